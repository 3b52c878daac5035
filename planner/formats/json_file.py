"""JSON objects from files nobody vouches for: bounded, UTF-8, an object at the top, or an ``InputError``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from planner.core.errors import InputError

MAX_JSON_BYTES = 100 * 10**6
"""Largest JSON file read whole: the limit safetensors sets for its header."""


def refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An ``object_pairs_hook`` for ``json.loads`` which raises ``ValueError`` where a key comes twice."""
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"the key {key!r} is there twice")
            seen.add(key)
    return found


def parse_object(text: bytes, what: str, *, code: str = "bad-json") -> dict[str, Any]:
    """The JSON object in ``text``; ``what`` names it in the error.

    Raises:
        InputError: not UTF-8, not JSON, nested beyond reason, a key twice, or no object at the top (``code``).
    """
    try:
        found = json.loads(text.decode("utf-8"), object_pairs_hook=refuse_duplicates)
    except RecursionError:
        raise InputError(f"{what} is nested too deeply to be read", code=code) from None
    except ValueError as error:
        raise InputError(f"{what} is not JSON", numbers=str(error)[:200], code=code) from None
    if not isinstance(found, dict):
        raise InputError(f"{what} is not a JSON object but a {type(found).__name__}", code=code)
    return found


def size_of(path: Path) -> int:
    """Bytes of the regular file ``path``.

    Raises:
        InputError: it is missing (``missing-file``), unreadable or no regular file (``unreadable-file``).
    """
    try:
        if path.is_file():
            return path.stat().st_size
        exists = path.exists()
    except (OSError, ValueError) as error:
        raise InputError(f"{str(path)!r} cannot be read", numbers=str(error), code="unreadable-file") from None
    if exists:
        raise InputError(f"{str(path)!r} is not a file", code="unreadable-file")
    raise InputError(f"there is no file {str(path)!r}", code="missing-file")


def read_object(path: Path, *, code: str = "bad-json") -> dict[str, Any]:
    """The JSON object in the file ``path``.

    Raises:
        InputError: missing, unreadable, over 100 MB, or no JSON object (``code``).
    """
    size_bytes = size_of(path)
    if size_bytes > MAX_JSON_BYTES:
        raise InputError(
            f"{path.name} is too large to be JSON about a model",
            numbers=f"{size_bytes} bytes; at most {MAX_JSON_BYTES}",
            code=code,
        )
    try:
        text = path.read_bytes()
    except OSError as error:
        raise InputError(f"{str(path)!r} cannot be read", numbers=str(error), code="unreadable-file") from None
    return parse_object(text, path.name, code=code)
