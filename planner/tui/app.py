"""The app: which screen follows which, errors, help, the palette, leaving. It knows no model and no number."""

from __future__ import annotations

import dataclasses
import importlib
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from textual.app import App, SystemCommand
from textual.reactive import reactive
from textual.screen import Screen

from planner.tui import keys, settings
from planner.tui.messages import Again, Failed, Forward
from planner.tui.screens.base import QplanScreen
from planner.tui.screens.hardware import HardwareScreen
from planner.tui.state import State

if TYPE_CHECKING:
    from planner.tui.serving import Serving, ServingChanged, StartWanted

FOLLOWS = {
    "Hardware": "model.ModelScreen",
    "Model": "goal.GoalScreen",
    "Goal": "choose.ChooseScreen",
    "Choose": "review.ReviewScreen",
    "Review": "run.RunScreen",
    "Run": "result.ResultScreen",
}
"""The screen after each step, by module and class."""
FINETUNE = "finetune.FinetuneScreen"
"""Takes the place of the candidates where an adapter is to be trained."""
ASIDE = {
    "frontier": "frontier.FrontierScreen",
    "measurements": "measurements.MeasurementsScreen",
    "settings": "settings.SettingsScreen",
    "serve": "serve.ServeScreen",
}
"""Screens reached from the palette."""


def following(step: str, state: State) -> str:
    """The screen after a step."""
    trains = state.answer is not None and state.answer.finetuning is not None
    return FINETUNE if step == "Goal" and trains else FOLLOWS[step]


def made(name: str, state: State) -> QplanScreen:
    """The screen ``module.Class``, imported now: the first one is painted before the others are read."""
    module, _, kind = name.partition(".")
    screen: QplanScreen = getattr(importlib.import_module(f"planner.tui.screens.{module}"), kind)(state)
    return screen


class Wizard(App[State]):
    """Hardware, model, goal, choice, review, run, result."""

    TITLE = "qplan"
    CSS_PATH = Path(__file__).with_name("wizard.tcss")
    BINDINGS = keys.APP
    ENABLE_COMMAND_PALETTE = True

    serving: reactive[Serving | None] = reactive(None)
    """The server of a result; it outlives the screen that started it, never the wizard."""

    def __init__(self, state: State) -> None:
        super().__init__()
        self.start = state
        self._stop_serving = threading.Event()
        self.latest = state
        """The state of the last step that was done, for the command line printed on leaving."""
        chosen = settings.load()
        if chosen.theme in self.available_themes:
            self.theme = chosen.theme
        self.set_keymap(chosen.keymap)

    def get_default_screen(self) -> Screen[None]:
        """The first screen, with none under it; it looks at the machine once it is painted."""
        return self.first_screen()

    def first_screen(self) -> QplanScreen:
        """Where it begins."""
        return HardwareScreen(self.start)

    def on_forward(self, message: Forward) -> None:
        """A step is done: the next one, with its state."""
        screen = self.screen
        if isinstance(screen, QplanScreen) and screen.TITLE_TEXT in FOLLOWS:
            self.latest = message.state
            self.push_screen(made(following(screen.TITLE_TEXT, message.state), message.state))

    def on_failed(self, message: Failed) -> None:
        """Say what went wrong; everything stays as it was."""
        from planner.tui.screens.dialogs import ErrorDialog

        self.push_screen(ErrorDialog(message.error))

    def on_again(self, message: Again) -> None:
        """Back to the model, with the machine kept."""
        state = message.state.from_model_on()
        while len(self.screen_stack) > 1:
            self.pop_screen()
        self.push_screen(made(FOLLOWS["Hardware"], state))

    def on_start_wanted(self, message: StartWanted) -> None:
        """Serve a report in a thread, one at a time."""
        if self.serving is None or not self.serving.alive:
            from planner.tui.serving import serve

            self._stop_serving = stop = threading.Event()
            self.run_worker(lambda: serve(message.target, self.post_message, stop), thread=True, exit_on_error=False)

    def on_stop_wanted(self) -> None:
        """End the server; its thread tells when it is gone."""
        if self.serving is not None and self.serving.alive:
            self.serving = dataclasses.replace(self.serving, phase="stopping")
        self._stop_serving.set()

    def on_serving_changed(self, message: ServingChanged) -> None:
        """Screens look at the value."""
        self.serving = message.serving

    def on_unmount(self) -> None:
        """No server outlives the wizard."""
        self._stop_serving.set()

    def action_go(self, name: str) -> None:
        """A screen aside of the steps."""
        here = self.screen
        if isinstance(here, QplanScreen) and here.TITLE_TEXT.lower() != name:
            self.push_screen(made(ASIDE[name], here.state))

    def get_system_commands(self, screen: Screen[object]) -> Iterable[SystemCommand]:
        """What the palette offers: only what makes sense now."""
        if not isinstance(screen, QplanScreen):
            return
        at = screen.TITLE_TEXT
        if screen.state.answer is not None and at != "Frontier":
            yield SystemCommand(
                "Frontier", "size, quality and speed of all candidates", lambda: self.action_go("frontier")
            )
        if self.serving is not None and self.serving.alive and at != "Serve":
            yield SystemCommand("Server", "the server that runs, and how to ask it", lambda: self.action_go("serve"))
        if at != "Measurements":
            yield SystemCommand(
                "Measurements", "what was measured on this machine", lambda: self.action_go("measurements")
            )
        if at != "Settings":
            yield SystemCommand("Settings", "theme and keys", lambda: self.action_go("settings"))
        other = settings.LIGHT if self.current_theme.dark else settings.DARK
        yield SystemCommand("Light or dark", f"change to {other}", lambda: setattr(self, "theme", other))
        yield SystemCommand("Help", "help for what has the focus", self.action_toggle_help)
        yield SystemCommand("Quit", "leave, and print the command line that does the same", self.action_leave)

    def action_toggle_help(self) -> None:
        """Help beside the screen; it follows the focus."""
        if self.screen.query("HelpPanel"):
            self.action_hide_help_panel()
        else:
            self.action_show_help_panel()

    def action_leave(self) -> None:
        """Leave; what runs is asked about first."""
        from planner.tui.screens.dialogs import Question

        question = ""
        if getattr(self.screen, "running", False):
            question = "A step is running. Stop it and leave? What is finished is kept."
        elif self.serving is not None and self.serving.alive:
            question = "The server runs as long as the wizard does. Stop it and leave?"
        if question and not isinstance(self.screen, Question):
            self.push_screen(Question(question, "Stop and leave", "Stay"), lambda yes: self._leave() if yes else None)
        else:
            self._leave()

    def _leave(self) -> None:
        screen = next((s for s in reversed(self.screen_stack) if isinstance(s, QplanScreen)), None)
        state = screen.state if screen is not None else self.latest
        self.exit(state.but(served=self.serving is not None))
