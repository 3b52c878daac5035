"""Bits per weight by layer and kind of tensor, read from the header of a GGUF file."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from planner.core.model import layer_of
from planner.formats.gguf import StoredGgufTensor, open_gguf

SMALL = "norms, biases"
"""The row of all one-dimensional tensors: they stay in 32 bits and weigh nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """All tensors of one kind, as ``ffn_down``."""

    name: str
    types: tuple[tuple[str, int], ...]
    """Storage types with how many tensors have each, most first."""
    weight_count: int
    size_bytes: int
    cells: tuple[tuple[int, str, float], ...]
    """(layer, type, bits per weight) of the layers that have it; empty outside the layers."""

    @property
    def bits_per_weight(self) -> float:
        """Bits of storage for one weight."""
        return 8 * self.size_bytes / self.weight_count


@dataclass(frozen=True, slots=True, kw_only=True)
class Bits:
    """A file's tensors by kind, in the order in which they first come."""

    kinds: tuple[Kind, ...]
    layer_count: int

    @property
    def weight_count(self) -> int:
        """All weights."""
        return sum(kind.weight_count for kind in self.kinds)

    @property
    def size_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(kind.size_bytes for kind in self.kinds)

    @property
    def bits_per_weight(self) -> float:
        """Of the whole file, its metadata left out."""
        return 8 * self.size_bytes / self.weight_count


def bits_of(artifact: Path) -> Bits | None:
    """The tensors of the GGUF file ``artifact``, of all its shards; ``None`` for a file without tensors.

    Raises:
        InputError: missing, damaged or no GGUF file.
    """
    tensors = open_gguf(artifact).tensors
    grouped: dict[str, list[StoredGgufTensor]] = {}
    for tensor in tensors:
        grouped.setdefault(_kind(tensor), []).append(tensor)
    layers = max((layer + 1 for tensor in tensors if (layer := _layer(tensor)) is not None), default=0)
    return (
        Bits(kinds=tuple(_row(name, found) for name, found in grouped.items()), layer_count=layers) if tensors else None
    )


def _layer(tensor: StoredGgufTensor) -> int | None:
    try:
        return layer_of(tensor.name)
    except (ValueError, IndexError):  # a stranger's tensor may be called `blk.x`
        return None


def _kind(tensor: StoredGgufTensor) -> str:
    if len(tensor.shape) == 1:
        return SMALL
    parts = tensor.name.split(".")
    return parts[2] if _layer(tensor) is not None and len(parts) > 2 else parts[0]


def _row(name: str, tensors: list[StoredGgufTensor]) -> Kind:
    by_layer: dict[int, list[StoredGgufTensor]] = {}
    for tensor in tensors:
        layer = _layer(tensor)
        if layer is not None and name != SMALL:
            by_layer.setdefault(layer, []).append(tensor)
    return Kind(
        name=name,
        types=tuple(Counter(tensor.type for tensor in tensors).most_common()),
        weight_count=sum(_weights(tensor) for tensor in tensors),
        size_bytes=sum(tensor.size_bytes for tensor in tensors),
        cells=tuple((layer, found[0].type, _bits(found)) for layer, found in sorted(by_layer.items())),
    )


def _weights(tensor: StoredGgufTensor) -> int:
    count = 1
    for length in tensor.shape:
        count *= length
    return count


def _bits(tensors: list[StoredGgufTensor]) -> float:
    return 8 * sum(tensor.size_bytes for tensor in tensors) / sum(_weights(tensor) for tensor in tensors)
