"""Time of an optimizer step: arithmetic over what training reaches of a GPU's rate, and the weights' dequantization."""

from __future__ import annotations

from planner.core.estimates import FORMULA, Prediction
from planner.core.finetuning import NF4, FinetuneSettings
from planner.core.hardware import Gpu
from planner.core.model import ModelSpec
from planner.methods import common

UTILIZATION, LEAST, MOST = 0.30, 0.12, 0.50
"""Share of the matrix units' dense rate that training reaches: 21 to 46 % of large runs,
Chowdhery et al. 2022, table 3, https://arxiv.org/abs/2204.02311; less with few tokens at once, so the range is wide."""
_DEQUANTIZED_BYTES = 4.5
"""Per weight: half a byte read, two written, two read again by the product."""
_SOURCE = (
    "arithmetic of forward and backward pass over 12 to 50 % of the GPU's dense 16-bit rate "
    "(Chowdhery et al. 2022, table 3, https://arxiv.org/abs/2204.02311)"
)


def passes(settings: FinetuneSettings) -> int:
    """Products with each frozen weight: forward, backward to the input, and with checkpointing forward once more."""
    return 3 if settings.gradient_checkpointing else 2


def flops_per_token(model: ModelSpec, settings: FinetuneSettings) -> float:
    """Two per active weight and pass; attention over half the sequence on average, twice as much backward."""
    attention = sum(layer.head_count * (layer.k_dim + layer.v_dim) for layer in model.attention)
    scores = settings.sequence_length * attention
    return passes(settings) * 2.0 * model.active_parameter_count + (passes(settings) + 1) * scores


def seconds_per_step(model: ModelSpec, settings: FinetuneSettings, gpu: Gpu | None) -> Prediction | None:
    """Seconds of an optimizer step on ``gpu``; ``None`` without one, or where its rates are not known."""
    if gpu is None or not gpu.fp16_flops_per_second or not gpu.bandwidth_bytes_per_second:
        return None
    flops = settings.batch * settings.sequence_length * flops_per_token(model, settings)
    unpacking = 0.0
    if settings.base == NF4:
        weights = sum(t.element_count for t in model.tensors if common.is_linear(t))
        moved = _DEQUANTIZED_BYTES * weights * passes(settings) * settings.accumulation
        unpacking = moved / gpu.bandwidth_bytes_per_second
    ideal = flops / gpu.fp16_flops_per_second
    return Prediction(
        value=ideal / UTILIZATION + unpacking,
        low=ideal / MOST + unpacking,
        high=ideal / LEAST + 2 * unpacking,
        basis=FORMULA,
        source=_SOURCE,
        terms=(
            ("arithmetic", flops, "FLOP"),
            ("rate of the GPU", gpu.fp16_flops_per_second, "FLOP/s"),
            ("unpacking weights", unpacking, "s"),
        ),
    )
