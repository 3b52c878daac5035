"""``qplan estimate``."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from planner.cli.options import existing, json_option, profile_option
from planner.cli.output import console, escape, print_json, table
from planner.core.errors import Exit, InputError, UsageError
from planner.core.units import format_bytes, format_rate
from planner.core.wording import ranged

_OPTIONS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("--method", {"help": "gguf, awq, gptq, bitsandbytes or none."}),
    ("--type", {"help": "Q4_K_M, 4bit, nf4, bf16 …"}),
    ("--group-size", {"type": int, "help": "Weights per scale, for awq and gptq; -1 is a whole row."}),
    ("--context", {"type": int, "help": "Tokens of context per sequence."}),
    ("--depth", {"type": int, "help": "Tokens already in the KV cache when decode is timed."}),
    ("--kv-type", {"help": "Type of the KV cache."}),
    ("--gpu-layers", {"help": "Layers on the GPU, or 'all'; n_layer + 1 includes the output layer."}),
    ("--cpu-expert-layers", {"type": int, "help": "Layers whose experts stay in RAM, as llama.cpp's --n-cpu-moe."}),
    ("--tensor-split", {"help": "Shares of several GPUs, as in 3,1; default: by their free memory."}),
    ("--ubatch", {"type": int, "help": "Tokens computed at once."}),
    ("--flash-attention", {"type": click.Choice(["on", "off"])}),
    ("--sequences", {"type": int, "help": "Sequences at once."}),
    ("--threads", {"type": int, "help": "CPU threads."}),
    ("--prompt-tokens", {"type": int, "help": "Tokens of the prompt whose prefill is predicted."}),
    ("--device", {"help": "A device of the table, as in 'GeForce RTX 4090'."}),
    ("--device-count", {"type": int, "help": "How many of it."}),
    ("--backend", {"help": "cuda, rocm, vulkan, metal, sycl or cpu."}),
)


def case_options(command: Any) -> Any:
    """Add the options of a case; each becomes a key of it."""
    for name, settings in reversed(_OPTIONS):
        command = click.option(name, **settings)(command)
    return profile_option(command)


def case_of(model: str | None, given: dict[str, Any]) -> dict[str, Any]:
    """The case of a command line: what was given, and nothing else."""
    case = {"model": model, **given}
    layers = case.get("gpu_layers")
    if isinstance(layers, str) and layers.isdecimal():
        case["gpu_layers"] = int(layers)
    return {key: value for key, value in case.items() if value is not None and value is not False}


@click.command("estimate")
@click.argument("model", required=False)
@click.option("--batch", metavar="FILE", help="One case a line as JSON, `-` for stdin; answers on stdout, in order.")
@click.option("--imatrix", is_flag=True, help="Quantized with an importance matrix.")
@click.option("--oracle", is_flag=True, help="Ask the installed llama.cpp too, and print its answer beside.")
@case_options
@json_option
def command(model: str | None, batch: str | None, as_json: bool, oracle: bool, **given: Any) -> int:
    """Size, memory per device, speed and quality of one way to run MODEL, or of many.

    With --batch every line of FILE is a case; a bad one gets an error and the exit code is 1.

    With --oracle llama.cpp itself answers for a file of MODEL's shapes without weights; takes a second and no memory.
    """
    if batch is not None and oracle:
        raise UsageError("--oracle asks about one case", hint="`qplan doctor --check-estimates` compares many")
    if batch is not None:
        return run_batch(batch)
    if model is None:
        raise UsageError("estimate needs a MODEL or --batch FILE", hint="`qplan estimate llama-2-13b --type Q4_K_M`")
    from planner.workflow.estimates import computed_case, estimate_case

    case = case_of(model, given)
    if oracle:
        return run_oracle(case, as_json)
    if as_json:
        print_json(estimate_case(case))
    else:
        show(*computed_case(case))
    return Exit.DONE


def run_oracle(case: dict[str, Any], as_json: bool) -> int:
    """The estimate, and llama.cpp's own answer beside it."""
    from planner.workflow.estimates import computed_case, estimate_case
    from planner.workflow.oracle import compare, oracle_document

    computed = computed_case(case)
    model, variant, placement, hardware, _ = computed
    report, (found,) = compare(model, [(variant, placement)], hardware)
    if as_json:
        print_json({**estimate_case(case), "oracle": oracle_document(report, found)})
    else:
        show(*computed)
        show_oracle(report, found)
    return Exit.DONE


