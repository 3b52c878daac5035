"""How answers are printed: rich tables for a person, one JSON document for a program."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


def print_json(document: dict[str, Any]) -> None:
    """One JSON document on stdout."""
    click.echo(json.dumps(document, indent=2, ensure_ascii=False))


def console(*, stderr: bool = False) -> Console:
    """A console that wraps at the terminal's width and colours only on a terminal (``NO_COLOR`` is respected)."""
    from rich.console import Console

    return Console(stderr=stderr, highlight=False, soft_wrap=False)


def table(*columns: str, title: str | None = None) -> Table:
    """An open table; a column whose name ends in ``>`` is right-aligned."""
    from rich import box
    from rich.table import Table

    made = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", pad_edge=False)
    for column in columns:
        right = column.endswith(">")
        made.add_column(column.removesuffix(">"), justify="right" if right else "left", overflow="fold")
    return made


def escape(text: str) -> str:
    """A name or a note as it is: square brackets in it are no markup."""
    from rich.markup import escape as escaped

    return escaped(text)
