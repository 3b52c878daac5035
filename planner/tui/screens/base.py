"""What all screens share: the head, the footer, work in threads, going back and forward."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import ClassVar

from textual.app import ComposeResult
from textual.message import Message
from textual.screen import Screen
from textual.widget import Widget
from textual.widgets import Footer
from textual.worker import Worker, WorkerState, get_current_worker

from planner.core.errors import QplanError
from planner.tui import keys
from planner.tui.messages import Failed
from planner.tui.state import State
from planner.tui.widgets.rail import Rail


class QplanScreen(Screen[None]):
    """A screen of the wizard with its title, its body and a footer."""

    TITLE_TEXT: ClassVar[str] = ""
    LEADS_ON: ClassVar[bool] = False
    """There is a step after it."""
    BINDINGS = keys.STEP

    def __init__(self, state: State) -> None:
        super().__init__()
        self.state = state

    def compose(self) -> ComposeResult:
        """Head, body, footer."""
        yield Rail(self.TITLE_TEXT, self.state.summary())
        yield from self.body()
        yield Footer(show_command_palette=False, compact=True)

    def body(self) -> Iterable[Widget]:
        """What lies between head and footer."""
        raise NotImplementedError

    def ask(self, work: Callable[[], Message], *, group: str) -> None:
        """Do ``work`` in a thread and post its message, or :class:`Failed`; newer work of a group makes older void."""

        def run() -> None:
            worker = get_current_worker()
            try:
                message = work()
            except QplanError as error:
                message = Failed(error)
            if not worker.is_cancelled:
                self.post_message(message)

        self.run_worker(run, thread=True, exclusive=True, group=group, exit_on_error=False)

    def action_back(self) -> None:
        """To the screen before."""
        self.app.pop_screen()

    def action_forward(self) -> None:
        """To the next screen, if this one is done."""

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """There is nothing before the first screen, and not after each a next one."""
        if action == "forward" and not self.LEADS_ON:
            return False
        stack = self.app.screen_stack
        if action == "back" and self in stack and stack.index(self) < 1:
            return False
        return super().check_action(action, parameters)

    def on_worker_state_changed(self, event: Worker.StateChanged) -> None:
        """A thread that ended in an error nobody foresaw: say so, as for any other."""
        if event.state is WorkerState.ERROR and event.worker.error is not None:
            event.stop()
            self.post_message(Failed(_unforeseen(event.worker.error)))


def _unforeseen(error: BaseException) -> QplanError:
    if isinstance(error, OSError):
        named = f" {error.filename}" if error.filename else ""
        return QplanError(f"the system refused{named}: {error.strerror or error}", code="system")
    return QplanError(
        f"unexpected {type(error).__name__}: {error}",
        hint="this is a bug in qplan; the same command on the command line with QPLAN_DEBUG=1 prints the traceback",
        code="internal",
    )
