"""Result: predicted against measured, and what comes next."""

from __future__ import annotations

import os
import sys
import webbrowser
from collections.abc import Iterable
from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.text import Text
from textual.containers import Horizontal, VerticalScroll
from textual.content import Content
from textual.widget import Widget
from textual.widgets import Button, DataTable, Static

from planner.core.units import format_seconds
from planner.core.wording import TITLES, quantity, quantity_span
from planner.report.document import Judged, Report, parse
from planner.tui import keys, texts
from planner.tui.messages import Again
from planner.tui.screens.base import QplanScreen
from planner.tui.screens.compare import CompareScreen
from planner.tui.state import State

if TYPE_CHECKING:
    from planner.tui.serving import Serving

COLUMNS = ("quantity", "predicted", "95 % range", "measured", "ratio", "verdict")
NEXT = {"serve": "Serve it", "open": "Open the report", "compare": "Compare", "new": "Another model"}
"""What comes next: each has a key as well."""
WIDE = 90
"""From this width there is a column for the ratio."""
VERDICTS = {True: "$text-success", False: "$text-error", None: "$text-warning"}


class Verdicts(DataTable[object]):
    """Predicted beside measured."""

    HELP = """\
## Predicted and measured

The range is where 95 of 100 measurements should lie. *better* is beyond it on the good side; *machine busy* means that
other programs had the cores, so that the speed says nothing of the plan. What was measured is remembered: the next
estimate on this machine uses it.

Command line: `qplan show report.json`, `qplan report`, `qplan compare`.
"""


class ResultScreen(QplanScreen):
    """The last step."""

    TITLE_TEXT = "Result"
    BINDINGS = keys.RESULT

    def __init__(self, state: State) -> None:
        super().__init__(state)
        self.report: Report | None = parse(state.outcome.report, "the report") if state.outcome else None

    def body(self) -> Iterable[Widget]:
        """The verdict, the table, what else there is to know."""
        yield Static("", id="result-head")
        yield Verdicts(id="verdicts", cursor_type="row", zebra_stripes=True)
        yield Static("", id="result-serving")
        yield VerticalScroll(Static("", id="result-notes"), classes="card", id="result-card")
        offered = {id_: words for id_, words in NEXT.items() if id_ != "serve" or not self._is_adapter()}
        yield Horizontal(*(Button(words, id=id_, compact=True) for id_, words in offered.items()), classes="buttons")

    def on_mount(self) -> None:
        """Show the report."""
        table = self.query_one(Verdicts)
        kept = [n for n, name in enumerate(COLUMNS) if name != "ratio" or self.app.size.width >= WIDE]
        table.add_columns(*(COLUMNS[n] for n in kept))
        table.focus()
        report = self.report
        if report is None:
            self.query_one("#result-head", Static).update(" nothing was measured yet")
            return
        for row in report.verdicts:
            cells = _cells(row)
            table.add_row(*(Text(cells[n], justify="right" if 0 < n < 5 else "left") for n in kept))
        self.query_one("#result-head", Static).update(_head(report))
        self.query_one("#result-notes", Static).update(self._foot(report))

        self.watch(self.app, "serving", self._show_serving)

    def _show_serving(self, found: Serving | None) -> None:
        line = self.query_one("#result-serving", Static)
        line.display = found is not None
        if found is not None:
            from planner.tui.screens.serve import headline

            line.update(headline(found))

    def on_button_pressed(self, event: Button.Pressed) -> None:
        """What comes next, by mouse or Enter."""
        actions = {"serve": self.action_serve, "compare": self.action_compare, "open": self.action_open_report}
        actions.get(str(event.button.id), self.action_new)()

    def _foot(self, report: Report) -> RenderableType:
        page = self.state.outcome.page_path if self.state.outcome else None
        rows = [("artifact", report.artifact), ("page", str(page))]
        rows += [(step.step, f"{format_seconds(step.seconds)}, sha256 {step.sha256[:16]}") for step in report.steps]
        uses = [texts.titled(name, text) for name, text in report.commands.items()] if self._is_adapter() else []
        return texts.spaced(texts.facts(rows), texts.notes(report.notes), *uses)

    def _is_adapter(self) -> bool:
        """It was trained, and is used beside its model."""
        return self.state.plan is not None and self.state.plan.finetune_step() is not None

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """An adapter is served beside its model, which the wizard does not start: its commands are shown."""
        if action == "serve" and self._is_adapter():
            return False
        return super().check_action(action, parameters)

    def action_open_report(self) -> None:
        """The page in the browser."""
        page = self.state.outcome.page_path if self.state.outcome else None
        if page is None:
            return
        if self.app.is_web:
            self.app.deliver_text(page, open_method="browser", mime_type="text/html")
        elif not (_has_windows() and webbrowser.open(page.absolute().as_uri())):
            self.notify(f"no browser to open it here; the page is {page}", markup=False)

    def action_serve(self) -> None:
        """Start a server for the result, or look at the one that runs."""
        outcome = self.state.outcome
        if outcome is not None and outcome.report_path is not None:
            from planner.tui.screens.serve import ServeScreen

            self.app.push_screen(ServeScreen(self.state))

    def action_compare(self) -> None:
        """Beside other runs."""
        outcome = self.state.outcome
        if outcome is None or outcome.report_path is None:
            return
        self.app.push_screen(CompareScreen(self.state, outcome.report_path))

    def action_new(self) -> None:
        """From the model on, for the same machine."""
        self.post_message(Again(self.state))


def _has_windows() -> bool:
    """Whether a browser can have a window: one that runs in the terminal would take it from the wizard."""
    named = any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER"))
    return named or sys.platform in {"darwin", "win32"}


def _cells(row: Judged) -> tuple[str, ...]:
    name = row.quantity
    ratio = f"{row.ratio:.3f}" if row.ratio is not None else "-"
    expected = quantity_span(name, row.low, row.high)
    title = TITLES.get(name, name)
    return title, quantity(name, row.predicted), expected, quantity(name, row.measured), ratio, row.position


def _head(report: Report) -> Content:
    outside = [TITLES.get(v.quantity, v.quantity) for v in report.verdicts if v.ok is False]
    if outside:
        return Content.assemble((f" ✗ outside of what was expected: {', '.join(outside)}", f"bold {VERDICTS[False]}"))
    if any(v.ok is None for v in report.verdicts):
        return Content.assemble((" ○ as expected, but not all of it could be judged", f"bold {VERDICTS[None]}"))
    return Content.assemble((" ✓ everything measured is as expected or better", f"bold {VERDICTS[True]}"))
