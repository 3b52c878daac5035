"""GGUF files with a catalog model's real shapes and types and random weights, in seconds and without a quantizer."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from planner.core.model import ModelSpec
from planner.core.units import MIB
from planner.execute import stub
from planner.formats import ggml
from planner.formats.gguf_header import DEFAULT_ALIGNMENT
from planner.formats.gguf_skeleton import header
from planner.methods import gguf
from planner.verify.trial import Buffer

_TILE_BYTES = 32 * MIB
_STANDARD_DEVIATION = 0.02
_ONES = "ones"
"""Every vector is a norm, in F32."""
# 16-bit scales within a block of ggml-common.h: (offset, value), chosen for weights of about 0.02 around 0;
# all other bytes may be anything.
_SCALES: dict[str, tuple[tuple[int, float], ...]] = {
    "Q4_0": ((0, 0.004),),
    "Q5_0": ((0, 0.002),),
    "Q8_0": ((0, 0.00027),),
    "Q2_K": ((80, 0.0018), (82, 0.0027)),
    "Q3_K": ((108, 0.0005),),
    "Q4_K": ((0, 0.00012), (2, 0.0009)),
    "Q5_K": ((0, 0.00006), (2, 0.0009)),
    "Q6_K": ((208, 0.000015),),
}


def write_random_gguf(spec: ModelSpec, type_: str, path: Path) -> Path:
    """``spec`` in the file type ``type_`` with the tensor types that qplan gives it; norms are 1. No vocabulary."""
    types = gguf.tensor_types(spec, gguf.variant(type_, imatrix=False))
    sizes = [ggml.tensor_bytes(t, tensor.shape) for t, tensor in zip(types, spec.tensors, strict=True)]
    path.write_bytes(header(stub.metadata(spec), stub.stored_tensors(spec, types)))
    tiles = {t: _tile(t) for t in {*types, _ONES}}
    kinds = [_ONES if len(tensor.shape) == 1 else t for tensor, t in zip(spec.tensors, types, strict=True)]
    with path.open("r+b") as file:
        file.seek(0, 2)
        for kind, size in zip(kinds, sizes, strict=True):
            file.write(b"\0" * (-file.tell() % DEFAULT_ALIGNMENT))
            _write_tiled(file.write, tiles[kind], size)
    return path


def _write_tiled(write: Callable[[Any], Any], tile: memoryview, size: int) -> None:
    whole, rest = divmod(size, len(tile))
    for _ in range(whole):
        write(tile)
    write(tile[:rest])


def _tile(type_: str) -> memoryview:
    """A stretch of random weights, a whole number of blocks."""
    import numpy as np

    rng = np.random.default_rng(1)
    if type_ == _ONES:
        return memoryview(np.ones(MIB, np.float32).tobytes())
    if type_ in ("F32", "F16"):
        values = rng.standard_normal(_TILE_BYTES // 4, np.float32) * np.float32(_STANDARD_DEVIATION)
        return memoryview(values.astype(np.float32 if type_ == "F32" else np.float16).tobytes())
    block = ggml.type_traits(type_).block_bytes
    blocks = rng.integers(0, 256, (_TILE_BYTES // block, block), np.uint8)
    for offset, value in _SCALES[type_]:
        blocks[:, offset : offset + 2] = np.frombuffer(np.float16(value).tobytes(), np.uint8)
    return memoryview(blocks.tobytes())


def reported(buffers: Iterable[Buffer]) -> dict[tuple[str, str], int]:
    """llama.cpp's memory report as bytes by place, ``gpu`` or ``host``, and kind, as ``model`` or ``KV``."""
    totals: dict[tuple[str, str], int] = {}
    for buffer in buffers:
        place = "gpu" if re.fullmatch(r"CUDA\d+", buffer.name) else "host"
        totals[place, buffer.kind] = totals.get((place, buffer.kind), 0) + buffer.size_bytes
    return totals
