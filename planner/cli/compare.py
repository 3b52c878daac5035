"""``qplan compare RUN…``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from planner.cli.options import existing, json_option
from planner.cli.output import console, escape, print_json, table
from planner.core.errors import Exit
from planner.core.measurement import (
    DECODE,
    FILE_BYTES,
    KL_DIVERGENCE,
    PEAK_MEMORY,
    PERPLEXITY_RATIO,
    PREFILL,
    QUANTITIES,
)
from planner.core.wording import TITLES, quantity, quantity_span

if TYPE_CHECKING:
    from planner.cli.tables import Table
    from planner.report.document import Judged
    from planner.report.page import Run

SHORT_TITLES = {
    FILE_BYTES: "file",
    PEAK_MEMORY: "peak memory",
    PREFILL: "prefill t/s",
    DECODE: "decode t/s",
    PERPLEXITY_RATIO: "ppl ratio",
    KL_DIVERGENCE: "KL, nats",
}
"""Quantities at the head of a column."""
GIVE_WAY = ("same top>", "bits>", "prefill t/s>")


@click.command("compare")
@click.argument("runs", nargs=-1, required=True, metavar="RUN...")
@click.option("-o", "--output", metavar="FILE", help="Write the comparison as an HTML page too.")
@json_option
def command(runs: tuple[str, ...], output: str | None, as_json: bool) -> int:
    """Put several runs side by side: size, memory, speed, perplexity and KL divergence.

    A RUN is a report.json, the folder it is in, or the artifact it is about.
    """
    from planner import FORMAT_VERSION
    from planner.workflow.reporting import comparison_document, load_run, write_comparison

    loaded = tuple(load_run(run) for run in runs)
    if as_json:
        print_json({"format_version": FORMAT_VERSION, "runs": comparison_document(loaded)})
    else:
        show(loaded)
    if output:
        click.echo(f"wrote {write_comparison(loaded, existing(output))}", err=True)
    return Exit.DONE


def show(runs: tuple[Run, ...]) -> None:
    """The runs as columns where they fit beside each other, else as rows of what was measured alone."""
    out = console()
    model, names = _names(runs)
    if model:
        out.print(f"[bold]{escape(model)}[/]")
    beside = side_by_side(runs, names)
    if beside.fits(out):
        out.print(beside)
        out.print("[dim]measured, below it the 95 % range that the plan expected[/]")
        return
    out.print(one_below_another(runs, names))
    out.print("[dim]measured; [red]![/] outside of the 95 % range that the plan expected[/]")
    out.print("[dim]a wider terminal, -o FILE.html and --json show the ranges[/]")


def _names(runs: tuple[Run, ...]) -> tuple[str, list[str]]:
    """The model that all runs are of, with their variants; without a common model their whole names."""
    plans = [run.report.plan for run in runs]
    models = {plan.model.name if plan else "" for plan in plans}
    if len(models) > 1 or models == {""}:
        return "", [run.report.name for run in runs]
    return models.pop(), [plan.variant.label() for plan in plans if plan]


def side_by_side(runs: tuple[Run, ...], names: list[str]) -> Table:
    """A row for each quantity and a column for each run: measured, and what had been predicted below it."""
    made = table("quantity", *(f"{escape(name)}>" for name in names))
    variants = (run.report.measured_variant for run in runs)
    made.add_row("runtime", *(variant.runtime if variant else "-" for variant in variants))
    made.add_row("bits per weight", *(f"{run.bits.bits_per_weight:.3f}" if run.bits else "-" for run in runs))
    for name in QUANTITIES:
        made.add_row(TITLES[name], *(_cell(name, *found) for found in _found(runs, name)))
    made.add_row("same top token", *(_top(run) for run in runs))
    return made


def one_below_another(runs: tuple[Run, ...], names: list[str]) -> Table:
    """A row for each run and a column for each quantity, as measured."""
    made = table("run", "bits>", *(f"{SHORT_TITLES[name]}>" for name in QUANTITIES), "same top>", give_way=GIVE_WAY)
    found = {name: _found(runs, name) for name in QUANTITIES}
    for index, (run, label) in enumerate(zip(runs, names, strict=True)):
        bits = f"{run.bits.bits_per_weight:.2f}" if run.bits else "-"
        cells = (_short_cell(name, *found[name][index]) for name in QUANTITIES)
        made.add_row(escape(label), bits, *cells, _top(run))
    return made


def _found(runs: tuple[Run, ...], name: str) -> list[tuple[float | None, Judged | None]]:
    """What each run measured of a quantity, and the verdict on it."""
    judged = ({verdict.quantity: verdict for verdict in run.report.verdicts}.get(name) for run in runs)
    return [(run.report.measured.get(name), known) for run, known in zip(runs, judged, strict=True)]


def _cell(name: str, measured: float | None, known: Judged | None) -> str:
    said = f"\n[dim]{quantity_span(name, known.low, known.high)}[/]" if known else ""
    return f"{quantity(name, measured)}{' [red]outside[/]' * _is_outside(known)}{said}"


def _short_cell(name: str, measured: float | None, known: Judged | None) -> str:
    return f"{quantity(name, measured)}{'[red]![/]' * _is_outside(known)}"


def _is_outside(known: Judged | None) -> bool:
    return known is not None and known.ok is False


def _top(run: Run) -> str:
    top = run.report.same_top_fraction
    return "-" if top is None else f"{top:.2%}"
