"""Measurements: what was measured on this machine, which the next estimate uses."""

from __future__ import annotations

from collections.abc import Iterable

from rich.text import Text
from textual.message import Message
from textual.widget import Widget
from textual.widgets import DataTable, Static

from planner.core.measurement import Measurement
from planner.core.wording import TITLES, quantity, quantity_span
from planner.tui.screens.base import QplanScreen
from planner.workflow import survey

COLUMNS = ("when", "model", "type", "quantity", "predicted", "measured", "low - high")


class MeasurementsFound(Message):
    """What the store holds."""

    def __init__(self, found: tuple[Measurement, ...]) -> None:
        super().__init__()
        self.found = found


class MeasurementsScreen(QplanScreen):
    """The store of this machine, as `qplan measurements` prints it."""

    TITLE_TEXT = "Measurements"

    def body(self) -> Iterable[Widget]:
        """How many, and the table."""
        yield Static(" reading …", id="measurements-head")
        yield DataTable(id="measurements", cursor_type="row", zebra_stripes=True)

    def on_mount(self) -> None:
        """Read the store."""
        self.query_one(DataTable).focus()
        self.ask(lambda: MeasurementsFound(survey.measurements()), group="measurements")

    def on_measurements_found(self, message: MeasurementsFound) -> None:
        """Newest first."""
        message.stop()
        found = message.found
        words = f" {len(found)} measured here; the next estimate on this machine uses them"
        none = " nothing was measured on this machine yet; carrying a plan out does"
        self.query_one("#measurements-head", Static).update(words if found else none)
        table = self.query_one(DataTable)
        table.add_columns(*COLUMNS)
        for item in reversed(found):
            name = item.quantity
            numbers = (
                quantity(name, item.predicted),
                quantity(name, item.value),
                quantity_span(name, item.low, item.high),
            )
            words_ = (item.measured_at[:16].replace("T", " "), item.model, item.type, TITLES.get(name, name))
            table.add_row(*(Text(cell) for cell in words_), *(Text(cell, justify="right") for cell in numbers))
