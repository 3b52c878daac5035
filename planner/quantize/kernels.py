"""ggml's own quantization kernels, out of the shared libraries that llama-cpp-python ships.

A kernel aborts the whole process on an input it does not expect, so everything is checked before it is called. The
functions release Python's global lock: threads run side by side. Signatures are those of ggml.h in llama-cpp-python
0.3.36.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from planner.convert.encode import F16_MAX, float32_to_bf16, float32_to_f16, to_float32
from planner.core.errors import ExecutionFailed, InputError, MissingDependency
from planner.formats import ggml

if TYPE_CHECKING:
    import numpy as np

FLOAT_TYPES = ("F32", "F16", "BF16")
_LOW_BIT = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S")
_DEMANDING = frozenset((*_LOW_BIT, "IQ3_XXS"))
"""Types that llama.cpp makes only of the token embedding and the output without an importance matrix."""
_UNDEMANDING = ("token_embd.weight", "per_layer_token_embd.weight", "output.weight")
_ABORTING = frozenset({"IQ1_S", "IQ2_XXS", "IQ2_XS"})
"""``ggml_quantize_requires_imatrix``: without one the kernel ends the process, of whatever tensor."""
_SMALL_BLOCKS = ("Q1_0", "Q2_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "MXFP4", "NVFP4")
_LARGE_BLOCKS = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "TQ1_0", "TQ2_0", "IQ4_XS", "IQ3_S", "IQ3_XXS", *_LOW_BIT)
_KERNELS = frozenset((*_SMALL_BLOCKS, *_LARGE_BLOCKS))
"""Types that ``ggml_quantize_chunk`` makes, floats aside."""
_SUFFIX = {"win32": ".dll", "darwin": ".dylib"}.get(sys.platform, ".so")


def demands_importance(name: str, type_: str, *, low_bit_mix: bool = False) -> bool:
    """Whether llama.cpp refuses ``type_`` for the tensor ``name`` without an importance matrix.

    Source: ``tensor_requires_imatrix`` in src/llama-quant.cpp, and ``ggml_quantize_requires_imatrix`` in ggml.c.

    Args:
        low_bit_mix: the file's type is Q2_K_S, whose Q2_K tensors demand one too.
    """
    if type_ in _ABORTING:
        return True
    if name in _UNDEMANDING:
        return False
    return type_ in _DEMANDING or (type_ == "Q2_K" and low_bit_mix)


@dataclass(frozen=True, slots=True)
class Kernels:
    """The functions of the library."""

    quantize_chunk: Any
    initialise: Any
    validate: Any
    widen: dict[str, Any]
    """16-bit type → function to float32, of contiguous values."""
    narrow: Any
    """The CPU's own float32 → float16; ``None`` where the library lacks it."""

    def prepare(self, types: set[str]) -> None:
        """Build the tables of ``types`` before threads need them."""
        for name in sorted(types & _KERNELS):
            self.initialise(ggml.type_traits(name).id)

    def to_float32(self, stored: np.ndarray[Any, Any], dtype: str, scratch: np.ndarray[Any, Any]) -> Any:
        """Rows of the type ``dtype`` as float32, in ``scratch`` (at least as many values) where they are not yet."""
        if dtype == "F32":
            return stored
        if not stored.flags.c_contiguous or scratch.size < stored.size:
            return to_float32(stored, dtype)
        values = scratch[: stored.size].reshape(stored.shape)
        self.widen[dtype](stored.ctypes.data, values.ctypes.data, stored.size)
        return values

    def to_float16(self, values: np.ndarray[Any, Any], name: str) -> np.ndarray[Any, Any]:
        """float32 rows as nearest float16.

        Raises:
            InputError: a finite value beyond 65504 (``f16-overflow``).
        """
        import numpy as np

        inside = values.size and values.max() <= F16_MAX and values.min() >= -F16_MAX
        if self.narrow is None or not inside or not values.flags.c_contiguous:
            return float32_to_f16(values, name)
        made = np.empty(values.shape, dtype="<f2")
        self.narrow(values.ctypes.data, made.ctypes.data, values.size)
        return made

    def quantize(
        self,
        values: np.ndarray[Any, Any],
        type_: str,
        out: np.ndarray[Any, Any],
        importance: np.ndarray[Any, Any] | None,
        *,
        name: str,
    ) -> None:
        """Quantize whole rows.

        Args:
            values: finite float32, shape ``(rows, row_length)``, contiguous.
            out: bytes the rows take, contiguous.
            importance: float32 weights of the columns, ``(row_length,)``.
            name: the tensor's, for errors.

        Raises:
            InputError: the arrays do not fit each other or the type, or a value does not fit in float16.
            ExecutionFailed: the result is not valid, as ``ggml_validate_row_data`` has it (``quantize-failed``).
        """
        rows, length = values.shape
        _check(values, type_, out, importance, name)
        if type_ in FLOAT_TYPES:
            out[:] = _narrow(values, type_, name).reshape(-1).view("u1")
            return
        weights = None if importance is None else importance.ctypes.data
        number = ggml.type_traits(type_).id
        made = self.quantize_chunk(number, values.ctypes.data, out.ctypes.data, 0, rows, length, weights)
        if made != out.size or not self.validate(number, out.ctypes.data, out.size):
            raise ExecutionFailed(
                f"{name} did not come out as valid {type_}",
                numbers=f"{rows} rows of {length} weights gave {made} bytes",
                hint="weights beyond the range of float16 scales are the usual cause; Q8_0 and F16 tell more",
                code="quantize-failed",
            )


