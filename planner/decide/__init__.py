"""Candidates → rules → rank: which way to run a model on a machine, and why not the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from planner.decide import explain, loss, mixture, rank, rules
from planner.decide.candidates import enumerate_candidates, restricted

if TYPE_CHECKING:
    from planner.core.candidate import Candidate, Rejection, TraceEntry
    from planner.core.hardware import HardwareProfile
    from planner.core.measurement import Calibration
    from planner.core.model import ModelSpec
    from planner.core.workload import Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """The answer of a recommendation. ``chosen`` is ``None`` when nothing fits."""

    chosen: Candidate | None
    alternatives: tuple[Candidate, ...]
    """All other fitting candidates, best first."""
    rejected: tuple[Rejection, ...]
    trace: tuple[TraceEntry, ...]


def decide(
    model: ModelSpec, hardware: HardwareProfile, workload: Workload, calibration: Calibration | None = None
) -> Decision:
    """The best way to run ``model`` on ``hardware`` for ``workload``, the others in order, and the reasons.

    Where memory falls between two types, a mixture that would fill it is one of the candidates.
    """
    fitting, rejected = enumerate_candidates(model, hardware, workload, calibration)
    allowed, refused, spoken = rules.require(fitting, hardware, workload)
    ranked = rank.rank(allowed, hardware, workload)
    mixed = mixture.offer(model, hardware, workload, calibration, ranked)
    if mixed is not None:
        allowed, refused, spoken = rules.require((*fitting, mixed), hardware, workload)
        ranked = rank.rank(allowed, hardware, workload)
    trace = rules.trace(ranked, spoken, hardware, workload)
    if not ranked:
        return Decision(chosen=None, alternatives=(), rejected=rejected + refused, trace=trace)
    trace += loss.trace(ranked[0])
    explained = explain.with_reasons(ranked, model, restricted(hardware, workload), workload, calibration)
    return Decision(chosen=explained[0], alternatives=explained[1:], rejected=rejected + refused, trace=trace)
