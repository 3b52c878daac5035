"""A table that fits the terminal: it takes room from gaps, headings and text, and never from the inside of a word."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console, ConsoleOptions, RenderableType
from rich.measure import Measurement
from rich.table import Table as Grid

WIDE_GAP, NARROW_GAP = 3, 2
"""Cells between two columns."""
EDGES = 2
"""Cells that the box leaves at its left and right."""


@dataclass(frozen=True, slots=True)
class _Width:
    """Widths of a column: of its longest word, of its cells unbroken, and of its heading unbroken too."""

    word: int
    cells: int
    whole: int


class Table:
    """An open table, laid out when it is printed.

    Where the terminal is too narrow for it, gaps narrow and headings wrap; then the columns that may ``give_way`` go,
    the first named first; then text wraps between words (numbers, at the right, never wrap). Where not even the
    longest words stand side by side, each row is printed as lines of heading and cell.
    """

    def __init__(self, *columns: str, title: str | None = None, give_way: Sequence[str] = ()) -> None:
        """Columns whose name ends in ``>`` are right-aligned; ``give_way`` names columns as they are named here."""
        self._columns = columns
        self._title = title
        self._give_way = give_way
        self._rows: list[tuple[tuple[RenderableType, ...], str]] = []

    @property
    def row_count(self) -> int:
        """Rows so far."""
        return len(self._rows)

    def add_row(self, *cells: RenderableType, style: str = "") -> None:
        """A row; cells left out at its end are empty."""
        self._rows.append((cells, style))

    def fits(self, console: Console) -> bool:
        """Whether its columns stand side by side, none left out and no word broken."""
        widths = [self._width(console, console.options, index) for index in range(len(self._columns))]
        return sum(width.word for width in widths) <= _room(console.width, len(widths), NARROW_GAP)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        """As rich asks for it: the layout depends on the width that there is."""
        widths = [self._width(console, options, index) for index in range(len(self._columns))]
        width = options.max_width
        for kept in self._choices():
            whole, cells = [widths[i].whole for i in kept], [widths[i].cells for i in kept]
            gap = WIDE_GAP if sum(whole) <= _room(width, len(kept), WIDE_GAP) else NARROW_GAP
            if sum(cells) <= (room := _room(width, len(kept), gap)):
                yield self._grid(kept, share(cells, whole, room), gap)
                return
        words = [widths[i].word for i in kept]
        if sum(words) <= (room := _room(width, len(kept), NARROW_GAP)):
            yield self._grid(kept, share(words, cells, room), NARROW_GAP)
        else:
            yield from self._records()

    def _choices(self) -> Iterator[list[int]]:
        """Columns to try, all of them first, then without those that give way, one after the other."""
        kept = list(range(len(self._columns)))
        yield kept
        for name in self._give_way:
            kept = [index for index in kept if self._columns[index] != name]
            yield kept

    def _width(self, console: Console, options: ConsoleOptions, index: int) -> _Width:
        head = Measurement.get(console, options, _heading(self._columns[index]))
        cells = [Measurement.get(console, options, row[index]) for row, _ in self._rows if index < len(row)]
        unbroken = max((cell.maximum for cell in cells), default=0)
        words = unbroken if self._is_right(index) else max((cell.minimum for cell in cells), default=0)
        return _Width(max(head.minimum, words), max(head.minimum, unbroken), max(head.maximum, unbroken))

    def _is_right(self, index: int) -> bool:
        return self._columns[index].endswith(">")

    def _grid(self, kept: list[int], widths: Sequence[int], gap: int) -> Grid:
        made = Grid(
            box=box.SIMPLE_HEAD,
            title=self._title,
            title_justify="left",
            pad_edge=False,
            collapse_padding=gap == NARROW_GAP,
        )
        for index, width in zip(kept, widths, strict=True):
            name = _heading(self._columns[index])
            made.add_column(name, justify="right" if self._is_right(index) else "left", overflow="fold", width=width)
        for cells, style in self._rows:
            made.add_row(*(cells[index] if index < len(cells) else "" for index in kept), style=style)
        return made

    def _records(self) -> Iterator[RenderableType]:
        """Each row as lines of heading and cell, all columns, as there is room for them below each other."""
        yield ""
        if self._title is not None:
            yield self._title
        for cells, style in self._rows:
            record = Grid(box=None, show_header=False, pad_edge=False, padding=(0, NARROW_GAP, 0, 0))
            record.add_column(style="dim", no_wrap=True)
            record.add_column(overflow="fold")
            for name, cell in zip(self._columns, cells, strict=False):
                if cell != "":
                    record.add_row(_heading(name), cell, style=style)
            yield record
            yield ""


def _heading(column: str) -> str:
    return column.removesuffix(">")


def _room(width: int, column_count: int, gap: int) -> int:
    """Cells of a line of ``width`` that are left for what stands in its columns."""
    return width - gap * (column_count - 1) - EDGES


def share(least: Sequence[int], most: Sequence[int], room: int) -> list[int]:
    """Widths between ``least`` and ``most`` that fill ``room``: the narrow columns get all they want, the wide share.

    ``least`` must fit in ``room``.
    """
    widths = list(least)
    left = room - sum(widths)
    while left > 0 and (growing := [i for i, width in enumerate(widths) if width < most[i]]):
        narrowest = min(growing, key=widths.__getitem__)
        widths[narrowest] += 1
        left -= 1
    return widths
