"""What-if answers as text: the longest context that fits whole, and layers by context and KV type."""

from __future__ import annotations

from typing import TYPE_CHECKING

from planner.cli.output import table

if TYPE_CHECKING:
    from rich.console import Console

    from planner.workflow.recommend import Recommendation
    from planner.workflow.what_if import Longest, WhatIf


def show(out: Console, answer: Recommendation, found: WhatIf, *, name: bool = False) -> None:
    """The block; ``name`` says which model and machine it is about."""
    from planner.workflow.what_if import cell

    where = "on the GPU" if answer.hardware.gpus and not answer.workload.cpu_only else "in RAM"
    about = f" {answer.model.name} on {answer.hardware.name}" if name else ""
    out.print(f"[bold]What if[/]{about}")
    out.print(f"  as {found.type} it fits whole {where} {longest_text(found.longest)}")
    if not found.options:
        out.print("  [dim]layers that fit at other contexts: add --what-if[/]\n")
        return
    kv_types = list(dict.fromkeys(option.kv_type for option in found.options))
    made = table("context>", *(f"KV {kv_type}>" for kv_type in kv_types))
    cells = {(option.context, option.kv_type): cell(option) for option in found.options}
    for context in dict.fromkeys(option.context for option in found.options):
        made.add_row(f"{context:,}", *(cells[context, kv_type] for kv_type in kv_types))
    out.print(made)
    if any(option.cpu_expert_layers for option in found.options):
        out.print("[dim]49-12e: 49 layers on the GPU, of which 12 keep their experts in RAM (--n-cpu-moe 12)[/]")
    out.print()


def longest_text(longest: tuple[Longest, ...]) -> str:
    """``up to 24,576 tokens of context with KV cache f16, 47,104 with q8_0``; ``at no context``."""
    known = [item for item in longest if item.context is not None]
    if not known:
        return "at no context"
    if known[0].at_limit:  # the others are smaller still
        return f"up to {known[0].context:,} tokens of context, as many as it is for"
    parts = [f"{item.context:,} with {item.kv_type}" for item in known]
    return f"up to this context, by type of the KV cache: {', '.join(parts)}"
