"""Plots with two axes: described here in Vega-Lite, drawn as SVG by vl-convert without a browser or a network.

A drawing has its own colours on light and on dark, its title and description, and what each mark stands for.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape, unescape
from math import log10
from typing import Any

from planner.core.errors import MissingDependency
from planner.core.units import GIB, MIB, format_bytes
from planner.core.wording import short_rate
from planner.report.document import Depth, Point, Range, Taken

PACKAGE = "vl_convert"
HINT = "pip install 'qplan[plots]'"
LEAST_PERCENT = 0.01
"""A rise of perplexity below this, in percent, is drawn here: the axis is logarithmic."""
MOST = 1e30
"""Beyond it a value is drawn here: a stranger's report may hold any number."""
WIDTH, HEIGHT = 380, 230
LEGEND = "Area: decode speed. Diamond: recommended. Faint: another is better in all three."
LETTER, LINE_SHARE = 0.022, 0.09
"""Shares of the axes that a letter and a line of a label take in a plot of usual size."""
SOFT, LINE, ACCENT, BAND, CARD, GOOD = "#56606b", "#dcd9d2", "#0b5cad", "#9cc3ea", "#ffffff", "#17692f"
METHODS = {
    "GGUF": ACCENT, "AWQ": "#1a7f37", "GPTQ": "#9a6700", "bitsandbytes": "#8250df", "other": "#57606a",
}  # fmt: skip
"""The first word of a variant's label, and its colour."""
ON_DARK = {
    SOFT: "#a7afb9", LINE: "#333a43", ACCENT: "#7db7f5", BAND: "#2f5780", CARD: "#1b1f25", GOOD: "#6fd08c",
    "#1b1f24": "#e9e6df", "#1a7f37": "#57d364", "#9a6700": "#e3b341", "#8250df": "#c297ff", "#57606a": "#adbac7",
}  # fmt: skip
"""The colour in place of another where the reader prefers dark; contrast with the page is above 4.5 to 1 in both."""
INK = "#1b1f24"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plot:
    """A drawing, and its title for the page around it."""

    title: str
    svg: str


def installed() -> bool:
    """Whether there is something to draw with."""
    return importlib.util.find_spec(PACKAGE) is not None


def check_installed() -> None:
    """Refuse to draw without the library.

    Raises:
        MissingDependency: naming the extra.
    """
    if not installed():
        raise MissingDependency(
            "drawing needs a package that is not installed: vl-convert-python",
            hint=f"`{HINT}`; tables and JSON have the same numbers without it",
        )


def frontier(
    points: Sequence[Point],
    *,
    by_speed: bool,
    id: str,
    width: int = WIDTH,
    height: int = HEIGHT,
    heading: str = "",
) -> Plot | None:
    """Loss of quality against the file's size or against decode speed; ``None`` with fewer than two points.

    Where size is the axis, a mark's area is the decode speed. ``None`` also without the library.

    Args:
        points: what is drawn.
        by_speed: the axis along is decode speed.
        id: begins the names within the drawing, for a page with several.
        width: of the plot within its axes.
        height: of the plot within its axes.
        heading: in the drawing, for one that stands alone.
    """
    known = [p for p in points if p.perplexity_ratio is not None and (p.decode is not None or not by_speed)]
    if len(known) < 2 or not installed():
        return None
    unit, name = (GIB, "GiB") if max(p.file_bytes for p in known) >= GIB else (MIB, "MiB")
    rows = [_row(point, by_speed, unit) for point in known]
    _label(rows, left_from=0.3 if by_speed else 0.75)
    what = "decode speed" if by_speed else "size"
    title = f"Loss of quality against {what}"
    told = [str(row["text"]) for row in rows if row["front"] or row["chosen"]]
    spec = _trade_off(rows, "decode, tokens/s" if by_speed else f"size of the file, {name}", sized=not by_speed)
    if heading:
        spec["title"] = {"text": heading, "subtitle": f"{title}. {LEGEND}", "anchor": "start", "color": INK,
                         "subtitleColor": SOFT, "fontSize": 16, "subtitleFontSize": 12, "offset": 14}  # fmt: skip
    return _drawn(spec, title, f"{len(rows)} ways to run the model. {'; '.join(told)}.", id, width, height)


def method_of(label: str) -> str:
    """The method in a variant's label, as ``GGUF`` in ``GGUF Q4_K_M``; 16-bit weights are ``other``."""
    first = label.partition(" ")[0]
    return first if first in METHODS else "other"


