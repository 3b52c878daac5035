"""Rank candidates by what an objective trades, and mark the ones nothing beats."""

from __future__ import annotations

import dataclasses
from math import log2

from planner.core.candidate import Candidate
from planner.core.hardware import HardwareProfile
from planner.core.units import GIB
from planner.core.workload import Workload
from planner.decide import rules

UNKNOWN_QUALITY_RATIO = 1.05
"""Perplexity ratio assumed for ranking where nothing is known: about the worst 4-bit result published."""
PAST_ENOUGH = 0.1
"""Share of speed's worth that remains above what the objective calls enough."""


def rank(candidates: tuple[Candidate, ...], hardware: HardwareProfile, workload: Workload) -> tuple[Candidate, ...]:
    """The candidates with their scores, best first; the label breaks ties so that the order never varies."""
    goal = rules.objective(workload.objective)
    scored = [
        dataclasses.replace(c, score=round(score(c, goal) + rules.bonus(c, hardware, workload) - _effort(c), 4))
        for c in candidates
    ]
    front = pareto(tuple(scored))
    marked = [dataclasses.replace(c, pareto=on) for c, on in zip(scored, front, strict=True)]
    return tuple(sorted(marked, key=lambda c: (-(c.score or 0.0), c.variant.label())))


def _effort(candidate: Candidate) -> float:
    """What a mixture must gain to be worth measuring the 16-bit model for."""
    return rules.mixture_terms().least_gain_percent if candidate.variant.recipe else 0.0


def score(candidate: Candidate, goal: rules.Objective) -> float:
    """Worth in percent of perplexity: minus the loss, plus speed by doublings, minus memory by doublings."""
    return (
        -100 * (quality_ratio(candidate) - 1)
        + goal.speed_percent_per_doubling * speed_doublings(candidate, goal.speed_enough_tokens_per_second)
        - goal.memory_percent_per_halving * log2(max(memory_bytes(candidate), 1) / GIB)
    )


def speed_doublings(candidate: Candidate, enough: float) -> float:
    """Doublings of decode speed over one token/s; beyond ``enough`` they count a tenth.

    The low end of the interval counts, so that a doubtful prediction does not win by luck.
    """
    decode = candidate.estimate.speed.decode
    if decode is None or decode.value <= 0:
        return 0.0
    sure = max(decode.low, 1e-3)
    return log2(min(sure, enough)) + PAST_ENOUGH * max(0.0, log2(sure / enough))


def quality_ratio(candidate: Candidate) -> float:
    """Predicted perplexity ratio, a cautious one where it is unknown."""
    predicted = candidate.estimate.quality.perplexity_ratio
    return UNKNOWN_QUALITY_RATIO if predicted is None else predicted.value


def memory_bytes(candidate: Candidate) -> int:
    """Memory of the fullest device; of a model parted between GPUs and RAM, its weights and KV cache.

    A parted model fills the GPUs to the brim whatever its size, so their memory would say nothing of it.
    """
    used = candidate.estimate.memory
    places = (*used.devices, used.host)
    least = max(device.needed_bytes for device in places)
    if candidate.placement.gpu_count == 0 or rules.whole_in_vram(candidate):
        return least
    return max(least, sum(device.weights_bytes + device.kv_cache_bytes for device in places))


def pareto(candidates: tuple[Candidate, ...]) -> tuple[bool, ...]:
    """For each candidate whether no other is at least as good in memory, speed and quality and better in one."""
    points = [_point(candidate) for candidate in candidates]
    return tuple(not any(_dominates(other, point) for other in points) for point in points)


def _point(candidate: Candidate) -> tuple[float, float, float]:
    decode = candidate.estimate.speed.decode
    return (
        float(memory_bytes(candidate)),
        -(decode.value if decode else 0.0),
        quality_ratio(candidate),
    )


def _dominates(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return one != other and all(a <= b for a, b in zip(one, other, strict=True))