def show_oracle(report: Any, found: Any) -> None:
    """Formula beside oracle, byte for byte."""
    from rich.markup import escape

    out = console()
    rows = table("", "", "formula>", f"{report.tool}>", "difference>", title="formula beside llama.cpp itself, bytes")
    for row in found.differences:
        difference = "exact" if row.bytes == 0 else f"{row.bytes:+,} ({row.relative:+.3%})"
        rows.add_row(row.where, row.part, f"{row.formula_bytes:,}", f"{row.oracle_bytes:,}", difference)
    if found.differences:
        out.print(rows)
    refused = () if found.disagreement else ((found.answer.refused,) if found.answer.refused else ())
    for line in (*refused, *filter(None, (found.disagreement,)), *found.notes):
        out.print(f"[dim]note: {escape(line)}[/]")


def run_batch(source: str) -> int:
    """Answer every line; 1 if one was bad."""
    from planner.workflow.batch import answered
    from planner.workflow.estimates import estimate_batch

    failed = False
    streamed = source == "-"  # whoever writes the lines may wait for an answer before writing the next one
    found = (json.dumps(answer, ensure_ascii=False) for answer in estimate_batch(_lines(None) if streamed else ()))
    for text in found if streamed else answered(_lines(existing(source))):
        failed = failed or '"error": {' in text  # a quote inside a string would be escaped
        sys.stdout.write(text + "\n")
        if streamed:
            sys.stdout.flush()
    return Exit.FAILED if failed else Exit.DONE


def _lines(path: Path | None) -> Iterator[str]:
    """Lines of a file or of stdin; bytes that are no UTF-8 become escapes, which no JSON has.

    Raises:
        InputError: it cannot be read.
    """
    try:
        with open(0 if path is None else path, encoding="utf-8-sig", errors="backslashreplace") as file:  # noqa: PTH123
            yield from file
    except FileNotFoundError:
        raise InputError(f"{path} does not exist", code="missing-file") from None
    except BrokenPipeError:
        raise
    except OSError as error:
        name = "stdin" if path is None else path
        raise InputError(
            f"{name} cannot be read", numbers=error.strerror or str(error), code="unreadable-file"
        ) from None


def show(model: Any, variant: Any, placement: Any, hardware: Any, made: Any) -> None:
    """One estimate as a page."""
    from planner.cli.recommend import memory_table, quality_line
    from planner.core.candidate import Candidate

    out = console()
    candidate = Candidate(variant=variant, placement=placement, estimate=made)
    out.print(f"[bold]{escape(model.name)}[/] as [bold]{variant.label()}[/] on {escape(hardware.name)}")
    out.print(f"  context  {placement.context}, KV cache {placement.kv_type}")
    size = made.size
    out.print(f"  file     {format_bytes(size.file_bytes, 2)}, {size.bits_per_weight:.2f} bits per weight")
    decode = made.speed.decode
    source = f"  [dim]{decode.basis}: {escape(decode.source)}[/]" if decode else ""
    out.print(f"  decode   {ranged(decode, format_rate)} tokens/s{source}")
    out.print(f"  prefill  {ranged(made.speed.prefill, format_rate)} tokens/s")
    out.print(f"  quality  {quality_line(candidate)}")
    out.print(memory_table(candidate))
    if placement.context > model.n_ctx_train:
        out.print(f"[dim]note: {escape(model.name)} was trained with {model.n_ctx_train} tokens of context[/]")
    for note in (*made.memory.notes, *made.speed.notes, *made.quality.notes):
        out.print(f"[dim]note: {escape(note)}[/]")
