"""Measured beside predicted: inside the plan's interval, better, or outside."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

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


def verdict(expectation: Expectation, measured: Measured | None, *, busy: bool = False) -> Verdict:
    """One expectation judged. A speed that falls short while other programs had the cores says nothing of the plan."""
    if measured is None:
        where, value, ok, ratio = NOT_MEASURED, None, None, None
    else:
        value = measured.value
        where = position(expectation.quantity, expectation.low, expectation.high, value)
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
    )


def verdicts(
    expectations: Sequence[Expectation], measured: Mapping[str, Measured], busy: Collection[str] = ()
) -> tuple[Verdict, ...]:
    """All expectations judged, in the contract's order; ``busy`` names those measured on a busy machine."""
    order = {quantity: i for i, quantity in enumerate(QUANTITIES)}
    judged = [verdict(e, measured.get(e.quantity), busy=e.quantity in busy) for e in expectations]
    return tuple(sorted(judged, key=lambda v: order.get(v.quantity, len(order))))


def all_ok(judged: Sequence[Verdict]) -> bool:
    """No verdict is outside; what was not measured, or on a busy machine, does not count."""
    return all(v.ok is not False for v in judged)
