"""GGUF metadata as plain values, so that it can be compared, printed and written without the ``gguf`` package."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class KeyValue:
    """One entry of a GGUF header.

    ``kind`` is GGUF's value type: ``u32``, ``f32``, ``bool``, ``string``, ``bytes`` (an array of u8) or
    ``array`` (of the type of its first element: ``str`` or ``bytes`` → string, ``int`` → i32, ``float`` → f32).
    """

    key: str
    kind: str
    value: Any


def u32(key: str, value: int) -> KeyValue:
    """A count."""
    return KeyValue(key, "u32", int(value))


def f32(key: str, value: float) -> KeyValue:
    """A number."""
    return KeyValue(key, "f32", float(value))


def flag(key: str, value: bool) -> KeyValue:
    """A yes or no."""
    return KeyValue(key, "bool", bool(value))


def string(key: str, value: str) -> KeyValue:
    """A text."""
    return KeyValue(key, "string", value)


def array(key: str, value: list[Any] | tuple[Any, ...]) -> KeyValue:
    """A list of one type."""
    return KeyValue(key, "array", list(value))


def merge(entries: list[KeyValue]) -> list[KeyValue]:
    """``entries`` with each key once: the last value at the place of the first, as llama.cpp's converter does."""
    found: dict[str, KeyValue] = {}
    for entry in entries:
        found[entry.key] = entry
    return list(found.values())
