"""The report as a page, runs side by side, and what a browser makes of them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.core.errors import InputError
from planner.core.measurement import QUANTITIES
from planner.report import charts
from planner.report.bits import bits_of
from planner.report.document import Judged, parse
from planner.report.page import compare_page, report_page
from planner.report.scale import Scale, around
from planner.workflow.reporting import find_report, load_run, write_report_page
from tests.browser import axe_violations, screenshot, visit
from tests.conftest import Qplan
from tests.report_fixtures import write_run

NASTY = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run."""
    return write_run(tmp_path_factory.mktemp("run")).parent


@pytest.fixture(scope="module")
def page(run: Path) -> Path:
    return write_report_page(str(run))


def test_the_page_shows_every_part_of_the_run(page: Path) -> None:
    text = page.read_text()
    heads = re.findall(r"<h2 id=\"([a-z]+)\"", text)
    assert heads == ["compare", "plan", "memory", "frontier", "bits", "depth", "steps", "machine", "run", "notes"]
    assert "demo, GGUF Q4_K_M" in text and "ab" * 32 in text and "a note of the step" in text
    assert "llama-server" in text and "quality is of 8 of 85 chunks" in text


def test_every_predicted_number_stands_with_its_range(run: Path, page: Path) -> None:
    from planner.core.wording import quantity

    report = load_run(str(run)).report
    text = page.read_text()
    assert {v.quantity for v in report.verdicts} == set(QUANTITIES)
    for row in report.verdicts:
        low, high = quantity(row.quantity, row.low), quantity(row.quantity, row.high)
        assert f"{quantity(row.quantity, row.predicted)}<small>{low} – {high}</small>" in text
        assert row.measured is None or f"<strong>{quantity(row.quantity, row.measured)}</strong>" in text


def test_bits_are_those_of_the_files_header(run: Path) -> None:
    bits = bits_of(run / "demo-Q4_K_M.gguf")
    assert bits is not None and bits.layer_count == 6
    kinds = {kind.name: kind for kind in bits.kinds}
    assert kinds["attn_v"].types == (("Q6_K", 6),) and kinds["attn_v"].bits_per_weight == 6.5625
    assert kinds["ffn_down"].bits_per_weight == 4.5 and len(kinds["ffn_down"].cells) == 6
    assert kinds["token_embd"].cells == () and kinds["norms, biases"].bits_per_weight == 32


def test_an_artifact_that_is_gone_costs_a_note_only(tmp_path: Path) -> None:
    folder = write_run(tmp_path).parent
    (folder / "demo-Q4_K_M.gguf").unlink()
    assert "demo-Q4_K_M.gguf does not lie beside the report" in write_report_page(str(folder)).read_text()


def test_names_of_strangers_are_text_and_nothing_else(tmp_path: Path) -> None:
    path = write_run(tmp_path)
    document = json.loads(path.read_text())
    document["artifact"] = NASTY
    document["notes"] = [NASTY]
    document["tools"] = {NASTY: NASTY}
    document["commands"] = {NASTY: NASTY}
    document["steps"][0]["step"] = NASTY
    document["verdicts"][0]["position"] = NASTY
    document["candidates"][0]["label"] = NASTY
    document["hardware"]["cpu"]["model"] = NASTY
    document["plan"]["model"]["name"] = NASTY
    document["plan"]["reasons"] = [NASTY]
    path.write_text(json.dumps(document))
    text = write_report_page(str(path)).read_text() + compare_page([load_run(str(path))] * 2)
    assert "<script" not in text and "<img" not in text and "&lt;script&gt;" in text
    assert not re.search(r"\son\w+=", re.sub(r"&[#\w]+;[^<]*", "", text))


def test_a_report_of_an_older_version_still_makes_a_page(tmp_path: Path) -> None:
    path = write_run(tmp_path)
    document = json.loads(path.read_text())
    for key in ("plan", "hardware", "candidates", "speed_by_depth", "commands", "measurements", "tools"):
        del document[key]
    path.write_text(json.dumps(document))
    assert "demo-Q4_K_M.gguf" in write_report_page(str(path)).read_text()


def test_any_numbers_of_a_stranger_make_a_page(tmp_path: Path) -> None:
    path = write_run(tmp_path)
    document = json.loads(path.read_text())
    for value in (0, -1, 1e308, -1e308, 5e-324):
        for row in document["verdicts"]:
            row |= {"predicted": value, "low": -value, "high": value, "measured": value}
        for item in document["candidates"]:
            item["decode"] = item["perplexity_ratio"] = {"value": value, "low": value, "high": value}
        for item in document["speed_by_depth"]:
            item["decode"] = {"value": value, "low": value, "high": value}
        document["measurements"][0] |= {"value": value, "low": value, "high": value}
        path.write_text(json.dumps(document))
        text = write_report_page(str(path)).read_text()
        assert "nan" not in re.sub(r"<desc.*?</desc>|<title.*?</title>", "", text)
    document["speed_by_depth"] = [{"depth": 0, "decode": {"value": 1, "low": 1, "high": 1}}] * 2
    path.write_text(json.dumps(document))
    assert 'id="depth"' not in write_report_page(str(path)).read_text()


@pytest.mark.parametrize(
    "text",
    ["{}", "[1]", '{"verdicts": 3}', '{"verdicts": [], "artifact": "x", "measured": {"decode": 1e999}}', "nonsense"],
)
def test_what_is_no_report_is_refused_in_a_sentence(tmp_path: Path, qplan: Qplan, text: str) -> None:
    (tmp_path / "report.json").write_text(text)
    done = qplan("report", str(tmp_path))
    assert done.returncode == 1 and "error:" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "report.html").exists()


