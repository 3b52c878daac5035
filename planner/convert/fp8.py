"""8-bit float checkpoints: weights in E4M3 or E5M2 with scales per block, per row or per tensor.

DeepSeek-V3 and Qwen3-FP8 publish blocks of 128 x 128 (``weight_scale_inv``, config.json's ``weight_block_size``),
Mistral one scale a tensor. A value is the stored one times its scale, in float32, as ``dequant_simple`` in
conversion/base.py of llama.cpp has it. E4M3 is the "fn" kind without infinities: Micikevicius et al. 2022,
https://arxiv.org/abs/2209.05433.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any

from planner.core.errors import InputError
from planner.formats.safetensors import StoredTensor, read_tensor_bytes

if TYPE_CHECKING:
    import numpy as np

FP8_DTYPES = ("F8_E4M3", "F8_E5M2")
SCALE_SUFFIXES = ("_scale_inv", "_scale")
"""``…weight_scale_inv`` (blocks, Mistral) and ``…weight_scale`` lie beside ``…weight``."""
_SCALE_TYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}
UNUSED_SUFFIXES = (".activation_scale", ".input_scale", ".k_scale", ".v_scale")
"""Scales of activations and of the KV cache; llama.cpp has no use for them."""


@dataclass(frozen=True, slots=True)
class Scale:
    """Factors of a matrix: ``tensor`` holds one for each block of ``block`` rows and columns."""

    tensor: StoredTensor
    block: tuple[int, int]


def is_scale(name: str, tensors: Mapping[str, StoredTensor]) -> bool:
    """Whether the tensor ``name`` belongs to an 8-bit weight and is none of the model's own."""
    if name.endswith(UNUSED_SUFFIXES):
        return True
    return any(name.endswith(suffix) and name.removesuffix(suffix) in tensors for suffix in SCALE_SUFFIXES)


def find_scale(
    stored: StoredTensor, tensors: Mapping[str, StoredTensor], block_size: tuple[int, int] | None
) -> Scale | None:
    """The scale of the 8-bit tensor ``stored``; ``None`` where it has none, and is meant as it is.

    Raises:
        InputError: it does not fit the tensor's shape (``bad-scale``).
    """
    found = next((tensors[stored.name + suffix] for suffix in SCALE_SUFFIXES if stored.name + suffix in tensors), None)
    if found is None:
        return None
    rows, columns = stored.shape[-2:] if len(stored.shape) > 1 else (stored.shape[0], 1)
    block = (rows, columns)
    if found.element_count != 1:
        block = block_size or (1, columns)
    blocks = -(-rows // block[0]) * -(-columns // block[1])
    per_tensor = found.element_count == 1
    if found.dtype not in _SCALE_TYPES or not (
        per_tensor or (len(stored.shape) == 2 and found.element_count == blocks)
    ):
        raise InputError(
            f"the scales of {stored.name} do not fit it",
            numbers=f"{found.dtype} {list(found.shape)} for {list(stored.shape)}, blocks of {list(block)}",
            hint="take the 16-bit checkpoint of the same model, or pass --llama-cpp DIR with a llama.cpp checkout",
            code="bad-scale",
        )
    return Scale(found, block)


def dequantize(stored: np.ndarray[Any, Any], dtype: str, scale: Scale | None, first_row: int) -> np.ndarray[Any, Any]:
    """float32 values of the 8-bit rows ``stored``, the first of which is row ``first_row`` of the whole matrix."""
    import numpy as np

    values: np.ndarray[Any, Any] = _table(dtype)[stored]
    if scale is None:
        return values
    rows, columns = stored.shape
    block_rows, block_columns = scale.block
    factors = _factors(scale, -(-columns // block_columns))
    last = (first_row + rows - 1) // block_rows
    for index in range(first_row // block_rows, last + 1):
        inside = slice(max(index * block_rows - first_row, 0), (index + 1) * block_rows - first_row)
        values[inside] *= np.repeat(factors[index], block_columns)[:columns]
    return values


@lru_cache(maxsize=64)
def _factors(scale: Scale, per_row: int) -> np.ndarray[Any, Any]:
    import numpy as np

    from planner.convert.encode import to_float32

    raw = np.frombuffer(read_tensor_bytes(scale.tensor), dtype=_SCALE_TYPES[scale.tensor.dtype])
    factors: np.ndarray[Any, Any] = to_float32(raw.copy(), scale.tensor.dtype).reshape(-1, per_row)
    return factors


@cache
def _table(dtype: str) -> np.ndarray[Any, Any]:
    """The 256 values of an 8-bit float."""
    import numpy as np

    mantissa_bits, bias = (3, 7) if dtype == "F8_E4M3" else (2, 15)
    codes = np.arange(256)
    exponent, mantissa = (codes & 127) >> mantissa_bits, codes & ((1 << mantissa_bits) - 1)
    steps = np.where(exponent > 0, (1 << mantissa_bits) + mantissa, mantissa).astype(np.float64)
    values = np.ldexp(steps, np.maximum(exponent, 1) - bias - mantissa_bits)
    if dtype == "F8_E4M3":
        values[codes & 127 == 127] = np.nan
    else:
        values[(codes & 127) == 0x7C] = np.inf
        values[(codes & 127) > 0x7C] = np.nan
    signed: np.ndarray[Any, Any] = np.where(codes < 128, values, -values).astype("<f4")
    return signed
