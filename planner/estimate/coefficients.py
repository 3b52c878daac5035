"""Read a coefficient file: the small part of TOML that the fit scripts write, twenty times faster than tomllib.

Such a file has only ``[a.b]`` headers and lines of ``"key" = number`` or ``key = "text"``; a test compares the result
with tomllib's. tomllib would cost 20 ms of a start-up that should stay below 300 ms.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from planner.core.errors import InputError


def read_coefficients(path: Path) -> dict[str, Any]:
    """Nested tables of ``path``.

    Raises:
        InputError: the file is missing, or a line is neither a header nor a number or text.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise InputError(f"{path.name} cannot be read", numbers=str(error), code="broken-install") from None
    document: dict[str, Any] = {}
    table = document
    for number, line in enumerate(lines, start=1):
        if not line or line.startswith("#"):
            continue
        if line.startswith("["):
            table = document
            for part in line.strip("[]").split("."):
                table = table.setdefault(part.strip('"'), {})
            continue
        key, _, text = line.partition(" = ")
        try:
            table[key.strip('"')] = text.strip('"') if text.startswith('"') else float(text)
        except ValueError:
            raise InputError(
                f"{path.name} is damaged", numbers=f"line {number}: {line}", code="broken-install"
            ) from None
    return document
