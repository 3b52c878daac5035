"""All ways to run a model on a machine, with what they cost each other, as values and as a drawing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from planner import FORMAT_VERSION
from planner.core.codec import write_atomically
from planner.core.errors import DoesNotFit, UsageError
from planner.core.wording import fullest
from planner.core.workload import Workload
from planner.decide.frontier import Point, points
from planner.workflow.documents import (
    candidate_document,
    hardware_document,
    model_document,
)
from planner.workflow.recommend import Recommendation, recommend

if TYPE_CHECKING:
    from planner.report.document import Point as Drawn

FORMATS = (".svg", ".html")
DRAWING_SIZE = (820, 440)
"""Of a drawing that stands alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Frontier:
    """A recommendation with all its candidates as points."""

    answer: Recommendation
    points: tuple[Point, ...]


def frontier(model_text: str, workload: Workload, *, profile: str | None = None) -> Frontier:
    """Every candidate that fits, with those that nothing beats in size, quality and speed.

    Raises:
        QplanError: as ``recommend``.
    """
    answer = recommend(model_text, workload, profile=profile)
    chosen = answer.decision.chosen
    ranked = () if chosen is None else (chosen, *answer.decision.alternatives)
    return Frontier(answer=answer, points=points(ranked, chosen))


def document(found: Frontier) -> dict[str, Any]:
    """What ``qplan frontier --json`` prints: points from the smallest file up."""
    model = found.answer.model
    return {
        "format_version": FORMAT_VERSION,
        "model": model_document(model),
        "hardware": hardware_document(found.answer.hardware),
        "points": [
            {
                **candidate_document(point.candidate, model),
                "chosen": point.chosen,
                "on_front": point.on_front,
                "beaten_by": None if point.beaten_by is None else point.beaten_by.variant.label(),
            }
            for point in found.points
        ],
    }


def check_drawing(path: Path) -> None:
    """Refuse a drawing that could not be made, before anything is worked out for it.

    Raises:
        UsageError: its ending is none that can be drawn, or its folder is not there.
        MissingDependency: an SVG needs the extra; a page without it has the table alone.
    """
    from planner.report import plots

    if path.suffix.lower() not in FORMATS:
        raise UsageError(f"{path.name} is no drawing qplan makes", hint=f"end it in {' or '.join(FORMATS)}")
    if not path.absolute().parent.is_dir():
        raise UsageError(f"there is no folder {path.absolute().parent}", hint="make it first")
    if path.suffix.lower() == ".svg":
        plots.check_installed()


def draw(found: Frontier, path: Path) -> None:
    """The trade-off as a self-contained SVG file or page, by the ending of ``path``.

    Raises:
        DoesNotFit: there are fewer than two points whose quality is known.
    """
    from planner.report import page, plots

    title = f"{found.answer.model.name} on {found.answer.hardware.name}"
    drawn = [_drawn(point) for point in found.points]
    if path.suffix.lower() == ".html":
        better = [point.beaten_by.variant.label() if point.beaten_by else "" for point in found.points]
        write_atomically(path, page.frontier_page(title, drawn, better))
        return
    width, height = DRAWING_SIZE
    made = plots.frontier(drawn, by_speed=False, id="qplan", width=width, height=height, heading=title)
    if made is None:
        raise DoesNotFit(
            "there is nothing to draw: a plot takes two ways to run the model whose quality is known",
            hint="without --output the table has what is known",
        )
    write_atomically(path, made.svg + "\n")


def _drawn(point: Point) -> Drawn:
    from planner.report.document import Point as Drawn
    from planner.report.document import Range

    def span(known: Any) -> Range | None:
        return None if known is None else Range(value=known.value, low=known.low, high=known.high)

    estimate = point.candidate.estimate
    return Drawn(
        label=point.candidate.variant.label(),
        file_bytes=point.size_bytes,
        memory_bytes=fullest(point.candidate).needed_bytes,
        decode=span(estimate.speed.decode),
        perplexity_ratio=span(estimate.quality.perplexity_ratio),
        pareto=point.on_front,
        chosen=point.chosen,
    )
