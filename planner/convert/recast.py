"""A safetensors file written again with other float types: block by block, so that its size does not matter."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from planner.convert.encode import encode
from planner.convert.rows import BLOCK_BYTES, FLOAT_DTYPES
from planner.core.errors import InputError
from planner.formats.safetensors import StoredTensor, read_header

if TYPE_CHECKING:
    import numpy as np

_HEADER_ALIGNMENT = 8
"""safetensors pads its header with spaces to this."""

TypeOf = Callable[[StoredTensor], str]
"""What a tensor is to be stored as, one of ``FLOAT_DTYPES``; asked of tensors that are stored as such a type only."""


def recast_file(source: Path, target: Path, type_of: TypeOf, moved: Callable[[int], None] = lambda _: None) -> None:
    """Write ``source`` as ``target``; whole numbers, flags and 8-bit floats stay as they are.

    Args:
        source: a safetensors file.
        target: another file; neither atomic nor synced.
        type_of: the new type of a tensor.
        moved: told how many bytes were read since it was last called.

    Raises:
        InputError: the file is damaged, or a value does not fit in its new type (``f16-overflow``).
        OSError: it cannot be written.
    """
    header = read_header(source)
    types = {t.name: type_of(t) if t.dtype in FLOAT_DTYPES else t.dtype for t in header.tensors}
    with target.open("wb") as out:
        out.write(_header(header.tensors, header.metadata, types))
        for tensor in header.tensors:
            for block, read in _blocks(tensor, types[tensor.name]):
                out.write(block if isinstance(block, bytes) else block.data)
                moved(read)


def _header(tensors: tuple[StoredTensor, ...], metadata: dict[str, str], types: dict[str, str]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    offset = 0
    for tensor in tensors:
        stored = types[tensor.name]
        size = tensor.element_count * FLOAT_DTYPES[stored][1] if stored in FLOAT_DTYPES else tensor.size_bytes
        entries[tensor.name] = {
            "dtype": stored,
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _HEADER_ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _blocks(tensor: StoredTensor, target: str) -> Iterator[tuple[np.ndarray[Any, Any] | bytes, int]]:
    """Blocks of a tensor as they are to be stored, each with the bytes that were read for it."""
    import numpy as np

    with tensor.file.open("rb") as stream:
        stream.seek(tensor.offset)
        left = tensor.size_bytes
        while left:
            raw = stream.read(min(BLOCK_BYTES, left))
            if not raw:
                raise InputError(f"{tensor.file.name!r} became shorter while it was read", code="truncated-safetensors")
            left -= len(raw)
            if target == tensor.dtype:
                yield raw, len(raw)
                continue
            values = np.frombuffer(raw, dtype=FLOAT_DTYPES[tensor.dtype][0])
            made = encode(values, tensor.dtype, target, name=tensor.name, shift=0.0)
            yield np.ascontiguousarray(made), len(raw)
