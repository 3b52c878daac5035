"""Rows, bars and cells that a page lays out itself: positions, and words for those who cannot see them.

They are HTML and CSS (``templates/charts.html``); what has two axes is a plot, which a library draws: ``plots.py``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import log2

from planner.core.estimates import DeviceMemory
from planner.core.units import format_bytes
from planner.core.wording import TITLES
from planner.report.bits import Bits
from planner.report.document import Judged
from planner.report.scale import Scale

FARTHEST = 5.0
"""Doublings from the prediction that an interval's axis shows at most."""
MOST_LAYERS = 400


@dataclass(frozen=True, slots=True, kw_only=True)
class Tick:
    """A mark on an axis."""

    at: float
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A row of the chart of predictions: positions in percent of the track's width."""

    title: str
    position: str
    ok: bool | None
    left: float
    width: float
    dot: float | None
    beyond: str
    """``less`` or ``more``: the measured value lies beyond the track's end."""
    text: str
    """The row in words."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Intervals:
    """All predictions on one axis of measured over predicted."""

    rows: tuple[Interval, ...]
    ticks: tuple[Tick, ...]
    one: float
    """Where the prediction itself lies."""


def intervals(verdicts: Sequence[Judged]) -> Intervals | None:
    """The chart of predictions; ``None`` where nothing was predicted."""
    known = [verdict for verdict in verdicts if verdict.predicted > 0]
    if not known:
        return None
    reach = max([1.0, *(_doublings(v, row.predicted) for row in known for v in (row.low, row.high, row.measured))])
    scale = Scale(low=2**-reach, high=2**reach, start=0, end=100, log=True)
    every = 1 if reach < 2 else 2
    most = int(reach) // every * every
    return Intervals(
        rows=tuple(_interval(row, scale) for row in known),
        ticks=tuple(Tick(at=scale.at(2.0**step), text=_times(2.0**step)) for step in range(-most, most + 1, every)),
        one=scale.at(1.0),
    )


def _doublings(value: float | None, predicted: float) -> float:
    if value is None or value <= 0:
        return 0.0
    return min(abs(log2(value) - log2(predicted)) * 1.05, FARTHEST)


def _times(ratio: float) -> str:
    return f"×{ratio:g}" if ratio >= 1 else f"÷{1 / ratio:g}"


def _interval(row: Judged, scale: Scale) -> Interval:
    left = scale.at(row.low / row.predicted)
    right = scale.at(row.high / row.predicted)
    ratio = row.ratio
    beyond = "" if ratio is None else "less" if ratio < scale.low else "more" if ratio > scale.high else ""
    title = TITLES.get(row.quantity, row.quantity)
    measured = "not measured" if ratio is None else f"measured {ratio:.3g} times what was predicted"
    return Interval(
        title=title,
        position=row.position,
        ok=row.ok,
        left=left,
        width=max(round(right - left, 2), 0.6),
        dot=None if ratio is None else scale.at(ratio),
        beyond=beyond,
        text=f"{title}: expected {row.low / row.predicted:.3g} to {row.high / row.predicted:.3g}, {measured}, "
        f"{row.position}",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A part of a memory bar, in percent of it."""

    name: str
    css: str
    width: float
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """One device's memory."""

    name: str
    parts: tuple[Part, ...]
    total: str
    capacity: str
    limit: float | None
    """Where the usable memory ends, if the need goes beyond it."""
    text: str


def memory_bars(devices: Iterable[DeviceMemory]) -> tuple[Bar, ...]:
    """A bar for each device, as long as what is usable there."""
    return tuple(_bar(device) for device in devices if device.total_bytes)


def _bar(device: DeviceMemory) -> Bar:
    whole = max(device.needed_bytes, device.capacity_bytes or 0)
    parts = (
        ("weights", "weights", device.weights_bytes),
        ("KV cache", "kv", device.kv_cache_bytes),
        ("compute", "compute", device.compute_bytes),
        ("overhead", "overhead", device.needed_overhead_bytes),
    )
    shown = tuple(
        Part(name=name, css=css, width=round(100 * size / whole, 2), text=format_bytes(size))
        for name, css, size in parts
        if size
    )
    over = device.capacity_bytes is not None and device.capacity_bytes < device.needed_bytes
    capacity = format_bytes(device.capacity_bytes)
    return Bar(
        name=device.name,
        parts=shown,
        total=format_bytes(device.needed_bytes),
        capacity=capacity,
        limit=round(100 * (device.capacity_bytes or 0) / whole, 2) if over else None,
        text=f"{device.name}: {', '.join(f'{p.name} {p.text}' for p in shown)}; {capacity} usable",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """A tensor in the map of bits."""

    x: float
    y: float
    css: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class BitMap:
    """Bits per weight of every layer and kind of tensor."""

    cells: tuple[Cell, ...]
    rows: tuple[Tick, ...]
    columns: tuple[Tick, ...]
    width: float
    height: float
    text: str


MAP_LEFT, MAP_RIGHT, ROW = 104.0, 408.0, 20.0
STEPS = (2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 9.0)
"""Bits per weight below which the map takes its first, second … shade; all above share the last."""


def bit_map(bits: Bits) -> BitMap | None:
    """The map of a file with layers; ``None`` for one without, or with more than can be told apart."""
    rows = [kind for kind in bits.kinds if kind.cells]
    if not rows or bits.layer_count > MOST_LAYERS:
        return None
    wide = (MAP_RIGHT - MAP_LEFT) / bits.layer_count
    cells = [
        Cell(
            x=round(MAP_LEFT + layer * wide, 2),
            y=number * ROW + 4,
            css=f"b{shade(value)}",
            text=f"layer {layer}, {kind.name}: {type_}, {value:.2f} bits per weight",
        )
        for number, kind in enumerate(rows)
        for layer, type_, value in kind.cells
    ]
    every = max(1, round(bits.layer_count / 8))
    columns = [Tick(at=round(MAP_LEFT + (n + 0.5) * wide, 2), text=str(n)) for n in range(0, bits.layer_count, every)]
    return BitMap(
        cells=tuple(cells),
        rows=tuple(Tick(at=number * ROW + 4 + ROW / 2, text=kind.name) for number, kind in enumerate(rows)),
        columns=tuple(columns),
        width=round(max(wide - (1.0 if wide > 6 else 0.3), 0.5), 2),
        height=len(rows) * ROW + 26,
        text=f"{bits.layer_count} layers; " + "; ".join(f"{k.name} {k.bits_per_weight:.2f} bits" for k in rows),
    )


def shade(bits_per_weight: float) -> int:
    """Number of the shade of a cell, 0 for the fewest bits."""
    return sum(bits_per_weight >= step for step in STEPS)
