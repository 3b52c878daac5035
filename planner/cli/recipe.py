"""A mixture drawn: one character for each tensor, kinds downwards and blocks across."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from planner.cli.output import console, escape
from planner.formats.ggml import type_traits

_MARKS = {
    "F16": ("F", "white"),
    "Q8_0": ("8", "bright_blue"),
    "Q6_K": ("6", "blue"),
    "Q5_1": ("Q", "cyan"),
    "Q5_K": ("5", "cyan"),
    "Q5_0": ("q", "cyan"),
    "Q4_1": ("G", "green"),
    "Q4_K": ("4", "green"),
    "Q4_0": ("g", "green"),
    "IQ4_NL": ("n", "bright_green"),
    "IQ4_XS": ("x", "bright_green"),
    "Q3_K": ("3", "yellow"),
    "IQ3_S": ("s", "yellow"),
    "IQ3_XXS": ("t", "bright_yellow"),
    "Q2_K": ("2", "red"),
    "IQ2_S": ("c", "red"),
    "IQ2_XS": ("b", "bright_red"),
    "IQ2_XXS": ("a", "magenta"),
    "IQ1_M": ("m", "bright_magenta"),
    "IQ1_S": ("1", "bright_magenta"),
}
"""Character and colour of a type, from the most bits to the fewest."""
_OUTSIDE = "rest"
_LABEL_WIDTH = 22


def show_recipe(types: Sequence[tuple[str, str]], title: str) -> None:
    """The grid, with the bits per weight of each kind as their mean over its tensors, and a legend."""
    out = console()
    kinds, count = _grid(types)
    width = max(8, out.width - _LABEL_WIDTH - 8)
    out.print(f"\n[bold]{escape(title)}[/]")
    for start in range(0, max(count, 1), width):
        stop = min(count, start + width)
        if count:
            out.print(f"[dim]{'block':<{_LABEL_WIDTH}}{_ruler(start, stop)}[/]", highlight=False)
        for kind, cells in kinds.items():
            row = "".join(_mark(cells.get(block)) for block in range(start, stop))
            out.print(f"{escape(kind):<{_LABEL_WIDTH}}{row}  {_mean_bits(cells.values()):.2f}")
    for name, type_ in types:
        if _place(name)[1] is None:
            out.print(f"{escape(name.removesuffix('.weight')):<{_LABEL_WIDTH}}{_mark(type_)}  {_bits(type_):.2f}")
    used = {type_ for _, type_ in types}
    out.print("  ".join(f"{_mark(t)} {t} {_bits(t):.2f}" for t in _MARKS if t in used) + "  [dim]bits per weight[/]")


def _place(name: str) -> tuple[str, int | None]:
    """The kind of a tensor and its block."""
    if name.startswith("blk."):
        _, block, kind = name.split(".", 2)
        if block.isdecimal():
            return kind.removesuffix(".weight"), int(block)
    return _OUTSIDE, None


def _grid(types: Iterable[tuple[str, str]]) -> tuple[dict[str, dict[int, str]], int]:
    """Kind → block → type, and the number of blocks."""
    kinds: dict[str, dict[int, str]] = {}
    for name, type_ in types:
        kind, block = _place(name)
        if block is not None:
            kinds.setdefault(kind, {})[block] = type_
    return kinds, 1 + max((block for cells in kinds.values() for block in cells), default=-1)


def _ruler(start: int, stop: int) -> str:
    """Block numbers, one at every tenth."""
    text = ""
    for block in range(start, stop):
        if block % 10 == 0 or block == start:
            text = text[: block - start].ljust(block - start) + str(block)
    return text[: stop - start] if len(text) > stop - start else text


def _mark(type_: str | None) -> str:
    mark, colour = _MARKS.get(type_ or "", ("·" if type_ is None else "?", "dim"))
    return f"[{colour}]{mark}[/]"


def _bits(type_: str) -> float:
    return type_traits(type_).bits_per_weight


def _mean_bits(types: Iterable[str]) -> float:
    bits = [_bits(type_) for type_ in types]
    return sum(bits) / len(bits)
