"""The trade-off drawn: what is on the front, and that the drawings are sound."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.cli import chart
from planner.core.candidate import Candidate, Placement
from planner.core.errors import MissingDependency
from planner.core.estimates import (
    DeviceMemory,
    Estimate,
    MemoryEstimate,
    Prediction,
    QualityEstimate,
    SizeEstimate,
    SpeedEstimate,
)
from planner.core.workload import Workload
from planner.decide.frontier import points
from planner.methods import gguf
from planner.report import plots
from planner.workflow.frontier import Frontier, check_drawing, draw, frontier
from tests.conftest import Qplan

TYPES = ("Q2_K", "Q3_K_M", "Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0", "F16")
SVG = "{http://www.w3.org/2000/svg}"


def about(value: float) -> Prediction:
    return Prediction(value=value, low=value * 0.9, high=value * 1.1, basis="formula", source="a test")


def candidate(type_: str, size: int, ratio: float | None, decode: float | None, score: float = 0.0) -> Candidate:
    estimate = Estimate(
        size=SizeEstimate(tensor_bytes=size, metadata_bytes=0, file_bytes=size, bits_per_weight=4.0),
        memory=MemoryEstimate(devices=(), host=DeviceMemory(name="host")),
        speed=SpeedEstimate(decode=None if decode is None else about(decode), prefill=None),
        quality=QualityEstimate(perplexity_ratio=None if ratio is None else about(ratio), kl_divergence_nats=None),
    )
    return Candidate(variant=gguf.variant(type_), placement=Placement(context=512), estimate=estimate, score=score)


numbers = st.tuples(
    st.integers(1, 6).map(lambda n: n << 30),
    st.none() | st.sampled_from((1.0, 1.01, 1.05, 1.5)),
    st.none() | st.sampled_from((5.0, 10.0, 20.0)),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(numbers, min_size=1, max_size=7))
def test_the_front_is_what_nothing_beats(given_: list[tuple[int, float | None, float | None]]) -> None:
    ranked = tuple(candidate(t, *values) for t, values in zip(TYPES, given_, strict=False))
    found = points(ranked, ranked[0])
    assert len(found) == len(ranked) and sum(p.chosen for p in found) == 1
    assert [p.size_bytes for p in found] == sorted(p.size_bytes for p in found)
    for point in found:
        if not point.comparable:
            assert not point.on_front and point.beaten_by is None
            continue
        assert point.on_front == (point.beaten_by is None)
        if point.beaten_by is not None:
            mine, better = point.candidate.estimate, point.beaten_by.estimate
            assert better.size.file_bytes <= mine.size.file_bytes
            assert better.quality.perplexity_ratio.value <= mine.quality.perplexity_ratio.value  # type: ignore[union-attr]
            assert better.speed.decode.value >= mine.speed.decode.value  # type: ignore[union-attr]
    comparable = [p for p in found if p.comparable]
    assert not comparable or any(p.on_front for p in comparable)


@settings(max_examples=60, deadline=None)
@given(st.lists(numbers, min_size=1, max_size=7), st.integers(20, 200), st.integers(6, 40))
def test_the_terminal_plot_keeps_to_its_size(
    given_: list[tuple[int, float | None, float | None]], width: int, height: int
) -> None:
    ranked = tuple(candidate(t, *values) for t, values in zip(TYPES, given_, strict=False))
    drawn = chart.dots(points(ranked, ranked[0]))
    if not drawn:
        return
    lines = chart.terminal(drawn, width, height).plain.splitlines()
    assert len(lines) == height + 3
    assert all(len(line) <= max(width, 30) + 8 for line in lines)
    assert (chart.CHOSEN in "".join(lines)) == any(d.point.chosen for d in drawn)


@pytest.fixture(scope="module")
def found() -> Frontier:
    return frontier("llama-3.1-8b", Workload(context=4096), profile="rtx-4090")


def test_the_chosen_way_is_the_recommended_one(found: Frontier) -> None:
    chosen = next(p for p in found.points if p.chosen)
    assert found.answer.decision.chosen is chosen.candidate
    assert len(found.points) == 1 + len(found.answer.decision.alternatives)


@pytest.fixture(scope="module")
def drawing(found: Frontier, tmp_path_factory: pytest.TempPathFactory) -> str:
    pytest.importorskip("vl_convert", reason="pip install 'qplan[plots]'")
    path = tmp_path_factory.mktemp("drawn") / "f.svg"
    draw(found, path)
    return path.read_text("utf-8")


def test_the_svg_is_sound_and_says_what_it_shows(found: Frontier, drawing: str) -> None:
    root = ET.fromstring(drawing)
    assert root.tag == f"{SVG}svg" and root.get("role") == "img"
    named = root.get("aria-labelledby", "").split()
    assert [root.find(f"{SVG}{tag}").get("id") for tag in ("title", "desc")] == named  # type: ignore[union-attr]
    described = root.find(f"{SVG}desc").text  # type: ignore[union-attr]
    assert found.answer.decision.chosen is not None
    assert described and found.answer.decision.chosen.variant.label() in described
    marks = [path.find(f"{SVG}title").text for path in root.iter(f"{SVG}path") if path.find(f"{SVG}title") is not None]
    drawn = {p.candidate.variant.label() for p in found.points if p.candidate.estimate.quality.perplexity_ratio}
    assert {str(text).partition(":")[0] for text in marks} == drawn and len(marks) == len(drawn)
    assert all(" to " in str(text) for text in marks)  # never a number without its range
    assert found.answer.model.name in drawing and "prefers-color-scheme:dark" in drawing
    assert drawing.count("http") == drawing.count("http://www.w3.org/")  # nothing is fetched


def test_every_colour_has_another_on_dark(drawing: str) -> None:
    used = set(re.findall(r'(?:fill|stroke)="(#[0-9a-fA-F]{6})"', drawing))
    assert used and used <= set(plots.ON_DARK)
    assert set(plots.METHODS.values()) <= set(plots.ON_DARK)


class Tags(HTMLParser):
    """Whether every tag is closed in order, and how many rows the table has."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.rows = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.rows += tag == "tr"
        if tag not in ("meta", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_holds_the_drawing_and_the_table(found: Frontier, tmp_path: Path) -> None:
    draw(found, tmp_path / "f.html")
    page = (tmp_path / "f.html").read_text("utf-8")
    reader = Tags()
    reader.feed(page)
    assert reader.open == [] and reader.rows == 1 + len(found.points)
    assert "<script" not in page and "src=" not in page
    assert page.count('<svg xmlns="http://www.w3.org/2000/svg" class="plot"') == (2 if plots.installed() else 0)


def test_without_the_library_the_page_has_its_table_and_says_what_is_missing(
    found: Frontier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plots, "installed", lambda: False)
    draw(found, tmp_path / "f.html")
    page = (tmp_path / "f.html").read_text("utf-8")
    assert "<svg" not in page and "qplan[plots]" in page and page.count("<tr>") == 1 + len(found.points)
    with pytest.raises(MissingDependency, match="vl-convert"):
        check_drawing(tmp_path / "f.svg")


def test_a_model_with_markup_in_its_name_stays_text(found: Frontier, tmp_path: Path) -> None:
    evil = replace(found.answer, model=replace(found.answer.model, name='<b onload="x">&'))
    for name in ("f.html", "f.svg") if plots.installed() else ("f.html",):
        draw(replace(found, answer=evil), tmp_path / name)
        text = (tmp_path / name).read_text("utf-8")
        assert "<b onload" not in text and "&lt;b onload" in text


def test_marks_with_markup_in_their_words_stay_text() -> None:
    given_ = (
        '<svg viewBox="0 0 1 1"><path aria-label="&lt;b> &quot;x&quot; &amp; y" role="graphics-symbol" d="M0,0"/></svg>'
    )
    made = plots.finished(given_, "<t>", "a & b", "p")
    marks = ET.fromstring(made).findall(f"{SVG}path/{SVG}title")
    assert [mark.text for mark in marks] == ['<b> "x" & y'] and "<t>" not in made


def test_frontier_verb(qplan: Qplan, tmp_path: Path) -> None:
    pytest.importorskip("vl_convert", reason="pip install 'qplan[plots]'")
    run = qplan("frontier", "llama-3.2-1b", "--profile", "rtx-4090", "--json", "--output", "f.svg", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    answer = json.loads(run.stdout)
    ET.fromstring((tmp_path / "f.svg").read_text("utf-8"))
    listed = answer["points"]
    assert sum(p["chosen"] for p in listed) == 1 and any(p["on_front"] for p in listed)
    labels = {p["type"] for p in listed}
    assert {"Q4_K_M", "Q8_0"} <= labels
    for point in listed:
        assert point["on_front"] == (point["beaten_by"] is None)
    shown = qplan("frontier", "llama-3.2-1b", "--profile", "rtx-4090")
    assert shown.returncode == 0 and "★" in shown.stdout and "GiB of file" in shown.stdout


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("--output", "f.png"), 2),
        (("--output", "no/such/folder/f.svg"), 2),
        (("--methods", "awq", "--max-memory", "10MiB"), 3),
    ],
)
def test_what_cannot_be_drawn_is_refused(qplan: Qplan, tmp_path: Path, arguments: tuple[str, ...], code: int) -> None:
    run = qplan("frontier", "llama-3.1-8b", "--profile", "rtx-4090", *arguments, cwd=tmp_path)
    assert run.returncode == code and "Traceback" not in run.stderr
    assert not list(tmp_path.iterdir())
