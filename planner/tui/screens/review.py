"""Review: the plan, its steps, the disk and the time they take; save it, or carry it out."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text
from textual.containers import Horizontal, VerticalScroll
from textual.widget import Widget
from textual.widgets import Button, Input, Label, Static

from planner.core.errors import QplanError
from planner.core.plan import Plan, Step
from planner.core.units import format_bytes, format_seconds
from planner.core.wording import TITLES, quantity, quantity_span, span
from planner.tui import keys, texts
from planner.tui.messages import Failed, Forward, Planned
from planner.tui.screens.base import QplanScreen
from planner.workflow import environments, library
from planner.workflow.planning import Measuring, conversion_note, make_plan, save_plan

if TYPE_CHECKING:
    from planner.workflow.environments import Offer

PLANNING = "planning: reading the model's files …"


def planned(plan: Plan) -> Planned:
    """The plan, with what this machine lacks to carry it out."""
    return Planned(plan, () if plan.hardware.simulated else environments.needed_by(plan))


class PathInput(Input):
    """Where something is written."""

    HELP = """\
## Where

The plan is a JSON file without command lines; `qplan apply` carries it out. The artifact, its report and the receipts
go into the folder. A file that qplan did not write is never replaced.

Command line: `qplan plan -o FILE`, `qplan apply FILE --output DIR`.
"""


class ReviewScreen(QplanScreen):
    """The fifth step."""

    TITLE_TEXT = "Review"
    LEADS_ON = True
    HELP = """\
## Review

What will be made, what its measurements should give (95 % ranges) and what each step takes. **Carry it out** saves the
plan and begins; nothing is written before.

Command line: `qplan plan`, `qplan show plan.json`, `qplan check plan.json`.
"""
    BINDINGS = keys.REVIEW

    def body(self) -> Iterable[Widget]:
        """Where to, what is expected, which steps."""
        yield Horizontal(
            Label("Folder"),
            PathInput(str(self.state.output), id="output", compact=True),
            Label("Plan"),
            PathInput(str(self.state.plan_path), id="plan-path", compact=True),
            classes="form-row paths",
        )
        yield VerticalScroll(Static(PLANNING, id="plan"), classes="card", id="plan-card", can_focus=True)
        yield Horizontal(
            Button("Carry it out", id="start", variant="primary", disabled=True, compact=True),
            Button("Save the plan", id="save", disabled=True, compact=True),
            classes="buttons",
        )

    def on_mount(self) -> None:
        """Plan in a thread: the model's files are pinned by their hashes."""
        self.query_one("#plan-card").border_title = "the plan"
        self.query_one("#plan-card").focus()
        answer, candidate = self.state.answer, self.state.candidate
        if answer is None:
            return
        if answer.finetuning is not None:
            measuring = Measuring(dataset=self.state.dataset)
            self.ask(lambda: planned(make_plan(answer, measuring=measuring)), group="plan")
            return
        if candidate is None:
            return
        if not library.executable(candidate):
            self._by_hand()
            return
        self.ask(lambda: planned(make_plan(answer, candidate)), group="plan")

    def _by_hand(self) -> None:
        """A method that apply does not carry out: the commands that do."""
        candidate, model = self.state.candidate, self.state.model
        if candidate is None or model is None:
            return
        head = f"This version recommends {candidate.variant.label()} but does not carry it out. By hand:"
        commands = [texts.titled(n.capitalize(), t) for n, t in library.commands(model, candidate).items()]
        page = texts.spaced(Text(head, "bold"), texts.facts(texts.numbers(candidate)), *commands)
        self.query_one("#plan", Static).update(page)

    def on_planned(self, message: Planned) -> None:
        """Show the plan."""
        message.stop()
        self.state = self.state.but(plan=message.plan, installs=message.installs)
        page = texts.spaced(
            _what(message.plan, message.installs),
            _expected(message.plan),
            _steps(message.plan),
            *self._reasons(message.plan),
        )
        self.query_one("#plan", Static).update(page)
        for button in self.query(Button):
            button.disabled = False
        self.query_one("#start", Button).focus()

    def _reasons(self, plan: Plan) -> list[RenderableType]:
        """Of a training its settings and memory, of an artifact why it was chosen and what its making may lack."""
        training, candidate = self.state.finetuning, self.state.candidate
        if training is not None:
            told = dataclasses.replace(training, reasons=plan.reasons)
            return [texts.training(told, sources=False)]
        needed = conversion_note(self.state.model) if self.state.model else None
        return [texts.bullets(candidate.reasons if candidate else ()), texts.notes((needed,) if needed else ())]

    def on_button_pressed(self, event: Button.Pressed) -> None:
        """By mouse or Enter."""
        if event.button.id == "start":
            self.action_forward()
        else:
            self.action_save()

    def on_input_submitted(self) -> None:
        """Enter in a field goes to the button."""
        self.query_one("#start", Button).focus()

    def _save(self) -> bool:
        """The plan into its file; an error goes to the wizard."""
        plan = self.state.plan
        if plan is None:
            return False
        path = Path(self.query_one("#plan-path", Input).value or "plan.json").expanduser()
        output = Path(self.query_one("#output", Input).value or ".").expanduser()
        try:
            save_plan(plan, path)
        except QplanError as error:
            self.post_message(Failed(error))
            return False
        self.state = self.state.but(plan_path=path, output=output, saved=True)
        return True

    def action_save(self) -> None:
        """Write the plan and stay."""
        if self._save():
            self.notify(f"wrote {self.state.plan_path}", markup=False)

    def action_forward(self) -> None:
        """Write the plan and carry it out."""
        if self._save():
            self.post_message(Forward(self.state))


