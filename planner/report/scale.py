"""From values to positions on paper, linear and logarithmic, with ticks at round numbers."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, floor, log10

MOST = 1e100
"""Beyond it a value lies at the axis's end: a stranger's report may hold any number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """An axis: values ``low`` … ``high`` lie at ``start`` … ``end`` (in the drawing's units)."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def at(self, value: float) -> float:
        """Where ``value`` lies; a value beyond the axis lies at its end."""
        held = min(max(value, self.low), self.high)
        if self.log:
            share = (log10(held) - log10(self.low)) / (log10(self.high) - log10(self.low))
        else:
            share = (held - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 2)

    def ticks(self, count: int = 5) -> tuple[float, ...]:
        """Round values on the axis, about ``count`` of them."""
        return _log_ticks(self.low, self.high, count) if self.log else _even_ticks(self.low, self.high, count)


def around(values: list[float], start: float, end: float, *, log: bool = False, from_zero: bool = False) -> Scale:
    """An axis that holds all ``values`` with some air at the ends; logarithmic ones must be positive."""
    least = 1 / MOST if log else -MOST
    low, high = (min(max(value, least), MOST) for value in (min(values), max(values)))
    if log:
        air = max((high / low) ** 0.08, 1.15)
        return Scale(low=low / air, high=high * air, start=start, end=end, log=True)
    air = 0.08 * (high - low) or 0.1 * abs(high) or 1.0
    return Scale(low=0.0 if from_zero else low - air, high=high + air, start=start, end=end)


def _even_ticks(low: float, high: float, count: int) -> tuple[float, ...]:
    raw = (high - low) / max(count, 1)
    power = 10.0 ** floor(log10(raw))
    step = power * next(nice for nice in (1, 2, 2.5, 5, 10) if raw <= nice * power)
    first = ceil(low / step)
    values = (float(f"{n * step:.15g}") for n in range(first, floor(high / step + 1e-9) + 1))
    return tuple(dict.fromkeys(value for value in values if low <= value <= high))


def _log_ticks(low: float, high: float, count: int) -> tuple[float, ...]:
    powers = range(floor(log10(low)), ceil(log10(high)) + 1)
    for digits in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 8)):
        found = tuple(d * 10.0**p for p in powers for d in digits if low <= d * 10.0**p <= high)
        if len(found) >= min(count, 3):
            return found[:: max(1, len(found) // (count + 1))]
    return _even_ticks(low, high, count)