def _row(point: Point, by_speed: bool, unit: int) -> dict[str, Any]:
    assert point.perplexity_ratio is not None
    decode, loss = point.decode, _percent(point.perplexity_ratio)
    size = _held(point.file_bytes / unit)
    across = Range(value=size, low=size, high=size) if not by_speed or decode is None else decode
    said = f", {_span(decode, short_rate)} tokens/s" if decode else ""
    return {
        "x": _held(across.value), "x_low": _held(across.low), "x_high": _held(across.high),
        "y": loss.value, "y_low": loss.low, "y_high": loss.high,
        "speed": _held(decode.value) if decode else None,
        "method": method_of(point.label), "front": point.pareto, "chosen": point.chosen,
        "name": point.label.removeprefix("GGUF ").removesuffix(" +imatrix"),
        "text": f"{point.label}: {format_bytes(point.file_bytes)}{said}, perplexity × "
        f"{_span(point.perplexity_ratio, '{:.4f}'.format)}",
    }  # fmt: skip


def _span(known: Range, show: Any) -> str:
    return f"{show(known.value)} ({show(known.low)} to {show(known.high)})"


def _held(value: float) -> float:
    return min(max(value, 1 / MOST), MOST)


def _percent(ratio: Range) -> Range:
    value, low, high = (min(max(100 * (v - 1), LEAST_PERCENT), MOST) for v in (ratio.value, ratio.low, ratio.high))
    return Range(value=value, low=low, high=high)


def _label(rows: list[dict[str, Any]], *, left_from: float) -> None:
    """Names where they meet no other, the chosen one's always; the table below a plot has all of them.

    Smaller files lose more and faster ones too: the free side of a curve is right of it by size, left of it by speed.
    """
    shares = {axis: _shares([row[axis] for row in rows]) for axis in ("x", "y")}
    order = sorted(range(len(rows)), key=lambda n: (not rows[n]["chosen"], not rows[n]["front"], rows[n]["x"]))
    taken: list[tuple[float, float, float]] = []
    for n in order:
        row, x, y = rows[n], shares["x"][n], shares["y"][n]
        row["left"] = x > left_from
        length = LETTER * (len(row["name"]) + 2)
        begin, end = (x - length, x) if row["left"] else (x, x + length)
        free = all(begin > e or end < b or abs(y - at) > LINE_SHARE for b, e, at in taken)
        row["label"] = row["name"] if row["chosen"] or (row["front"] and free) else ""
        if row["label"]:
            taken.append((begin, end, y))


def _shares(values: list[float]) -> list[float]:
    """Where positive values lie between the least and the most of them, on a logarithmic axis."""
    low, high = log10(min(values)), log10(max(values))
    return [(log10(value) - low) / ((high - low) or 1.0) for value in values]


def _axis(field: str, title: str, *, log: bool = True, suffix: str = "") -> dict[str, Any]:
    axis: dict[str, Any] = {"tickCount": 5, "labelFlush": False}
    if log:
        axis["format"] = "~g"
    if suffix:
        axis["labelExpr"] = f"datum.label && datum.label + '{suffix}'"
    scale = {"type": "log", "nice": False, "padding": 24} if log else {"zero": True}
    return {"field": field, "type": "quantitative", "title": title, "scale": scale, "axis": axis}


def _trade_off(rows: list[dict[str, Any]], x_title: str, *, sized: bool) -> dict[str, Any]:
    x, y = _axis("x", x_title), _axis("y", "perplexity over the 16-bit model's", suffix=" %")
    used = [method for method in METHODS if any(row["method"] == method for row in rows)]
    colour = {
        "field": "method",
        "type": "nominal",
        "scale": {"domain": used, "range": [METHODS[method] for method in used]},
        "legend": {"title": None, "orient": "top", "columnPadding": 18} if len(used) > 1 else None,
    }
    faint = {"condition": {"test": "datum.front || datum.chosen", "value": 1}, "value": 0.3}
    seen = [{"filter": "datum.front || datum.chosen"}]
    size = {"field": "speed", "type": "quantitative", "scale": {"range": [36, 320], "zero": True}, "legend": None}
    mark = {
        "x": x,
        "y": y,
        "color": colour,
        "opacity": faint,
        "shape": {"condition": {"test": "datum.chosen", "value": "diamond"}, "value": "circle"},
        "size": size if sized and any(row["speed"] for row in rows) else {"value": 80},
        "description": {"field": "text"},
    }
    rule = {"type": "rule", "strokeWidth": 1.2, "opacity": 0.55, "aria": False}
    return {
        "data": {"values": rows},
        "layer": [
            {"transform": seen, "mark": rule, "encoding": {"x": x, "color": colour, "y": {**y, "field": "y_low"},
             "y2": {"field": "y_high"}}},
            {"transform": seen, "mark": rule, "encoding": {"y": y, "color": colour, "x": {**x, "field": "x_low"},
             "x2": {"field": "x_high"}}},
            {"mark": {"type": "point", "filled": True}, "encoding": mark},
            {"transform": [{"filter": "datum.chosen"}], "mark": {"type": "point", "shape": "diamond", "size": 420,
             "filled": False, "stroke": INK, "strokeWidth": 1.6, "aria": False}, "encoding": {"x": x, "y": y}},
            *(_names(x, y, left=left) for left in (False, True)),
        ],
    }  # fmt: skip