def _check(
    values: np.ndarray[Any, Any],
    type_: str,
    out: np.ndarray[Any, Any],
    importance: np.ndarray[Any, Any] | None,
    name: str,
) -> None:
    rows, length = values.shape
    if type_ not in _KERNELS and type_ not in FLOAT_TYPES:
        raise InputError(f"ggml quantizes no tensor to {type_}", numbers=name, code="unknown-ggml-type")
    size = rows * ggml.row_bytes(type_, length)
    fits = values.dtype == "<f4" and out.dtype == "u1" and out.size == size
    if not (fits and values.flags.c_contiguous and out.flags.c_contiguous):
        raise InputError(f"{name}: {out.size} bytes for {rows} rows of {type_}", numbers=f"{size} are needed")
    if importance is None:
        if type_ in _ABORTING:
            raise missing_importance(name, type_)
    elif importance.shape != (length,) or importance.dtype != "<f4" or not importance.flags.c_contiguous:
        raise InputError(
            f"the importance matrix does not fit {name}",
            numbers=f"{importance.shape} of {importance.dtype}, {length} float32 expected",
            code="bad-importance",
        )


def missing_importance(name: str, type_: str) -> InputError:
    """The error for a type that needs an importance matrix where there is none."""
    return InputError(
        f"{type_} needs an importance matrix, and there is none for {name}",
        numbers="llama.cpp refuses it too: the result would be garbage",
        hint="choose a type that does without, as IQ3_S, IQ4_XS or Q4_K_M",
        code="needs-imatrix",
    )


def _narrow(values: np.ndarray[Any, Any], type_: str, name: str) -> np.ndarray[Any, Any]:
    if type_ == "F32":
        return values
    return float32_to_bf16(values) if type_ == "BF16" else float32_to_f16(values, name)


def check_finite(values: np.ndarray[Any, Any], name: str) -> None:
    """Refuse NaN and infinity, on which kernels abort or give a model that answers nonsense.

    Raises:
        InputError: with their number (``not-finite``).
    """
    import numpy as np

    with np.errstate(over="ignore", invalid="ignore"):
        # one reduction is cheaper than a mask; a sum that overflowed is looked at again
        if np.isfinite(values.sum()):
            return
    bad = values.size - int(np.isfinite(values).sum())
    if bad:
        raise InputError(
            f"{name} holds numbers that are not finite",
            numbers=f"{bad} of {values.size} in one block",
            hint="the checkpoint is damaged; download it again",
            code="not-finite",
        )


def library_files() -> tuple[Path, ...]:
    """The two libraries of ggml that are used: the base, and the one for CPUs.

    Raises:
        MissingDependency: llama-cpp-python is not installed, or has its libraries elsewhere.
    """
    found = find_spec("llama_cpp")
    folders = [Path(place) / "lib" for place in (found.submodule_search_locations or ())] if found else []
    for folder in folders:
        prefix = "" if (folder / f"ggml-base{_SUFFIX}").is_file() else "lib"
        files = tuple(folder / f"{prefix}{name}{_SUFFIX}" for name in ("ggml-base", "ggml-cpu"))
        if files[0].is_file():
            return files
    raise MissingDependency(
        "ggml's library is not here: llama-cpp-python is not installed" if not folders else "ggml's library is missing",
        numbers="\n".join(map(str, folders)),
        hint="`pip install 'qplan[gguf]'` (compiles llama.cpp, 7-15 minutes)",
    )


@cache
def load() -> Kernels:
    """The kernels; the library stays loaded.

    Raises:
        MissingDependency: as ``library_files``, or a function is gone.
    """
    base_file, cpu_file = library_files()
    try:
        base = ctypes.CDLL(str(base_file))
        chunk, start, validate = base.ggml_quantize_chunk, base.ggml_quantize_init, base.ggml_validate_row_data
        widen = {"F16": base.ggml_fp16_to_fp32_row, "BF16": base.ggml_bf16_to_fp32_row}
    except (OSError, AttributeError) as error:
        raise MissingDependency(
            "the installed llama-cpp-python has another ggml than is known here",
            numbers=str(error),
            hint="`pip install 'qplan[gguf]'` installs the one that is",
        ) from None
    narrow: Any = None
    with contextlib.suppress(OSError, AttributeError):  # eight times as fast with the CPU's own instructions
        own = ctypes.CDLL(str(cpu_file))
        widen["F16"], narrow = own.ggml_cpu_fp16_to_fp32, own.ggml_cpu_fp32_to_fp16
    pointer, long, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    chunk.argtypes, chunk.restype = (number, pointer, pointer, long, long, long, pointer), ctypes.c_size_t
    start.argtypes, start.restype = (number,), None
    validate.argtypes, validate.restype = (number, pointer, ctypes.c_size_t), ctypes.c_bool
    for function in filter(None, (*widen.values(), narrow)):
        function.argtypes, function.restype = (pointer, pointer, long), None
    return Kernels(chunk, start, validate, widen, narrow)
