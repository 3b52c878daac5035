"""``qplan show FILE``: a plan or a report for a person."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from planner.cli.options import existing, json_option
from planner.cli.output import console, escape, print_json, table
from planner.cli.recipe import show_recipe
from planner.core.errors import Exit, InputError
from planner.core.units import format_bytes, format_seconds
from planner.core.wording import TITLES, quantity, quantity_span, span

if TYPE_CHECKING:
    from pathlib import Path

    from planner.core.plan import Plan, Step

COLOURS = {True: "green", False: "red", None: "yellow"}


@click.command("show")
@click.argument("file")
@json_option
def command(file: str, as_json: bool) -> int:
    """Print the plan or report FILE for a person; the folder of a run stands for its report."""
    from planner.core.codec import read_json
    from planner.workflow.planning import load_plan
    from planner.workflow.reporting import is_report, run_report

    path = run_report(existing(file))
    document = read_json(path)
    if is_report(document):
        check_report(document, path)
        print_json(document) if as_json else show_report(document)
        return Exit.DONE
    plan = load_plan(path)
    print_json(document) if as_json else show_plan(plan)
    return Exit.DONE


def check_report(document: dict[str, Any], path: Path) -> None:
    """Refuse a report that lacks what is printed of one.

    Raises:
        InputError: naming a missing part.
    """
    verdicts = document["verdicts"]
    whole = {"artifact": str, "measured": dict, "verdicts": list}
    lacking = [name for name, kind in whole.items() if not isinstance(document.get(name), kind)]
    keys = {"quantity", "predicted", "low", "high", "measured", "ok", "position"}
    if not lacking and not all(isinstance(verdict, dict) and keys <= set(verdict) for verdict in verdicts):
        lacking = ["a whole verdict"]
    if lacking:
        raise InputError(f"{path} is no report of qplan", numbers=f"it lacks {', '.join(lacking)}", code="bad-document")


def show_plan(plan: Plan) -> None:
    """The plan: what, where, expectations, steps."""
    out = console()
    out.print(f"[bold]{escape(plan.model.name)}[/] as [bold green]{plan.variant.label()}[/], {escape(plan.artifact)}")
    out.print(
        f"on {escape(plan.hardware.name)} [dim]{plan.hardware.identity}[/]{' (simulated)' * plan.hardware.simulated}"
    )
    placement = plan.placement
    where = f"{placement.gpu_layers} layers on GPU" if placement.gpu_count else f"CPU, {placement.threads} threads"
    where += f" with the experts of {placement.cpu_expert_layers} in RAM" * (placement.cpu_expert_layers > 0)
    out.print(f"context {placement.context}, KV cache {placement.kv_type}, {where}")
    for reason in plan.reasons:
        out.print(f"  · {escape(reason)}")
    expected = table("expected", "value>", "95 % range>", "basis")
    for item in plan.expectations:
        expected_range = quantity_span(item.quantity, item.low, item.high)
        predicted = quantity(item.quantity, item.predicted)
        expected.add_row(TITLES[item.quantity], predicted, expected_range, item.basis)
    out.print(expected)
    for source in dict.fromkeys(item.source for item in plan.expectations):
        out.print(f"[dim]source: {source}[/]")
    steps = table("step", "makes", "size>", "peak memory>", "time>", "80 % range>", give_way=("80 % range>",))
    for step in plan.steps:
        steps.add_row(*_step_row(step))
    out.print(steps)
    if peak := plan.disk_peak_bytes():
        kept = sum(step.predicted_bytes or 0 for step in plan.making_steps() if not step.intermediate)
        out.print(f"disk: {format_bytes(peak)} while it runs, {format_bytes(kept)} in the end")
    if plan.variant.recipe:
        show_recipe(plan.variant.recipe, f"types as planned, for at most {_target(plan)}")


def _target(plan: Plan) -> str:
    return format_bytes(next((step.target_bytes for step in plan.steps if step.target_bytes), None), 2)


def _step_row(step: Step) -> tuple[str, ...]:
    name = f"{step.name}{' (removed at the end)' if step.intermediate else ''}"
    size = format_bytes(step.predicted_bytes) if step.predicted_bytes else ""
    memory = format_bytes(step.predicted_memory.value) if step.predicted_memory else ""
    if step.predicted_gpu_memory is not None:
        memory += f", {format_bytes(step.predicted_gpu_memory.value)} of the GPU's"
    took = step.predicted_seconds
    time = (format_seconds(took.value), span(format_seconds(took.low), format_seconds(took.high))) if took else ("", "")
    return name, step.output or "the report", size, memory, *time


def show_report(document: dict[str, Any]) -> None:
    """Predicted beside measured, a verdict for each quantity, and the notes."""
    out = console()
    out.print(f"[bold]{escape(document['artifact'])}[/]")
    rows = table("quantity", "predicted>", "range>", "measured>", "ratio>", "verdict")
    for verdict in document["verdicts"]:
        rows.add_row(*_verdict_row(verdict))
    out.print(rows)
    for name, value in document["measured"].items():
        if name not in {v["quantity"] for v in document["verdicts"]}:
            out.print(f"  {TITLES.get(name, name)}: {quantity(name, value)}, nothing was predicted")
    _show_steps(document.get("steps", ()))
    if recipe := document.get("recipe"):
        show_recipe([(str(name), str(type_)) for name, type_ in recipe.items()], "types as made")
    for note in document.get("notes", ()):
        out.print(f"[dim]note: {escape(str(note))}[/]")


def _show_steps(steps: list[dict[str, Any]]) -> None:
    """Time, memory and bytes of each step beside what was predicted, and the hash of what it made."""
    out = console()
    rows = table("step", "took", "predicted>", "range>", "measured>", "ratio>", "verdict")
    for step in steps:
        for verdict in step.get("verdicts", ()):
            rows.add_row(step["step"], *_verdict_row(verdict))
    if rows.row_count:
        out.print(rows)
    for step in steps:
        out.print(f"[dim]step {step['step']}: {format_seconds(step['seconds'])}, sha256 {step['sha256'][:16]}[/]")
        for note in step.get("notes", ()):
            out.print(f"[dim]  {escape(str(note))}[/]")


def _verdict_row(verdict: dict[str, Any]) -> tuple[str, ...]:
    name = verdict["quantity"]
    measured, predicted = verdict["measured"], verdict["predicted"]
    ratio = f"{measured / predicted:.3f}" if measured is not None and predicted else "-"
    return (
        TITLES.get(name, name),
        quantity(name, predicted),
        quantity_span(name, verdict["low"], verdict["high"]),
        quantity(name, measured),
        ratio,
        f"[{COLOURS[verdict['ok']]}]{verdict['position']}[/]",
    )
