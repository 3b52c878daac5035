"""Run: the steps with progress and time left, a log; cancel leaves things clean, resume goes on."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable

from textual.containers import Horizontal, Vertical
from textual.content import Content
from textual.widget import Widget
from textual.widgets import Label, ProgressBar, RichLog, Static

from planner.core.units import format_bytes, format_seconds
from planner.core.wording import ranged
from planner.tui import keys
from planner.tui.messages import Applied, DownloadBegan, Failed, Forward, Progressed, StepBegan, StepEnded
from planner.tui.screens.base import QplanScreen
from planner.tui.screens.dialogs import Question
from planner.tui.state import State
from planner.tui.watching import Asked, Watching
from planner.workflow import applying
from planner.workflow.pace import Pace

DOWNLOAD = "download"
MEASURE = "measure"
ENOUGH = 0.03
"""Share of a step that must be done before its speed says when it will end."""
MARKS = {"waiting": ("·", "$text-muted"), "running": ("▸", "bold $accent"), "done": ("✓", "$text-success"),
         "reused": ("✓", "$text-success"), "stopped": ("✗", "$text-error")}  # fmt: skip


class StepRow(Horizontal):
    """A step: its mark, a bar, and what is known of its time."""

    def __init__(self, name: str, makes: str) -> None:
        super().__init__(id=f"step-{name}", classes="step-row")
        self.step_name, self.makes = name, makes
        self.state_name = "waiting"

    def compose(self) -> Iterable[Widget]:
        """Mark, name, bar, words."""
        yield Label(id="mark")
        yield Label(Content(self.step_name), id="name")
        yield ProgressBar(total=None, show_eta=False, show_percentage=True, id="bar")
        yield Label(Content(self.makes), id="words")

    def on_mount(self) -> None:
        """Nothing runs yet."""
        self.show("waiting", self.makes)

    def show(self, state: str, words: str) -> None:
        """The step's state in a mark and words."""
        self.state_name = state
        self.query_one("#mark", Label).update(Content.assemble(MARKS[state]))
        self.query_one("#words", Label).update(Content(words))
        self.query_one("#bar").display = state == "running"

    def advance(self, done: float, total: float) -> None:
        """How far it is; a total of 0 is unknown."""
        self.query_one(ProgressBar).update(total=total or None, progress=done)


