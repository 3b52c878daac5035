"""Find and read the tables in ``data/`` and ``profiles/``: in a wheel, an editable install or a checkout."""

from __future__ import annotations

import csv
import os
from functools import cache
from pathlib import Path

from planner.core.errors import InputError

_PACKAGE = Path(__file__).resolve().parent.parent


@cache
def _root(folder: str) -> Path:
    for candidate in (_PACKAGE / f"_{folder}", _PACKAGE.parent / folder):
        if candidate.is_dir():
            return candidate
    raise InputError(
        f"qplan's {folder}/ folder is missing",
        numbers=f"looked in {_PACKAGE / f'_{folder}'} and {_PACKAGE.parent / folder}",
        hint="reinstall qplan: `pip install --force-reinstall qplan`",
        code="broken-install",
    )


def data_path(name: str) -> Path:
    """Path of ``data/<name>``, which need not exist."""
    return _root("data") / name


def profiles_path() -> Path:
    """The folder of the captured machines."""
    return _root("profiles")


@cache
def read_table(name: str) -> tuple[dict[str, str], ...]:
    """Rows of the CSV table ``data/<name>``; every value is text, an empty one is unknown."""
    with data_path(name).open(newline="", encoding="utf-8") as file:
        return tuple(csv.DictReader(file))


def home() -> Path:
    """Everything qplan keeps: ``QPLAN_HOME``, else ``$XDG_DATA_HOME/qplan``, else ``~/.local/share/qplan``."""
    if chosen := os.environ.get("QPLAN_HOME"):
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_DATA_HOME")
    return (Path(base) if base else Path.home() / ".local" / "share") / "qplan"


def number(text: str | None) -> float | None:
    """The number in a table's cell; ``None`` for an empty one."""
    return float(text) if text else None
