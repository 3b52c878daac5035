"""``qplan imatrix MODEL``."""

from __future__ import annotations

import click

from planner.cli.options import existing, json_option
from planner.cli.output import console, escape, print_json
from planner.core.errors import Exit
from planner.core.units import format_bytes, format_seconds


@click.command("imatrix")
@click.argument("model")
@click.option("-o", "--output", default="imatrix.gguf", show_default=True, metavar="FILE", help="The matrix.")
@click.option("--text", metavar="FILE|DIR|hub:ORG/NAME", help="Calibration text; default: qplan's own.")
@click.option("--chunks", type=click.IntRange(1), help="512-token chunks of it to use; default: all.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Draws the chunks.")
@click.option("--outputs", is_flag=True, help="Collect the output matrix too (llama-imatrix's --process-output).")
@click.option("--threads", type=click.IntRange(1), help="CPU threads; default: the fast physical cores.")
@click.option("--gpu-layers", type=click.IntRange(0), default=0, show_default=True, help="Layers on the GPU.")
@json_option
def command(
    model: str,
    output: str,
    text: str | None,
    chunks: int | None,
    seed: int,
    outputs: bool,
    threads: int | None,
    gpu_layers: int,
    as_json: bool,
) -> int:
    """Compute an importance matrix of MODEL: a GGUF file, or a checkpoint directory or catalog name that is here.

    It tells the quantizer which columns of each weight matrix the model's activations make count. The file is in
    llama.cpp's own format: `llama-quantize --imatrix` reads it, and so do `qplan plan --imatrix FILE` and all types
    that demand one.
    """
    from planner.cli.apply import Watching
    from planner.workflow.importance import ImatrixWish, make_imatrix

    wish = ImatrixWish(
        model=model,
        output=existing(output),
        text=existing(text) if text else None,
        chunks=chunks,
        seed=seed,
        outputs=outputs,
        threads=threads,
        gpu_layers=gpu_layers,
    )
    with Watching() as watcher:
        made = make_imatrix(wish, watcher.measuring())
    if as_json:
        print_json(made)
        return Exit.DONE
    out = console()
    out.print(f"[bold]{escape(str(made['output']))}[/] ({format_bytes(made['size_bytes'])})")
    out.print(
        f"{made['tensors']} tensors, {made['tokens']} tokens in {made['chunks']} chunks of {escape(made['dataset'])}, "
        f"{format_seconds(made['seconds'])}"
    )
    if made["experts_unseen"]:
        out.print(f"{made['experts_unseen']} experts got no token: a longer --text reaches more")
    return Exit.DONE
