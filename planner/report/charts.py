"""What the charts of a page are drawn from: positions, labels and words for those who cannot see them.

The drawing itself is in ``templates/charts.html``. It is plain SVG and CSS, written here rather than by a plotting
library: it takes the page's own colours, light and dark and on paper, and weighs a few kilobytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import log2

from planner.core.estimates import DeviceMemory
from planner.core.units import GIB, MIB, format_bytes
from planner.core.wording import TITLES, short_rate
from planner.report.bits import Bits
from planner.report.document import Depth, Judged, Point, Range, Taken
from planner.report.scale import Scale, around

LEFT, RIGHT, TOP, BOTTOM = 52.0, 408.0, 24.0, 232.0
FARTHEST = 5.0
"""Doublings from the prediction that an interval's axis shows at most."""
LEAST_PERCENT = 0.01
"""A rise of perplexity below this, in percent, is drawn here: the axis is logarithmic."""
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
    whole = max(device.total_bytes, device.capacity_bytes or 0)
    parts = (
        ("weights", "weights", device.weights_bytes),
        ("KV cache", "kv", device.kv_cache_bytes),
        ("compute", "compute", device.compute_bytes),
        ("overhead", "overhead", device.overhead_bytes),
    )
    shown = tuple(
        Part(name=name, css=css, width=round(100 * size / whole, 2), text=format_bytes(size))
        for name, css, size in parts
        if size
    )
    over = device.capacity_bytes is not None and device.capacity_bytes < device.total_bytes
    capacity = format_bytes(device.capacity_bytes)
    return Bar(
        name=device.name,
        parts=shown,
        total=format_bytes(device.total_bytes),
        capacity=capacity,
        limit=round(100 * (device.capacity_bytes or 0) / whole, 2) if over else None,
        text=f"{device.name}: {', '.join(f'{p.name} {p.text}' for p in shown)}; {capacity} usable",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Dot:
    """A candidate in a plot; the whiskers are its ranges."""

    x: float
    y: float
    left: float
    right: float
    top: float
    bottom: float
    css: str
    label: str
    text: str
    label_left: bool
    """The label stands left of the dot, as there is no room to its right."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plot:
    """Dots or a line with a band, between two axes."""

    title: str
    text: str
    x_title: str
    y_title: str
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    dots: tuple[Dot, ...] = ()
    line: str = ""
    band: str = ""
    marks: tuple[Dot, ...] = ()
    """Measured points."""


def frontier(points: Sequence[Point], *, by_speed: bool) -> Plot | None:
    """Loss of quality against the file's size, or against decode speed; ``None`` with fewer than two points."""
    known = [p for p in points if p.perplexity_ratio is not None and (p.decode is not None or not by_speed)]
    if len(known) < 2:
        return None
    unit, size = ("GiB", GIB) if max(p.file_bytes for p in known) >= GIB else ("MiB", MIB)
    xs = {p: _x_range(p, by_speed, size) for p in known}
    ys = {p: _loss(p.perplexity_ratio) for p in known if p.perplexity_ratio}
    x = around([r.value for r in xs.values()], LEFT, RIGHT, log=True)
    y = around([r.value for r in ys.values()], BOTTOM, TOP, log=True)
    # crowded labels are left out, the chosen one never; the table below has all
    order = sorted(known, key=lambda p: (not p.chosen, not p.pareto, -(p.file_bytes)))
    taken: list[tuple[float, float]] = []
    dots = [_dot(p, xs[p], ys[p], x, y, taken) for p in order]
    what = "decode speed" if by_speed else "size"
    return Plot(
        title=f"Loss of quality against {what}",
        text=f"{len(known)} points; " + "; ".join(dot.text for dot in dots if dot.css != "other"),
        x_title="decode, tokens/s" if by_speed else f"file, {unit}",
        y_title="perplexity rise",
        x_ticks=_ticks(x, lambda v: f"{v:,.4g}"),
        y_ticks=_ticks(y, lambda v: f"{v:g} %"),
        dots=tuple(reversed(dots)),
    )


def _x_range(point: Point, by_speed: bool, unit: int) -> Range:
    if by_speed and point.decode is not None:
        return Range(value=max(point.decode.value, 1e-6), low=max(point.decode.low, 1e-6), high=point.decode.high)
    size = max(point.file_bytes, 1) / unit
    return Range(value=size, low=size, high=size)


def _loss(ratio: Range) -> Range:
    percent = [max(100 * (value - 1), LEAST_PERCENT) for value in (ratio.value, ratio.low, ratio.high)]
    return Range(value=percent[0], low=percent[1], high=percent[2])


def _dot(point: Point, across: Range, loss: Range, x: Scale, y: Scale, taken: list[tuple[float, float]]) -> Dot:
    at = (x.at(across.value), y.at(loss.value))
    wanted = point.chosen or point.pareto
    free = all(abs(at[0] - other[0]) > 74 or abs(at[1] - other[1]) > 13 for other in taken)
    label = point.label.removeprefix("GGUF ") if wanted and (free or point.chosen) else ""
    if label:
        taken.append(at)
    ratio, decode = point.perplexity_ratio, point.decode
    speed = (
        f", {short_rate(decode.value)} ({short_rate(decode.low)}-{short_rate(decode.high)}) tokens/s" if decode else ""
    )
    loss_text = f", perplexity × {ratio.value:.4f} ({ratio.low:.4f}-{ratio.high:.4f})" if ratio else ""
    return Dot(
        x=at[0],
        y=at[1],
        left=x.at(across.low),
        right=x.at(across.high),
        top=y.at(loss.high),
        bottom=y.at(loss.low),
        css="chosen" if point.chosen else "pareto" if point.pareto else "other",
        label=label,
        text=f"{point.label}: file {format_bytes(point.file_bytes)}{speed}{loss_text}",
        label_left=at[0] > RIGHT - 80,
    )


def _ticks(scale: Scale, show: Callable[[float], str]) -> tuple[Tick, ...]:
    found = [Tick(at=scale.at(value), text=show(value)) for value in scale.ticks()]
    return tuple(found)


def by_depth(depths: Sequence[Depth], measured: Sequence[Taken]) -> Plot | None:
    """Decode speed against tokens in the KV cache: the prediction with its range, and what was measured."""
    if len({depth.depth for depth in depths}) < 2 or min(depth.depth for depth in depths) < 0:
        return None
    highest = [d.decode.high for d in depths] + [m.value for m in measured]
    x = Scale(low=0, high=max(d.depth for d in depths), start=LEFT, end=RIGHT)
    y = around([0.0, *highest], BOTTOM, TOP, from_zero=True)
    upper = [f"{x.at(d.depth)},{y.at(d.decode.high)}" for d in depths]
    lower = [f"{x.at(d.depth)},{y.at(d.decode.low)}" for d in reversed(depths)]
    return Plot(
        title="Decode speed against tokens in the KV cache",
        text="; ".join(f"{d.depth} tokens: {short_rate(d.decode.value)} tokens/s" for d in depths),
        x_title="tokens in the KV cache",
        y_title="tokens/s",
        x_ticks=_ticks(x, lambda v: f"{v:,.0f}"),
        y_ticks=_ticks(y, lambda v: f"{v:,.4g}"),
        line=" ".join(f"{x.at(d.depth)},{y.at(d.decode.value)}" for d in depths),
        band=" ".join(upper + lower),
        marks=tuple(_mark(m, x, y) for m in measured),
    )


def _mark(taken: Taken, x: Scale, y: Scale) -> Dot:
    at, height = x.at(taken.conditions.depth), y.at(taken.value)
    return Dot(
        x=at,
        y=height,
        left=at,
        right=at,
        top=y.at(taken.high),
        bottom=y.at(taken.low),
        css="measured",
        label="measured",
        text=f"measured at {taken.conditions.depth} tokens: {short_rate(taken.value)} tokens/s",
        label_left=at > RIGHT - 80,
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


MAP_LEFT, ROW = 104.0, 20.0
STEPS = (2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 9.0)
"""Bits per weight below which the map takes its first, second … shade; all above share the last."""


def bit_map(bits: Bits) -> BitMap | None:
    """The map of a file with layers; ``None`` for one without, or with more than can be told apart."""
    rows = [kind for kind in bits.kinds if kind.cells]
    if not rows or bits.layer_count > MOST_LAYERS:
        return None
    wide = (RIGHT - MAP_LEFT) / bits.layer_count
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
