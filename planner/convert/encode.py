"""From a checkpoint's numbers to a GGUF file's: float32, float16, bfloat16, rounded as llama.cpp rounds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from planner.core.errors import InputError

if TYPE_CHECKING:
    import numpy as np

F16_MAX = 65504.0
"""Largest finite float16 (IEEE 754 binary16)."""


def to_float32(block: np.ndarray[Any, Any], dtype: str) -> np.ndarray[Any, Any]:
    """``block`` of stored ``dtype`` as float32, exactly: each of the three types is a subset of it."""
    import numpy as np

    if dtype == "BF16":
        wide = block.astype("<u4")
        wide <<= 16
        return wide.view("<f4")
    return block.astype("<f4", copy=False) if dtype == "F16" else np.ascontiguousarray(block, dtype="<f4")


def float32_to_bf16(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Nearest bfloat16, ties to even, NaN kept quiet: ``ggml_compute_fp32_to_bf16`` in ggml-impl.h; bits as uint16."""
    import numpy as np

    bits = np.ascontiguousarray(values, dtype="<f4").view("<u4")
    rounded: np.ndarray[Any, Any] = ((bits.astype("<u8") + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")
    nan = (bits & 0x7FFFFFFF) > 0x7F800000
    if nan.any():
        rounded[nan] = ((bits[nan] >> 16) | 64).astype("<u2")
    return rounded


def float32_to_f16(values: np.ndarray[Any, Any], name: str) -> np.ndarray[Any, Any]:
    """Nearest float16.

    llama.cpp's converter lets larger values become infinite, and the model answers NaN; here that is an error.

    Raises:
        InputError: a finite value beyond 65504 (``f16-overflow``).
    """
    import numpy as np

    with np.errstate(over="ignore"):
        narrow = values.astype("<f2")
    inside = values.size == 0 or bool(values.min() >= -F16_MAX and values.max() <= F16_MAX)
    lost = None if inside else np.isinf(narrow) & np.isfinite(values)
    if lost is not None and lost.any():
        largest = float(np.abs(values[lost]).max())
        raise InputError(
            f"{name} does not fit in 16-bit floats",
            numbers=f"{int(lost.sum())} values up to {largest:g}; float16 ends at {F16_MAX:g}",
            hint="convert to bf16 or f32, which hold them",
            code="f16-overflow",
        )
    return narrow


def encode(block: np.ndarray[Any, Any], source: str, target: str, *, name: str, shift: float) -> np.ndarray[Any, Any]:
    """``block`` of stored type ``source`` as GGUF type ``target`` (``F32``, ``F16`` or ``BF16``), ``shift`` added.

    Raises:
        InputError: it does not fit in float16 (``f16-overflow``).
    """
    if source == target and not shift:
        return block
    values = to_float32(block, source)
    if shift:
        values = values + values.dtype.type(shift)
    if target == "BF16":
        return float32_to_bf16(values)
    return float32_to_f16(values, name) if target == "F16" else values
