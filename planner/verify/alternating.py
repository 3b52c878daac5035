"""Timing several pieces of work by turns, so that what the machine does meanwhile hits all of them alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from planner.core.errors import QplanError

SHORTEST_SAMPLE_SECONDS = 0.1
"""A piece is repeated within a sample until it lasts this long. Shorter ones fall between what else the machine does,
so that a slice would seem faster than the whole model, whose every token lasts as long."""
UNDISTURBED = 0.985
"""Least share of threads × wall time that the process was on its cores. llama.cpp's threads spin while they wait, so
all that is missing was taken by other programs; with two threads, one that is put aside makes the other wait."""
WANTED_SAMPLES = 5
_ENOUGH_WATCHED = 3
"""So many times the wanted samples are enough where other programs run all the time on other cores."""
_LOOK_SECONDS = 0.01
_MOST_WAITING = 0.3
"""Share of the time that may go into waiting for a moment without other programs."""


@dataclass(slots=True)
class Piece:
    """One thing to time.

    Args:
        work: does it once.
        before: brings the cache back to where it starts and sets the threads; not timed.
        threads: that should be busy; 0 where the host's do not matter.
        wanted: good samples.
    """

    name: str
    work: Callable[[], None]
    before: Callable[[], None]
    threads: int = 0
    wanted: int = WANTED_SAMPLES
    samples: list[float] = field(default_factory=list)
    """Seconds of one piece of work in each sample that was alone on the machine."""
    watched: list[float] = field(default_factory=list)
    """The same where it had its cores, and other programs ran on others: they take bandwidth."""
    disturbed: list[float] = field(default_factory=list)
    """The same where others took its cores."""
    broken: bool = False
    """It failed, and is not tried again."""

    def sample(self) -> None:
        """Take one sample."""
        count, wall, cpu = 0, 0.0, 0.0
        others = others_running()
        while not count or wall < SHORTEST_SAMPLE_SECONDS:
            self.before()
            began, cpu_began = time.perf_counter(), time.process_time()
            self.work()
            wall += time.perf_counter() - began
            cpu += time.process_time() - cpu_began
            count += 1
        kept = not self.threads or cpu >= UNDISTURBED * self.threads * wall
        alone = kept and not others and not others_running()
        (self.samples if alone else self.watched if kept else self.disturbed).append(wall / count)

    @property
    def taken(self) -> int:
        """All samples."""
        return len(self.samples) + len(self.watched) + len(self.disturbed)

    @property
    def done(self) -> bool:
        """Whether there are enough good samples, or there can be no more."""
        if self.broken:
            return True
        kept = len(self.samples) + len(self.watched)
        return len(self.samples) >= self.wanted or kept >= _ENOUGH_WATCHED * self.wanted

    @property
    def good(self) -> list[float]:
        """The best class of samples that there are two of: alone, with its cores; empty where others took the cores."""
        if len(self.samples) >= 2:
            return sorted(self.samples)
        return sorted([*self.samples, *self.watched])

    @property
    def result(self) -> tuple[float, float, float]:
        """Median, 10 % and 90 % quantiles of the good samples, else of the best two of all.

        A run to be predicted has its share of slow moments too: lower quantiles of a slice and of the whole model that
        is made of it lay up to 4 % apart where medians lay within 1 % (2-core virtual machine, 2026-11-27).
        """
        ordered = self.good or sorted(self.disturbed)[:2]
        return quantile(ordered, 0.5), quantile(ordered, 0.1), quantile(ordered, 0.9)


def alternate(
    pieces: Sequence[Piece], *, until: float, failed: Callable[[Piece, QplanError], None] | None = None
) -> None:
    """Sample the pieces by turns until each has its good samples or ``until`` (``perf_counter``) has come.

    Each gets one sample however late it is. Where other programs run, a sample waits for them for a while.

    Args:
        failed: called with a piece that failed, and the others go on; without it the error is raised.
    """
    patience = _MOST_WAITING * max(0.0, until - time.perf_counter())
    while waiting := [piece for piece in pieces if not piece.done]:
        for piece in waiting:
            if time.perf_counter() < until or not piece.taken:
                patience -= _wait_for_calm(min(patience, until - time.perf_counter()))
                _sample(piece, failed)
        if time.perf_counter() >= until:
            return


def _sample(piece: Piece, failed: Callable[[Piece, QplanError], None] | None) -> None:
    try:
        piece.sample()
    except QplanError as error:
        if failed is None:
            raise
        piece.broken = True
        failed(piece, error)


def _wait_for_calm(most_seconds: float) -> float:
    """Sleep while others run, for at most so long; the seconds slept."""
    began = time.perf_counter()
    while time.perf_counter() - began < most_seconds and others_running():
        time.sleep(_LOOK_SECONDS)
    return time.perf_counter() - began


def others_running() -> int:
    """Threads of other programs that run or wait for a core at this moment; 0 where the system does not tell.

    They take bandwidth even where they leave this process its cores. From ``/proc``: see proc(5), ``procs_running``.
    """
    try:
        lines = Path("/proc/stat").read_text("ascii").splitlines()
        running = next(int(line.split()[1]) for line in lines if line.startswith("procs_running"))
        if running <= 1:
            return 0
        tasks = [task / "stat" for task in Path("/proc/self/task").iterdir()]
        own = sum(task.read_text("utf-8", errors="replace").rpartition(")")[2].split()[0] == "R" for task in tasks)
    except (OSError, StopIteration, ValueError, IndexError):
        return 0
    return max(0, running - own)


def quantile(ordered: Sequence[float], share: float) -> float:
    """The quantile of sorted values, linear between neighbours."""
    at = share * (len(ordered) - 1)
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)
