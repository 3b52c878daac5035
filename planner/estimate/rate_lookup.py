"""The rate of one kind of work for a type and a thread count, measured or from the nearest that were."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import exp, log, sqrt
from statistics import median, pstdev

from planner.core import rates as kinds
from planner.core.rates import Rate, Rates
from planner.formats import ggml

UNMEASURED_SIGMA = 0.1
"""Least that is added for a type whose neighbour's rate stands in."""
THREADS_SIGMA = 0.05
"""Added between two measured thread counts; beyond the largest it doubles."""
_FAMILY_DISTANCE = 0.5
"""How much further a type of another family of kernels is, in factors e of bits per weight."""
_CACHE = 4096


@dataclass(frozen=True, slots=True)
class Found:
    """A rate with what is not known about it."""

    value: float
    sigma: float
    note: str = ""


_ByThreads = dict[int, Rate]


@lru_cache(maxsize=_CACHE)
def rate_of(rates: Rates, work: str, type_: str, device: str, threads: int, tokens: int) -> Found | None:
    """The rate of ``work`` for a type on a device; ``None`` where that work was never measured there.

    Args:
        rates: of one machine.
        work: one of :mod:`planner.core.rates`.
        type_: of the tensors or of the KV cache; the nearest measured one stands in for one that was not.
        device: ``cpu`` or a GPU's key.
        threads: 0 for a GPU.
        tokens: of a micro-batch, for prefill.
    """
    table = _table(rates, work, device, tokens)
    if not table:
        return None
    nearest = type_ if type_ in table else min(table, key=lambda other: _distance(type_, other))
    found = _at(table[nearest], table if _counts(table) > 1 else _growing(rates, device, tokens), threads)
    if nearest == type_:
        return found
    logs = [log(points[count].value) for points in table.values() for count in points if count == max(points)]
    sigma = sqrt(found.sigma**2 + max(UNMEASURED_SIGMA, pstdev(logs)) ** 2)
    return Found(found.value, sigma, f" (as {nearest})")


def seconds_at(rates: Rates, work: str, device: str, threads: int) -> float:
    """A time beside the rates: hardly grows with threads, so the nearest measured count stands; 0 without any."""
    nearest = min(rates.of(work, device), key=lambda time: _far(time.threads, threads), default=None)
    return nearest.value if nearest else 0.0


def time_at(rates: Rates, work: str, times: list[Rate], device: str, threads: int) -> Found | None:
    """A time of a model's own slices at a thread count; where it was not measured, as ``work`` grows with threads.

    ``None`` where nothing tells how it would: rates for any model were not measured, or only with one thread count.
    """
    known = {time.threads: time for time in times}
    if threads in known:
        return Found(known[threads].value, known[threads].sigma)
    table = _table(rates, work, device, 0)
    if not known or not table or _counts(table) < 2:
        return None
    nearest = known[min(known, key=lambda count: _far(count, threads))]
    gained = _growth(table, nearest.threads, threads)
    return Found(nearest.value / gained, sqrt(nearest.sigma**2 + THREADS_SIGMA**2))


def _table(rates: Rates, work: str, device: str, tokens: int) -> dict[str, _ByThreads]:
    """Rates by type and threads, of the micro-batch nearest to ``tokens``."""
    table: dict[str, _ByThreads] = {}
    for rate in rates.of(work, device):
        points = table.setdefault(rate.type, {})
        before = points.get(rate.threads)
        if before is None or _far(rate.tokens, tokens) < _far(before.tokens, tokens):
            points[rate.threads] = rate
    return table


def _growing(rates: Rates, device: str, tokens: int) -> dict[str, _ByThreads]:
    """What stands in for work measured with one thread count alone: matrix products, bound by the cores too."""
    return _table(rates, kinds.PREFILL_WEIGHTS, device, tokens)


def _counts(table: dict[str, _ByThreads]) -> int:
    return max(len(points) for points in table.values())


def _far(a: int, b: int) -> float:
    return abs(log(max(a, 1) / max(b, 1)))


@lru_cache(maxsize=256)
def _distance(a: str, b: str) -> float:
    """How unlike the kernels of two types are: bits per weight, and the family."""
    try:
        bits = [ggml.type_traits(name.upper()).bits_per_weight for name in (a, b)]
    except Exception:  # noqa: BLE001 - a type that this build does not know is just far away
        return 99.0
    return abs(log(bits[0] / bits[1])) + _FAMILY_DISTANCE * (_family(a) != _family(b))


def _family(type_: str) -> str:
    upper = type_.upper()
    if upper.startswith("IQ"):
        return "IQ"
    return "K" if upper.endswith("_K") else "F" if upper.startswith(("F", "B")) else "legacy"


def _at(points: _ByThreads, table: dict[str, _ByThreads], threads: int) -> Found:
    """The rate at a thread count: measured, or from the nearest count and how others of ``table`` grow from it."""
    exact = points.get(threads)
    if exact is not None:
        return Found(exact.value, exact.sigma)
    nearest = points[min(points, key=lambda count: _far(count, threads))]
    most = max(max(others) for others in (points, *table.values()))
    sigma = THREADS_SIGMA * (2.0 if threads > most else 1.0)
    return Found(nearest.value * _growth(table, nearest.threads, threads), sqrt(nearest.sigma**2 + sigma**2))


def _growth(table: dict[str, _ByThreads], known: int, asked: int) -> float:
    """How much rates gain from ``known`` to ``asked`` threads: where types were measured with both, else on a curve."""
    ratios = [points[asked].value / points[known].value for points in table.values() if {known, asked} <= set(points)]
    if ratios:
        return median(ratios)
    curve = max(table.values(), key=len, default={})
    if known <= 0 or asked <= 0 or not curve:
        return 1.0
    return _on_line(curve, asked) / _on_line(curve, known)


def _on_line(points: _ByThreads, threads: int) -> float:
    counts = sorted(points)
    if threads >= counts[-1]:
        return points[counts[-1]].value  # more threads than were tried: no gain is assumed
    if threads <= counts[0]:
        return points[counts[0]].value * threads / counts[0]
    above = next(count for count in counts if count >= threads)
    below = max(count for count in counts if count <= threads)
    if above == below:
        return points[above].value
    share = log(threads / below) / log(above / below)
    return exp((1 - share) * log(points[below].value) + share * log(points[above].value))
