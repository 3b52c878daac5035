"""GGUF files on disk, whole or in shards: their headers, and single arrays out of their metadata."""

from __future__ import annotations

import mmap
import re
from pathlib import Path
from typing import Any

from planner.core.errors import InputError
from planner.formats.gguf_header import (
    MAGIC,
    SCALARS,
    ArrayInfo,
    Cursor,
    GgufHeader,
    ShortPrefix,
    StoredGgufTensor,
    bad_gguf,
    parse_header,
    truncated,
)
from planner.formats.json_file import size_of

__all__ = [
    "ArrayInfo",
    "GgufHeader",
    "ShortPrefix",
    "StoredGgufTensor",
    "merge_shards",
    "open_gguf",
    "parse_header",
    "read_array",
    "read_header",
    "shard_names",
]

_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")


def read_header(file: Path) -> GgufHeader:
    """The header of the GGUF file ``file``: one shard, if it is split.

    Raises:
        InputError: missing, unreadable, or as for ``parse_header``.
    """
    file_size = size_of(file)
    if file_size < len(MAGIC):
        raise truncated(file, 24, file_size)  # magic, version, two counts
    try:
        with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            return parse_header(mapped, len(mapped), file)
    except OSError as error:
        raise InputError(f"{str(file)!r} cannot be read", numbers=str(error), code="unreadable-file") from None


def read_array(file: Path, info: ArrayInfo) -> tuple[Any, ...]:
    """All elements of the metadata array ``info`` of the GGUF file ``file``: a vocabulary, its scores, merges.

    Raises:
        InputError: the file changed since its header was read.
    """
    try:
        with file.open("rb") as stream:
            stream.seek(info.offset)
            data = stream.read(info.size_bytes)
    except OSError as error:
        raise InputError(f"{str(file)!r} cannot be read", numbers=str(error), code="unreadable-file") from None
    cursor = Cursor(data, len(data), file)
    if info.type == "str":
        return tuple(cursor.text() for _ in range(info.count))
    element = next(kind for name, kind in SCALARS.values() if name == info.type)
    cursor.advance(info.count * element.size)
    return tuple(value for (value,) in element.iter_unpack(data))


def shard_names(name: str) -> tuple[str, ...]:
    """Names of all shards of the GGUF file called ``name``: itself, unless it is ``…-00001-of-0000N.gguf``."""
    match = _SHARD.fullmatch(name)
    if match is None:
        return (name,)
    return tuple(f"{match[1]}-{number:05d}-of-{match[3]}.gguf" for number in range(1, int(match[3]) + 1))


def open_gguf(path: Path) -> GgufHeader:
    """The header of a whole GGUF model: of ``path``, or of all the shards it is one of.

    Raises:
        InputError: a shard is missing (``missing-shard``) or does not belong (``bad-gguf``), or as for ``read_header``.
    """
    names = shard_names(path.name)
    missing = [name for name in names if len(names) > 1 and not (path.parent / name).is_file()]
    if missing:
        raise InputError(
            f"{len(missing)} of {len(names)} shards of {path.name!r} are missing",
            numbers="\n".join(missing[:5]),
            hint="download the missing shards into the same directory",
            code="missing-shard",
        )
    if not names:
        raise bad_gguf(path, "its name says that it has no shards")
    return merge_shards([read_header(path.parent / name) for name in names])


def merge_shards(shards: list[GgufHeader]) -> GgufHeader:
    """One header out of the headers of all shards of a model, in order; the first has the metadata.

    Raises:
        InputError: a shard is of another model or place, or tensors are missing (``bad-gguf``, ``missing-shard``).
    """
    first = shards[0]
    for number, shard in enumerate(shards):
        count, place = shard.metadata.get("split.count", 1), shard.metadata.get("split.no", 0)
        if (count or 1, place) != (len(shards), number):
            problem = f"it is shard {place} of {count}, not {number} of {len(shards)} as its name says"
            raise bad_gguf(shard.path, problem, "shards are named NAME-00001-of-0000N.gguf", "missing-shard")
    tensors = tuple(tensor for shard in shards for tensor in shard.tensors)
    claimed = first.metadata.get("split.tensors.count", len(tensors))
    if claimed != len(tensors) or len({tensor.name for tensor in tensors}) != len(tensors):
        raise bad_gguf(first.path, "its shards do not add up", f"{claimed} tensors expected, {len(tensors)} there")
    return GgufHeader(
        path=first.path,
        version=first.version,
        metadata=first.metadata,
        tensors=tensors,
        data_offset=first.data_offset,
        alignment=first.alignment,
        metadata_bytes=sum(shard.metadata_bytes for shard in shards),
        files=tuple(shard.path for shard in shards),
        file_bytes=sum(shard.file_bytes for shard in shards),
    )
