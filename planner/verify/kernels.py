"""ggml's kernels to and fro: what a tensor's weights become in a type. Only a child process uses this.

A kernel aborts the process on what it does not expect, so the arguments are checked here. Signatures are those of
ggml.h and ggml-quants.h in llama-cpp-python 0.3.36; ctypes lets other threads run meanwhile.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import TYPE_CHECKING, Any

from planner.formats.ggml import type_traits
from planner.verify import native

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_NEEDS_WEIGHTS = frozenset({"IQ2_XXS", "IQ2_XS", "IQ1_S", "IQ2_S", "IQ1_M", "IQ3_XXS"})
"""``ggml_quantize_requires_imatrix``, and what llama.cpp refuses besides: equal weights stand in."""


@cache
def _quantize() -> Any:
    function = native.library().llama_cpp._lib.ggml_quantize_chunk
    function.restype = ctypes.c_size_t
    function.argtypes = (ctypes.c_int, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3, ctypes.c_void_p)
    return function


@cache
def _dequantize(type_: str) -> Any:
    function = getattr(native.library().llama_cpp._lib, f"dequantize_row_{type_.lower().replace('_k', '_K')}")
    function.restype, function.argtypes = None, (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)
    return function


def round_trip(weights: NDArray[np.float32], type_: str, importance: NDArray[np.float32] | None) -> NDArray[np.float32]:
    """``weights[rows, columns]`` as they come back from ``type_``.

    Args:
        importance: ``[columns]``; types that demand it take equal weights where there is none.
    """
    import numpy as np

    rows, columns = weights.shape
    traits = type_traits(type_)
    assert columns % traits.block_weights == 0 and weights.dtype == np.float32 and weights.flags.c_contiguous
    if type_ == "F16":
        return weights.astype(np.float16).astype(np.float32)
    if importance is None and type_ in _NEEDS_WEIGHTS:
        importance = np.ones(columns, dtype=np.float32)
    if importance is not None:
        assert importance.shape == (columns,) and importance.dtype == np.float32 and importance.flags.c_contiguous
    packed = np.empty(rows * (columns // traits.block_weights) * traits.block_bytes, dtype=np.uint8)
    address = None if importance is None else importance.ctypes.data
    made = _quantize()(traits.id, weights.ctypes.data, packed.ctypes.data, 0, rows, columns, address)
    assert made == packed.nbytes
    result = np.empty_like(weights)
    _dequantize(type_)(packed.ctypes.data, result.ctypes.data, weights.size)
    return result
