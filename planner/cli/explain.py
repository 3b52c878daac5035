"""``qplan explain MODEL``: the arithmetic of an estimate, term by term."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from planner.cli.estimate import case_of, case_options
from planner.cli.output import console, table
from planner.core.errors import Exit
from planner.core.units import format_bytes

if TYPE_CHECKING:
    from planner.core.estimates import Prediction


@click.command("explain")
@click.argument("model")
@click.option("--imatrix", is_flag=True, help="Quantized with an importance matrix.")
@case_options
def command(model: str, **given: Any) -> int:
    """Print where each number of an estimate of MODEL comes from: terms, basis, source."""
    from planner.cli.estimate import show
    from planner.workflow.estimates import computed_case

    computed = computed_case(case_of(model, given))
    show(*computed)
    made = computed[-1]
    terms("decode, tokens/s", made.speed.decode)
    terms("prefill, tokens/s", made.speed.prefill)
    terms("perplexity ratio", made.quality.perplexity_ratio)
    terms("KL divergence, nats", made.quality.kl_divergence_nats)
    return Exit.DONE


def terms(title: str, prediction: Prediction | None) -> None:
    """The terms of one prediction, its result and its source."""
    out = console()
    if prediction is None:
        out.print(f"[bold]{title}[/]: nothing sourced is known")
        return
    rows = table(title, "value>", "unit")
    for name, value, unit in prediction.terms:
        rows.add_row(name, format_bytes(value, 3) if unit == "bytes" else f"{value:.5g}", unit)
    rows.add_row("[bold]result[/]", f"{prediction.value:.5g}", f"80 %: {prediction.low:.5g} - {prediction.high:.5g}")
    out.print(rows)
    out.print(f"  [dim]{prediction.basis}: {prediction.source}[/]\n")
