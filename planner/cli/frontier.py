"""``qplan frontier MODEL``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from planner.cli.options import existing, json_option, profile_option, workload_options
from planner.cli.output import console, escape, print_json, table
from planner.core.errors import Exit
from planner.core.units import format_bytes
from planner.core.wording import short_rate
from planner.core.workload import Workload

if TYPE_CHECKING:
    from planner.decide.frontier import Point
    from planner.workflow.frontier import Frontier

ROWS = 20
"""Lines of the plot."""


@click.command("frontier")
@click.argument("model")
@profile_option
@workload_options
@click.option("--output", metavar="FILE", help="Also draw it into FILE.svg or FILE.html.")
@json_option
def command(model: str, profile: str | None, workload: Workload, output: str | None, as_json: bool) -> int:
    """Draw what size, quality and speed cost each other when MODEL runs on this machine.

    Every way that fits is a point; the recommended one is marked, and those that another beats in all three are dim.
    """
    from planner.workflow.frontier import check_drawing, document, draw, frontier

    path = None if output is None else existing(output)
    if path is not None:
        check_drawing(path)
    found = frontier(model, workload, profile=profile)
    if path is not None and found.points:
        draw(found, path)
        click.echo(f"wrote {path}", err=True)
    if as_json:
        print_json(document(found))
    elif found.points:
        show(found)
    else:
        from planner.cli.recommend import show as show_recommendation

        show_recommendation(found.answer, verbose=False)
    return Exit.DONE if found.points else Exit.NOTHING_FITS


def show(found: Frontier) -> None:
    """The plot with its table."""
    from planner.cli.chart import dots, terminal

    out, model, hardware = console(), found.answer.model, found.answer.hardware
    out.print(
        f"[bold]{escape(model.name)}[/] on {escape(hardware.name)}, {found.answer.workload.context} tokens of context"
    )
    drawn = dots(found.points)
    if drawn:
        out.print(terminal(drawn, min(out.width, 110), ROWS), end="")
        out.print("[dim]★ recommended  ● GGUF  ▲ AWQ  ◆ GPTQ  ■ bitsandbytes  ○ 16-bit  · beaten by another[/]")
    heads = ("way", "file>", "perplexity %>", "80 %>", "decode t/s>", "80 %>", "better")
    rows = table(*heads, give_way=("80 %>",))
    for point in found.points:
        rows.add_row(*_row(point), style="bold" if point.chosen else "" if point.on_front else "dim")
    out.print(rows)
    for note in found.answer.notes:
        out.print(f"[dim]note: {escape(note)}[/]")


def _row(point: Point) -> tuple[str, ...]:
    estimate = point.candidate.estimate
    ratio, decode = estimate.quality.perplexity_ratio, estimate.speed.decode
    loss = (
        ("unknown", "")
        if ratio is None
        else (_percent(ratio.value), f"{_percent(ratio.low)} to {_percent(ratio.high)}")
    )
    speed = ("unknown", "") if decode is None else (
        short_rate(decode.value),
        f"{short_rate(decode.low)}-{short_rate(decode.high)}",
    )  # fmt: skip
    better = point.beaten_by.variant.label() if point.beaten_by else "" if point.on_front else "not comparable"
    mark = "★ " if point.chosen else "  "
    name = f"{mark}{point.candidate.variant.label()}"
    return name, format_bytes(estimate.size.file_bytes), *loss, *speed, better


def _percent(ratio: float) -> str:
    return f"{100 * (ratio - 1):+.2f}"
