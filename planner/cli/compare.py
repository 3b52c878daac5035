"""``qplan compare RUN…``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from planner.cli.options import existing, json_option
from planner.cli.output import console, print_json, table
from planner.core.errors import Exit
from planner.core.measurement import QUANTITIES
from planner.core.wording import TITLES, quantity

if TYPE_CHECKING:
    from planner.report.document import Judged
    from planner.report.page import Run


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
    """A row for each quantity and a column for each run: measured, and what had been predicted below it."""
    named = table("quantity", *(f"{run.report.name}>" for run in runs))
    named.add_row(
        "runtime", *(run.report.measured_variant.runtime if run.report.measured_variant else "-" for run in runs)
    )
    named.add_row("bits per weight", *(f"{run.bits.bits_per_weight:.3f}" if run.bits else "-" for run in runs))
    for name in QUANTITIES:
        judged = [{verdict.quantity: verdict for verdict in run.report.verdicts}.get(name) for run in runs]
        cells = [_cell(name, run.report.measured.get(name), known) for run, known in zip(runs, judged, strict=True)]
        named.add_row(TITLES[name], *cells)
    tops = (run.report.same_top_fraction for run in runs)
    named.add_row("same top token", *("-" if top is None else f"{top:.2%}" for top in tops))
    console().print(named)
    console().print("[dim]measured, below it the 95 % range that the plan expected[/]")


def _cell(name: str, measured: float | None, known: Judged | None) -> str:
    said = f"\n[dim]{quantity(name, known.low)} - {quantity(name, known.high)}[/]" if known else ""
    mark = "" if known is None or known.ok is not False else " [red]outside[/]"
    return f"{quantity(name, measured)}{mark}{said}"
