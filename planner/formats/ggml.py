"""Block sizes of ggml's tensor types: how many bytes a row of weights takes in a GGUF file."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, lru_cache
from math import prod

from planner.core.data import read_table
from planner.core.errors import InputError


@dataclass(frozen=True, slots=True)
class TypeTraits:
    """One ggml type: ``block_bytes`` bytes hold ``block_weights`` weights."""

    name: str
    id: int
    block_weights: int
    block_bytes: int

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight, scales included."""
        return 8 * self.block_bytes / self.block_weights


@cache
def _by_name() -> dict[str, TypeTraits]:
    return {
        row["name"]: TypeTraits(row["name"], int(row["id"]), int(row["block_weights"]), int(row["block_bytes"]))
        for row in read_table("ggml_types.csv")
    }


@cache
def _by_id() -> dict[int, TypeTraits]:
    return {traits.id: traits for traits in _by_name().values()}


def type_names() -> tuple[str, ...]:
    """Names of all ggml types, in the order of their ids."""
    return tuple(_by_name())


def type_traits(name: str) -> TypeTraits:
    """Traits of the type called ``name`` (``F16``, ``Q4_K``, ``MXFP4`` …, as ggml.h spells it).

    Raises:
        InputError: there is no such type (``unknown-ggml-type``).
    """
    traits = _by_name().get(name)
    if traits is None:
        raise InputError(f"{name!r} is not a ggml type", numbers=" ".join(_by_name()), code="unknown-ggml-type")
    return traits


def find_type(type_id: int) -> TypeTraits | None:
    """Traits of the type numbered ``type_id`` in a GGUF file; ``None`` for an unknown or withdrawn number."""
    return _by_id().get(type_id)


def row_bytes(name: str, weights: int) -> int:
    """Bytes of one row of ``weights`` weights in type ``name``: ``ggml_row_size``.

    Raises:
        InputError: unknown type, or the row is no whole number of blocks (``row-not-divisible``).
    """
    traits = type_traits(name)
    left = weights % traits.block_weights
    if left:
        raise InputError(
            f"a row of {weights} weights cannot be stored as {name}",
            numbers=f"{name} packs {traits.block_weights} weights to a block; {left} are left",
            hint="llama.cpp falls back to a type of smaller blocks, as Q8_0 or F16",
            code="row-not-divisible",
        )
    return weights // traits.block_weights * traits.block_bytes


@lru_cache(maxsize=8192)
def tensor_bytes(name: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor of ``shape`` (ggml order, rows of ``shape[0]``) in type ``name``, without padding."""
    return row_bytes(name, shape[0]) * prod(shape[1:])
