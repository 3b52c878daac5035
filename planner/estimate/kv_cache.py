"""Bytes of the KV cache, layer by layer, as llama.cpp allocates it.

Source: src/llama-kv-cache.cpp and src/llama-kv-cache-iswa.cpp of llama.cpp as in llama-cpp-python 0.3.36.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import accumulate

from planner.core.candidate import Placement
from planner.core.errors import InputError
from planner.core.model import AttentionLayer, ModelSpec
from planner.core.units import pad
from planner.formats.ggml import row_bytes, type_traits

CELL_PADDING = 256
"""Cells per sequence are rounded up to this (``llama_context`` pads n_ctx, the window cache pads itself)."""
CUDA_ROW_PADDING = 512
"""``MATRIX_ROW_PADDING``: a quantized tensor on a GPU ends as if its last row had a multiple of this many weights."""
CUDA_ALIGNMENT_BYTES = 128


def cells(placement: Placement) -> int:
    """Cells per sequence of a layer that sees the whole context."""
    return pad(max(placement.context, 1), CELL_PADDING)


def micro_batch(placement: Placement) -> int:
    """Tokens of one micro-batch: no more than the batch and the whole context."""
    return max(1, min(placement.ubatch, placement.batch, cells(placement) * placement.sequences))


def window_cells(window: int, placement: Placement) -> int:
    """Cells per sequence of a sliding-window layer: the window and one micro-batch, padded."""
    ubatch = min(placement.ubatch, placement.batch)
    return pad(min(cells(placement), window + ubatch), CELL_PADDING)


def layer_cells(layer: AttentionLayer, placement: Placement) -> int:
    """Cells per sequence that ``layer`` keeps; 0 where it keeps none."""
    if layer.kind not in ("full", "sliding") or not layer.owns_kv_cache:
        return 0
    if layer.kind == "sliding" and layer.window is not None:
        return window_cells(layer.window, placement)
    return cells(placement)


@lru_cache(maxsize=8192)
def gpu_tensor_bytes(size: int, type_: str, row: int) -> int:
    """Bytes of a tensor in a CUDA buffer: the last row padded if it is quantized, then aligned."""
    if type_traits(type_).block_weights > 1 and row % CUDA_ROW_PADDING:
        size += row_bytes(type_, CUDA_ROW_PADDING - row % CUDA_ROW_PADDING)
    return pad(size, CUDA_ALIGNMENT_BYTES)


def divides_heads(model: ModelSpec, kv_type: str) -> bool:
    """Whether every head is a whole number of the KV type's blocks, as llama.cpp demands of a quantized cache.

    Source: ``llama_init_from_model`` in src/llama-context.cpp of llama.cpp as in llama-cpp-python 0.3.36.
    """
    return _undivided(model, type_traits(kv_type.upper()).block_weights) is None


def check_type(model: ModelSpec, kv_type: str) -> None:
    """Refuse a KV type that :func:`divides_heads` denies.

    Raises:
        InputError: with the head's length and the block's (``row-not-divisible``).
    """
    block = type_traits(kv_type.upper()).block_weights
    length = _undivided(model, block)
    if length is not None:
        raise InputError(
            f"{model.name} cannot keep its KV cache as {kv_type}",
            numbers=f"its heads have {length} values, {kv_type} packs {block} to a block",
            hint="f16 and bf16 hold any head",
            code="row-not-divisible",
        )


@lru_cache(maxsize=512)
def _undivided(model: ModelSpec, block: int) -> int | None:
    kept = [layer for layer in model.attention if layer.kind in ("full", "sliding")]
    return next((length for layer in kept for length in (layer.k_dim, layer.v_dim) if length % block), None)


def layer_bytes(layer: AttentionLayer, placement: Placement, *, on_gpu: bool) -> int:
    """Bytes of K and V of one layer over all sequences, with the padding of the device's buffers.

    A ``recurrent`` layer keeps ``state_bytes`` per sequence, whatever the context.

    Raises:
        InputError: a row of the cache is no whole number of the KV type's blocks (``row-not-divisible``).
    """
    return _layer_bytes(
        layer.state_bytes if layer.kind == "recurrent" else 0,
        layer.head_count_kv * layer.k_dim,
        layer.head_count_kv * layer.v_dim,
        layer_cells(layer, placement),
        placement.sequences,
        placement.kv_type.upper(),
        on_gpu,
    )


@lru_cache(maxsize=8192)
def _layer_bytes(state: int, k_row: int, v_row: int, count: int, sequences: int, type_: str, on_gpu: bool) -> int:
    total = state * sequences
    for row in (k_row, v_row) if count else ():
        size = row_bytes(type_, row) * count * sequences
        total += gpu_tensor_bytes(size, type_, row) if on_gpu else size
    return total


def bytes_per_layer(model: ModelSpec, placement: Placement, *, on_gpu: bool) -> tuple[int, ...]:
    """:func:`layer_bytes` of every layer of ``model``."""
    return _bytes_per_layer(
        model, placement.context, placement.kv_type, min(placement.ubatch, placement.batch), placement.sequences, on_gpu
    )


def layer_sums(model: ModelSpec, placement: Placement, *, on_gpu: bool) -> tuple[int, ...]:
    """Sums of :func:`bytes_per_layer` over the first 0, 1 … layers."""
    ubatch = min(placement.ubatch, placement.batch)
    return _layer_sums(model, placement.context, placement.kv_type, ubatch, placement.sequences, on_gpu)


@lru_cache(maxsize=2048)
def _layer_sums(
    model: ModelSpec, context: int, kv_type: str, ubatch: int, sequences: int, on_gpu: bool
) -> tuple[int, ...]:
    return tuple(accumulate(_bytes_per_layer(model, context, kv_type, ubatch, sequences, on_gpu), initial=0))


@lru_cache(maxsize=2048)
def _bytes_per_layer(
    model: ModelSpec, context: int, kv_type: str, ubatch: int, sequences: int, on_gpu: bool
) -> tuple[int, ...]:
    placement = Placement(context=context, kv_type=kv_type, ubatch=ubatch, batch=ubatch, sequences=sequences)
    return tuple(layer_bytes(layer, placement, on_gpu=on_gpu) for layer in model.attention)


def total_bytes(model: ModelSpec, placement: Placement) -> int:
    """Bytes of the whole cache without a device's padding."""
    return sum(bytes_per_layer(model, placement, on_gpu=False))