def test_a_run_is_found_by_report_folder_or_artifact(run: Path) -> None:
    wanted = run / "report.json"
    assert all(find_report(str(p)) == wanted for p in (wanted, run, run / "demo-Q4_K_M.gguf"))
    with pytest.raises(InputError) as caught:
        find_report(str(run / "other.gguf"))
    assert caught.value.code == "no-report" and "demo-Q4_K_M.gguf" in caught.value.what


def test_a_page_of_somebody_else_is_never_replaced(tmp_path: Path, qplan: Qplan) -> None:
    folder = write_run(tmp_path).parent
    (folder / "report.html").write_text("mine")
    done = qplan("report", str(folder))
    assert done.returncode == 1 and "output-exists" in done.stderr
    assert (folder / "report.html").read_text() == "mine"
    assert qplan("report", str(folder), "-o", str(folder / "own.html")).returncode == 0


def test_report_and_compare_on_the_command_line(tmp_path: Path, qplan: Qplan) -> None:
    one, two = (write_run(tmp_path / name, name).parent for name in ("Q4_K_M", "Q8_0"))
    made = json.loads(qplan("report", str(one), "--json").stdout)
    assert Path(made["page"]) == one / "report.html" and Path(made["page"]).is_file()
    done = qplan("compare", str(one), str(two), "-o", str(tmp_path / "both.html"), "--json")
    runs = json.loads(done.stdout)["runs"]
    assert [r["type"] for r in runs] == ["Q4_K_M", "Q8_0"]
    for row, folder in zip(runs, (one, two), strict=True):
        report = json.loads((folder / "report.json").read_text())
        assert row["measured"] == {q: report["measured"].get(q) for q in QUANTITIES}
        assert row["predicted"]["file_bytes"]["predicted"] == report["predicted"]["file_bytes"]
    assert (tmp_path / "both.html").read_text().count('<th scope="row">demo, GGUF') == 2
    shown = qplan("compare", str(one), str(two)).stdout
    assert "GGUF Q8_0" in shown and "perplexity ratio" in shown


@given(
    st.lists(st.floats(1e-9, 1e15), min_size=1, max_size=20),
    st.booleans(),
)
def test_every_value_lies_on_its_axis(values: list[float], log: bool) -> None:
    scale = around(values, 10, 90, log=log)
    assert all(10 <= scale.at(value) <= 90 for value in values)
    ticks = scale.ticks()
    assert all(scale.low <= t <= scale.high * (1 + 1e-9) for t in ticks) and list(ticks) == sorted(set(ticks))
    ordered = sorted(values)
    assert [scale.at(v) for v in ordered] == sorted(scale.at(v) for v in ordered)


def test_round_ticks() -> None:
    assert Scale(low=0, high=10, start=0, end=1).ticks() == (0, 2, 4, 6, 8, 10)
    assert Scale(low=0.5, high=2000, start=0, end=1, log=True).ticks() == (1, 10, 100, 1000)


positive = st.floats(1e-6, 1e12)


@given(st.lists(st.tuples(positive, positive, positive, st.none() | st.floats(0, 1e15)), min_size=1, max_size=6))
def test_intervals_stay_on_their_track(rows: list[tuple[float, float, float, float | None]]) -> None:
    verdicts = [
        Judged(quantity="file_bytes", predicted=p, low=min(p, a), high=max(p, b), measured=m) for p, a, b, m in rows
    ]
    chart = charts.intervals(verdicts)
    assert chart is not None and len(chart.rows) == len(rows)
    for row in chart.rows:
        assert 0 <= row.left <= row.left + row.width <= 100.61
        assert row.dot is None or 0 <= row.dot <= 100


def test_numbers_that_are_not_finite_are_refused() -> None:
    with pytest.raises(InputError):
        parse({"artifact": "a", "measured": {}, "verdicts": [], "notes": [float("nan")]}, "it")


@pytest.mark.slow
def test_the_page_in_a_browser(page: Path, tmp_path: Path) -> None:
    seen = visit(page.as_uri(), tmp_path)
    assert seen.console == [] and seen.requests == []
    assert "Predicted and measured" in seen.dom
    for name, width, height in (("phone", 390, 844), ("desktop", 1280, 900)):
        picture = screenshot(page.as_uri(), tmp_path / f"{name}.png", width, height)
        assert picture.startswith(b"\x89PNG") and len(picture) > 20_000


@pytest.mark.slow
def test_the_browser_of_these_tests_sees_requests_and_complaints(tmp_path: Path) -> None:
    page = tmp_path / "loud.html"
    page.write_text('<img src="http://example.invalid/x.png"><script>console.error("loud")</script>')
    seen = visit(page.as_uri(), tmp_path)
    assert seen.requests == ["http://example.invalid/x.png"] and any("loud" in line for line in seen.console)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_pages_are_accessible(page: Path, run: Path, tmp_path: Path, scheme: str) -> None:
    extra = ["--blink-settings=preferredColorScheme=0"] if scheme == "dark" else []
    assert axe_violations(page, tmp_path, *extra) == []
    both = tmp_path / "both.html"
    both.write_text(compare_page([load_run(str(run))] * 2))
    assert axe_violations(both, tmp_path, *extra) == []


def test_no_part_of_a_page_asks_the_network(page: Path) -> None:
    text = page.read_text()
    outside = [url for url in re.findall(r"(?:src|href)=\"([^\"]*)\"", text) if not url.startswith(("#", "data:"))]
    assert outside == [] and "default-src 'none'" in text and "@import" not in text and "url(" not in text


def test_report_page_is_a_function_of_its_run(run: Path) -> None:
    loaded = load_run(str(run))
    assert report_page(loaded) == report_page(loaded)
