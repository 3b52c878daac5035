"""All ways to run a model on a machine, with what they cost each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from planner import FORMAT_VERSION
from planner.core.workload import Workload
from planner.decide.frontier import Point, points
from planner.workflow.documents import (
    candidate_document,
    hardware_document,
    model_document,
)
from planner.workflow.recommend import Recommendation, recommend


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
