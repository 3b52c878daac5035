"""An apply in a thread, told in messages: each call of the runner becomes one."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from textual.message import Message

from planner.core.errors import Interrupted
from planner.tui.messages import DownloadBegan, InstallBegan, InstallEnded, Progressed, StepBegan, StepEnded

if TYPE_CHECKING:
    from planner.core.plan import Step
    from planner.workflow.applying import Receipt
    from planner.workflow.environments import Offer, Tell

LOOK_SECONDS = 0.2


class Asked(Message):
    """The thread waits for an answer to a question."""

    def __init__(self, question: str, answer: Callable[[bool | None], None]) -> None:
        super().__init__()
        self.question = question
        self.answer = answer


class Watching:
    """The wizard's side of :class:`planner.workflow.applying.Watcher`. ``post`` may be called from any thread."""

    def __init__(self, post: Callable[[Message], object], stop: threading.Event) -> None:
        self._post = post
        self._stop = stop

    def downloading(self, what: str) -> Callable[..., None]:
        """A model of the hub is fetched; its progress comes in bytes."""
        self._post(DownloadBegan(what))
        return lambda done, total: self._tell(float(done), float(total or 0), "")

    def installing(self, offer: Offer) -> Tell:
        """The environment of a quantizer is installed; its stages come with the share that is behind."""
        self._post(InstallBegan(offer))

        def tell(what: str, fraction: float) -> None:
            self._tell(fraction, 1.0, what)
            if fraction >= 1.0:
                self._post(InstallEnded(offer))

        return tell

    def started(self, step: Step) -> Callable[..., None]:
        """A step begins; its progress comes in any unit."""
        self._post(StepBegan(step))
        return lambda done, total: self._tell(float(done), float(total or 0), "")

    def told(self, text: str) -> None:
        """Shown beside the bar until the step's own progress comes."""
        self._tell(0.0, 0.0, text)

    def finished(self, step: Step, receipt: Receipt, *, reused: bool) -> None:
        """A step is done."""
        self._post(StepEnded(step, receipt, reused=reused))

    def measuring(self) -> Callable[[str, float], None]:
        """The verification begins."""
        self._post(StepBegan(None))
        return lambda what, fraction: self._tell(fraction, 1.0, what)

    def confirm(self, question: str) -> bool:
        """Ask a person, and wait.

        Raises:
            Interrupted: the apply was stopped meanwhile.
        """
        answers: queue.Queue[bool | None] = queue.Queue()
        self._post(Asked(question, answers.put))
        while not self._stop.is_set():
            try:
                return bool(answers.get(timeout=LOOK_SECONDS))
            except queue.Empty:
                continue
        raise Interrupted("stopped")

    def _tell(self, done: float, total: float, what: str) -> None:
        self._post(Progressed(done, total, what))
