"""``qplan recommend MODEL``."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

import click

from planner.cli import finetuning, what_if
from planner.cli.finetuning import finetune_options
from planner.cli.options import json_option, profile_option, verbose_option, workload_options
from planner.cli.output import console, escape, print_json, table
from planner.core.candidate import method_and_type
from planner.core.errors import Exit
from planner.core.units import format_bytes, format_count, format_rate
from planner.core.wording import (
    fullest,
    layers_cell,
    machine_line,
    placement_line,
    ranged,
    rejection_numbers,
    short_percent,
    short_rate,
)
from planner.core.workload import Workload

if TYPE_CHECKING:
    from rich.console import Console

    from planner.cli.tables import Table
    from planner.core.candidate import Candidate, KernelUse
    from planner.core.estimates import DeviceMemory
    from planner.workflow.recommend import Recommendation
    from planner.workflow.what_if import WhatIf

ALTERNATIVES_SHOWN = 6
REJECTIONS_SHOWN = 4


@click.command("recommend")
@click.argument("model")
@profile_option
@workload_options
@finetune_options
@click.option("--what-if", "only_what_if", is_flag=True, help="Only: layers that fit by context and KV cache type.")
@verbose_option
@json_option
def command(
    model: str, profile: str | None, workload: Workload, only_what_if: bool, verbose: bool, as_json: bool
) -> int:
    """Say how to run MODEL best on this machine, with predicted memory, speed and quality.

    MODEL is a catalog name (llama-2-13b), a checkpoint directory, a GGUF file, a hub id (org/name) or a bare
    size (14b, 30b-a3b).
    """
    from planner.workflow.recommend import recommend
    from planner.workflow.what_if import answers, document

    answer = recommend(model, workload, profile=profile)
    found = answers(answer, table=only_what_if or verbose)
    if as_json:
        from planner.workflow.documents import recommendation_document

        print_json({**recommendation_document(answer), "what_if": document(found)})
    elif only_what_if and found is not None:
        what_if.show(console(), answer, found, name=True)
    else:
        show(answer, verbose=verbose, found=found)
    return Exit.DONE if answer.fits else Exit.NOTHING_FITS


def show(answer: Recommendation, *, verbose: bool, found: WhatIf | None = None) -> None:
    """The recommendation as a page: the machine, the choice, why, the alternatives, the commands."""
    out = console()
    _heading(out, answer)
    if answer.finetuning is not None:
        finetuning.show(out, answer, answer.finetuning, verbose=verbose)
    chosen = answer.decision.chosen
    if chosen is None and answer.fits:
        out.print("Run the trained model in another format: `qplan recommend` without --objective says which.")
        return
    if chosen is None:
        _nothing_fits(out, answer)
        return
    _choice(out, chosen)
    out.print(memory_table(chosen))
    for note in chosen.estimate.memory.notes:
        out.print(f"[dim]note: {escape(note)}[/]")
    out.print("[bold]Why[/]")
    for reason in chosen.reasons:
        out.print(f"  · {escape(reason)}")
    for entry in answer.decision.trace:
        out.print(f"  · {entry.effect} [dim]\\[{entry.rule}][/]")
    out.print()
    _alternatives(out, answer, verbose)
    _rejections(out, answer, verbose)
    if found is not None:
        what_if.show(out, answer, found)
    _commands(out, answer, chosen)


def _heading(out: Console, answer: Recommendation) -> None:
    model, hardware = answer.model, answer.hardware
    active = model.active_parameter_count
    size = f"{format_count(model.parameter_count)} parameters"
    if model.mixture is not None:
        size += f" ({format_count(active)} active)"
    out.print(f"[bold]{escape(model.name)}[/]  {model.architecture}, {size}, {model.n_layer} layers", highlight=False)
    out.print(f"[bold]{escape(hardware.name)}[/]  {escape(machine_line(hardware))}")
    out.print(
        f"for {answer.workload.context} tokens of context, objective {answer.workload.objective}"
        + (f", {answer.workload.concurrency} sequences" if answer.workload.concurrency > 1 else "")
    )
    for note in (*model.notes, *hardware.notes, *answer.notes):
        out.print(f"[dim]note: {escape(note)}[/]")
    out.print()


def _choice(out: Console, chosen: Candidate) -> None:
    placement, estimate = chosen.placement, chosen.estimate
    out.print(f"[bold green]→ {chosen.variant.label()}[/] with {chosen.variant.runtime}")
    size = estimate.size
    rows = [
        ("file", f"{format_bytes(size.file_bytes, 2)}, {size.bits_per_weight:.2f} bits per weight"),
        ("runs as", placement_line(placement)),
        ("decode", f"{ranged(estimate.speed.decode, format_rate)} tokens/s{basis(chosen)}"),
        (
            "prefill",
            f"{ranged(estimate.speed.prefill, format_rate)} tokens/s for a prompt of {placement.prompt_tokens}",
        ),
        ("quality", quality_line(chosen)),
    ]
    if chosen.kernel is not None:
        rows.append(("kernel", kernel_line(chosen.kernel)))
    for name, text in rows:
        out.print(f"  [dim]{name:<8}[/] {text}")
    out.print()


def kernel_line(kernel: KernelUse) -> str:
    """The kernel and the version that is true for; a slow one with what would get a faster."""
    slow = f", slow: {escape(kernel.text)}. Instead: {escape(kernel.fix)}" if kernel.speed != "fast" else ""
    return f"{escape(kernel.name)}{slow}  [dim]\\[{kernel.id}] {escape(kernel.version)}[/]"


def basis(candidate: Candidate) -> str:
    """What a speed rests on, as a suffix."""
    decode = candidate.estimate.speed.decode
    return f"  [dim]{decode.basis}: {escape(decode.source)}[/]" if decode else ""


def quality_line(candidate: Candidate) -> str:
    """Perplexity ratio and KL divergence with ranges and their basis."""
    quality = candidate.estimate.quality
    ratio, divergence = quality.perplexity_ratio, quality.kl_divergence_nats
    if ratio is None:
        return "unknown"
    text = f"perplexity × {ranged(ratio, '{:.4f}'.format)} of the 16-bit model"
    if divergence is not None:
        text += f", KL divergence {ranged(divergence, '{:.4f}'.format)} nats"
    return f"{text}  [dim]{ratio.basis}: {escape(ratio.source)}[/]"


def memory_table(candidate: Candidate) -> Table:
    """Memory per device: weights, KV cache, compute buffers, overhead, what is needed in all, capacity."""
    made = table("memory", "weights>", "KV cache>", "compute>", "overhead>", "needed>", "usable>")
    used = candidate.estimate.memory
    for device in (*used.devices, used.host):
        made.add_row(*_memory_row(device))
    return made


def _memory_row(device: DeviceMemory) -> tuple[str, ...]:
    parts = (device.weights_bytes, device.kv_cache_bytes, device.compute_bytes, device.needed_overhead_bytes)
    return (
        device.name,
        *(format_bytes(part) for part in parts),
        f"[bold]{format_bytes(device.needed_bytes)}[/]",
        format_bytes(device.capacity_bytes),
    )


def _alternatives(out: Console, answer: Recommendation, verbose: bool) -> None:
    others = answer.decision.alternatives
    if not others:
        return
    shown = others if verbose else others[:ALTERNATIVES_SHOWN]
    columns = ("alternative", "file>", "memory>", "decode t/s>", "perplexity>", "layers>", "KV", "", "score>")
    made = table(*columns, give_way=("layers>", "KV", "file>"))
    for candidate in shown:
        made.add_row(*candidate_row(candidate))
    out.print(made)
    if len(others) > len(shown):
        out.print(f"[dim]{len(others) - len(shown)} more fit; -v lists them[/]")
    out.print("[dim]ranges are 80 %; perplexity in percent over 16-bit; * nothing beats it in all three[/]\n")


def candidate_row(candidate: Candidate) -> tuple[str, ...]:
    """A candidate as a row of the alternatives table."""
    estimate = candidate.estimate
    return (
        candidate.variant.label(),
        format_bytes(estimate.size.file_bytes),
        format_bytes(fullest(candidate).needed_bytes),
        ranged(estimate.speed.decode, short_rate),
        ranged(estimate.quality.perplexity_ratio, short_percent),
        layers_cell(candidate.placement.gpu_layers, candidate.placement.cpu_expert_layers),
        candidate.placement.kv_type,
        "*" if candidate.pareto else "",
        f"{candidate.score:.2f}" if candidate.score is not None else "",
    )


def _rejections(out: Console, answer: Recommendation, verbose: bool) -> None:
    """Rejected variants, those of one reason in one line, lack of memory first."""
    lines: dict[str, list[str]] = {}
    for item in sorted(answer.decision.rejected, key=lambda item: item.rule != "memory"):
        source = f" {escape(item.source)}" if verbose and item.source else ""
        reason = f"{escape(item.reason)}{rejection_numbers(item)} [dim]\\[{item.rule}]{source}[/]"
        lines.setdefault(reason, []).append(method_and_type(item.method, item.type))
    if not lines:
        return
    shown = list(lines.items()) if verbose else list(lines.items())[:REJECTIONS_SHOWN]
    out.print("[bold]Not chosen[/]")
    for reason, names in shown:
        out.print(f"  · {', '.join(dict.fromkeys(names))}: {reason}")
    if len(lines) > len(shown):
        out.print(f"  [dim]{len(lines) - len(shown)} more reasons; -v lists them[/]")
    out.print()


def _nothing_fits(out: Console, answer: Recommendation) -> None:
    out.print("[bold red]nothing fits[/]\n")
    _rejections(out, answer, verbose=True)
    least = min((r for r in answer.decision.rejected if r.unit == "bytes"), key=lambda r: r.needed or 0, default=None)
    if least is not None and least.needed and least.available:
        out.print(
            f"the smallest is {least.type}: {format_bytes(least.needed)} of {format_bytes(least.available)}; "
            "a shorter --context, a smaller model or a larger --max-memory would help"
        )


def _commands(out: Console, answer: Recommendation, chosen: Candidate) -> None:
    from planner import methods

    location = answer.model.source.location
    if answer.model.source.kind != "size" and answer.model.file_type is None:
        out.print("[bold]Do it[/]")
        out.print(
            f"  qplan plan {shlex.quote(location)} -o plan.json && qplan apply plan.json && qplan serve plan.json",
            soft_wrap=True,
            markup=False,
        )
    if not methods.row(chosen.variant.method).executable:
        out.print(f"  which plans the best that apply can carry out; {chosen.variant.method} goes by hand:")
    commands = methods.get(chosen.variant.method).commands(answer.model, chosen)
    for name, text in commands.items():
        out.print(f"[bold]{name.capitalize()}[/]")
        for line in text.splitlines():
            out.print(f"  {line}", soft_wrap=True, markup=False)
