"""Find and read the tables in ``data/`` and ``profiles/``: in a wheel, an editable install or a checkout."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Protocol, TypeVar

from planner.core.errors import InputError, UsageError

T = TypeVar("T")


class Named(Protocol):
    """A row with a name."""

    @property
    def name(self) -> str:
        """What it is called."""


N = TypeVar("N", bound=Named)

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


@cache
def read_document(name: str) -> dict[str, Any]:
    """The TOML document ``data/<name>``. It is shared: nobody changes it."""
    import tomllib  # most of the commands that start in no time read CSV alone

    return tomllib.loads(data_path(name).read_text("utf-8"))


def read_rows(kind: Callable[..., T], name: str, key: str) -> tuple[T, ...]:
    """The rows ``[[key]]`` of the TOML document ``data/<name>`` as values of ``kind``, in the document's order.

    Lists become tuples, and tables tuples of pairs: what is hashed holds neither.
    """
    return tuple(kind(**{field: _frozen(value) for field, value in row.items()}) for row in read_document(name)[key])


def _frozen(value: Any) -> Any:
    if isinstance(value, dict):
        return tuple(value.items())
    return tuple(value) if isinstance(value, list) else value


def named(rows: Sequence[N], name: str, *, what: str, code: str) -> N:
    """The row of a table that has this name.

    Raises:
        UsageError: there is none; it says those there are.
    """
    for row in rows:
        if row.name == name:
            return row
    known = ", ".join(row.name for row in rows)
    raise UsageError(f"{name!r} is no {what}", hint=f"one of {known}", code=code)


def home() -> Path:
    """Everything qplan keeps: ``QPLAN_HOME``, else ``$XDG_DATA_HOME/qplan``, else ``~/.local/share/qplan``."""
    if chosen := os.environ.get("QPLAN_HOME"):
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_DATA_HOME")
    return (Path(base) if base else Path.home() / ".local" / "share") / "qplan"


def number(text: str | None) -> float | None:
    """The number in a table's cell; ``None`` for an empty one."""
    return float(text) if text else None
