"""Choose: every way to run the model that fits, ranked; why, what else, and what if."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from textual import events
from textual.containers import Horizontal, Vertical
from textual.content import Content
from textual.widget import Widget
from textual.widgets import DataTable, Static

from planner.core.candidate import Candidate
from planner.tui import keys, texts
from planner.tui.messages import Answered, Failed, Forward
from planner.tui.screens.base import QplanScreen
from planner.tui.screens.dialogs import Page
from planner.tui.screens.frontier import FrontierScreen
from planner.tui.screens.goal import nothing_fits
from planner.tui.state import State
from planner.tui.widgets.memory import MemoryBars
from planner.tui.widgets.scatter import Scatter
from planner.workflow import environments, what_if
from planner.workflow.recommend import Recommendation, recommend_for

WIDE, HIGH = 100, 34
"""From this width there are all columns; from this height the reasons and the plot lie below the table."""
KV_CHOICES = (None, "f16", "q8_0", "q4_0")


class Candidates(DataTable[object]):
    """The ranked candidates."""

    HELP = """\
## Ways to run it

Best first, for the objective you chose. Ranges are 80 %: the truth should lie inside four times in five. Perplexity is
the change against the 16-bit model. `*`: nothing beats it in memory, speed and quality at once.

- **e** explains every number of the row · **x** shows what was rejected, and why
- **[** and **]** ask what a shorter or longer context would change, **k** another type of KV cache
- **w** shows how many layers fit at other contexts · **f** the plot

Command line: `qplan recommend -v`, `qplan explain`, `qplan recommend --what-if`.
"""


class ChooseScreen(QplanScreen):
    """The fourth step."""

    TITLE_TEXT = "Choose"
    LEADS_ON = True
    BINDINGS = keys.CHOOSE

    def __init__(self, state: State) -> None:
        super().__init__(state)
        self._rows: tuple[Candidate, ...] = ()

    def body(self) -> Iterable[Widget]:
        """The table, memory, and the reasons beside the plot."""
        yield Static("", id="choose-head")
        yield Candidates(id="candidates", cursor_type="row", zebra_stripes=True)
        yield MemoryBars(id="choose-memory")
        yield Horizontal(Vertical(Static("", id="reasons"), id="reasons-box"), Scatter(id="scatter"), id="choose-foot")

    def on_mount(self) -> None:
        """Show the answer that the goal led to."""
        self.query_one(Candidates).focus()
        if self.state.answer is not None:
            self._fill(self.state.answer)

    def on_resize(self, event: events.Resize) -> None:
        """Columns and the foot as there is room."""
        self.set_class(event.size.height >= HIGH, "high")
        self.set_class(event.size.width >= WIDE, "wide")
        if self.state.answer is not None and self._columns() != self._shown_columns():
            self._fill(self.state.answer)

    def _columns(self) -> tuple[str, ...]:
        return texts.COLUMNS if self.size.width >= WIDE else texts.NARROW

    def _shown_columns(self) -> tuple[str, ...]:
        return tuple(str(column.value) for column in self.query_one(Candidates).columns)

    def _fill(self, answer: Recommendation) -> None:
        decision = answer.decision
        kept = self.state.candidate.variant if self.state.candidate else None
        self._rows = (decision.chosen, *decision.alternatives) if decision.chosen else ()
        table = self.query_one(Candidates)
        table.clear(columns=True)
        for name in self._columns():
            table.add_column(name, key=name)
        for candidate in self._rows:
            cells = texts.candidate_cells(candidate)
            if "" not in self._columns():  # the mark needs no column of its own
                cells["type"].append(f" {cells['']}")
            table.add_row(*(cells[name] for name in self._columns()))
        at = next((n for n, candidate in enumerate(self._rows) if candidate.variant == kept), 0)
        table.move_cursor(row=at)
        kv = answer.workload.kv_type or "f16, or q8_0 if that fits"
        self.query_one("#choose-head", Static).update(
            Content.assemble(
                (f" {answer.workload.context:,} tokens", "bold"),
                f" · KV cache {kv} · {len(self._rows)} fit, {len(decision.rejected)} rejected",
                *((f" · {note}", "$text-warning") for note in answer.notes if self.size.width >= WIDE),
            )
        )
        self._show(at)

    def on_data_table_row_highlighted(self, event: DataTable.RowHighlighted) -> None:
        """Another row: its memory, its reasons, its place in the plot."""
        self._show(event.cursor_row)

    def _show(self, row: int) -> None:
        answer = self.state.answer
        if not 0 <= row < len(self._rows) or answer is None:
            return
        candidate = self._rows[row]
        self.state = self.state.but(candidate=candidate)
        memory = candidate.estimate.memory
        self.query_one(MemoryBars).show((*memory.devices, memory.host))
        self.query_one(Scatter).show(self._rows, candidate)
        reasons = candidate.reasons if row == 0 else tuple(f"against the first: {r}" for r in candidate.reasons)
        spoken = tuple(entry.effect for entry in answer.decision.trace) if row == 0 else ()
        head = Text.assemble((candidate.variant.label(), "bold"), f" with {candidate.variant.runtime}")
        lacks = None if answer.simulated else environments.needed_by_variant(candidate.variant)
        first = (f"making it installs {lacks.title} first: {lacks.takes()}",) if lacks else ()
        self.query_one("#reasons", Static).update(Group(head, texts.bullets((*first, *reasons, *spoken))))

    def on_data_table_row_selected(self) -> None:
        """Enter or a second click takes the row."""
        self.action_forward()

    def on_answered(self, message: Answered) -> None:
        """A what-if: nothing fits, or the table anew."""
        message.stop()
        if message.answer.decision.chosen is None:
            self.post_message(Failed(nothing_fits(message.answer)))
            return
        self.state = self.state.but(answer=message.answer, workload=message.answer.workload)
        self._fill(message.answer)

    def _what_if(self, **changes: object) -> None:
        answer = self.state.answer
        if answer is None:
            return
        workload = dataclasses.replace(answer.workload, **changes)  # type: ignore[arg-type]
        model, hardware, simulated = answer.model, answer.hardware, answer.simulated
        self.ask(lambda: Answered(recommend_for(model, hardware, workload, simulated=simulated)), group="answer")

    def action_context(self, direction: int) -> None:
        """The next shorter or longer context."""
        if self.state.answer is None:
            return
        now = self.state.answer.workload.context
        known = what_if.contexts(self.state.answer.model, now)
        at = known.index(now) + direction
        if 0 <= at < len(known):
            self._what_if(context=known[at], context_fixed=True)

    def action_kv_type(self) -> None:
        """The next type of KV cache."""
        if self.state.answer is not None:
            now = self.state.answer.workload.kv_type
            at = KV_CHOICES.index(now) if now in KV_CHOICES else -1
            self._what_if(kv_type=KV_CHOICES[(at + 1) % len(KV_CHOICES)])

    def action_explain(self) -> None:
        """Every number of the row: terms, basis, source."""
        candidate = self.state.candidate
        if candidate is not None:
            self.app.push_screen(Page(f"{candidate.variant.label()}, every number", explained(candidate)))

    def action_rejected(self) -> None:
        """What was rejected and the number that decided."""
        if self.state.answer is not None:
            self.app.push_screen(Page("Not chosen", texts.rejections(self.state.answer.decision.rejected)))

    def action_what_if(self) -> None:
        """Layers that fit by context and type of KV cache."""
        answer = self.state.answer
        found = what_if.answers(answer, table=True) if answer is not None else None
        if answer is not None and found is not None:
            self.app.push_screen(Page(f"What if: {found.type}", what_if_table(found)))
        else:
            self.notify("a table of layers is for GGUF files, and the first choice is none")

    def action_frontier(self) -> None:
        """The plot on the whole screen."""
        self.app.push_screen(FrontierScreen(self.state))

    def action_forward(self) -> None:
        """On to the review of the row's plan."""
        if self.state.candidate is not None:
            self.post_message(Forward(self.state.but(plan=None, saved=False)))


