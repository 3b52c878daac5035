"""Timing several pieces of work by turns, so that what the machine does meanwhile hits all of them alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

SHORTEST_SAMPLE_SECONDS = 0.015
"""A piece is repeated within a sample until it lasts this long: a scheduler's time slice is some milliseconds."""
UNDISTURBED = 0.985
"""Least share of threads × wall time that the process was on its cores. llama.cpp's threads spin while they wait, so
all that is missing was taken by other programs; with two threads, one that is put aside makes the other wait."""
WANTED_SAMPLES = 5


@dataclass(slots=True)
class Piece:
    """One thing to time.

    Args:
        work: does it once.
        before: brings the cache back to where it starts and sets the threads; not timed.
        threads: that should be busy; 0 where the host's do not matter.
    """

    name: str
    work: Callable[[], None]
    before: Callable[[], None]
    threads: int = 0
    samples: list[float] = field(default_factory=list)
    """Seconds of one piece of work in each undisturbed sample."""
    disturbed: list[float] = field(default_factory=list)

    def sample(self) -> None:
        """Take one sample."""
        count, wall, cpu = 0, 0.0, 0.0
        while not count or wall < SHORTEST_SAMPLE_SECONDS:
            self.before()
            began, cpu_began = time.perf_counter(), time.process_time()
            self.work()
            wall += time.perf_counter() - began
            cpu += time.process_time() - cpu_began
            count += 1
        alone = not self.threads or cpu >= UNDISTURBED * self.threads * wall
        (self.samples if alone else self.disturbed).append(wall / count)

    @property
    def result(self) -> tuple[float, float, float]:
        """Lower quartile, 10 % and 90 % quantiles of the undisturbed samples; of the best two where all were disturbed.

        Others only ever take bandwidth away, so the lower quartile repeats better than the median.
        """
        ordered = sorted(self.samples or sorted(self.disturbed)[:2])
        return quantile(ordered, 0.25), quantile(ordered, 0.1), quantile(ordered, 0.9)


def quantile(ordered: Sequence[float], share: float) -> float:
    """The quantile of sorted values, linear between neighbours."""
    at = share * (len(ordered) - 1)
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


def alternate(pieces: Sequence[Piece], *, until: float, wanted: int = WANTED_SAMPLES) -> None:
    """Sample the pieces by turns until each has ``wanted`` undisturbed samples or ``until`` (``perf_counter``) has come.

    Each gets one sample however late it is.
    """
    while waiting := [piece for piece in pieces if len(piece.samples) < wanted]:
        for piece in waiting:
            if time.perf_counter() < until or not (piece.samples or piece.disturbed):
                piece.sample()
        if time.perf_counter() >= until:
            return
