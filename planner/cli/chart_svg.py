"""The trade-off as a self-contained SVG or HTML file: light and dark by the reader's setting, nothing fetched."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from math import sqrt

from planner.cli.chart import Axes, Dot, axes, dots, order
from planner.core.units import format_bytes, format_rate
from planner.workflow.frontier import Frontier

WIDTH, HEIGHT = 920, 560
LEFT, RIGHT, TOP, BOTTOM = 78, 24, 64, 60
LARGEST, SMALLEST = 13.0, 4.0
"""Radii; a dot's area is in proportion to its decode speed."""
LETTER = 6.4
"""Width of a letter of a label."""

COLOURS = {
    "gguf": ("#0b6bcb", "#6cb6ff"),
    "awq": ("#1a7f37", "#57d364"),
    "gptq": ("#9a6700", "#e3b341"),
    "bitsandbytes": ("#8250df", "#c297ff"),
    "none": ("#57606a", "#adbac7"),
}
"""Of a method on light and on dark: contrast above 4.5 to 1 with the background, and unlike for the colour-blind."""


def html(found: Frontier) -> str:
    """A page with the drawing and the table under it."""
    head = f"<title>{escape(_title(found))}</title>"
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8"/>\n'
        f'<meta name="viewport" content="width=device-width"/>\n{head}\n<style>{_page_style()}</style>\n</head>\n'
        f"<body>\n<main>\n{svg(found)}\n{_table(found)}\n</main>\n</body>\n</html>\n"
    )


def svg(found: Frontier) -> str:
    """The drawing; ``<title>`` and ``<desc>`` tell it in words, and each dot has its numbers."""
    drawn = dots(found.points)
    frame = axes(drawn)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        'aria-labelledby="qplan-title qplan-desc" class="qplan">',
        f'<title id="qplan-title">{escape(_title(found))}</title>',
        f'<desc id="qplan-desc">{escape(_description(drawn))}</desc>',
        f"<style>{_style()}</style>",
        f'<rect class="paper" width="{WIDTH}" height="{HEIGHT}"/>',
        f'<text class="head" x="{LEFT}" y="26">{escape(_title(found))}</text>',
        *_legend(drawn),
        *_grid(frame),
        *_dots(drawn, frame),
        *_labels(drawn, frame),
        "</svg>",
    ]
    return "\n".join(parts)


def _title(found: Frontier) -> str:
    return f"{found.answer.model.name} on {found.answer.hardware.name}: size, quality and speed"


def _description(drawn: Sequence[Dot]) -> str:
    front = [d.label for d in drawn if d.point.on_front]
    chosen = next((d for d in drawn if d.point.chosen), None)
    said = f" Recommended is {_numbers(chosen)}." if chosen else ""
    return (
        f"{len(drawn)} ways to run the model; along: size of the file in GiB; upwards: increase of perplexity in "
        f"percent; area of a dot: decode speed. Nothing beats {', '.join(front)}.{said}"
    )


def _numbers(dot: Dot) -> str:
    estimate = dot.point.candidate.estimate
    ratio, decode = estimate.quality.perplexity_ratio, estimate.speed.decode
    assert ratio is not None and decode is not None
    size = format_bytes(estimate.size.file_bytes)
    loss = f"{100 * (ratio.value - 1):+.2f} % ({100 * (ratio.low - 1):+.2f} to {100 * (ratio.high - 1):+.2f})"
    speed = f"{format_rate(decode.value)} ({format_rate(decode.low)}-{format_rate(decode.high)}) tokens/s"
    beaten = dot.point.beaten_by
    than = f"; {beaten.variant.label()} is better" if beaten else ""
    return f"{dot.point.candidate.variant.label()}: {size}, perplexity {loss}, {speed}{than}"


def _style() -> str:
    light = "".join(f".{name}{{fill:{colours[0]};stroke:{colours[0]}}}" for name, colours in COLOURS.items())
    dark = "".join(f".{name}{{fill:{colours[1]};stroke:{colours[1]}}}" for name, colours in COLOURS.items())
    return (
        ".qplan{font:12px system-ui,sans-serif}.paper{fill:#fff}.qplan text{fill:#1f2328}.qplan .soft{fill:#57606a}"
        ".head{font-size:16px;font-weight:600}.grid{stroke:#d8dee4;stroke-width:1}.axis{stroke:#57606a}"
        ".dot{stroke-width:1;fill-opacity:.75}.range{stroke-width:1;stroke-opacity:.5;fill:none}"
        ".beaten{opacity:.25}.ring{fill:none;stroke:#1f2328;stroke-width:2}.strong{font-weight:700}"
        f"{light}@media (prefers-color-scheme:dark){{.paper{{fill:#0d1117}}.qplan text{{fill:#e6edf3}}"
        f".qplan .soft{{fill:#9198a1}}.grid{{stroke:#30363d}}.axis{{stroke:#9198a1}}.ring{{stroke:#e6edf3}}{dark}}}"
    )


def _page_style() -> str:
    return (
        "body{margin:0;background:#fff;color:#1f2328;font:14px system-ui,sans-serif}"
        "main{max-width:60rem;margin:1rem auto;padding:0 1rem}svg{width:100%;height:auto}"
        "table{border-collapse:collapse;width:100%}th,td{padding:.3rem .6rem;"
        "text-align:right;border-bottom:1px solid #d8dee4}th:first-child,td:first-child{text-align:left}"
        ".beaten-row{color:#57606a}.chosen-row{font-weight:700}"
        "@media (prefers-color-scheme:dark){body{background:#0d1117;color:#e6edf3}th,td{border-color:#30363d}"
        ".beaten-row{color:#9198a1}}"
    )


def _x(frame: Axes, gib: float) -> float:
    return LEFT + frame.x(gib) * (WIDTH - LEFT - RIGHT)


