"""``qplan doctor``."""

from __future__ import annotations

from typing import Any

import click

from planner.cli.options import json_option
from planner.cli.output import console, escape, print_json, table
from planner.core.errors import Exit, UsageError


@click.command("doctor")
@click.option("--check-estimates", is_flag=True, help="Compare the formulas with llama.cpp itself over the catalog.")
@click.option("--models", help="With --check-estimates: these models, separated by commas.")
@click.option("--types", help="With --check-estimates: these GGUF types, separated by commas.")
@click.option("--all", "everything", is_flag=True, help="With --check-estimates: every model and type; takes minutes.")
@json_option
def command(check_estimates: bool, models: str | None, types: str | None, everything: bool, as_json: bool) -> int:
    """Check this installation: data, tools, store, machine. Exit code 1 if something qplan needs is broken.

    With --check-estimates llama.cpp itself is asked, for files of the models' shapes without weights, what it would
    write and allocate. Exit code 1 if a size is not exact or a device's total is off by more than 5 %.
    """
    if check_estimates:
        return run_check(models, types, everything=everything, as_json=as_json)
    if models is not None or types is not None or everything:
        raise UsageError("--models, --types and --all belong to --check-estimates")
    from planner import FORMAT_VERSION
    from planner.core.codec import encode
    from planner.workflow.doctor import examine

    findings = examine()
    if as_json:
        print_json({"format_version": FORMAT_VERSION, "findings": [encode(finding) for finding in findings]})
    else:
        rows = table("", "what", "found", "hint")
        for finding in findings:
            colour = {"ok": "green", "missing": "yellow", "broken": "red"}[finding.state]
            rows.add_row(f"[{colour}]{finding.state}[/]", *map(escape, (finding.what, finding.found, finding.hint)))
        console().print(rows)
    return Exit.FAILED if any(finding.state == "broken" for finding in findings) else Exit.DONE


def run_check(models: str | None, types: str | None, *, everything: bool, as_json: bool) -> int:
    """Compare the formulas with llama.cpp; 1 if they no longer hold."""
    from planner.workflow.check_estimates import check_document, check_estimates, names_of

    if models is not None and everything:
        raise UsageError("--models names some, --all takes every model", hint="leave one of them out")
    chosen, kinds = names_of(models), names_of(types)
    with console(stderr=True).status("asking llama.cpp") as status:

        def progress(done: int, total: int, name: str) -> None:
            status.update(f"asking llama.cpp about {name}, {done + 1} of {total}")
            if not status.console.is_terminal and done % 10 == 0:
                status.console.print(f"asking llama.cpp about {name}, {done + 1} of {total}")

        check = check_estimates(chosen, kinds, everything=everything, progress=progress)
    if as_json:
        print_json(check_document(check))
    else:
        show_check(check)
    return Exit.DONE if check.ok else Exit.FAILED


def show_check(check: Any) -> None:
    """A table per architecture, the worst figures, and the verdict."""
    from planner.workflow.check_estimates import MOST_TOTAL_ERROR, by_architecture

    out = console()
    rows = table(
        "architecture",
        "models>",
        "sizes exact>",
        "weights exact>",
        "KV exact>",
        "compute mean>",
        "worst>",
        "total mean>",
        "worst>",
    )
    for row in by_architecture(check):
        sizes = f"{row.size_exact_count}/{row.size_count}"
        shares = (_share(row.weights_exact_fraction), _share(row.cache_exact_fraction))
        errors = (row.compute_mean, row.compute_worst, row.total_mean, row.total_worst)
        rows.add_row(row.architecture, str(row.model_count), sizes, *shares, *map(_error, errors))
    out.print(rows)
    show_worst(check)
    for found in check.comparisons:
        if found.disagreement:
            label = f"{found.model.name} {found.variant.label()}"
            out.print(f"[red]disagree[/] {label}: {escape(found.disagreement)}")
    for name, reason in check.failures:
        out.print(f"[red]no answer[/] {name}: {escape(reason)}")
    for note in sorted({note for found in check.comparisons for note in found.notes}):
        out.print(f"[dim]note: {escape(note)}[/]")
    where = f"GPUs: {', '.join(check.gpus)}" if check.gpus else "host only, as it sees no GPU"
    verdict = "[green]they hold[/]" if check.ok else "[red]they do not hold[/]"
    sizes = "every size exact" if check.sizes_exact else "[red]sizes differ[/]"
    out.print(
        f"{len(check.comparisons)} comparisons with {check.tool} ({where}): {sizes}; totals off by "
        f"{check.mean_total:.3%} on average, {check.worst_total:.2%} at worst (limit {MOST_TOTAL_ERROR:.0%}): {verdict}"
    )


def show_worst(check: Any) -> None:
    """The largest differences."""
    from planner.workflow.check_estimates import placement_label, worst

    rows = table("worst", "type", "placement", "where", "part", "formula>", "llama.cpp>", "difference>")
    for found, row in worst(check):
        kind = f"{found.variant.type}{' +imatrix' if found.variant.imatrix else ''}"
        figures = (f"{row.formula_bytes:,}", f"{row.oracle_bytes:,}", f"{row.relative:+.3%}")
        rows.add_row(found.model.name, kind, placement_label(found.placement), row.where, row.part, *figures)
    if rows.row_count:
        console().print(rows)


def _share(fraction: float | None) -> str:
    return "" if fraction is None else f"{fraction:.0%}"


def _error(relative: float | None) -> str:
    return "" if relative is None else f"{relative:.3%}"
