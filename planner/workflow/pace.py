"""How fast a step goes and when it ends, for every front end in the same words."""

from __future__ import annotations

import time
from collections.abc import Callable

from planner.core.units import format_bytes, format_seconds

BYTES_FROM = 1 << 20
"""Progress that counts further than this counts bytes; tensors, chunks and shares are fewer."""
SECONDS_BETWEEN_LINES = 30.0
LEAST_SECONDS = 0.5
"""Before it a rate is chance."""


class Pace:
    """What is done and how fast, from the first that is told: an earlier run may have done that before."""

    def __init__(self, clock: Callable[[], float] | None = None) -> None:
        self._clock = clock or time.monotonic
        self._first: float | None = None
        self._done = self._total = 0.0
        self._began = self._said = self._clock()

    def see(self, done: float, total: float) -> None:
        """So much of so much is done; a total of 0 is unknown."""
        if self._first is None:
            self._first, self._began = done, self._clock()
        self._done, self._total = done, total

    @property
    def per_second(self) -> float:
        """What is done in a second; 0 while it is not known."""
        seconds = self._clock() - self._began
        return (self._done - (self._first or 0.0)) / seconds if seconds > LEAST_SECONDS else 0.0

    def rate(self) -> str:
        """Bytes or pieces per second; empty while it is not known, and for a mere share."""
        if self._total <= 1 or not self.per_second:
            return ""
        return f"{format_bytes(self.per_second)}/s" if self._total > BYTES_FROM else f"{self.per_second:.3g}/s"

    def amount(self) -> str:
        """``1.2 of 4.0 GiB`` or ``3 of 85``; empty for a mere share."""
        if self._total <= 1:
            return ""
        if self._total > BYTES_FROM:
            done, whole = format_bytes(self._done), format_bytes(self._total)
            number, _, unit = done.partition(" ")
            return f"{number if whole.endswith(f' {unit}') else done} of {whole}"
        return f"{self._done:,.0f} of {self._total:,.0f}"

    def left(self) -> str:
        """The time that the rest takes at this rate; empty while it is not known."""
        if not self.per_second or not self._total:
            return ""
        return format_seconds((self._total - self._done) / self.per_second)

    def words(self) -> str:
        """The amount and the rate."""
        return ", ".join(filter(None, (self.amount(), self.rate())))

    def line(self) -> str:
        """All of it in a line: share, rate, time left."""
        share = f"{self._done / self._total:.0%}" if self._total else ""
        return ", ".join(filter(None, (share, self.rate(), f"{self.left() or 'unknown'} left")))

    def is_due(self) -> bool:
        """Whether half a minute has passed since it last was."""
        due = self._clock() - self._said >= SECONDS_BETWEEN_LINES
        self._said = self._clock() if due else self._said
        return due
