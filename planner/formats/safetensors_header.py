"""Headers of safetensors files, checked as the format's specification asks; weights only as a mapped view.

The format: https://huggingface.co/docs/safetensors/en/index#format. Eight bytes (little-endian) give the length of
a JSON object, which gives every tensor's type, shape and byte range; the ranges cover the rest of the file exactly.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from planner.core.errors import InputError
from planner.core.units import format_bytes
from planner.formats.json_file import MAX_JSON_BYTES, parse_object, size_of

LENGTH_BYTES = 8
"""Bytes of the length in front of the header."""
MAX_HEADER_BYTES = MAX_JSON_BYTES
"""The reference implementation refuses longer headers (``MAX_HEADER_SIZE``, safetensors/src/tensor.rs)."""

# `Dtype::bitsize` of safetensors 0.6 (safetensors/src/tensor.rs)
_BITS = {
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """One tensor as a safetensors file stores it."""

    name: str
    dtype: str
    """As the file spells it: ``BF16``, ``F16``, ``F8_E4M3`` …"""
    shape: tuple[int, ...]
    """Hugging Face's order: a linear layer is ``(out, in)``."""
    file: Path
    offset: int
    """First byte, counted from the start of the file."""
    size_bytes: int

    @property
    def element_count(self) -> int:
        """Number of values."""
        return prod(self.shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """The header of one safetensors file."""

    path: Path
    tensors: tuple[StoredTensor, ...]
    """In the order of their bytes."""
    data_offset: int
    """Bytes in front of the data."""
    metadata: dict[str, str] = field(default_factory=dict)


def _bad(path: Path, problem: str, numbers: str = "", code: str = "bad-safetensors") -> InputError:
    return InputError(
        f"{path.name!r} is no valid safetensors file: {problem}",
        numbers=numbers,
        hint="download the file again; its size and hash are on the repository's page",
        code=code,
    )


def _truncated(path: Path, expected: int, actual: int) -> InputError:
    return _bad(
        path,
        "it is cut short",
        f"{expected} bytes expected, {actual} there; {format_bytes(expected - actual)} are missing",
        "truncated-safetensors",
    )


def header_length(prefix: bytes, file_size: int, path: Path = Path("the file")) -> int:
    """Bytes of the JSON header, from the first eight bytes of a file of ``file_size`` bytes.

    Raises:
        InputError: too short (``truncated-safetensors``) or no safetensors file (``bad-safetensors``).
    """
    if len(prefix) < LENGTH_BYTES:
        raise _truncated(path, LENGTH_BYTES, len(prefix))
    length = int.from_bytes(prefix[:LENGTH_BYTES], "little")
    if prefix[:LENGTH_BYTES].startswith(b"version "):
        raise _bad(path, "it is a Git LFS pointer, not the weights", "`git lfs pull` fetches them", "lfs-pointer")
    if length > MAX_HEADER_BYTES:
        raise _bad(path, "its header is too long", f"{length} bytes; at most {MAX_HEADER_BYTES}")
    if length < len(b"{}"):
        raise _bad(path, "its header is empty", f"{length} bytes")
    if LENGTH_BYTES + length > file_size:
        raise _truncated(path, LENGTH_BYTES + length, file_size)
    return length


def parse_header(prefix: bytes, file_size: int, path: Path = Path("the file")) -> Header:
    """The header at the start of a file of ``file_size`` bytes; ``prefix`` holds at least the whole header.

    ``path`` only names the file. Nothing beyond the header is needed, so a range request is enough.

    Raises:
        InputError: ``truncated-safetensors`` or ``bad-safetensors``, with the figures.
    """
    length = header_length(prefix, file_size, path)
    data_offset = LENGTH_BYTES + length
    if len(prefix) < data_offset:
        raise _truncated(path, data_offset, len(prefix))
    text = prefix[LENGTH_BYTES:data_offset]
    if text[:1] != b"{":
        raise _bad(path, "its header does not begin with `{`", repr(text[:16]))
    entries = parse_object(text, f"the header of {path.name!r}", code="bad-safetensors")
    metadata = _metadata(entries.pop("__metadata__", {}), path)
    tensors = [_tensor(name, entry, data_offset, path) for name, entry in entries.items()]
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.size_bytes))
    _check_ranges(tensors, data_offset, file_size, path)
    return Header(path=path, tensors=tuple(tensors), data_offset=data_offset, metadata=metadata)


