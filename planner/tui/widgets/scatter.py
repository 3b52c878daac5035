"""Size, quality and speed of all candidates as a plot of characters."""

from __future__ import annotations

from dataclasses import dataclass

from textual.content import Content
from textual.widget import Widget

from planner.core.candidate import Candidate
from planner.core.units import GIB, MIB
from planner.report.plots import LEAST_PERCENT
from planner.report.scale import Scale, around

SPEEDS = "▂▄▆█"
"""Slow to fast, by quarters of the candidates."""
LEFT = 9
"""Cells for the labels of the upright axis."""


@dataclass(frozen=True, slots=True)
class Mark:
    """A candidate on the grid."""

    column: int
    row: int
    glyph: str
    style: str
    label: str = ""


class Scatter(Widget):
    """Loss of quality upwards, size to the right, speed by the height of the mark."""

    HELP = """\
## Size, quality, speed

To the right: larger files. Upwards: more perplexity lost. The taller the mark, the faster it decodes. Marks in bold
are beaten by nothing in all three; the selected one is shown inverse with its name.
"""
    DEFAULT_CSS = "Scatter { height: 1fr; min-height: 8; }"

    def __init__(self, id: str | None = None) -> None:
        super().__init__(id=id)
        self._candidates: tuple[Candidate, ...] = ()
        self._selected: Candidate | None = None

    def show(self, candidates: tuple[Candidate, ...], selected: Candidate | None) -> None:
        """Draw these candidates."""
        self._candidates = tuple(c for c in candidates if c.estimate.quality.perplexity_ratio is not None)
        self._selected = selected
        self.refresh()

    def render(self) -> Content:
        """The plot in the room there is."""
        size = self.content_size
        if len(self._candidates) < 2 or size.width < 30 or size.height < 6:
            return Content("a plot needs two candidates whose quality is known, and more room")
        return _plot(self._candidates, self._selected, size.width, size.height)


def _plot(candidates: tuple[Candidate, ...], selected: Candidate | None, width: int, height: int) -> Content:
    unit, name = (GIB, "GiB") if max(c.estimate.size.file_bytes for c in candidates) >= GIB else (MIB, "MiB")
    x = around([c.estimate.size.file_bytes / unit for c in candidates], 0, width - LEFT - 1, log=True)
    y = around([_loss(c) for c in candidates], height - 4, 0, log=True)
    marks = [_mark(c, selected, x, y, unit, _speeds(candidates)) for c in _drawn_last(candidates, selected)]
    grid = [[(" ", "")] * (width - LEFT) for _ in range(height - 3)]
    for mark in marks:
        _put(grid, mark)
    labels = {round(y.at(tick)): f"{tick:g} %" for tick in y.ticks(min(5, height // 3))}
    lines = [Content.assemble((f"{'perplexity +':<{LEFT}}", "$text-muted"))]
    for number, row in enumerate(grid):
        edge = (f"{labels.get(number, ''):>{LEFT - 2}} {'┤' if number in labels else '│'}", "$text-muted")
        lines.append(Content.assemble(edge, *row))
    lines.append(Content.assemble((_x_axis(x, name, width), "$text-muted")))
    lines.append(Content.assemble((f"{' ' * LEFT}{SPEEDS} slow to fast · bold: nothing beats it", "$text-muted")))
    return Content("\n").join(lines)


def _drawn_last(candidates: tuple[Candidate, ...], selected: Candidate | None) -> list[Candidate]:
    return sorted(candidates, key=lambda c: (c == selected, c.pareto))


def _loss(candidate: Candidate) -> float:
    ratio = candidate.estimate.quality.perplexity_ratio
    return max(100 * (ratio.value - 1), LEAST_PERCENT) if ratio else LEAST_PERCENT


def _speeds(candidates: tuple[Candidate, ...]) -> list[float]:
    return sorted(c.estimate.speed.decode.value for c in candidates if c.estimate.speed.decode)


def _mark(candidate: Candidate, selected: Candidate | None, x: Scale, y: Scale, unit: int, speeds: list[float]) -> Mark:
    decode = candidate.estimate.speed.decode
    rank = sum(speed < decode.value for speed in speeds) / len(speeds) if decode and speeds else 0.0
    chosen = candidate == selected
    return Mark(
        column=round(x.at(candidate.estimate.size.file_bytes / unit)),
        row=round(y.at(_loss(candidate))),
        glyph=SPEEDS[min(int(rank * len(SPEEDS)), len(SPEEDS) - 1)],
        style="bold reverse" if chosen else "bold $accent" if candidate.pareto else "dim",
        label=candidate.variant.label().removeprefix("GGUF ") if chosen else "",
    )


def _put(grid: list[list[tuple[str, str]]], mark: Mark) -> None:
    row = grid[min(max(mark.row, 0), len(grid) - 1)]
    column = min(max(mark.column, 0), len(row) - 1)
    row[column] = (mark.glyph, mark.style)
    text = f" {mark.label} " if mark.label else ""
    start = column + 1 if column + 1 + len(text) <= len(row) else column - len(text)
    for offset, letter in enumerate(text):
        if 0 <= start + offset < len(row):
            row[start + offset] = (letter, "bold")


def _x_axis(x: Scale, unit: str, width: int) -> str:
    line = [" "] * (width - LEFT)
    for tick in x.ticks(max(2, (width - LEFT) // 16)):
        text, at = f"{tick:g}", round(x.at(tick))
        start = max(min(at - len(text) // 2, len(line) - len(text)), 0)
        if all(cell == " " for cell in line[max(start - 1, 0) : start + len(text) + 1]):
            line[start : start + len(text)] = text
    return f"{unit:>{LEFT - 2}} └" + "".join(line)
