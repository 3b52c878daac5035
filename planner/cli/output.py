"""How answers are printed: rich tables for a person, one JSON document for a program."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from rich.console import Console
    from rich.table import Table as Grid

    from planner.cli.tables import Table


def print_json(document: dict[str, Any]) -> None:
    """One JSON document on stdout."""
    click.echo(json.dumps(document, indent=2, ensure_ascii=False))


def console(*, stderr: bool = False) -> Console:
    """A console that wraps at the terminal's width and colours only on a terminal (``NO_COLOR`` is respected)."""
    from rich.console import Console

    return Console(stderr=stderr, highlight=False, soft_wrap=False)


def table(*columns: str, title: str | None = None, give_way: Sequence[str] = ()) -> Table:
    """An open table that fits the terminal; a column whose name ends in ``>`` is right-aligned.

    ``give_way`` names the columns that a narrow terminal can do without, the first to go first; ``--json`` has all.
    """
    from planner.cli.tables import Table

    return Table(*columns, title=title, give_way=give_way)


def escape(text: str) -> str:
    """A name or a note as it is: square brackets in it are no markup."""
    from rich.markup import escape as escaped

    return escaped(text)


def facts(rows: Iterable[tuple[str, str]]) -> Grid:
    """Names with what is known under them, one a line, without a heading; a long value goes on in its own column."""
    from rich.table import Table as Grid
    from rich.text import Text

    grid = Grid.grid(padding=(0, 2, 0, 0))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in rows:
        grid.add_row(Text(f" {name}"), Text(value))
    return grid
