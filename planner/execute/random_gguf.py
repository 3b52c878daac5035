"""GGUF files with a model's real shapes and types and random weights: written at the disk's pace, without a quantizer.

Speed and memory do not depend on what the weights are, so such a file stands in for a model that nobody downloaded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from planner.core.model import ModelSpec
from planner.core.units import MIB
from planner.execute import stub
from planner.formats import ggml
from planner.formats.gguf_header import DEFAULT_ALIGNMENT
from planner.formats.gguf_skeleton import header
from planner.methods import gguf

_TILE_BYTES = 8 * MIB
"""Random bytes are repeated after this much: no cache of a processor notices, and it is drawn in 20 ms."""
_STANDARD_DEVIATION = 0.02
_ONES = "ones"
"""Every vector is a norm, in F32."""
# 16-bit scales within a block of ggml-common.h: (offset, value), chosen for weights of about 0.02 around 0;
# all other bytes may be anything.
_SCALES: dict[str, tuple[tuple[int, float], ...]] = {
    "Q1_0": ((0, 0.02),),
    "Q2_0": ((0, 0.015),),
    "Q4_0": ((0, 0.004),),
    "Q4_1": ((0, 0.004), (2, -0.03)),
    "Q5_0": ((0, 0.002),),
    "Q5_1": ((0, 0.002), (2, -0.03)),
    "Q8_0": ((0, 0.00027),),
    "Q2_K": ((80, 0.0018), (82, 0.0027)),
    "Q3_K": ((108, 0.0005),),
    "Q4_K": ((0, 0.00012), (2, 0.0009)),
    "Q5_K": ((0, 0.00006), (2, 0.0009)),
    "Q6_K": ((208, 0.000015),),
    "IQ1_S": ((0, 0.002),),
    "IQ2_XXS": ((0, 0.0003),),
    "IQ2_XS": ((0, 0.0003),),
    "IQ2_S": ((0, 0.0003),),
    "IQ3_XXS": ((0, 0.0002),),
    "IQ3_S": ((0, 0.0001),),
    "IQ4_NL": ((0, 0.0003),),
    "IQ4_XS": ((0, 0.00002),),
    "TQ1_0": ((52, 0.02),),
    "TQ2_0": ((64, 0.02),),
}
# Scales in other forms: bytes at an offset. IQ1_M: a half's four digits (0.002) lead its four words of scales.
# MXFP4: a power of two, 2**(121 - 127). NVFP4: 8-bit floats of 2**-5 (exponent bias 7).
_SCALE_BYTES: dict[str, tuple[tuple[int, bytes], ...]] = {
    "IQ1_M": ((48, bytes((0x11, 0x92, 0x11, 0x12, 0x11, 0x82, 0x11, 0x12))),),
    "MXFP4": ((0, bytes((121,))),),
    "NVFP4": ((0, bytes((0x10,) * 4)),),
}


def writable_types() -> tuple[str, ...]:
    """Tensor types that can be filled with random weights: all that llama.cpp runs."""
    return ("F32", "F16", "BF16", *_SCALES, *_SCALE_BYTES)


def write_random_gguf(spec: ModelSpec, type_: str, path: Path) -> Path:
    """``spec`` in the file type ``type_`` with the tensor types that qplan gives it; norms are 1. No vocabulary."""
    return write_random_tensors(spec, gguf.tensor_types(spec, gguf.variant(type_, imatrix=False)), path)


def write_random_tensors(spec: ModelSpec, types: Sequence[str], path: Path) -> Path:
    """``spec`` with one of :func:`writable_types` for each of its tensors."""
    sizes = [ggml.tensor_bytes(t, tensor.shape) for t, tensor in zip(types, spec.tensors, strict=True)]
    kinds = [_ONES if len(tensor.shape) == 1 else t for tensor, t in zip(spec.tensors, types, strict=True)]
    with path.open("wb") as file:
        file.write(header(stub.metadata(spec), stub.stored_tensors(spec, types)))
        for kind, size in zip(kinds, sizes, strict=True):
            file.write(b"\0" * (-file.tell() % DEFAULT_ALIGNMENT))
            _write_tiled(file.write, _tile(kind), size)
    return path


def _write_tiled(write: Callable[[Any], Any], tile: memoryview, size: int) -> None:
    whole, rest = divmod(size, len(tile))
    for _ in range(whole):
        write(tile)
    write(tile[:rest])


@lru_cache(maxsize=8)
def _tile(type_: str) -> memoryview:
    """A stretch of random weights, a whole number of blocks."""
    import numpy as np

    rng = np.random.default_rng(1)
    if type_ == _ONES:
        return memoryview(np.ones(MIB, np.float32).tobytes())
    if type_ in ("F32", "F16", "BF16"):
        values = rng.standard_normal(_TILE_BYTES // 4, np.float32) * np.float32(_STANDARD_DEVIATION)
        if type_ == "BF16":  # the upper half of a float, little endian
            return memoryview(values.view(np.uint16)[1::2].tobytes())
        return memoryview(values.astype(np.float32 if type_ == "F32" else np.float16).tobytes())
    block = ggml.type_traits(type_).block_bytes
    blocks = rng.integers(0, 256, (_TILE_BYTES // block, block), np.uint8)
    for offset, value in _SCALES.get(type_, ()):
        blocks[:, offset : offset + 2] = np.frombuffer(np.float16(value).tobytes(), np.uint8)
    for offset, data in _SCALE_BYTES.get(type_, ()):
        blocks[:, offset : offset + len(data)] = np.frombuffer(data, np.uint8)
    return memoryview(blocks.tobytes())