class RunScreen(QplanScreen):
    """The sixth step."""

    TITLE_TEXT = "Run"
    LEADS_ON = True
    HELP = """\
## Run

Each step runs in a process of its own and leaves a receipt. **c** stops it at once: nothing half-written is left, and
**r** goes on where it stopped, a download too. A step that fails says why; the wizard stays.

Command line: `qplan apply plan.json --output DIR`.
"""
    BINDINGS = keys.RUN

    def __init__(self, state: State) -> None:
        super().__init__(state)
        self._stop = threading.Event()
        self.running = False
        self._row: StepRow | None = None
        self._pace = Pace()
        self._agreed = False
        """To the download."""

    def body(self) -> Iterable[Widget]:
        """The steps above the log."""
        plan = self.state.plan
        rows = [StepRow(step.name, str(step.output)) for step in plan.making_steps()] if plan else []
        if plan is not None and applying.needs_download(plan):
            rows.insert(0, StepRow(DOWNLOAD, plan.model.location))
        yield Static("", id="run-head")
        yield Vertical(*rows, StepRow(MEASURE, "memory, speed and quality"), id="steps")
        yield RichLog(id="log", wrap=True, markup=False, max_lines=500, min_width=20)

    def on_mount(self) -> None:
        """Begin once the screen is painted."""
        self.query_one(RichLog).focus()
        self.call_after_refresh(self._start)

    def _start(self) -> None:
        plan = self.state.plan
        if plan is None or self.running:
            return
        self._stop = threading.Event()
        self.running = True
        self._head("running", "c stops it; finished steps are kept")
        watcher = Watching(self.post_message, self._stop)
        options = applying.ApplyOptions(
            output=self.state.output, assume_yes=self._agreed, confirm=watcher.confirm, stop=self._stop
        )
        self.ask(lambda: Applied(applying.apply(plan, options, watcher)), group="apply")
        self.refresh_bindings()

    def _head(self, what: str, hint: str) -> None:
        self.query_one("#run-head", Static).update(Content.assemble((f" {what}", "bold"), (f"  {hint}", "$text-muted")))

    def _log(self, text: str) -> None:
        self.query_one(RichLog).write(f"{time.strftime('%H:%M:%S')}  {text}")

    def on_download_began(self, message: DownloadBegan) -> None:
        """The model is fetched."""
        message.stop()
        self._begin(DOWNLOAD, "", message.what)

    def on_step_began(self, message: StepBegan) -> None:
        """A step, or the measuring, begins."""
        message.stop()
        step = message.step
        expected = step.predicted_seconds if step else None
        said = f"predicted {ranged(expected, format_seconds)}" if expected else ""
        self._begin(step.name if step else MEASURE, said, said)

    def _begin(self, name: str, words: str, logged: str) -> None:
        if self._row is not None and self._row.step_name == DOWNLOAD and self._row.state_name == "running":
            self._row.show("done", self._pace.amount() or "is there already")
            self._log(f"{DOWNLOAD}: {self._pace.amount() or 'is there already'}")
        self._row = self.query_one(f"#step-{name}", StepRow)
        self._pace = Pace(time.monotonic)
        self._row.show("running", words)
        self._log(f"{name} begins{', ' * bool(logged)}{logged}")

    def on_progressed(self, message: Progressed) -> None:
        """The running step got further."""
        message.stop()
        if self._row is None:
            return
        self._pace.see(message.done, message.total)
        self._row.advance(message.done, message.total)
        share = message.done / message.total if message.total else 0.0
        left = self._pace.left() if share >= ENOUGH or self._row.step_name == DOWNLOAD else ""
        ends = "finishing" if share >= 1 else f"{left} left" if left else ""
        parts = (message.what, ends, self._pace.words())
        self._row.show("running", " · ".join(part for part in parts if part))

    def on_step_ended(self, message: StepEnded) -> None:
        """A step left its receipt."""
        message.stop()
        receipt = message.receipt
        how = "is there already" if message.reused else f"in {format_seconds(receipt.seconds)}"
        text = f"{receipt.output} ({format_bytes(receipt.size_bytes)}) {how}"
        self.query_one(f"#step-{message.step.name}", StepRow).show("reused" if message.reused else "done", text)
        self._log(f"{message.step.name}: {text}, sha256 {receipt.sha256[:16]}")

    def on_asked(self, message: Asked) -> None:
        """The thread waits for a person."""
        message.stop()

        def answered(yes: bool | None) -> None:
            self._agreed = bool(yes)
            message.answer(yes)

        self.app.push_screen(Question(message.question), answered)

    def on_applied(self, message: Applied) -> None:
        """Done and measured: on to the result."""
        message.stop()
        self._ended()
        if message.outcome.nothing_to_do:
            self._log("nothing to do: the plan is applied and its artifact is unchanged")
        self.query_one(f"#step-{MEASURE}", StepRow).show("done", str(message.outcome.report_path))
        self._head("done", "ctrl+n shows the result")
        self.state = self.state.but(outcome=message.outcome)
        self.post_message(Forward(self.state))

    def on_failed(self, message: Failed) -> None:
        """Stopped, or failed: say so here as well, and offer to resume."""
        self._ended()
        if self._row is not None and self._row.state_name == "running":
            self._row.show("stopped", "not finished")
        self._log(f"{message.error.what} [{message.error.code}]")
        if message.error.code == "interrupted":
            message.stop()
            self._head("stopped", "nothing half-written is left; r goes on where it stopped")
        elif message.error.code == "download-needs-yes":  # a person said no; there is nothing to explain
            message.stop()
            self._head("not downloaded", "r asks again")
        else:
            self._head("failed", "r tries again; finished steps are kept")

    def _ended(self) -> None:
        self.running = False
        self.refresh_bindings()

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Cancel while it runs, resume when it does not; no way back from a running step."""
        if action == "cancel":
            return self.running
        if action == "resume":
            return not self.running and self.state.outcome is None
        if action == "back" and self.running:
            return False
        if action == "forward":
            return self.state.outcome is not None
        return super().check_action(action, parameters)

    def action_cancel(self) -> None:
        """End the child process; what it had begun is removed."""
        self._head("stopping …", "")
        self._stop.set()

    def action_resume(self) -> None:
        """Go on: finished steps are skipped by their receipts."""
        self._start()

    def action_forward(self) -> None:
        """To the result again."""
        if self.state.outcome is not None:
            self.post_message(Forward(self.state))

    def on_unmount(self) -> None:
        """Nothing runs on when the screen is gone."""
        self._stop.set()
