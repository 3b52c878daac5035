"""Serve: the result behind an API on this machine; whether it answers, where, and how to ask it."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import RenderableType
from rich.text import Text
from textual.containers import Horizontal, VerticalScroll
from textual.content import Content
from textual.widget import Widget
from textual.widgets import Button, RichLog, Static

from planner.tui import keys, serving, texts
from planner.tui.screens.base import QplanScreen
from planner.tui.serving import Serving
from planner.tui.state import State
from planner.workflow import library

LOOK_SECONDS = 1.0
"""Between two looks at the server's log."""
HEADS = {
    serving.PREPARING: ("○ looking for a server …", "$text-warning"),
    serving.STARTING: ("○ starting: the model is being loaded …", "$text-warning"),
    serving.ANSWERS: ("● answers at ", "$text-success"),
    serving.STOPPING: ("○ stopping …", "$text-warning"),
    serving.STOPPED: ("■ stopped", "$text-muted"),
    serving.FAILED: ("✗ it could not be served", "$text-error"),
}
"""What a phase is called; the mark says it without colour."""


def headline(found: Serving) -> Content:
    """The server's state in a line."""
    words, style = HEADS[found.phase]
    where = found.url if found.phase == serving.ANSWERS else ""
    return Content.assemble((f" {words}", f"bold {style}"), (where, "bold"))


class ServeScreen(QplanScreen):
    """Beside the result; the server goes on when the screen is left."""

    TITLE_TEXT = "Serve"
    HELP = """\
## Serve

The server is a program of its own with the plan's settings. It listens on this machine alone and ends with the wizard,
or when you stop it with **x**; **r** starts it again. **Esc** goes back and lets it run.

Whatever speaks OpenAI's API can use it: give it the address, and any key.

Command line: `qplan serve report.json`; `--print command`, `docker`, `kubernetes` and more only print how.
"""
    BINDINGS = keys.SERVE

    def __init__(self, state: State) -> None:
        super().__init__(state)
        self._read = 0
        """Bytes of the log that are shown."""

    def body(self) -> Iterable[Widget]:
        """The state, how to use it, the log."""
        yield Static("", id="serve-head")
        yield VerticalScroll(Static("", id="serve-facts"), classes="card", id="serve-card")
        yield RichLog(id="log", wrap=True, markup=False, max_lines=500, min_width=20)
        yield Horizontal(
            Button("Stop", id="stop", compact=True),
            Button("Start again", id="again", compact=True),
            classes="buttons",
        )

    def on_mount(self) -> None:
        """Start it, unless it runs."""
        self.query_one(RichLog).border_title = "the server's own words"
        self.query_one("#stop", Button).focus()
        self.watch(self.app, "serving", self._show)
        self.set_interval(LOOK_SECONDS, self._follow)
        now = self._now()
        if now is None or not now.alive:
            self.call_after_refresh(self.action_again)

    def _now(self) -> Serving | None:
        found: Serving | None = getattr(self.app, "serving", None)
        return found

    def _show(self, found: Serving | None) -> None:
        if found is None:
            return
        self.query_one("#serve-head", Static).update(headline(found))
        self.query_one("#serve-facts", Static).update(self._facts(found))
        self.query_one("#stop", Button).disabled = not self.check_action("stop", ())
        self.query_one("#again", Button).disabled = found.alive
        self.refresh_bindings()
        self._follow()

    def _facts(self, found: Serving) -> RenderableType:
        rows = [("serves", str(found.target)), ("with", found.server), ("as", found.command), ("log", str(found.log))]
        known = texts.facts([(name, value) for name, value in rows if value and value != "None"])
        wrong = Text("")
        if found.error is not None:
            parts = (f"{found.error.what} [{found.error.code}]", found.error.numbers, found.error.hint)
            wrong = Text("\n").join(Text(part) for part in parts if part)
        ask = texts.titled("Try it", library.question_line(found.url, found.model)) if found.url else Text("")
        hand = texts.spaced(*self._by_hand()) if found.phase == serving.FAILED else Text("")
        return texts.spaced(wrong, ask, known, texts.notes(found.notes), hand)

    def _by_hand(self) -> list[Text]:
        """Commands that need nothing of what is installed here."""
        candidate, model = self.state.candidate, self.state.model
        if candidate is None or model is None:
            return []
        made = library.commands(model, candidate).items()
        return [texts.titled(f"{name.capitalize()}, by hand", text) for name, text in made if name != "quantize"]

    def _follow(self) -> None:
        """What the server said since the last look."""
        found = self._now()
        if found is None or found.log is None:
            return
        text, self._read = library.log_since(found.log, self._read)
        if text:
            self.query_one(RichLog).write(text.rstrip("\n"))

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Stop what runs, start what does not."""
        found = self._now()
        if action == "stop":
            return found is not None and found.alive and found.phase != serving.STOPPING
        if action == "again":
            return found is None or not found.alive
        return super().check_action(action, parameters)

    def on_button_pressed(self, event: Button.Pressed) -> None:
        """By mouse or Enter."""
        self.action_stop() if event.button.id == "stop" else self.action_again()

    def action_stop(self) -> None:
        """End the server."""
        self.post_message(serving.StopWanted())

    def action_again(self) -> None:
        """Start it."""
        outcome = self.state.outcome
        if outcome is not None and outcome.report_path is not None:
            self._read = 0
            self.query_one(RichLog).clear()
            self.post_message(serving.StartWanted(outcome.report_path))
