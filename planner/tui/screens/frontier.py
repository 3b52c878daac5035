"""Frontier: the plot of all candidates on the whole screen, and those that nothing beats."""

from __future__ import annotations

from collections.abc import Iterable

from textual.widget import Widget
from textual.widgets import DataTable, Static

from planner.core.candidate import Candidate
from planner.tui import texts
from planner.tui.screens.base import QplanScreen
from planner.tui.widgets.scatter import Scatter

COLUMNS = ("type", "file", "decode t/s", "perplexity %")


class FrontierScreen(QplanScreen):
    """Size against quality and speed."""

    TITLE_TEXT = "Frontier"

    def body(self) -> Iterable[Widget]:
        """The plot, and the table of what nothing beats."""
        yield Scatter(id="frontier-plot")
        yield Static(" nothing beats these in memory, speed and quality at once", classes="muted")
        yield DataTable(id="frontier-table", cursor_type="row", zebra_stripes=True)

    def on_mount(self) -> None:
        """All candidates of the answer."""
        table = self.query_one(DataTable)
        table.focus()
        table.add_columns(*COLUMNS)
        for candidate in self._front():
            cells = texts.candidate_cells(candidate)
            table.add_row(*(cells[name] for name in COLUMNS))
        self.query_one(Scatter).show(self._all(), self.state.candidate)

    def _all(self) -> tuple[Candidate, ...]:
        decision = self.state.answer.decision if self.state.answer else None
        return (decision.chosen, *decision.alternatives) if decision and decision.chosen else ()

    def _front(self) -> tuple[Candidate, ...]:
        front = (candidate for candidate in self._all() if candidate.pareto)
        return tuple(sorted(front, key=lambda candidate: candidate.estimate.size.file_bytes))

    def on_data_table_row_highlighted(self, event: DataTable.RowHighlighted) -> None:
        """The row's place in the plot."""
        front = self._front()
        if 0 <= event.cursor_row < len(front):
            self.query_one(Scatter).show(self._all(), front[event.cursor_row])
