"""Measured beside predicted: inside the plan's interval, better, or outside."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from planner.core.estimates import TO_95
from planner.core.hardware import STRICT
from planner.core.measurement import (
    DECODE,
    KL_DIVERGENCE,
    LOSS_RATIO,
    PEAK_MEMORY,
    PERPLEXITY_RATIO,
    PREFILL,
    QUANTITIES,
    TRAINING_RATE,
)
from planner.core.plan import Expectation

INSIDE = "inside"
BETTER = "better"
OUTSIDE = "outside"
NOT_MEASURED = "not measured"
MACHINE_BUSY = "machine busy"

_BETTER_IS_LESS = {
    PEAK_MEMORY: True,
    PREFILL: False,
    DECODE: False,
    PERPLEXITY_RATIO: True,
    KL_DIVERGENCE: True,
    TRAINING_RATE: False,
    LOSS_RATIO: True,
}
"""Which side of the interval is good news. File bytes have none: the size is exact, and a smaller file is another."""
_SAMPLED = frozenset({PERPLEXITY_RATIO, KL_DIVERGENCE})
"""Quantities whose ``low`` and ``high`` are the 80 % interval of a standard error; of the others, the extremes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """A measured value with its own spread."""

    __pydantic_config__: ClassVar[dict[str, str]] = STRICT

    value: float
    low: float
    high: float
    samples: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """One quantity judged."""

    __pydantic_config__: ClassVar[dict[str, str]] = STRICT

    quantity: str
    predicted: float
    low: float
    high: float
    measured: float | None
    ok: bool | None
    """Inside or better; ``None`` when it was not measured."""
    ratio: float | None
    """measured / predicted."""
    position: str
    """:data:`INSIDE`, :data:`BETTER`, :data:`OUTSIDE`, :data:`NOT_MEASURED` or :data:`MACHINE_BUSY`."""
    error: float | None = None
    """Half-width of the measurement's own 95 % interval, on the side of the prediction; ``None`` where it has none."""

    @property
    def within_error(self) -> bool:
        """It counts as inside only because the measurement itself may be off."""
        outside = self.measured is not None and not self.low <= self.measured <= self.high
        return outside and self.position == INSIDE


def position(quantity: str, low: float, high: float, measured: float) -> str:
    """Where ``measured`` lies.

    Inside ``low … high``: inside. Beyond it on the good side (less memory, more tokens per second, less loss of
    quality): better, which counts as ok but is told apart, as the prediction was still wrong. Else: outside; file
    bytes beyond either end are outside.
    """
    if math.isnan(measured):
        return OUTSIDE
    if low <= measured <= high:
        return INSIDE
    less_is_better = _BETTER_IS_LESS.get(quantity)
    if less_is_better is None:
        return OUTSIDE
    return BETTER if (measured < low) == less_is_better else OUTSIDE


def own_error(expectation: Expectation, measured: Measured) -> float | None:
    """How far the truth may lie from a sampled measurement towards the prediction, with 95 %; ``None``: not sampled."""
    if expectation.quantity not in _SAMPLED:
        return None
    above = measured.value > expectation.predicted
    half = measured.value - measured.low if above else measured.high - measured.value
    # a plan's interval is one of 95 %, and so is the error that stands beside it
    return TO_95 * half if math.isfinite(half) and half > 0 else None


def _bounds(expectation: Expectation, error: float | None) -> tuple[float, float]:
    """The expected range, each side widened by the measurement's own error: independent errors add up in squares."""
    if error is None:
        return expectation.low, expectation.high
    predicted = expectation.predicted
    below, above = max(predicted - expectation.low, 0.0), max(expectation.high - predicted, 0.0)
    return predicted - math.hypot(below, error), predicted + math.hypot(above, error)


def verdict(expectation: Expectation, measured: Measured | None, *, busy: bool = False) -> Verdict:
    """One expectation judged, with the measurement's own error.

    A loss of quality on few chunks of text has a wide one, which the plan could not know of. A speed that falls short
    while other programs had the cores says nothing of the plan.
    """
    error = None
    if measured is None:
        where, value, ok, ratio = NOT_MEASURED, None, None, None
    else:
        value, error = measured.value, own_error(expectation, measured)
        where = position(expectation.quantity, *_bounds(expectation, error), value)
        where = MACHINE_BUSY if busy and where == OUTSIDE else where
        ok = None if where == MACHINE_BUSY else where != OUTSIDE
        ratio = value / expectation.predicted if expectation.predicted else None
    return Verdict(
        quantity=expectation.quantity,
        predicted=expectation.predicted,
        low=expectation.low,
        high=expectation.high,
        measured=value,
        ok=ok,
        ratio=ratio,
        position=where,
        error=error,
    )


def verdicts(
    expectations: Sequence[Expectation], measured: Mapping[str, Measured], busy: Collection[str] = ()
) -> tuple[Verdict, ...]:
    """All expectations judged, in the contract's order; ``busy`` names those measured on a busy machine."""
    order = {quantity: i for i, quantity in enumerate(QUANTITIES)}
    judged = [verdict(e, measured.get(e.quantity), busy=e.quantity in busy) for e in expectations]
    return tuple(sorted(judged, key=lambda v: order.get(v.quantity, len(order))))


def error_notes(judged: Sequence[Verdict]) -> tuple[str, ...]:
    """A word for each that is outside the plan's range and yet not told to be wrong."""
    return tuple(
        f"{v.quantity} of {v.measured:.4g} lies outside {v.low:.4g} to {v.high:.4g}, by less than its own error of "
        f"{v.error:.2g}: more text would tell"
        for v in judged
        if v.within_error
    )


def all_ok(judged: Sequence[Verdict]) -> bool:
    """No verdict is outside; what was not measured, or on a busy machine, does not count."""
    return all(v.ok is not False for v in judged)
