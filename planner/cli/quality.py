"""``qplan quality ARTIFACT --reference MODEL``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from planner.cli.options import Finite, GpuLayers, existing, json_option, names
from planner.cli.output import console, escape, print_json, table
from planner.core.errors import Exit, UsageError

if TYPE_CHECKING:
    from planner.workflow.quality import Measured, QualityOptions


@click.command("quality")
@click.argument("artifact", required=False)
@click.option("--reference", metavar="MODEL", help="The 16-bit model: a GGUF file, a checkpoint directory or `demo`.")
@click.option("--text", metavar="FILE", help="Text to score, UTF-8; default: the held-out one that comes with qplan.")
@click.option("--context", type=click.IntRange(16), default=512, show_default=True, help="Tokens of a chunk.")
@click.option("--chunks", type=click.IntRange(1), help="At most so many chunks; default: all that the time allows.")
@click.option("--seconds", type=Finite(1), default=600.0, show_default=True, help="Time for the text.")
@click.option("--gpu-layers", type=GpuLayers(), default=0, show_default=True, help="Layers on the GPU, or all.")
@click.option("--tasks", metavar="A,B", help="Also these tasks of lm-evaluation-harness (`pip install 'lm-eval[hf]'`).")
@click.option("--task-folder", metavar="DIR", help="Task definitions of your own.")
@click.option("--task-limit", type=click.IntRange(1), help="Examples of each task; default: all.")
@click.option("--table", "table_of", metavar="MODEL", help="Print what is published of MODEL instead of measuring.")
@json_option
def command(artifact: str | None, table_of: str | None, as_json: bool, **given: Any) -> int:
    """Measure how much quality ARTIFACT lost: perplexity, KL divergence and agreement on the top token.

    ARTIFACT and the reference are GGUF files or checkpoint directories in any mix: llama.cpp runs the one, transformers
    the other, on the same text, windows and statistics (those of llama-perplexity: chunks of 512 tokens, the second
    half of each is scored). The next estimate for this model on this machine says "measured".
    """
    if table_of is not None:
        return show_published(table_of, as_json)
    if artifact is None:
        raise UsageError(
            "quality needs an ARTIFACT, or --table MODEL", hint="`qplan quality model-Q4_K_M.gguf --reference model/`"
        )
    from planner.cli.apply import Watching
    from planner.workflow.quality import measure

    with Watching() as watcher:
        found = measure(existing(artifact), options(**given), watcher.measuring())
    if as_json:
        from planner.workflow.quality import document

        print_json(document(found))
    else:
        show(found)
    return Exit.DONE


def options(**given: Any) -> QualityOptions:
    """The options of the command line."""
    from planner.workflow.quality import QualityOptions

    paths = {name: existing(given[name]) if given[name] else None for name in ("text", "task_folder")}
    return QualityOptions(
        reference=given["reference"],
        context=given["context"],
        chunks=given["chunks"],
        budget_seconds=given["seconds"],
        gpu_layers=given["gpu_layers"],
        tasks=names(given["tasks"]) or (),
        task_limit=given["task_limit"],
        **paths,
    )


def show(found: Measured) -> None:
    """What was measured, beside what was predicted."""
    out, quality = console(), found.quality
    rows = table("quantity", "measured>", "standard error>", "predicted>", "80 % range>")
    rows.add_row("perplexity", f"{quality.perplexity.value:.4f}", f"{quality.perplexity.standard_error:.4f}", "", "")
    comparison = quality.comparison
    if comparison is not None:
        from math import exp

        ratio = exp(comparison.log_ratio)
        reference = comparison.reference
        rows.add_row("  of the reference", f"{reference.value:.4f}", f"{reference.standard_error:.4f}", "", "")
        error = f"{ratio * comparison.log_ratio_standard_error:.5f}"
        rows.add_row("perplexity ratio", f"{ratio:.5f}", error, *_predicted(found, "perplexity_ratio"))
        error = f"{comparison.kl_standard_error_nats:.5f}"
        kl = f"{comparison.kl_mean_nats:.5f}"
        rows.add_row("KL divergence, nats: mean", kl, error, *_predicted(found, "kl_divergence_nats"))
        rows.add_row("  median", f"{comparison.kl_median_nats:.5f}", "", "", "")
        rows.add_row("  99 %", f"{comparison.kl_quantile_99_nats:.5f}", "", "", "")
        top = f"{comparison.same_top_fraction:.2%}", f"{comparison.same_top_standard_error:.2%}"
        rows.add_row("same top token", *top, "", "")
    for score in found.tasks.scores if found.tasks else ():
        error = "" if score.standard_error is None else f"{score.standard_error:.4f}"
        rows.add_row(f"{score.task}: {score.metric}", f"{score.value:.4f}", error, "", "")
    out.print(rows)
    variant = found.variant.label() if found.variant else "unknown type"
    scored = f"{quality.token_count} tokens scored in {quality.chunk_count} chunks of {quality.context}"
    out.print(f"[dim]{escape(variant)}, {scored}, with {found.trial.tool_version}[/]")
    for note in found.notes:
        out.print(f"[dim]note: {escape(note)}[/]")


def _predicted(found: Measured, quantity: str) -> tuple[str, str]:
    known = found.predicted.get(quantity)
    return ("", "") if known is None else (f"{known['value']:.5f}", f"{known['low']:.4f} - {known['high']:.4f}")


def show_published(model: str, as_json: bool) -> int:
    """The published rows of a model, those set aside with the reason."""
    from planner.workflow.quality import published

    rows = published(model)
    if as_json:
        from planner import FORMAT_VERSION

        print_json({"format_version": FORMAT_VERSION, "model": model, "rows": list(rows)})
        return Exit.DONE
    sources = list(dict.fromkeys(f"{row['source']} ({row['date']})" for row in rows))
    made = table("type", "metric", "value>", "16-bit>", "text or task", "status", "source>")
    for row in rows:
        group = f" g{row['group_size']}" if row["group_size"] else ""
        name = f"{row['method']} {row['type']}{group}{' +imatrix' if row['imatrix'] else ''}"
        why = f"{row['status']}: {row['notes']}" if row["status"] not in ("used", "reference") else row["status"]
        at = str(1 + sources.index(f"{row['source']} ({row['date']})"))
        shown = (name, row["metric"], row["value"], row["value_16bit"], row["dataset"], why, at)
        made.add_row(*(escape(cell) for cell in shown))
    out = console()
    out.print(made)
    for number, source in enumerate(sources, start=1):
        out.print(f"[dim]{number:2d}  {escape(source)}[/]")
    return Exit.DONE
