"""The header of a GGUF file as bytes, and files that have one and no weights: the data is a hole in a sparse file.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from struct import pack

from planner.core.errors import InputError
from planner.core.units import MIB, format_bytes, pad
from planner.formats.ggml import tensor_bytes, type_traits
from planner.formats.gguf_header import DEFAULT_ALIGNMENT, MAGIC

VERSION = 3
MOST_DISK_BYTES = 64 * MIB
"""A header takes some hundred KiB; a file that takes more on the disk is not sparse there."""


class Int32(int):
    """A whole number that is stored signed; others are unsigned."""


Scalar = bool | int | float | str
Value = Scalar | bytes | Sequence[Scalar] | Sequence[bytes]
"""``bytes`` is an array of bytes; a sequence of them, as one of ``str``, is an array of texts."""
StoredTensor = tuple[str, tuple[int, ...], str]
"""Name, shape in ggml's order, ggml type."""

# gguf_type of gguf.h
_U8, _U32, _I32, _F32, _BOOL, _STRING, _ARRAY = 0, 4, 5, 6, 7, 8, 9


def header(metadata: Mapping[str, Value], tensors: Sequence[StoredTensor]) -> bytes:
    """Everything before the tensors' data, padded; tensors follow each other in the given order.

    Raises:
        InputError: a row is no whole number of blocks of its type (``row-not-divisible``).
    """
    parts = [MAGIC, pack("<IQQ", VERSION, len(tensors), len(metadata))]
    parts += [_text(key) + _value(value) for key, value in metadata.items()]
    offset = 0
    for name, shape, type_ in tensors:
        parts.append(_text(name) + pack(f"<I{len(shape)}QIQ", len(shape), *shape, type_traits(type_).id, offset))
        offset += pad(tensor_bytes(type_, shape), DEFAULT_ALIGNMENT)
    made = b"".join(parts)
    return made.ljust(pad(len(made), DEFAULT_ALIGNMENT), b"\0")


def write_skeleton(path: Path, metadata: Mapping[str, Value], tensors: Sequence[StoredTensor]) -> None:
    """Write ``path`` with a hole for the tensors' data; it takes the header's bytes on the disk.

    Raises:
        InputError: as for :func:`header`, or the file system knows no sparse files or none as long
            (``not-sparse``); nothing is left behind.
    """
    made = header(metadata, tensors)
    length = len(made) + sum(pad(tensor_bytes(type_, shape), DEFAULT_ALIGNMENT) for _, shape, type_ in tensors)
    try:
        with path.open("wb") as file:
            file.write(made)
            file.truncate(length)
            taken = getattr(os.fstat(file.fileno()), "st_blocks", 0) * 512  # stat(2): in units of 512 bytes
    except OSError as error:
        raise _refused(path, length, error.strerror or str(error)) from None
    if taken > MOST_DISK_BYTES:
        raise _refused(path, length, f"it took {format_bytes(taken)} of the disk")


def _refused(path: Path, length: int, reason: str) -> InputError:
    path.unlink(missing_ok=True)
    return InputError(
        f"{path.parent} cannot hold a sparse file of {format_bytes(length)}",
        numbers=reason,
        hint="TMPDIR names another folder for temporary files",
        code="not-sparse",
    )


def _text(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return pack("<Q", len(data)) + data


def _value(value: Value) -> bytes:
    if isinstance(value, (bool, int, float, str)):
        type_, data = _scalar(value)
        return pack("<I", type_) + data
    type_, data = (_U8, value) if isinstance(value, bytes) else _elements(value)
    return pack("<IIQ", _ARRAY, type_, len(value)) + data


def _scalar(value: Scalar) -> tuple[int, bytes]:
    if isinstance(value, bool):
        return _BOOL, pack("<?", value)
    if isinstance(value, int):
        return (_I32, pack("<i", value)) if isinstance(value, Int32) else (_U32, pack("<I", value))
    return (_F32, pack("<f", value)) if isinstance(value, float) else (_STRING, _text(value))


def _elements(values: Sequence[Scalar] | Sequence[bytes]) -> tuple[int, bytes]:
    """All at once: a vocabulary has 100,000 of them. The first tells the type; whole numbers are signed."""
    first = values[0] if values else 0
    if isinstance(first, (str, bytes)):
        return _STRING, b"".join([_text(value) for value in values])  # type: ignore[arg-type]
    kind = "?" if isinstance(first, bool) else "f" if isinstance(first, float) else "i"
    return {"?": _BOOL, "f": _F32, "i": _I32}[kind], pack(f"<{len(values)}{kind}", *values)
