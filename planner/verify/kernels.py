"""What a tensor's weights become in a type: ggml's kernels to and fro. Only a child process uses this."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import TYPE_CHECKING, Any

from planner.formats.ggml import row_bytes
from planner.quantize import kernels

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@cache
def _dequantize(type_: str) -> Any:
    """``dequantize_row_*`` of ggml-quants.h in llama-cpp-python 0.3.36."""
    library = ctypes.CDLL(str(kernels.library_files()[0]))
    function = getattr(library, f"dequantize_row_{type_.lower().replace('_k', '_K')}")
    function.restype, function.argtypes = None, (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)
    return function


def round_trip(weights: NDArray[np.float32], type_: str, importance: NDArray[np.float32] | None) -> NDArray[np.float32]:
    """``weights[rows, columns]`` as they come back from ``type_``.

    Args:
        importance: ``[columns]``; types that demand it take equal weights where there is none.

    Raises:
        InputError: the arrays do not fit each other or the type.
    """
    import numpy as np

    rows, columns = weights.shape
    if type_ == "F16":
        return weights.astype(np.float16).astype(np.float32)
    if importance is None and kernels.demands_importance("", type_):
        importance = np.ones(columns, dtype=np.float32)
    packed = np.empty(rows * row_bytes(type_, columns), dtype=np.uint8)
    kernels.load().quantize(weights, type_, packed, importance, name="a sample")
    result = np.empty_like(weights)
    _dequantize(type_)(packed.ctypes.data, result.ctypes.data, weights.size)
    return result