def explained(candidate: Candidate) -> RenderableType:
    """All that is predicted of a candidate, with its arithmetic."""
    speed, quality = candidate.estimate.speed, candidate.estimate.quality
    return texts.spaced(
        texts.facts(texts.numbers(candidate)),
        texts.bullets(candidate.reasons),
        texts.prediction_terms("decode, tokens/s", speed.decode),
        texts.prediction_terms("prefill, tokens/s", speed.prefill),
        texts.prediction_terms("perplexity ratio", quality.perplexity_ratio),
        texts.prediction_terms("KL divergence, nats", quality.kl_divergence_nats),
        texts.notes((*candidate.estimate.memory.notes, *speed.notes, *quality.notes)),
    )


def what_if_table(found: what_if.WhatIf) -> RenderableType:
    """How many layers fit by context and type of the KV cache."""
    kv_types = list(dict.fromkeys(option.kv_type for option in found.options))
    rows = Table.grid(padding=(0, 3))
    for _ in ("context", *kv_types):
        rows.add_column(justify="right", no_wrap=True)
    rows.add_row(*(Text(name, "dim") for name in ("context", *(f"KV {kv}" for kv in kv_types))))
    cells = {(option.context, option.kv_type): what_if.cell(option) for option in found.options}
    for context in dict.fromkeys(option.context for option in found.options):
        rows.add_row(f"{context:,}", *(cells[context, kv] for kv in kv_types))
    longest = [f"{item.context:,} with {item.kv_type}" for item in found.longest if item.context is not None]
    return texts.spaced(rows, Text(f"fits whole up to: {', '.join(longest) or 'no context'}"))