def _what(plan: Plan, installs: Sequence[Offer]) -> RenderableType:
    trains = plan.finetune_step() is not None
    size = plan.artifact_step().predicted_bytes if trains else plan.estimate.size.file_bytes
    peak = plan.disk_peak_bytes()
    kept = sum(step.predicted_bytes or 0 for step in plan.making_steps() if not step.intermediate)
    simulated = " (not this machine: save the plan and apply it there)" if plan.hardware.simulated else ""
    rows = [
        ("makes", f"{plan.artifact}, {format_bytes(size, 2)}"),
        ("on", f"{plan.hardware.name}{simulated}"),
        ("disk", f"{format_bytes(peak)} while it runs, {format_bytes(kept)} in the end" if peak else "unknown"),
        ("time", _time(plan)),
        *(("installs", f"{offer.title}, once: {offer.takes()}") for offer in installs),
    ]
    return texts.facts(rows)


def _time(plan: Plan) -> str:
    known = [step.predicted_seconds for step in plan.making_steps()]
    if not known or any(item is None for item in known):
        return "unknown"
    parts = [
        f"{s.name} {format_seconds(s.predicted_seconds.value)}" for s in plan.making_steps() if s.predicted_seconds
    ]
    return f"{', '.join(parts)}{'' if plan.finetune_step() else ', then measuring'}"


def _expected(plan: Plan) -> Table:
    rows = [
        (
            TITLES[item.quantity],
            quantity(item.quantity, item.predicted),
            quantity_span(item.quantity, item.low, item.high),
            item.basis,
        )
        for item in plan.expectations
    ]
    return _grid(("expected", "value>", "95 % range>", "basis"), rows)


def _steps(plan: Plan) -> Table:
    columns = ("step", "makes>", "memory>", "time>", "80 % range>", "file")
    return _grid(columns, [_step(step) for step in plan.steps])


def _step(step: Step) -> tuple[str, ...]:
    took = step.predicted_seconds
    return (
        step.name,
        format_bytes(step.predicted_bytes) if step.predicted_bytes else "",
        _memory(step),
        format_seconds(took.value) if took else "",
        span(format_seconds(took.low), format_seconds(took.high)) if took else "",
        "removed" if step.intermediate else "kept" if step.output else "report",
    )


def _memory(step: Step) -> str:
    """Of the machine, and of its GPU where a step takes that too."""
    known = ((step.predicted_memory, ""), (step.predicted_gpu_memory, " of the GPU's"))
    return ", ".join(f"{format_bytes(found.value)}{whose}" for found, whose in known if found is not None)


def _grid(columns: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> Table:
    """An open table; a column whose name ends in ``>`` is right-aligned."""
    made = Table.grid(padding=(0, 2))
    for column in columns:
        right = column.endswith(">")
        made.add_column(justify="right" if right else "left", no_wrap=right or column == columns[0], overflow="fold")
    made.add_row(*(Text(column.removesuffix(">"), "dim") for column in columns))
    for row in rows:
        made.add_row(*(Text(cell) for cell in row))
    return made
