"""The trade-off drawn: what is on the front, and that the drawings are sound."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.cli import chart, chart_svg
from planner.core.candidate import Candidate, Placement
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
from planner.workflow.frontier import Frontier, frontier
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


def test_the_svg_is_sound_and_says_what_it_shows(found: Frontier) -> None:
    text = chart_svg.svg(found)
    root = ET.fromstring(text)
    assert root.tag == f"{SVG}svg" and root.get("role") == "img"
    named = root.get("aria-labelledby", "").split()
    assert [root.find(f"{SVG}{tag}").get("id") for tag in ("title", "desc")] == named  # type: ignore[union-attr]
    described = root.find(f"{SVG}desc").text  # type: ignore[union-attr]
    assert found.answer.decision.chosen is not None
    assert described and found.answer.decision.chosen.variant.label() in described
    groups = [g for g in root.findall(f"{SVG}g") if "point" in g.get("class", "")]
    assert len(groups) == len(chart.dots(found.points))
    assert all(g.find(f"{SVG}title").text for g in groups)  # type: ignore[union-attr]
    assert len(root.findall(f"{SVG}g/{SVG}circle[@class='ring']")) == 1
    for circle in root.iter(f"{SVG}circle"):
        assert 0 <= float(circle.get("cx", "-1")) <= chart_svg.WIDTH
        assert 0 <= float(circle.get("cy", "-1")) <= chart_svg.HEIGHT
    assert "prefers-color-scheme:dark" in text
    assert text.count("http") == text.count("http://www.w3.org/2000/svg")  # nothing is fetched


class Tags(HTMLParser):
    """Whether every tag is closed in order, and how many rows the table has."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.rows = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.rows += tag == "tr"
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert tag == "meta" or self.open.pop() == tag


def test_the_page_holds_the_drawing_and_the_table(found: Frontier) -> None:
    page = chart_svg.html(found)
    reader = Tags()
    reader.feed(page)
    assert reader.open == [] and reader.rows == 1 + len(found.points)
    assert "<script" not in page and "src=" not in page and "href=" not in page


def test_a_model_with_markup_in_its_name_stays_text(found: Frontier) -> None:
    evil = replace(found.answer, model=replace(found.answer.model, name='<b onload="x">&'))
    text = chart_svg.html(replace(found, answer=evil))
    assert "<b onload" not in text and "&lt;b onload" in text


def test_frontier_verb(qplan: Qplan, tmp_path: Path) -> None:
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
