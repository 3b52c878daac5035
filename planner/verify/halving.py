"""Successive halving: measure many things a little, the better half of them longer, and so on. Pure arithmetic.

Jamieson & Talwalkar, "Non-stochastic Best Arm Identification and Hyperparameter Optimization", 2016
(https://arxiv.org/abs/1502.07943): every rung gets an equal share of the time, so the last few get most samples each.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, exp, expm1, log, pi, sqrt

from planner.core.estimates import Z80
from planner.verify.alternating import quantile

FINALISTS = 2
"""So many are left for the last rung, beside those that are always kept."""
RUN_SIGMA = 0.014
"""Least standard deviation of the logarithm of one sample: two runs of one case on a quiet machine differ by about 2 %
(see ``estimate/speed_measured.py``), each by that over the root of two."""

Costs = Mapping[int, float]
Measure = Callable[[tuple[int, ...], int], Costs]
"""(which, rungs still to come with this one) → cost of each over all its samples so far; one that failed is missing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Search:
    """What a search found."""

    ranking: tuple[int, ...]
    """All that were measured, best first: by the last rung that they were in, then by their cost there."""
    rungs: Mapping[int, int]
    """Rungs that each was in."""

    @property
    def best(self) -> int | None:
        """The cheapest; ``None`` where everything failed."""
        return self.ranking[0] if self.ranking else None


def rung_count(count: int) -> int:
    """Rungs that ``count`` take until :data:`FINALISTS` are left, and the one of those."""
    rungs = 1
    while count > FINALISTS:
        count, rungs = max(FINALISTS, ceil(count / 2)), rungs + 1
    return rungs


def search(count: int, measure: Measure, *, keep: Collection[int] = ()) -> Search:
    """The cheapest of ``count`` things, by rungs of which each keeps the better half.

    Args:
        keep: these are measured in every rung, as they are to be compared with the best.
    """
    alive = tuple(range(count))
    rungs: dict[int, int] = {}
    last: dict[int, float] = {}
    total = rung_count(count)
    for number in range(total):
        costs = measure(alive, total - number)
        for one in costs:
            rungs[one], last[one] = number + 1, costs[one]
        ordered = sorted(costs, key=lambda one: costs[one])
        if number == total - 1 or not ordered:
            break
        half = max(FINALISTS, ceil(len(ordered) / 2))
        alive = tuple(one for place, one in enumerate(ordered) if place < half or one in keep)
    ranking = sorted(last, key=lambda one: (-rungs[one], last[one]))
    return Search(ranking=tuple(ranking), rungs=rungs)


@dataclass(frozen=True, slots=True, kw_only=True)
class Timed:
    """A median time and the standard deviation of its logarithm."""

    seconds: float
    sigma: float


def timed(samples: Sequence[float]) -> Timed:
    """Of at least one sample.

    The median of ``n`` normal samples varies by √(π/2n) times their deviation; that is taken from the middle half,
    which samples that something disturbed do not move.
    """
    ordered = sorted(samples)
    logs = [log(sample) for sample in ordered]
    deviation = (
        max(RUN_SIGMA, (quantile(logs, 0.75) - quantile(logs, 0.25)) / 1.349) if len(logs) > 1 else 3 * RUN_SIGMA
    )
    return Timed(seconds=quantile(ordered, 0.5), sigma=deviation * sqrt(pi / 2 / len(logs)))


def added(parts: Sequence[tuple[float, Timed]]) -> Timed:
    """Weighted times one after the other."""
    seconds = sum(weight * part.seconds for weight, part in parts)
    variance = sum((weight * part.seconds * part.sigma) ** 2 for weight, part in parts)
    return Timed(seconds=seconds, sigma=sqrt(variance) / seconds)


@dataclass(frozen=True, slots=True, kw_only=True)
class Regret:
    """What one setting takes longer than another, as a fraction, with an 80 % interval."""

    fraction: float
    low: float
    high: float

    @property
    def within_noise(self) -> bool:
        """The interval holds 0: the samples do not tell the two apart."""
        return self.low <= 0 <= self.high


def regret(chosen: Timed, best: Timed) -> Regret:
    """How much longer ``chosen`` takes than ``best``."""
    ratio = log(chosen.seconds / best.seconds)
    spread = Z80 * sqrt(chosen.sigma**2 + best.sigma**2)
    return Regret(fraction=exp(ratio) - 1, low=expm1(ratio - spread), high=expm1(ratio + spread))
