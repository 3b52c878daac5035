"""Compare: runs side by side."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from rich.text import Text
from textual.message import Message
from textual.widget import Widget
from textual.widgets import DataTable, Input, Static

from planner.core.measurement import QUANTITIES
from planner.core.wording import TITLES, quantity, quantity_span
from planner.tui.screens.base import QplanScreen
from planner.tui.state import State
from planner.workflow import reporting

if TYPE_CHECKING:
    from planner.report.page import Run


class RunsLoaded(Message):
    """Reports that were read."""

    def __init__(self, runs: tuple[Run, ...]) -> None:
        super().__init__()
        self.runs = runs


class CompareScreen(QplanScreen):
    """The run just made beside others, as `qplan compare` prints them."""

    TITLE_TEXT = "Compare"

    def __init__(self, state: State, first: Path) -> None:
        super().__init__(state)
        self._names = [str(first)]

    def body(self) -> Iterable[Widget]:
        """A field for another run, and the table."""
        yield Input(placeholder="another run: a report.json, its folder or an artifact; Enter adds it", id="other")
        yield DataTable(id="runs", cursor_type="none")
        yield Static(" measured; in brackets the 95 % range that the plan expected", classes="muted")

    def on_mount(self) -> None:
        """The run just made."""
        self.query_one("#other", Input).focus()
        self._load()

    def _load(self) -> None:
        names = tuple(self._names)
        self.ask(lambda: RunsLoaded(tuple(reporting.load_run(name) for name in names)), group="runs")

    def on_failed(self) -> None:
        """What could not be read is not tried again."""
        if len(self._names) > 1:
            self._names.pop()

    def on_input_submitted(self, event: Input.Submitted) -> None:
        """Another run."""
        if event.value.strip():
            self._names.append(event.value.strip())
            event.input.value = ""
            self._load()

    def on_runs_loaded(self, message: RunsLoaded) -> None:
        """A column for each run."""
        message.stop()
        table = self.query_one(DataTable)
        table.clear(columns=True)
        table.add_columns("quantity", *(run.report.name for run in message.runs))
        for name in QUANTITIES:
            cells = [Text(_cell(run, name), justify="right") for run in message.runs]
            table.add_row(TITLES[name], *cells, height=2)


def _cell(run: Run, name: str) -> str:
    known = next((row for row in run.report.verdicts if row.quantity == name), None)
    span = f"\n({quantity_span(name, known.low, known.high)})" if known else ""
    return f"{quantity(name, run.report.measured.get(name))}{span}"
