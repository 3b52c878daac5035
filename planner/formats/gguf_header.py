"""Headers of GGUF files: metadata and tensor infos, with every count and length held against the file's size.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. What llama.cpp's reader refuses
(ggml/src/gguf.cpp: nested arrays, names twice, tensors not in the order of their bytes) is refused here too.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from pathlib import Path
from struct import Struct
from typing import Any

from planner.core.errors import InputError
from planner.core.units import format_bytes, pad
from planner.formats.ggml import find_type, tensor_bytes

MAGIC = b"GGUF"
DEFAULT_ALIGNMENT = 32
"""``GGUF_DEFAULT_ALIGNMENT`` of gguf.h."""
MAX_NAME_BYTES = 63
"""``GGML_MAX_NAME`` of ggml.h, less the closing zero."""
MAX_DIMENSIONS = 4
"""``GGML_MAX_DIMS`` of ggml.h."""
MAX_ENTRY_COUNT = 1 << 20
"""Keys or tensors. The largest models have a few thousand tensors; a count beyond this is a lie."""
MAX_ARRAY_COUNT = 1 << 24
"""Elements of an array. The largest vocabularies have 262,144 tokens and half a million merges."""
MAX_STRING_BYTES = 1 << 24
"""Bytes of one string. Chat templates, the longest, take some 50 kB."""
MAX_KEPT_COUNT = 1024
"""Number arrays up to this length are read: per-layer figures. Token scores are not."""

_U32, _U64 = Struct("<I"), Struct("<Q")
# gguf_type of gguf.h, all but strings (8) and arrays (9)
SCALARS = {
    0: ("u8", Struct("<B")),
    1: ("i8", Struct("<b")),
    2: ("u16", Struct("<H")),
    3: ("i16", Struct("<h")),
    4: ("u32", _U32),
    5: ("i32", Struct("<i")),
    6: ("f32", Struct("<f")),
    7: ("bool", Struct("<?")),
    10: ("u64", _U64),
    11: ("i64", Struct("<q")),
    12: ("f64", Struct("<d")),
}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True, slots=True)
class ArrayInfo:
    """An array in the metadata, not read unless it is short and of numbers."""

    type: str
    """``u8`` … ``f64``, ``bool`` or ``str``."""
    count: int
    offset: int
    """First byte of the first element, from the start of the file."""
    size_bytes: int
    values: tuple[Any, ...] | None = None
    """The elements of a number array of at most ``MAX_KEPT_COUNT``; ``read_array`` reads the others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredGgufTensor:
    """One tensor as a GGUF file stores it."""

    name: str
    shape: tuple[int, ...]
    """ggml's order: ``shape[0]`` is the length of a row."""
    type: str
    """ggml type name: ``F16``, ``Q4_K`` …"""
    file: Path
    offset: int
    """First byte, counted from the start of the file."""
    size_bytes: int
    """Without the padding behind it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufHeader:
    """The header of a GGUF file, or of all shards of a split one."""

    path: Path
    """The file; of a split model, its first shard."""
    version: int
    metadata: dict[str, Any]
    """Numbers, booleans, text and ``ArrayInfo``, by key."""
    tensors: tuple[StoredGgufTensor, ...]
    data_offset: int
    """First byte of the tensor data in ``path``."""
    alignment: int
    metadata_bytes: int
    """Bytes in front of the tensor data, in all shards together."""
    files: tuple[Path, ...]
    file_bytes: int
    """Bytes of all files together."""

    @property
    def tensor_bytes(self) -> int:
        """Bytes of all tensors, without padding."""
        return sum(tensor.size_bytes for tensor in self.tensors)


class ShortPrefix(InputError):
    """The header goes on beyond the bytes at hand, though not beyond the file: fetch more."""

    default_code = "short-prefix"


def bad_gguf(path: Path, problem: str, numbers: str = "", code: str = "bad-gguf") -> InputError:
    """The error for a GGUF file at ``path`` with this ``problem``."""
    return InputError(
        f"{path.name!r} is no valid GGUF file: {problem}",
        numbers=numbers,
        hint="download the file again; its size and hash are on the repository's page",
        code=code,
    )


def truncated(path: Path, expected: int, actual: int) -> InputError:
    """The error for a GGUF file of ``actual`` bytes that must have ``expected``."""
    return bad_gguf(
        path,
        "it is cut short",
        f"at least {expected} bytes expected, {actual} there; {format_bytes(expected - actual)} are missing",
        "truncated-gguf",
    )


class Cursor:
    """Reads little-endian values off ``data``, the first bytes of a file of ``file_size`` bytes."""

    def __init__(self, data: bytes | mmap.mmap, file_size: int, path: Path) -> None:
        self.data, self.file_size, self.path = data, file_size, path
        self.available = len(data)
        self.position = 0

    def advance(self, size: int) -> int:
        """Skip ``size`` bytes, which must be there; the position before them."""
        start = self.position
        end = start + size
        if end > self.available:
            if end > self.file_size:
                raise truncated(self.path, end, self.file_size)
            raise ShortPrefix(f"the header of {self.path.name!r} goes on", numbers=f"beyond byte {self.available}")
        self.position = end
        return start

    def number(self, kind: Struct) -> Any:
        """The next number, of this ``kind``."""
        return kind.unpack_from(self.data, self.advance(kind.size))[0]

    def skip_string(self) -> tuple[int, int]:
        """Skip a string; where its bytes begin and end."""
        length = self.number(_U64)
        if length > MAX_STRING_BYTES:
            raise bad_gguf(
                self.path, "a string is longer than any real one", f"{length} bytes at byte {self.position - 8}"
            )
        start = self.advance(length)
        return start, self.position

    def skip_strings(self, count: int) -> None:
        """Skip ``count`` strings: ``skip_string`` without its calls, as vocabularies have 100,000 of them."""
        read, data, position = _U64.unpack_from, self.data, self.position
        last = self.available - _U64.size
        for _ in range(count):
            length = read(data, position)[0] if position <= last else MAX_STRING_BYTES
            if length > min(last - position, MAX_STRING_BYTES):
                self.position = position
                self.skip_string()  # raises, as it knows what is wrong
            position += _U64.size + length
        self.position = position

    def text(self) -> str:
        """The next string; bytes that are no UTF-8 are replaced."""
        start, end = self.skip_string()
        return bytes(self.data[start:end]).decode("utf-8", errors="replace")

    def name(self, what: str) -> str:
        """The next string as a name of ``what``: UTF-8 and not empty."""
        start, end = self.skip_string()
        try:
            found = bytes(self.data[start:end]).decode("utf-8")
        except UnicodeDecodeError:
            found = ""
        if not found:
            raise bad_gguf(self.path, f"the name of {what} is empty or not UTF-8", f"at byte {start}")
        return found


def parse_header(prefix: bytes | mmap.mmap, file_size: int, path: Path = Path("the file")) -> GgufHeader:
    """The header at the start of a GGUF file of ``file_size`` bytes.

    Raises:
        ShortPrefix: the header is longer than ``prefix``; try again with more bytes.
        InputError: ``not-gguf``, ``gguf-version``, ``big-endian-gguf``, ``truncated-gguf``, ``unknown-ggml-type``
            or ``bad-gguf``.
    """
    cursor = Cursor(prefix, file_size, path)
    version = _version(cursor)
    tensor_count, key_count = cursor.number(_U64), cursor.number(_U64)
    for what, count in (("tensors", tensor_count), ("keys", key_count)):
        if count > MAX_ENTRY_COUNT:
            raise bad_gguf(path, f"it claims more {what} than any model has", f"{count}; at most {MAX_ENTRY_COUNT}")
    metadata = _metadata(cursor, key_count)
    alignment = _alignment(metadata, path)
    infos = [_tensor_info(cursor) for _ in range(tensor_count)]
    if len({info[0] for info in infos}) != len(infos):
        raise bad_gguf(path, "a tensor is there twice")
    data_offset = pad(cursor.position, alignment) if infos else cursor.position
    return GgufHeader(
        path=path,
        version=version,
        metadata=metadata,
        tensors=_place(infos, data_offset, alignment, file_size, path),
        data_offset=data_offset,
        alignment=alignment,
        metadata_bytes=data_offset,
        files=(path,),
        file_bytes=file_size,
    )


def _version(cursor: Cursor) -> int:
    start = cursor.advance(len(MAGIC))
    magic = bytes(cursor.data[start : start + len(MAGIC)])
    if magic != MAGIC:
        raise bad_gguf(cursor.path, "it does not begin with GGUF", f"but with {magic!r}", "not-gguf")
    version: int = cursor.number(_U32)
    if version & 0xFFFF == 0:  # 3 in the other byte order is 0x03000000, as gguf.cpp tests
        raise InputError(
            f"{cursor.path.name!r} is a big-endian GGUF file",
            hint="convert it: `python -m gguf.scripts.gguf_convert_endian FILE little` from the gguf package",
            code="big-endian-gguf",
        )
    if version not in (2, 3):
        raise InputError(
            f"{cursor.path.name!r} is of GGUF version {version}",
            numbers="versions 2 and 3 can be read",
            hint="convert the model again from its original weights",
            code="gguf-version",
        )
    return version


def _metadata(cursor: Cursor, count: int) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for _ in range(count):
        key = cursor.name("a key")
        if key in metadata:
            raise bad_gguf(cursor.path, f"the key {key!r} is there twice")
        metadata[key] = _value(cursor, key, cursor.number(_U32))
    return metadata


def _value(cursor: Cursor, key: str, kind: int) -> Any:
    if kind == _STRING:
        return cursor.text()
    if kind == _ARRAY:
        return _array(cursor, key)
    if kind not in SCALARS:
        raise bad_gguf(cursor.path, f"the key {key!r} has an unknown type", str(kind))
    return cursor.number(SCALARS[kind][1])


def _array(cursor: Cursor, key: str) -> ArrayInfo:
    kind, count = cursor.number(_U32), cursor.number(_U64)
    if count > MAX_ARRAY_COUNT:
        raise bad_gguf(cursor.path, f"the array {key!r} is longer than any real one", f"{count} elements")
    start = cursor.position
    if kind == _STRING:
        cursor.skip_strings(count)
        return ArrayInfo("str", count, start, cursor.position - start)
    if kind not in SCALARS:
        raise bad_gguf(cursor.path, f"the array {key!r} has elements of an unknown or nested type", str(kind))
    name, element = SCALARS[kind]
    size_bytes = count * element.size
    cursor.advance(size_bytes)
    values = None
    if count <= MAX_KEPT_COUNT:
        values = Struct(f"<{count}{element.format[-1]}").unpack_from(cursor.data, start)
    return ArrayInfo(name, count, start, size_bytes, values)


def _alignment(metadata: dict[str, Any], path: Path) -> int:
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if type(alignment) is not int or alignment <= 0 or alignment & (alignment - 1):
        raise bad_gguf(path, "its alignment is no power of two", repr(alignment)[:80])
    return alignment


def _tensor_info(cursor: Cursor) -> tuple[str, tuple[int, ...], str, int, int]:
    """Name, shape, type, bytes and offset of the next tensor."""
    path = cursor.path
    name = cursor.name("a tensor")
    if len(name.encode()) > MAX_NAME_BYTES:
        raise bad_gguf(path, "a tensor's name is too long", f"{name[:40]!r}…, {len(name.encode())} bytes")
    dimension_count = cursor.number(_U32)
    if not 1 <= dimension_count <= MAX_DIMENSIONS:
        raise bad_gguf(path, f"{name!r} has {dimension_count} dimensions", f"1 to {MAX_DIMENSIONS} are possible")
    shape = tuple(cursor.number(_U64) for _ in range(dimension_count))
    elements = 1
    for length in shape:
        elements *= length
    if not 0 < elements < 1 << 63:
        raise bad_gguf(path, f"{name!r} has an impossible shape", str(shape))
    type_id, offset = cursor.number(_U32), cursor.number(_U64)
    traits = find_type(type_id)
    if traits is None:
        raise bad_gguf(path, f"{name!r} is of a type llama.cpp does not know", f"type {type_id}", "unknown-ggml-type")
    if shape[0] % traits.block_weights:
        numbers = f"rows of {shape[0]}, {traits.name} packs {traits.block_weights} weights to a block"
        raise bad_gguf(path, f"the rows of {name!r} are no whole number of blocks", numbers)
    return name, shape, traits.name, tensor_bytes(traits.name, shape), offset


def _place(
    infos: list[tuple[str, tuple[int, ...], str, int, int]],
    data_offset: int,
    alignment: int,
    file_size: int,
    path: Path,
) -> tuple[StoredGgufTensor, ...]:
    """The tensors at their absolute offsets: each begins where the one before it, padded, ends."""
    tensors, expected, end = [], 0, data_offset
    for name, shape, kind, size_bytes, offset in infos:
        if offset != expected:
            raise bad_gguf(
                path, f"{name!r} is not where the tensor before it ends", f"offset {offset}, expected {expected}"
            )
        start = data_offset + offset
        end = start + size_bytes
        tensors.append(
            StoredGgufTensor(name=name, shape=shape, type=kind, file=path, offset=start, size_bytes=size_bytes)
        )
        expected = pad(offset + size_bytes, alignment)
    if end > file_size:
        raise truncated(path, end, file_size)
    return tuple(tensors)
