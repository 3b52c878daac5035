"""ggml's tensors as llama.cpp's eval callback hands them over: names, shapes and data. Only a child process uses this.

llama-cpp-python binds no accessor for a tensor's shape, so the struct is laid out here (``struct ggml_tensor`` of
ggml/include/ggml.h as in llama-cpp-python 0.3.36) and :func:`check_layout` tries it on tensors of known shape before
anything relies on it. Everything that ggml exports a function for goes through that function.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from planner.core.errors import ExecutionFailed
from planner.verify import native

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_F32, _I32 = 0, 26
"""Of ``enum ggml_type``."""


class _Struct(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("ne", ctypes.c_int64 * 4),
        ("nb", ctypes.c_size_t * 4),
        ("op", ctypes.c_int),
        ("op_params", ctypes.c_int32 * 16),
        ("flags", ctypes.c_int32),
        ("src", ctypes.c_void_p * 10),
    )


class _InitParams(ctypes.Structure):
    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


_SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "ggml_init": (ctypes.c_void_p, (_InitParams,)),
    "ggml_free": (None, (ctypes.c_void_p,)),
    "ggml_new_tensor_4d": (ctypes.c_void_p, (ctypes.c_void_p, ctypes.c_int, *[ctypes.c_int64] * 4)),
    "ggml_mul_mat": (ctypes.c_void_p, (ctypes.c_void_p,) * 3),
    "ggml_set_name": (ctypes.c_void_p, (ctypes.c_void_p, ctypes.c_char_p)),
    "ggml_get_name": (ctypes.c_char_p, (ctypes.c_void_p,)),
    "ggml_op_desc": (ctypes.c_char_p, (ctypes.c_void_p,)),
    "ggml_nbytes": (ctypes.c_size_t, (ctypes.c_void_p,)),
    "ggml_backend_tensor_get": (None, (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t)),
    "ggml_backend_tensor_set": (None, (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t)),
}


@cache
def _function(name: str) -> Callable[..., Any]:
    function = getattr(native.library().llama_cpp._lib, name)
    function.restype, function.argtypes = _SIGNATURES[name]
    return function  # type: ignore[no-any-return]


@dataclass(frozen=True, slots=True)
class NativeTensor:
    """A tensor that llama.cpp owns; valid while the graph or the model that it belongs to is."""

    address: int

    @property
    def _struct(self) -> _Struct:
        return _Struct.from_address(self.address)

    @property
    def name(self) -> str:
        """Its name without what back ends add: ``CUDA0#blk.0.attn_k.weight#0`` is ``blk.0.attn_k.weight``."""
        name: str = _function("ggml_get_name")(self.address).decode("utf-8", "replace")
        return name.split("#")[1] if "#" in name else name

    @property
    def operation(self) -> str:
        """``MUL_MAT``, ``MUL_MAT_ID`` …, what computes it."""
        described: bytes = _function("ggml_op_desc")(self.address)
        return described.decode()

    @property
    def type_id(self) -> int:
        """Of ``enum ggml_type``."""
        return int(self._struct.type)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """In ggml's order: the length of a row first."""
        a, b, c, d = self._struct.ne
        return int(a), int(b), int(c), int(d)

    @property
    def size_bytes(self) -> int:
        """From its first to its last element, gaps between rows counted."""
        return int(_function("ggml_nbytes")(self.address))

    def source(self, index: int) -> NativeTensor | None:
        """An operand of what computes it."""
        address = self._struct.src[index]
        return NativeTensor(int(address)) if address else None

    def read(self) -> NDArray[Any]:
        """Its values, wherever they lie, in numpy's order (rows last but one); F32 and I32 only."""
        import numpy as np

        kind = {_F32: np.dtype("<f4"), _I32: np.dtype("<i4")}[self.type_id]
        raw = np.empty(self.size_bytes, dtype=np.uint8)
        _function("ggml_backend_tensor_get")(self.address, raw.ctypes.data, 0, raw.nbytes)
        strides = tuple(int(step) for step in self._struct.nb)[::-1]
        return np.ndarray(self.shape[::-1], dtype=kind, buffer=raw, strides=strides)

    def write(self, raw: NDArray[np.uint8]) -> None:
        """Replace its bytes; of a weight only where the model is not memory-mapped."""
        assert raw.nbytes == self.size_bytes and raw.flags.c_contiguous
        _function("ggml_backend_tensor_set")(self.address, raw.ctypes.data, 0, raw.nbytes)


@cache
def check_layout() -> None:
    """Try the struct on a product of two tensors that ggml makes.

    Raises:
        ExecutionFailed: this llama.cpp lays its tensors out differently (``ggml-layout``).
    """
    context = _function("ggml_init")(_InitParams(1 << 20, None, True))
    try:
        shapes = ((7, 5, 3, 2), (7, 11, 3, 2))
        one, other = (NativeTensor(_function("ggml_new_tensor_4d")(context, _F32, *shape)) for shape in shapes)
        _function("ggml_set_name")(one.address, b"CPU#blk.0.attn_k.weight#0")
        product = NativeTensor(_function("ggml_mul_mat")(context, one.address, other.address))
        seen = (one.name, product.operation, product.shape, tuple(one._struct.nb), product.source(0), product.source(1))
        wanted = ("blk.0.attn_k.weight", "MUL_MAT", (5, 11, 3, 2), (4, 28, 140, 420), one, other)
        ids = (one.shape == shapes[0], other.shape == shapes[1], one.type_id == _F32, product.source(2) is None)
        if seen != wanted or not all(ids):
            raise ExecutionFailed(
                "this llama.cpp lays out its tensors differently than qplan knows",
                numbers=f"found {seen[1:4]}, expected {wanted[1:4]}",
                hint="`pip install llama-cpp-python==0.3.36` is the version that qplan is checked with",
                code="ggml-layout",
            )
    finally:
        _function("ggml_free")(context)


Observer = Callable[[NativeTensor, bool], bool]
"""Asked of each node before it is computed, and told (second argument False) of those it wanted afterwards."""


def eval_callback(observer: Observer, failures: list[BaseException]) -> Any:
    """``observer`` as llama.cpp's ``cb_eval``; the caller keeps it alive. What it raises is put into ``failures``,
    as an exception cannot pass through C, and the computation stops."""
    check_layout()

    def called(address: int, asked: bool, _user: object) -> bool:
        try:
            return observer(NativeTensor(address), asked)
        except BaseException as error:  # noqa: BLE001 - raised again by the caller
            failures.append(error)
            return False

    return native.library().llama_cpp.ggml_backend_sched_eval_callback(called)
