"""The checkpoint's files as they are read: from the first byte to the last, once, each block where it is needed.

A shard is read in its own order and not in the order of any output, so that the disk streams and the hash of the file
falls out on the way. Every output's offsets are known beforehand, so the order of writing is free.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from planner.convert.rows import NamedTensor, RowSlice


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """Rows that lie together in a shard and in every output: what is journaled as done or not."""

    number: int
    tensor: NamedTensor
    part: RowSlice
    first_row: int
    """Row of ``tensor`` where the slice begins."""

    @property
    def offset(self) -> int:
        """First byte in the shard."""
        return self.part.tensor.offset + self.part.start * self.row_bytes

    @property
    def row_bytes(self) -> int:
        """Stored bytes of a row."""
        return self.tensor.row_length * self.part.value_bytes

    @property
    def size_bytes(self) -> int:
        """Stored bytes."""
        return self.part.count * self.row_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """One file of the checkpoint and the units in it, in the order of their bytes."""

    path: Path
    size_bytes: int
    units: tuple[Unit, ...]


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes to read at once: whole rows of ``unit`` from row ``first_row`` of its slice, or bytes nobody needs."""

    offset: int
    size_bytes: int
    unit: Unit | None = None
    first_row: int = 0

    @property
    def is_last(self) -> bool:
        """The unit ends here."""
        return self.unit is not None and self.offset + self.size_bytes == self.unit.offset + self.unit.size_bytes


def shards(tensors: list[NamedTensor]) -> tuple[Shard, ...]:
    """The files behind ``tensors``, each with its units; computed tensors have none."""
    found: dict[Path, list[tuple[int, NamedTensor, RowSlice, int]]] = {}
    for tensor in tensors:
        row = 0
        for part in tensor.slices:
            begin = part.tensor.offset + part.start * tensor.row_length * part.value_bytes
            found.setdefault(part.tensor.file, []).append((begin, tensor, part, row))
            row += part.count
    made, number = [], 0
    for path in sorted(found):
        units = []
        for _, tensor, part, row in sorted(found[path], key=lambda entry: entry[0]):
            units.append(Unit(number=number, tensor=tensor, part=part, first_row=row))
            number += 1
        made.append(Shard(path=path, size_bytes=path.stat().st_size, units=tuple(units)))
    return tuple(made)


def spans(shard: Shard, block_bytes: int) -> Iterator[Span]:
    """``shard`` from its first byte to its last, in pieces of about ``block_bytes``."""
    position = 0
    for unit in shard.units:
        yield from _gap(position, unit.offset, block_bytes)
        step = unit.tensor.rows_per_block(unit.part, block_bytes)
        for row in range(0, unit.part.count, step):
            count = min(step, unit.part.count - row)
            yield Span(unit.offset + row * unit.row_bytes, count * unit.row_bytes, unit, row)
        position = unit.offset + unit.size_bytes
    yield from _gap(position, shard.size_bytes, block_bytes)


def _gap(start: int, end: int, block_bytes: int) -> Iterator[Span]:
    for offset in range(start, end, block_bytes):
        yield Span(offset, min(block_bytes, end - offset))


def largest_span(all_shards: tuple[Shard, ...], block_bytes: int) -> int:
    """Bytes of the largest piece: one row, or one attention head whose rows are interleaved, may exceed a block."""
    sizes = [block_bytes]
    for shard in all_shards:
        for unit in shard.units:
            step = min(unit.tensor.rows_per_block(unit.part, block_bytes), unit.part.count)
            sizes.append(step * unit.row_bytes)
    return max(sizes)
