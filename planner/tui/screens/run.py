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
from planner.tui.messages import (
    Applied,
    DownloadBegan,
    Failed,
    Forward,
    InstallBegan,
    InstallEnded,
    Progressed,
    StepBegan,
    StepEnded,
)
from planner.tui.screens.base import QplanScreen
from planner.tui.screens.dialogs import Question
from planner.tui.state import State
from planner.tui.watching import Asked, Watching
from planner.workflow import applying
from planner.workflow.pace import Pace

INSTALL = "install"
DOWNLOAD = "download"
MEASURE = "measure"
ENOUGH = 0.03
"""Share of a step that must be done before its speed says when it will end."""
MARKS = {"waiting": ("·", "$text-muted"), "running": ("▸", "bold $accent"), "done": ("✓", "$text-success"),
         "reused": ("✓", "$text-success"), "stopped": ("✗", "$text-error")}  # fmt: skip


class StepRow(Horizontal):
    """A step: its mark, a bar, and what is known of its time."""

    def __init__(self, name: str, makes: str, *, of: str = "") -> None:
        super().__init__(id=row_id(name, of), classes="step-row")
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


def row_id(name: str, of: str = "") -> str:
    """The id of a row; ``of`` says of what, where there may be several of a name."""
    return f"step-{name}{f'-{of}' if of else ''}"


class RunScreen(QplanScreen):
    """The sixth step."""

    TITLE_TEXT = "Run"
    LEADS_ON = True
    HELP = """\
## Run

Each step runs in a process of its own and leaves a receipt. **c** stops it at once: nothing half-written is left, and
**r** goes on where it stopped, a download too. A step that fails says why; the wizard stays. What a quantizer needs is
installed first, into an environment of its own, after a question.

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
        rows[:0] = [StepRow(INSTALL, f"{o.title}: {o.takes()}", of=o.name) for o in self.state.installs]
        trains = plan is not None and plan.finetune_step() is not None
        measures = "the training tells what it took" if trains else "memory, speed and quality"
        yield Static("", id="run-head")
        yield Vertical(*rows, StepRow(MEASURE, measures), id="steps")
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
            output=self.state.output,
            assume_yes=self._agreed,
            confirm=watcher.confirm,
            installing=watcher.installing,
            stop=self._stop,
        )
        self.ask(lambda: Applied(applying.apply(plan, options, watcher)), group="apply")
        self.refresh_bindings()

    def _head(self, what: str, hint: str) -> None:
        self.query_one("#run-head", Static).update(Content.assemble((f" {what}", "bold"), (f"  {hint}", "$text-muted")))

    def _log(self, text: str) -> None:
        self.query_one(RichLog).write(f"{time.strftime('%H:%M:%S')}  {text}")

    async def on_install_began(self, message: InstallBegan) -> None:
        """An environment is made; one that was not foreseen has no row of its own."""
        message.stop()
        offer = message.offer
        if not self.query(f"#{row_id(INSTALL, offer.name)}"):
            await self.query_one("#steps").mount(StepRow(INSTALL, offer.title, of=offer.name), before=0)
        self._begin(row_id(INSTALL, offer.name), offer.takes_time(), f"{offer.title}: {offer.takes()}")

    def on_install_ended(self, message: InstallEnded) -> None:
        """It is there."""
        message.stop()
        self.query_one(f"#{row_id(INSTALL, message.offer.name)}", StepRow).show(
            "done", f"{message.offer.title} is ready"
        )
        self._log(f"{INSTALL}: {message.offer.title} is ready in {message.offer.place}")

    def on_download_began(self, message: DownloadBegan) -> None:
        """The model is fetched."""
        message.stop()
        self._begin(row_id(DOWNLOAD), "", message.what)

    def on_step_began(self, message: StepBegan) -> None:
        """A step, or the measuring, begins."""
        message.stop()
        step = message.step
        expected = step.predicted_seconds if step else None
        said = f"predicted {ranged(expected, format_seconds)}" if expected else ""
        self._begin(row_id(step.name if step else MEASURE), said, said)

    def _begin(self, id_: str, words: str, logged: str) -> None:
        if self._row is not None and self._row.step_name == DOWNLOAD and self._row.state_name == "running":
            self._row.show("done", self._pace.amount() or "is there already")
            self._log(f"{DOWNLOAD}: {self._pace.amount() or 'is there already'}")
        self._row = row = self.query_one(f"#{id_}", StepRow)
        if row.step_name != INSTALL:  # what comes later found them there
            for waiting in self._installs_waiting():
                waiting.show("reused", "is there already")
        self._pace = Pace(time.monotonic)
        row.show("running", words)
        self._log(f"{row.step_name} begins{', ' * bool(logged)}{logged}")

    def _installs_waiting(self) -> list[StepRow]:
        """Environments that are not there yet, as far as this screen knows."""
        rows = [row for row in self.query(StepRow) if row.step_name == INSTALL]
        return [row for row in rows if row.state_name not in ("done", "reused")]

    def on_progressed(self, message: Progressed) -> None:
        """The running step got further."""
        message.stop()
        if self._row is None:
            return
        self._row.advance(message.done, message.total)
        if self._row.step_name == INSTALL:  # stages, not a rate: they say nothing of the time left
            if message.done >= message.total:
                return
            self._row.show("running", message.what)
            self._log(f"{INSTALL}: {message.what}")
            return
        self._pace.see(message.done, message.total)
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
        self.query_one(f"#{row_id(message.step.name)}", StepRow).show("reused" if message.reused else "done", text)
        self._log(f"{message.step.name}: {text}, sha256 {receipt.sha256[:16]}")

    def on_asked(self, message: Asked) -> None:
        """The thread waits for a person."""
        message.stop()

        def answered(yes: bool | None) -> None:
            # one that was agreed to is asked about again only where it was stopped; a download never
            self._agreed = bool(yes) and not self._installs_waiting()
            message.answer(yes)

        self.app.push_screen(Question(message.question), answered)

    def on_applied(self, message: Applied) -> None:
        """Done and measured: on to the result."""
        message.stop()
        self._ended()
        if message.outcome.nothing_to_do:
            self._log("nothing to do: the plan is applied and its artifact is unchanged")
        for row in self._installs_waiting():
            row.show("reused", "is there already")
        self.query_one(f"#{row_id(MEASURE)}", StepRow).show("done", str(message.outcome.report_path))
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
        elif message.error.code == "install-needs-yes":
            message.stop()
            self._head("not installed", "r asks again")
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
