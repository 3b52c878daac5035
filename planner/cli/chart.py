"""The trade-off as a drawing: points with their axes for every kind of paper, and the terminal's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, floor, log10

from rich.text import Text

from planner.core.units import GIB
from planner.decide.frontier import Point
from planner.report.plots import LEAST_PERCENT

MARKS = {"gguf": "●", "awq": "▲", "gptq": "◆", "bitsandbytes": "■", "none": "○"}
STYLES = {"gguf": "cyan", "awq": "green", "gptq": "yellow", "bitsandbytes": "magenta", "none": "white"}
CHOSEN = "★"
MARGIN = 9
"""Columns of a terminal left of the plot."""


@dataclass(frozen=True, slots=True)
class Dot:
    """A point in the axes' own units."""

    point: Point
    gib: float
    percent: float
    """Loss of perplexity, never less than ``LEAST_PERCENT``."""
    tokens_per_second: float

    @property
    def label(self) -> str:
        """Short name of the variant: the type alone for GGUF."""
        variant = self.point.candidate.variant
        return variant.type if variant.method == "gguf" else variant.label()


@dataclass(frozen=True, slots=True)
class Axes:
    """Logarithmic axes; fractions run from 0 to 1, the larger value at 1."""

    gib: tuple[float, float]
    percent: tuple[float, float]

    def x(self, gib: float) -> float:
        """Fraction along the size axis."""
        return _fraction(gib, self.gib)

    def y(self, percent: float) -> float:
        """Fraction along the loss axis."""
        return _fraction(min(max(percent, self.percent[0]), self.percent[1]), self.percent)

    def x_ticks(self) -> list[float]:
        """Sizes to write at the axis, GiB."""
        return _ticks(self.gib, (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0))

    def y_ticks(self) -> list[float]:
        """Losses to write at the axis, percent."""
        return _ticks(self.percent, (1.0,))


def dots(points: Sequence[Point]) -> list[Dot]:
    """The points whose quality and speed are known."""
    found = []
    for point in points:
        ratio, decode = point.candidate.estimate.quality.perplexity_ratio, point.candidate.estimate.speed.decode
        if ratio is not None and decode is not None:
            percent = max(100 * (ratio.value - 1), LEAST_PERCENT)
            found.append(Dot(point, point.size_bytes / GIB, percent, decode.value))
    return found


def axes(drawn: Sequence[Dot]) -> Axes:
    """Axes around all dots."""
    sizes, losses = [d.gib for d in drawn], [d.percent for d in drawn]
    low, high = floor(log10(min(losses)) + 1e-9), ceil(log10(max(losses)) - 1e-9)
    return Axes((min(sizes) / 1.12, max(sizes) * 1.12), (10.0**low, 10.0 ** max(high, low + 1)))


def _fraction(value: float, ends: tuple[float, float]) -> float:
    return (log10(value) - log10(ends[0])) / (log10(ends[1]) - log10(ends[0]))


def _ticks(ends: tuple[float, float], steps: tuple[float, ...]) -> list[float]:
    powers = range(floor(log10(ends[0])), ceil(log10(ends[1])) + 1)
    return [t for p in powers for s in steps if ends[0] <= (t := s * 10.0**p) <= ends[1] * 1.0001]


def order(drawn: Sequence[Dot]) -> list[Dot]:
    """What is drawn over what: beaten ones first, the chosen one last."""
    return sorted(drawn, key=lambda d: (d.point.chosen, d.point.on_front, -d.gib))


def terminal(drawn: Sequence[Dot], width: int, height: int) -> Text:
    """The plot as ``height`` lines of ``width`` columns, the size along, the loss upwards.

    Args:
        drawn: at least one dot.
    """
    frame = axes(drawn)
    columns = max(width - MARGIN - 1, 20)
    cells: list[list[tuple[str, str]]] = [[(" ", "")] * columns for _ in range(height)]
    placed = [(d, *_cell(d, frame, columns, height)) for d in order(drawn)]
    for dot, row, column in placed:
        cells[row][column] = _mark(dot)
    for dot, row, column in reversed(placed):
        if dot.point.on_front or dot.point.chosen:
            _write(cells[row], column, dot)
    return _framed(cells, frame, columns, height)


def _cell(dot: Dot, frame: Axes, columns: int, height: int) -> tuple[int, int]:
    return round((1 - frame.y(dot.percent)) * (height - 1)), round(frame.x(dot.gib) * (columns - 1))


def _mark(dot: Dot) -> tuple[str, str]:
    method = dot.point.candidate.variant.method
    if dot.point.chosen:
        return CHOSEN, f"bold {STYLES[method]}"
    return (MARKS[method], STYLES[method]) if dot.point.on_front else ("·", "dim")


def _write(row: list[tuple[str, str]], column: int, dot: Dot) -> None:
    """The label right or left of its mark, where the cells are free; else none: the table has it."""
    text, style = dot.label, "bold" if dot.point.chosen else ""
    for start in (column + 2, column - 1 - len(text)):
        cells = range(start - 1, start + len(text) + 1)
        if start > 0 and cells.stop <= len(row) and all(row[i][0] in " ·" for i in cells if i != column):
            row[start : start + len(text)] = [(letter, style) for letter in text]
            return


def _framed(cells: list[list[tuple[str, str]]], frame: Axes, columns: int, height: int) -> Text:
    marks = {round((1 - frame.y(tick)) * (height - 1)): f"+{tick:g} %" for tick in frame.y_ticks()}
    out = Text("increase of perplexity, by GiB of file\n", style="dim")
    for number, row in enumerate(cells):
        out.append(f"{marks.get(number, ''):>{MARGIN - 1}}┤" if number in marks else " " * (MARGIN - 1) + "│", "dim")
        for letter, style in row:
            out.append(letter, style)
        out.append("\n")
    line, under = ["─"] * columns, [" "] * (columns + 8)
    for tick in frame.x_ticks():
        at, text = round(frame.x(tick) * (columns - 1)), f"{tick:g}"
        if all(c == " " for c in under[max(at - 1, 0) : at + len(text) + 1]):
            line[at] = "┬"
            under[at : at + len(text)] = text
    out.append(" " * (MARGIN - 1) + "└" + "".join(line) + "\n", "dim")
    out.append(" " * MARGIN + "".join(under).rstrip() + "\n", "dim")
    return out