def _names(x: dict[str, Any], y: dict[str, Any], *, left: bool) -> dict[str, Any]:
    side = {"align": "right", "dx": -9, "dy": -9} if left else {"align": "left", "dx": 9, "dy": -9}
    return {
        "transform": [{"filter": f"datum.label != '' && datum.left == {str(left).lower()}"}],
        "mark": {"type": "text", "baseline": "middle", "fontSize": 12, "color": INK, "aria": False, **side},
        "encoding": {
            "x": x,
            "y": y,
            "text": {"field": "label"},
            "opacity": {"condition": {"test": "datum.chosen", "value": 1}, "value": 0.85},
        },
    }


def by_depth(depths: Sequence[Depth], measured: Sequence[Taken]) -> Plot | None:
    """Decode speed against tokens in the KV cache: the prediction with its range, and what was measured."""
    if len({d.depth for d in depths}) < 2 or min(d.depth for d in depths) < 0 or not installed():
        return None
    said = [(d, f"{d.depth:,} tokens: {_span(d.decode, short_rate)} tokens/s") for d in depths]
    told = [(m, f"measured at {m.conditions.depth:,} tokens: {short_rate(m.value)} tokens/s") for m in measured]
    predicted = [
        {"x": d.depth, "y": _capped(d.decode.value), "low": _capped(d.decode.low), "high": _capped(d.decode.high),
         "text": text} for d, text in said
    ]  # fmt: skip
    taken = [{"x": m.conditions.depth, "y": _capped(m.value), "text": text} for m, text in told]
    x, y = _axis("x", "tokens in the KV cache", log=False), _axis("y", "tokens/s", log=False)
    ring = {"type": "point", "size": 110, "filled": True, "fill": CARD, "stroke": GOOD, "strokeWidth": 2.5}
    spec = {
        "layer": [
            {"data": {"values": predicted}, "mark": {"type": "area", "color": BAND, "opacity": 0.5, "aria": False},
             "encoding": {"x": x, "y": {**y, "field": "low"}, "y2": {"field": "high"}}},
            {"data": {"values": predicted}, "mark": {"type": "line", "color": ACCENT, "strokeWidth": 2.2,
             "aria": False}, "encoding": {"x": x, "y": y}},
            {"data": {"values": taken}, "mark": ring, "encoding": {"x": x, "y": y, "description": {"field": "text"}}},
        ]
    }  # fmt: skip
    words = "; ".join(text for _, text in (*said, *told))
    return _drawn(spec, "Decode speed against tokens in the KV cache", words, "depth", WIDTH, HEIGHT)


def _capped(value: float) -> float:
    return min(max(value, -MOST), MOST)


def _drawn(spec: dict[str, Any], title: str, text: str, id: str, width: int, height: int) -> Plot:
    import vl_convert  # V8 inside: 0.8 s of processor and 90 MB, once per process

    whole = {
        "$schema": "https://vega.github.io/schema/vega-lite/v5.json",
        "width": width,
        "height": height,
        "background": None,
        "config": {
            "font": "system-ui, sans-serif",
            "view": {"stroke": None},
            "axis": {"labelColor": SOFT, "titleColor": SOFT, "gridColor": LINE, "domain": False, "ticks": False,
                     "labelFontSize": 12, "titleFontSize": 12, "titleFontWeight": "normal", "labelPadding": 6,
                     "titlePadding": 10},
            "legend": {"labelColor": SOFT, "labelFontSize": 12},
        },
        **spec,
    }  # fmt: skip
    return Plot(title=title, svg=finished(vl_convert.vegalite_to_svg(whole), title, text, id))


_OPENING = re.compile(r"<svg [^>]*?(viewBox=\"[^\"]*\")[^>]*>")
_MARK = re.compile(r"<path aria-label=\"([^\"]*)\" ([^>]*?)/>")
_ROLES = re.compile(r" (?:role|aria-roledescription|aria-hidden)=\"[^\"]*\"")


def finished(svg: str, title: str, text: str, id: str) -> str:
    """The library's drawing with a title, a description, words on each mark, and colours for dark."""
    body = _OPENING.sub("", svg, count=1)
    body = _MARK.sub(lambda m: f"<path {m[2]}><title>{escape(unescape(m[1]))}</title></path>", _ROLES.sub("", body))
    viewbox = _OPENING.match(svg)
    assert viewbox is not None
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="plot" {viewbox[1]} role="img" '
        f'aria-labelledby="{id}-title {id}-text"><title id="{id}-title">{escape(title)}</title>'
        f'<desc id="{id}-text">{escape(text)}</desc><style>{dark_style()}</style>'
    )
    return head + body


def dark_style() -> str:
    """Other colours where the reader prefers dark; attributes have the light ones, for programs that know no style."""
    rules = "".join(
        f'.plot [{what}="{light}"]{{{what}:{dark}}}' for light, dark in ON_DARK.items() for what in ("fill", "stroke")
    )
    return f"@media screen and (prefers-color-scheme:dark){{{rules}}}"
