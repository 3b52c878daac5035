"""Options of the objective ``finetune``, and its block on the page of a recommendation."""

from __future__ import annotations

import functools
import shlex
from collections.abc import Callable
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any, TypeVar

import click

from planner.cli.options import Finite
from planner.cli.output import escape, table
from planner.core.errors import UsageError
from planner.core.finetuning import BASES, OPTIMIZERS, FinetuneWish
from planner.core.wording import finetune_facts, finetune_memory, rejection_numbers
from planner.core.workload import Workload

if TYPE_CHECKING:
    from rich.console import Console

    from planner.cli.tables import Table
    from planner.core.finetuning import FinetuneChoice, FinetuneDecision
    from planner.workflow.recommend import Recommendation

F = TypeVar("F", bound=Callable[..., Any])

_OPTIONS = (
    click.option("--lora-base", "base", type=click.Choice(BASES), help="Finetune: frozen weights; default: nf4."),
    click.option("--lora-rank", "rank", type=click.IntRange(1, 1024), help="Finetune: rank of LoRA; default: 16."),
    click.option(
        "--sequence-length", type=click.IntRange(8), help="Finetune: tokens of a sequence; default: the most that fit."
    ),
    click.option("--batch", type=click.IntRange(1, 4096), help="Finetune: sequences per step; default: 16."),
    click.option("--micro-batch", type=click.IntRange(1, 4096), help="Finetune: at once; default: the most that fit."),
    click.option("--optimizer", type=click.Choice(OPTIMIZERS), help="Finetune; default by device."),
    click.option("--learning-rate", type=Finite(1e-7, 1.0), help="Finetune; default: 2e-4, large models 1e-4."),
    click.option("--steps", type=click.IntRange(1), help="Finetune: optimizer steps; default: once over the data."),
)
_FIELDS = tuple(field.name for field in fields(FinetuneWish))


def finetune_options(command: F) -> F:
    """Add the options; they go into the command's ``workload``. Goes above ``workload_options``' wrapper.

    Raises:
        UsageError: one is given with another objective.
    """

    @functools.wraps(command)
    def wrapper(*, workload: Workload, **given: Any) -> Any:
        wish = FinetuneWish(**{name: given.pop(name) for name in _FIELDS})
        if wish != FinetuneWish() and workload.objective != "finetune":
            named = next(name for name in _FIELDS if getattr(wish, name) is not None)
            option = f"--{'lora-' * (named in ('base', 'rank'))}{named.replace('_', '-')}"
            raise UsageError(f"{option} is for fine-tuning", hint="add --objective finetune")
        return command(workload=replace(workload, finetuning=wish), **given)

    for option in reversed(_OPTIONS):
        wrapper = option(wrapper)
    return wrapper  # type: ignore[return-value]


def show(out: Console, answer: Recommendation, decision: FinetuneDecision, *, verbose: bool) -> None:
    """The block "fine-tuning": settings, memory by term, reasons, and what does not fit."""
    out.print("[bold]Fine-tuning[/]")
    if decision.chosen is None:
        out.print("[bold red]nothing fits[/]")
    else:
        _choice(out, decision.chosen, verbose)
    for item in decision.rejected:
        out.print(f"  · {item.type}: {escape(item.reason)}{rejection_numbers(item)} [dim]\\[{item.rule}][/]")
    if decision.hint:
        out.print(f"hint: {escape(decision.hint)}")
    if decision.chosen is not None and answer.model.source.kind != "size":
        plan = shlex.join(["qplan", "plan", answer.model.source.location, "--objective", "finetune"])
        out.print("[bold]Do it[/]")
        out.print(f"  {plan} --dataset FILE -o plan.json && qplan apply plan.json", soft_wrap=True, markup=False)
    out.print()


def _choice(out: Console, choice: FinetuneChoice, verbose: bool) -> None:
    for label, text in finetune_facts(choice):
        out.print(f"  [dim]{label:<8}[/] {text}")
    out.print()
    out.print(memory_table(choice, sources=verbose))
    for reason in choice.reasons:
        out.print(f"  · {escape(reason)}")
    for note in choice.estimate.notes:
        out.print(f"[dim]note: {escape(note)}[/]")


def memory_table(choice: FinetuneChoice, *, sources: bool) -> Table:
    """Memory of training by term; with ``sources``, where each comes from."""
    about = "80 % range, source" if sources else "80 % range"
    rows = table(f"memory on {escape(choice.estimate.device)}", "bytes>", about)
    terms = {term.name for term in choice.estimate.terms}
    for name, size, said in finetune_memory(choice):
        if name in terms:
            rows.add_row(escape(name), size, f"[dim]{escape(said)}[/]" if sources else "")
        else:
            bold = "bold" if name == "peak" else ""
            rows.add_row(name, size, said, style=bold)
    return rows