def _y(frame: Axes, percent: float) -> float:
    return HEIGHT - BOTTOM - frame.y(percent) * (HEIGHT - TOP - BOTTOM)


def _legend(drawn: Sequence[Dot]) -> list[str]:
    parts, at = [], float(LEFT)
    for method in dict.fromkeys(d.point.candidate.variant.method for d in drawn):
        name = "16-bit" if method == "none" else method.upper() if method != "bitsandbytes" else method
        parts.append(f'<circle class="dot {method}" cx="{at + 5:.1f}" cy="43" r="5"/>')
        parts.append(f'<text class="soft" x="{at + 15:.1f}" y="47">{escape(name)}</text>')
        at += 30 + LETTER * len(name)
    note = "area: decode speed · ring: recommended · faint: another is better in all three"
    return [*parts, f'<text class="soft" x="{at + 8:.1f}" y="47">{note}</text>']


def _grid(frame: Axes) -> list[str]:
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    parts = []
    for tick in frame.y_ticks():
        y = _y(frame, tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="soft" x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">+{tick:g} %</text>')
    for tick in frame.x_ticks():
        x = _x(frame, tick)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{bottom}"/>')
        parts.append(f'<text class="soft" x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">{tick:g}</text>')
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{LEFT}" y1="{TOP}" y2="{bottom}"/>')
    middle = (LEFT + right) / 2
    parts.append(f'<text x="{middle:.0f}" y="{HEIGHT - 14}" text-anchor="middle">size of the file, GiB</text>')
    turned = f'transform="rotate(-90)" x="{-(TOP + bottom) / 2:.0f}" y="18" text-anchor="middle"'
    return [*parts, f"<text {turned}>perplexity over the 16-bit model's</text>"]


def _radius(dot: Dot, drawn: Sequence[Dot]) -> float:
    fastest = max(d.tokens_per_second for d in drawn)
    return max(SMALLEST, LARGEST * sqrt(dot.tokens_per_second / fastest))


def _dots(drawn: Sequence[Dot], frame: Axes) -> list[str]:
    parts = []
    for dot in order(drawn):
        ratio = dot.point.candidate.estimate.quality.perplexity_ratio
        assert ratio is not None
        x, y, r = _x(frame, dot.gib), _y(frame, dot.percent), _radius(dot, drawn)
        low, high = (_y(frame, 100 * (end - 1)) for end in (ratio.low, ratio.high))
        method = dot.point.candidate.variant.method
        faint = "" if dot.point.on_front or dot.point.chosen else " beaten"
        ring = f'<circle class="ring" cx="{x:.1f}" cy="{y:.1f}" r="{r + 3:.1f}"/>' if dot.point.chosen else ""
        parts.append(
            f'<g class="point{faint}"><title>{escape(_numbers(dot))}</title>'
            f'<line class="range {method}" x1="{x:.1f}" x2="{x:.1f}" y1="{low:.1f}" y2="{high:.1f}"/>'
            f'<circle class="dot {method}" cx="{x:.1f}" cy="{y:.1f}" r="{r:.1f}"/>{ring}</g>'
        )
    return parts


def _labels(drawn: Sequence[Dot], frame: Axes) -> list[str]:
    """Names of the front's dots, each where it meets no other; one that finds no place is in the dot's title only."""
    named = [dot for dot in reversed(order(drawn)) if dot.point.on_front or dot.point.chosen]
    taken = [_around(_x(frame, d.gib), _y(frame, d.percent), _radius(d, drawn)) for d in named]
    parts = []
    for dot in named:
        x, y, away = _x(frame, dot.gib), _y(frame, dot.percent), _radius(dot, drawn) + 6
        wide = LETTER * len(dot.label)
        for left, base in (
            (x + away, y + 4),
            (x - away - wide, y + 4),
            (x - wide / 2, y - away),
            (x - wide / 2, y + away + 9),
        ):
            box = (left, base - 11, left + wide, base + 3)
            if box[0] < LEFT or box[2] > WIDTH - RIGHT or any(_meet(box, other) for other in taken):
                continue
            taken.append(box)
            strong = ' class="strong"' if dot.point.chosen else ""
            parts.append(f'<text{strong} x="{left:.1f}" y="{base:.1f}">{escape(dot.label)}</text>')
            break
    return parts


def _around(x: float, y: float, radius: float) -> tuple[float, float, float, float]:
    return x - radius, y - radius, x + radius, y + radius


def _meet(one: tuple[float, float, float, float], other: tuple[float, float, float, float]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _table(found: Frontier) -> str:
    heads = ("way", "file", "perplexity", "range", "decode, tokens/s", "range", "nothing beats it")
    rows = []
    for point in found.points:
        estimate = point.candidate.estimate
        ratio, decode = estimate.quality.perplexity_ratio, estimate.speed.decode
        loss = (
            ("unknown", "")
            if ratio is None
            else (f"{_percent(ratio.value)}", f"{_percent(ratio.low)} to {_percent(ratio.high)}")
        )
        speed = (
            ("unknown", "")
            if decode is None
            else (format_rate(decode.value), f"{format_rate(decode.low)}-{format_rate(decode.high)}")
        )
        verdict = "recommended" if point.chosen else "yes" if point.on_front else "no"
        kind = "chosen-row" if point.chosen else "" if point.on_front else "beaten-row"
        cells = (point.candidate.variant.label(), format_bytes(estimate.size.file_bytes), *loss, *speed, verdict)
        rows.append(f'<tr class="{kind}">' + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>")
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in heads)
    return f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n" + "\n".join(rows) + "\n</tbody>\n</table>"


def _percent(ratio: float) -> str:
    return f"{100 * (ratio - 1):+.2f} %"
