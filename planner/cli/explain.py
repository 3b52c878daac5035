"""``qplan explain MODEL``: the arithmetic of an estimate, term by term."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from planner.cli.estimate import case_of, case_options
from planner.cli.options import json_option
from planner.cli.output import console, escape, print_json, table
from planner.core.candidate import KernelUse, Rejection
from planner.core.errors import Exit
from planner.core.units import format_bytes

if TYPE_CHECKING:
    from planner.core.estimates import Prediction


TITLES = ("decode, tokens/s", "prefill, tokens/s", "perplexity ratio", "KL divergence, nats")


@click.command("explain")
@click.argument("model")
@click.option("--imatrix", is_flag=True, help="Quantized with an importance matrix.")
@case_options
@json_option
def command(model: str, as_json: bool, **given: Any) -> int:
    """Print where each number of an estimate of MODEL comes from: terms, basis, source."""
    from planner import methods
    from planner.cli.estimate import show
    from planner.workflow.estimates import computed_case, usual_context

    case = case_of(model, given)
    if not {"context", "depth"} & set(case):  # then it explains what `recommend` says
        case["context"] = usual_context(model)
    computed = computed_case(case)
    spec, variant, placement, hardware, made = computed
    kernel = methods.get(variant.method).kernel(spec, variant, placement, hardware)
    explained = {
        "decode_tokens_per_second": made.speed.decode,
        "prefill_tokens_per_second": made.speed.prefill,
        "perplexity_ratio": made.quality.perplexity_ratio,
        "kl_divergence_nats": made.quality.kl_divergence_nats,
    }
    if as_json:
        from planner import FORMAT_VERSION
        from planner.core.codec import encode

        terms_ = {key: encode(found) for key, found in explained.items()}
        print_json({"format_version": FORMAT_VERSION, **terms_, "kernel": encode(kernel)})
        return Exit.DONE
    show(*computed)
    show_kernel(kernel)
    for title, prediction in zip(TITLES, explained.values(), strict=True):
        terms(title, prediction)
    return Exit.DONE


def show_kernel(found: KernelUse | Rejection) -> None:
    """The kernel with its source, or why no kernel that qplan knows runs this."""
    out = console()
    if isinstance(found, Rejection):
        out.print(f"[bold]kernel[/]: none here: {escape(found.reason)}")
        out.print(f"  [dim]\\[{found.rule}] {escape(found.source or '')}[/]\n")
        return
    from planner.cli.recommend import kernel_line

    out.print(f"[bold]kernel[/]: {kernel_line(found)}")
    out.print(f"  [dim]{escape(found.source)}[/]\n")


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
