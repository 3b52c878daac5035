"""``qplan quantize MODEL``."""

from __future__ import annotations

import sys
from typing import Any

import click

from planner.cli.options import existing, json_option
from planner.cli.output import print_json
from planner.core.errors import Exit
from planner.core.units import format_bytes, format_seconds
from planner.core.wording import span


@click.command("quantize")
@click.argument("model")
@click.option("-t", "--types", "--type", default="", metavar="TYPE,...", help="Such as Q4_K_M,Q6_K,Q8_0.")
@click.option("--recipe", metavar="FILE", help="In place of types: the report of a mixture, or tensor → type as JSON.")
@click.option("--imatrix", metavar="FILE", help="An importance matrix, as `qplan imatrix` or llama-imatrix makes it.")
@click.option("-o", "--output", default=".", show_default=True, metavar="PATH", help="A folder, or a .gguf file.")
@click.option("--threads", type=click.IntRange(1, 1024), help="Default: as many as physical cores.")
@click.option(
    "--through",
    type=click.Choice(["auto", "F16", "BF16", "F32"], case_sensitive=False),
    default="auto",
    show_default=True,
    help="Type the weights are rounded to first, as a 16-bit file in between would.",
)
@click.option("--force", is_flag=True, help="Replace files that are there.")
@click.option("--yes", is_flag=True, help="Agree to a download beforehand.")
@click.option("--dry-run", is_flag=True, help="Say what it would make and take.")
@json_option
def command(
    model: str,
    types: str,
    recipe: str | None,
    imatrix: str | None,
    output: str,
    threads: int | None,
    through: str,
    force: bool,
    yes: bool,
    dry_run: bool,
    as_json: bool,
) -> int:
    """Quantize the checkpoint MODEL to GGUF in one pass, several types from one read.

    The bytes are those of llama.cpp's convert_hf_to_gguf.py and llama-quantize, with no 16-bit file in between. An
    interrupted run goes on where it stopped when it is started again. Nothing is measured: `qplan verify FILE
    --reference MODEL` does that, and `qplan plan` chooses the type.
    """
    from pathlib import Path

    from planner.cli.apply import Watching
    from planner.workflow.quantizing import QuantizeOptions, document, prepare, quantize

    options = QuantizeOptions(
        model=model,
        types=tuple(part.strip().upper() for part in types.split(",") if part.strip()),
        output=Path(output).expanduser(),
        threads=threads,
        recipe=existing(recipe) if recipe else None,
        imatrix=existing(imatrix) if imatrix else None,
        through=through if through == "auto" else through.upper(),
        replace=force,
        assume_yes=yes,
        confirm=click.confirm if sys.stdin.isatty() and not as_json else None,
    )
    with Watching() as watcher:
        prepared = prepare(options, watcher)
        told = document(prepared, None, None) if dry_run else quantize(prepared, watcher)
    print_json(told) if as_json else _show(told)
    return Exit.DONE


def _show(told: dict[str, Any]) -> None:
    from planner.cli.output import console, escape, table

    out, files = console(), table("type", "file", "predicted>", "size>")
    for file in told["files"]:
        size = format_bytes(file["bytes"]) if file["bytes"] is not None else ""
        files.add_row(file["type"], escape(file["path"]), format_bytes(file["predicted_bytes"]), size)
    out.print(files)
    took, memory = told["seconds"], told["peak_memory_bytes"]
    rows = table("", "predicted>", "range>", "measured>")
    rows.add_row("time", *_cells(took, format_seconds))
    rows.add_row("peak memory", *_cells(memory, format_bytes))
    out.print(rows)
    if told["read_bytes"]:
        rate = format_bytes(told["read_bytes"] / took["measured"])
        moved = f"read {format_bytes(told['read_bytes'])} once, wrote {format_bytes(told['written_bytes'])}"
        out.print(f"{moved}: {rate}/s")
    for note in told["notes"]:
        out.print(f"[dim]note: {escape(str(note))}[/]")


def _cells(entry: dict[str, Any], show: Any) -> tuple[str, str, str]:
    measured = show(entry["measured"]) if entry["measured"] is not None else ""
    if "predicted" not in entry:
        return "", "", measured
    return show(entry["predicted"]), span(show(entry["low"]), show(entry["high"])), measured
