"""What would fit at other contexts and types of the KV cache: "at 32k 21 layers fit, with q8_0 27"."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from planner.core.candidate import Placement
from planner.core.model import ModelSpec
from planner.core.wording import layers_cell
from planner.decide.candidates import restricted
from planner.estimate import kv_cache
from planner.estimate.placement import Option, longest_context, what_if
from planner.workflow.recommend import Recommendation

KV_TYPES = ("f16", "q8_0", "q4_0")
FIRST_CONTEXT = 4096
MOST_CONTEXTS = 7


@dataclass(frozen=True, slots=True, kw_only=True)
class Longest:
    """The longest context with which the whole model fits: on the GPUs, or in RAM where there are none."""

    kv_type: str
    context: int | None
    """Tokens per sequence; ``None``: it does not fit at all."""
    at_limit: bool
    """As long as the model was trained for, or as was asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WhatIf:
    """Answers for the variant that was chosen."""

    type: str
    longest: tuple[Longest, ...]
    options: tuple[Option, ...] = ()
    """Empty unless the table was asked for."""


def answers(recommendation: Recommendation, *, table: bool) -> WhatIf | None:
    """What-if answers for the chosen variant; ``None`` where nothing was chosen or it is no GGUF file.

    Args:
        table: also how many layers fit at contexts from 4096 tokens to what the model was trained with.
    """
    chosen, model, workload = recommendation.decision.chosen, recommendation.model, recommendation.workload
    if chosen is None or chosen.variant.format != "gguf":
        return None
    hardware, margin = restricted(recommendation.hardware, workload), workload.memory_margin_fraction
    gpus = len(hardware.gpus)
    base = dataclasses.replace(
        chosen.placement, gpu_layers=0, gpu_count=gpus, cpu_expert_layers=0, tensor_split=()
    )  # what stays as chosen: micro-batch, flash attention, sequences
    known = [kv for kv in KV_TYPES if kv_cache.divides_heads(model, kv)]
    limit = max(model.n_ctx_train, workload.context) // kv_cache.CELL_PADDING * kv_cache.CELL_PADDING
    longest = []
    for kv_type in known if table else known[:2]:
        whole = _whole(model, dataclasses.replace(base, kv_type=kv_type), gpus)
        found = longest_context(model, chosen.variant, whole, hardware, margin, limit)
        longest.append(Longest(kv_type=kv_type, context=found, at_limit=found is not None and found >= limit))
    options = (
        what_if(
            model, chosen.variant, base, hardware, margin, contexts=contexts(model, workload.context), kv_types=known
        )
        if table
        else ()
    )
    return WhatIf(type=chosen.variant.type, longest=tuple(longest), options=options)


def _whole(model: ModelSpec, placement: Placement, gpus: int) -> Placement:
    return dataclasses.replace(placement, gpu_layers=model.offloadable_count if gpus else 0, gpu_count=gpus)


def contexts(model: ModelSpec, asked: int) -> tuple[int, ...]:
    """4096 and its doublings, the context that was asked for, and the one that the model was trained with."""
    made = {FIRST_CONTEXT << power for power in range(MOST_CONTEXTS - 1)}
    return tuple(sorted({context for context in made if context < model.n_ctx_train} | {asked, model.n_ctx_train}))


def cell(option: Option) -> str:
    """An option for a table: ``whole``, ``21 layers``, ``49-12e`` or ``no room``."""
    if option.gpu_layers is None:
        return "no room"
    if option.whole:
        return "whole"
    layers = layers_cell(option.gpu_layers, option.cpu_expert_layers)
    return layers if option.cpu_expert_layers else f"{layers} layer{'s' * (option.gpu_layers != 1)}"


def document(found: WhatIf | None) -> dict[str, Any] | None:
    """The ``what_if`` block of ``qplan recommend --json``."""
    if found is None:
        return None
    return {
        "type": found.type,
        "longest_whole_context": {item.kv_type: item.context for item in found.longest},
        "options": [dataclasses.asdict(option) for option in found.options],
    }
