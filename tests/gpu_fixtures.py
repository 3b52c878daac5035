"""GGUF files with a catalog model's real shapes and types and random weights, in seconds and without a quantizer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from planner.core.model import ModelSpec
from planner.core.units import MIB
from planner.formats import ggml
from planner.methods import gguf
from tests.catalog_fixtures import ALIGNMENT, add_value, hyperparameters

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_TILE_BYTES = 32 * MIB
_STANDARD_DEVIATION = 0.02
# 16-bit scales within a block of ggml-common.h: (offset, value), chosen for weights of about 0.02 around 0;
# all other bytes may be anything.
_SCALES: dict[str, tuple[tuple[int, float], ...]] = {
    "Q4_0": ((0, 0.004),),
    "Q8_0": ((0, 0.00027),),
    "Q2_K": ((80, 0.0018), (82, 0.0027)),
    "Q3_K": ((108, 0.0005),),
    "Q4_K": ((0, 0.00012), (2, 0.0009)),
    "Q5_K": ((0, 0.00006), (2, 0.0009)),
    "Q6_K": ((208, 0.000015),),
}


def write_random_gguf(spec: ModelSpec, type_: str, path: Path) -> Path:
    """``spec`` in the file type ``type_`` with the tensor types that qplan gives it; norms are 1. No vocabulary."""
    import gguf as writing
    import numpy as np

    writer = writing.GGUFWriter(str(path), spec.architecture)
    writer.add_string("tokenizer.ggml.model", "no_vocab")
    for key, value in hyperparameters(spec).items():
        add_value(writer, f"{spec.architecture}.{key}", value)
    types = gguf.tensor_types(spec, gguf.variant(type_, imatrix=False))
    sizes = [ggml.tensor_bytes(t, tensor.shape) for t, tensor in zip(types, spec.tensors, strict=True)]
    for tensor, t, size in zip(spec.tensors, types, sizes, strict=True):
        raw = writing.GGMLQuantizationType[t]
        writer.add_tensor_info(tensor.name, tuple(reversed(tensor.shape)), np.dtype(np.float32), size, raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    tiles = {t: _tile(t) for t in set(types)}
    with path.open("r+b") as file:
        file.seek(0, 2)
        for t, size in zip(types, sizes, strict=True):
            file.write(b"\0" * (-file.tell() % ALIGNMENT))
            _write_tiled(file.write, tiles[t], size)
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
    if type_ == "F32":
        return memoryview(np.ones(MIB, np.float32).tobytes())
    if type_ in ("F16", "BF16"):
        values = (_STANDARD_DEVIATION * rng.standard_normal(_TILE_BYTES // 2, np.float32)).astype(np.float32)
        return memoryview(values.astype(np.float16).tobytes() if type_ == "F16" else _as_bf16(values).tobytes())
    block = ggml.type_traits(type_).block_bytes
    blocks = rng.integers(0, 256, (_TILE_BYTES // block, block), np.uint8)
    for offset, value in _SCALES[type_]:
        blocks[:, offset : offset + 2] = np.frombuffer(np.float16(value).tobytes(), np.uint8)
    return memoryview(blocks.tobytes())


def _as_bf16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    import numpy as np

    high: NDArray[np.uint16] = (values.view(np.uint32) >> 16).astype(np.uint16)
    return high
