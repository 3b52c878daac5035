"""The layout of compressed-tensors for whole-number weights: what llm-compressor writes and vLLM reads."""

from __future__ import annotations

from planner.core.candidate import Variant
from planner.core.model import ModelSpec, Tensor
from planner.methods import common

FORMAT = "compressed-tensors"
_SHAPE_BYTES = 2 * 8
"""``weight_shape``: two 64-bit numbers per layer."""


def tensor_bytes(model: ModelSpec, variant: Variant, bits: int) -> tuple[int, ...]:
    """Per linear layer of ``K`` inputs, ``N`` outputs and ``G`` groups: packed weights ``4·N·⌈K/(32/b)⌉``, 16-bit
    scales ``2·N·G``, the shape, and packed zeros ``4·⌈N/(32/b)⌉·G`` without symmetry; the rest stays 16-bit.

    Source: the pack-quantized format, https://github.com/vllm-project/compressed-tensors.
    """
    return tuple(_bytes(tensor, variant, bits) for tensor in model.tensors)


def _bytes(tensor: Tensor, variant: Variant, bits: int) -> int:
    if not common.is_linear(tensor):
        return common.kept_bytes(tensor)
    rows_in, columns_out, count = common.matrices(tensor)
    groups, in_word = common.groups(rows_in, variant.group_size), 32 // bits
    packed = 4 * columns_out * -(-rows_in // in_word)
    zeros = 0 if variant.symmetric else 4 * -(-columns_out // in_word) * groups
    return count * (packed + 2 * columns_out * groups + _SHAPE_BYTES + zeros)


def tensors_per_linear(variant: Variant) -> int:
    """Packed weights, scales and shape, and what else the settings ask for."""
    return 3 + (not variant.symmetric)
