"""The parent's side of a tuning: a child, and another without the setting that one died of."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from planner.execute.process import ChildDied, Stopped, ask_child
from planner.runtimes.service import visible_gpus
from planner.verify.run import FAULTS
from planner.verify.tuning_trial import FAILED, TuneAnswer, TuneRequest, TuneRow

Progress = Callable[[str, float], None]

_GRACE_SECONDS = 300.0
"""Loading a large model, or writing one, and finishing a rung that was begun."""
_MOST_DEATHS = 3
_LEAST_SECONDS = 5.0
_SETTING = re.compile(r"setting (\d+): ")


@dataclass(slots=True)
class _Watch:
    """Which setting the child was at, by its progress."""

    tell: Progress | None
    at: int | None = None

    def __call__(self, what: str, fraction: float) -> None:
        match = _SETTING.match(what)
        self.at = int(match[1]) if match else self.at
        if self.tell is not None:
            self.tell(_SETTING.sub("", what), fraction)


@dataclass(slots=True)
class _Alive:
    """The settings that no child died of, by their number in the request."""

    request: TuneRequest
    numbers: list[int] = field(default_factory=list)
    died: dict[int, str] = field(default_factory=dict)

    def answer(self, found: TuneAnswer) -> TuneAnswer:
        """In the numbers of the request, those that a child died of among them."""
        rows = {number: TuneRow(status=FAILED, note=note) for number, note in self.died.items()}
        rows |= dict(zip(self.numbers, found.rows, strict=True))
        ranking = tuple(self.numbers[place] for place in found.ranking)
        return replace(found, rows=tuple(rows[i] for i in range(len(self.request.settings))), ranking=ranking)


def run_tuning(request: TuneRequest, *, progress: Progress | None = None) -> tuple[TuneAnswer, bool]:
    """Carry out ``request`` in a child process; the answer, and whether the CPU's own layouts could be used.

    A setting that kills the child, as one that takes more memory than there is can, is a failed row, and the others go
    on in another child with the time that is left.

    Raises:
        QplanError: what the child raised, of the same class.
        ExecutionFailed: children died several times, or of the recommended setting.
    """
    alive = _Alive(request, list(range(len(request.settings))))
    began, repack = time.monotonic(), request.repack
    while True:
        left = request.budget_seconds - (time.monotonic() - began)
        settings = tuple(request.settings[number] for number in alive.numbers)
        asked = replace(request, settings=settings, budget_seconds=max(_LEAST_SECONDS, left), repack=repack)
        watch = _Watch(progress)
        try:
            return alive.answer(_attempt(asked, watch)), repack
        except Stopped:
            raise
        except ChildDied as error:
            if repack and error.signal_number in FAULTS:
                repack = False
                began = time.monotonic()
                continue
            if not watch.at or len(alive.died) == _MOST_DEATHS:  # of the recommended one, or before any
                raise
            alive.died[alive.numbers.pop(watch.at)] = error.what


def _attempt(request: TuneRequest, progress: Progress) -> TuneAnswer:
    return ask_child(
        TuneAnswer,
        "planner.verify.tune_child",
        request,
        what="tuning",
        progress=progress,
        environment=visible_gpus(request.settings[0], os.environ),
        timeout_seconds=2 * request.budget_seconds + _GRACE_SECONDS,
    )