def read_header(file: Path) -> Header:
    """The header of the safetensors file ``file``; its weights are not read.

    Raises:
        InputError: missing, unreadable, truncated or malformed.
    """
    file_size = size_of(file)
    try:
        with file.open("rb") as stream:
            prefix = stream.read(LENGTH_BYTES)
            length = header_length(prefix, file_size, file)
            return parse_header(prefix + stream.read(length), file_size, file)
    except OSError as error:
        raise InputError(f"{str(file)!r} cannot be read", numbers=str(error), code="unreadable-file") from None


def _metadata(entry: Any, path: Path) -> dict[str, str]:
    if not isinstance(entry, dict) or not all(isinstance(value, str) for value in entry.values()):
        raise _bad(path, "`__metadata__` is not a map from text to text")
    return entry


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 63  # an offset beyond 2**63 fits no file; `type` refuses bool


def _tensor(name: str, entry: Any, data_offset: int, path: Path) -> StoredTensor:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _bad(path, f"the entry of {name!r} must have dtype, shape and data_offsets, and nothing else")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    bits = _BITS.get(dtype) if isinstance(dtype, str) else None
    if bits is None:
        raise _bad(path, f"{name!r} has an unknown dtype", repr(dtype)[:80])
    if not isinstance(shape, list) or not all(_is_count(length) for length in shape):
        raise _bad(path, f"the shape of {name!r} is not a list of lengths", repr(shape)[:80])
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_count(offset) for offset in offsets):
        raise _bad(path, f"the data_offsets of {name!r} are not two offsets", repr(offsets)[:80])
    begin, end = offsets
    if begin > end:
        raise _bad(path, f"{name!r} ends before it begins", f"data_offsets {begin} and {end}")
    size_bits = prod(shape) * bits
    if size_bits % 8 or size_bits // 8 != end - begin:
        shown = f"{dtype} {tuple(shape)} takes {size_bits / 8:g} bytes"
        raise _bad(path, f"{name!r} has a byte range of another size than its shape", f"{shown}, not {end - begin}")
    return StoredTensor(
        name=name, dtype=dtype, shape=tuple(shape), file=path, offset=data_offset + begin, size_bytes=end - begin
    )


def _check_ranges(tensors: list[StoredTensor], data_offset: int, file_size: int, path: Path) -> None:
    """The ranges, in order, meet without overlap or hole and end where the file ends."""
    position = data_offset
    for tensor in tensors:
        if tensor.offset != position:
            problem = "overlaps the tensor before it" if tensor.offset < position else "leaves a hole in front of it"
            raise _bad(path, f"{tensor.name!r} {problem}", f"begins at {tensor.offset}, expected {position}")
        position += tensor.size_bytes
    if position > file_size:
        raise _truncated(path, position, file_size)
    if position < file_size:
        raise _bad(path, "bytes after the last tensor belong to none", f"{file_size - position} bytes")


def read_tensor_bytes(tensor: StoredTensor) -> memoryview:
    """The bytes of ``tensor`` as a read-only view of the mapped file; nothing is copied.

    The mapping lives as long as the view does.

    Raises:
        InputError: the file is gone, unreadable or shorter than its header said.
    """
    file_size = size_of(tensor.file)
    if tensor.offset + tensor.size_bytes > file_size:
        raise _truncated(tensor.file, tensor.offset + tensor.size_bytes, file_size)
    if not tensor.size_bytes:
        return memoryview(b"")
    start = tensor.offset - tensor.offset % mmap.ALLOCATIONGRANULARITY
    skip = tensor.offset - start
    try:
        with tensor.file.open("rb") as stream:
            mapped = mmap.mmap(stream.fileno(), skip + tensor.size_bytes, access=mmap.ACCESS_READ, offset=start)
    except OSError as error:
        raise InputError(f"{str(tensor.file)!r} cannot be mapped", numbers=str(error), code="unreadable-file") from None
    return memoryview(mapped)[skip:]
