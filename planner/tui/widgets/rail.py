"""The head of a screen: which step it is, and what is known so far."""

from __future__ import annotations

from textual.app import ComposeResult
from textual.containers import Vertical
from textual.content import Content
from textual.widgets import Static

STEPS = ("Hardware", "Model", "Goal", "Choose", "Review", "Run", "Result")


class Rail(Vertical):
    """Two lines: the steps, and the state in short."""

    def __init__(self, step: str, summary: str) -> None:
        super().__init__()
        self._step = step
        self._summary = summary

    def compose(self) -> ComposeResult:
        """The lines."""
        yield Static(self._steps(), id="rail-steps")
        yield Static(Content(self._summary or " "), id="rail-summary")

    def _steps(self) -> Content:
        if self._step not in STEPS:
            return Content.assemble((" qplan ", "bold $accent"), " ", (f" {self._step} ", "bold reverse"))
        at = STEPS.index(self._step)
        parts: list[Content | tuple[str, str]] = [(" qplan ", "bold $accent"), (" ", "")]
        for number, name in enumerate(STEPS):
            if number == at:
                parts.append((f" {name} ", "bold reverse"))
            elif number < at:
                parts.append((f" {name} ", "$text-success"))
            else:
                parts.append((f" {name} ", "$text-muted"))
            if number + 1 < len(STEPS):
                parts.append(("›", "$text-muted"))
        return Content.assemble(*parts)
