"""Choose, for a fine-tuning: the ways that fit, and the block of the plan that each leads to."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from rich.text import Text
from textual.containers import VerticalScroll
from textual.content import Content
from textual.widget import Widget
from textual.widgets import DataTable, Static

from planner.core.finetuning import FinetuneChoice
from planner.core.units import format_bytes, format_seconds
from planner.core.wording import finetune_label, ranged
from planner.tui import keys, texts
from planner.tui.messages import Forward
from planner.tui.screens.base import QplanScreen
from planner.tui.screens.dialogs import Page
from planner.tui.state import State
from planner.workflow.finetuning import with_choice

WIDE = 100
"""From this width there is room for the sources of what training takes."""
COLUMNS = ("way", "sequences", "memory", "time a step")


class Ways(DataTable[object]):
    """Bases that a model can be fine-tuned on."""

    HELP = """\
## Ways to fine-tune it

QLoRA keeps the model in 4 bits (NF4, double quantization), LoRA in 16; both train low-rank matrices beside it.
Sequences are *at once* x *times per optimizer step*. Memory is the peak with what the runtime takes besides.

Command line: `qplan recommend --objective finetune`, `--lora-base`.
"""


class FinetuneScreen(QplanScreen):
    """The fourth step, of the objective ``finetune``."""

    TITLE_TEXT = "Choose"
    LEADS_ON = True
    BINDINGS = keys.FINETUNE

    def __init__(self, state: State) -> None:
        super().__init__(state)
        decision = state.answer.finetuning if state.answer else None
        self._ways = (decision.chosen, *decision.alternatives) if decision and decision.chosen else ()

    def body(self) -> Iterable[Widget]:
        """The ways above the block of one."""
        yield Static("", id="choose-head")
        yield Ways(id="ways", cursor_type="row", zebra_stripes=True)
        yield VerticalScroll(Static("", id="training"), classes="card", id="training-card", can_focus=True)

    def on_mount(self) -> None:
        """Show the answer that the goal led to."""
        table = self.query_one(Ways)
        table.focus()
        table.add_columns(*COLUMNS)
        for choice in self._ways:
            table.add_row(*_cells(choice))
        data = self.state.dataset.name if self.state.dataset else "no data: a smoke test on qplan's own texts"
        self.query_one("#choose-head", Static).update(Content.assemble((" fine-tuning", "bold"), f" · {data}"))
        kept = self.state.finetuning
        at = next((n for n, way in enumerate(self._ways) if kept and way.settings == kept.settings), 0)
        table.move_cursor(row=at)
        self._show(at)

    def on_data_table_row_highlighted(self, event: DataTable.RowHighlighted) -> None:
        """Another way: its block."""
        self._show(event.cursor_row)

    def _show(self, row: int) -> None:
        if not 0 <= row < len(self._ways):
            return
        choice = self._ways[row]
        self.state = self.state.but(finetuning=choice)
        self.query_one("#training-card").border_title = finetune_label(choice.settings)
        self.query_one("#training", Static).update(texts.training(choice, sources=self.app.size.width >= WIDE))

    def on_data_table_row_selected(self) -> None:
        """Enter or a second click takes the row."""
        self.action_forward()

    def action_rejected(self) -> None:
        """What does not fit, with the numbers."""
        answer = self.state.answer
        if answer is not None and answer.finetuning is not None:
            self.app.push_screen(Page("Not chosen", texts.rejections(answer.finetuning.rejected)))

    def action_forward(self) -> None:
        """On to the review of the way's plan."""
        answer, choice = self.state.answer, self.state.finetuning
        if answer is None or choice is None:
            return
        wanted = with_choice(answer, choice)
        workload = dataclasses.replace(self.state.workload, finetuning=wanted.workload.finetuning)
        changed = self.state.but(workload=workload, answer=wanted, plan=None, saved=False)
        self.post_message(Forward(changed))


def _cells(choice: FinetuneChoice) -> tuple[Text, ...]:
    settings, made = choice.settings, choice.estimate
    room = f" of {format_bytes(made.capacity_bytes)}" if made.capacity_bytes else ""
    seconds = made.seconds_per_step
    return (
        Text(finetune_label(settings)),
        Text(f"{settings.micro_batch} x {settings.accumulation} of {settings.sequence_length}"),
        Text(f"{format_bytes(made.needed_bytes)}{room}"),
        Text(ranged(seconds, format_seconds) if seconds else "unknown"),
    )
