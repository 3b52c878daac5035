"""Values as styled text. Names may come from strangers: they are put in as text, never parsed as markup."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from planner.core.candidate import Candidate, Rejection, method_and_type
from planner.core.estimates import Prediction
from planner.core.finetuning import FinetuneChoice
from planner.core.hardware import HardwareProfile
from planner.core.model import ModelSpec
from planner.core.units import format_bytes, format_count, format_rate, format_seconds
from planner.core.wording import (
    finetune_facts,
    finetune_memory,
    fullest,
    layers_cell,
    placement_line,
    ranged,
    rejection_numbers,
    short_percent,
    short_rate,
)

COLUMNS = ("type", "file", "memory", "decode t/s", "perplexity %", "layers", "KV", "", "score")
NARROW = ("type", "file", "decode t/s", "perplexity %", "layers")
"""Columns of the table of candidates on a terminal below 100 columns."""


def candidate_cells(candidate: Candidate) -> dict[str, Text]:
    """A candidate as the cells of the table, by column."""
    estimate = candidate.estimate
    cells = {
        "type": candidate.variant.label().removeprefix("GGUF "),
        "file": format_bytes(estimate.size.file_bytes),
        "memory": format_bytes(fullest(candidate).needed_bytes),
        "decode t/s": ranged(estimate.speed.decode, short_rate),
        "perplexity %": ranged(estimate.quality.perplexity_ratio, short_percent),
        "layers": layers_cell(candidate.placement.gpu_layers, candidate.placement.cpu_expert_layers),
        "KV": candidate.placement.kv_type,
        "": "*" if candidate.pareto else "",
        "score": f"{candidate.score:.2f}" if candidate.score is not None else "",
    }
    left = {"type", "KV", ""}
    return {name: Text(text, justify="left" if name in left else "right") for name, text in cells.items()}


def machine_facts(hardware: HardwareProfile) -> list[tuple[str, str]]:
    """What was found, a line for each part."""
    cpu, memory = hardware.cpu, hardware.memory
    facts = []
    for gpu in hardware.gpus:
        unified = ", unified memory" if gpu.unified_memory else ""
        size = f"{format_bytes(gpu.memory_total_bytes)}, {format_bytes(gpu.usable_bytes())} usable{unified}"
        facts.append(("GPU", f"{gpu.name}\n{size}, {bandwidth(gpu.bandwidth_bytes_per_second, None)}"))
    if not hardware.gpus:
        facts.append(("GPU", "none found"))
    cores = f"{cpu.physical_core_count or '?'} physical, {cpu.logical_core_count or '?'} logical cores"
    facts += [
        ("CPU", f"{cpu.model}\n{cores}"),
        ("RAM", f"{format_bytes(memory.total_bytes)}, {format_bytes(memory.usable_bytes())} usable"),
        ("", bandwidth(memory.bandwidth_bytes_per_second, memory.bandwidth_basis)),
    ]
    if hardware.disk is not None:
        facts.append(("disk", f"{format_bytes(hardware.disk.free_bytes)} free at {hardware.disk.path}"))
    return facts


def bandwidth(value: float | None, basis: str | None) -> str:
    """Memory bandwidth with where it is from."""
    if value is None:
        return "bandwidth unknown"
    return f"{value / 1e9:.0f} GB/s{f' ({basis})' if basis else ''}"


def facts(rows: list[tuple[str, str]]) -> Table:
    """Names and values below each other; a long value wraps in its own column."""
    made = Table.grid(padding=(0, 2))
    made.add_column(style="dim", no_wrap=True)
    made.add_column(overflow="fold")
    for name, value in rows:
        made.add_row(Text(name), Text(value))
    return made


def notes(found: tuple[str, ...]) -> Text:
    """Notes, each on its own line."""
    return Text("\n").join(Text.assemble(("note: ", "bold"), note) for note in found)


def bullets(found: Iterable[str]) -> Text:
    """Reasons, each on its own line."""
    return Text("\n").join(Text(f"· {reason}") for reason in found)


def spaced(*parts: RenderableType) -> Group:
    """Parts below each other with an empty line between; empty ones are left out."""
    kept = [part for part in parts if not isinstance(part, Text) or part.plain]
    return Group(*(piece for part in kept for piece in (part, Text("")))) if kept else Group()


def titled(title: str, body: str) -> Text:
    """A bold title above a text, as for a command to copy."""
    return Text.assemble((title, "bold"), "\n", body)


def numbers(candidate: Candidate) -> list[tuple[str, str]]:
    """What is predicted of a candidate: each number with its range and its basis."""
    estimate, placement = candidate.estimate, candidate.placement
    size, speed, quality = estimate.size, estimate.speed, estimate.quality
    prompt = f" for a prompt of {placement.prompt_tokens}"
    return [
        ("file", f"{format_bytes(size.file_bytes, 2)}, {size.bits_per_weight:.2f} bits per weight"),
        ("runs as", placement_line(placement)),
        ("decode", f"{ranged(speed.decode, format_rate)} tokens/s{_basis(speed.decode)}"),
        ("prefill", f"{ranged(speed.prefill, format_rate)} tokens/s{prompt}{_basis(speed.prefill)}"),
        (
            "quality",
            f"perplexity × {ranged(quality.perplexity_ratio, '{:.4f}'.format)}{_basis(quality.perplexity_ratio)}",
        ),
        ("", f"KL divergence {ranged(quality.kl_divergence_nats, '{:.4f}'.format)} nats"),
    ]


def _basis(prediction: Prediction | None) -> str:
    return f"  {prediction.basis}" if prediction else ""


def short_numbers(candidate: Candidate) -> str:
    """A candidate in a line, for the live effect of a goal."""
    speed, quality = candidate.estimate.speed.decode, candidate.estimate.quality.perplexity_ratio
    size, memory = format_bytes(candidate.estimate.size.file_bytes), format_bytes(fullest(candidate).needed_bytes)
    rest = f"{ranged(speed, short_rate)} tokens/s, perplexity {ranged(quality, short_percent)} %"
    return f"file {size}, memory {memory}, {rest}"


def short_training(choice: FinetuneChoice) -> str:
    """A fine-tuning in a line, for the live effect of a goal."""
    settings, made = choice.settings, choice.estimate
    what = f"{settings.micro_batch} x {settings.accumulation} sequences of {settings.sequence_length} tokens"
    room = f" of {format_bytes(made.capacity_bytes)}" if made.capacity_bytes else ""
    seconds = f", {ranged(made.seconds_per_step, format_seconds)} a step" if made.seconds_per_step else ""
    return f"{what}, memory {format_bytes(made.needed_bytes)}{room}{seconds}"


def training(choice: FinetuneChoice, *, sources: bool) -> Group:
    """The block of a fine-tuning, as ``qplan recommend --objective finetune`` prints it: settings, memory by term.

    Args:
        choice: how it is trained.
        sources: with where each term comes from, if there is room for it.
    """
    rows = Table.grid(padding=(0, 2))
    rows.add_column(no_wrap=True)
    rows.add_column(justify="right", no_wrap=True)
    rows.add_column(style="dim", overflow="fold")
    rows.add_row(Text(f"memory on {choice.estimate.device}", "bold"), "", "")
    terms = {term.name for term in choice.estimate.terms}
    for name, size, said in finetune_memory(choice):
        shown = said if sources or name not in terms else ""
        rows.add_row(Text(name), Text(size, "bold" if name == "peak" else ""), Text(shown))
    return spaced(facts(finetune_facts(choice)), rows, bullets(choice.reasons), notes(choice.estimate.notes))


def prediction_terms(title: str, prediction: Prediction | None) -> RenderableType:
    """The arithmetic of a prediction, as ``qplan explain`` prints it."""
    if prediction is None:
        return Text.assemble((title, "bold"), ": nothing sourced is known")
    rows = Table.grid(padding=(0, 2))
    rows.add_column(overflow="fold")
    rows.add_column(justify="right", no_wrap=True)
    rows.add_column(style="dim", overflow="fold")
    for name, value, unit in prediction.terms:
        in_bytes = unit == "bytes"
        rows.add_row(Text(name), format_bytes(value, 3) if in_bytes else f"{value:.5g}", Text("" if in_bytes else unit))
    span = f"80 %: {prediction.low:.5g} - {prediction.high:.5g}"
    rows.add_row(Text("result", "bold"), Text(f"{prediction.value:.5g}", "bold"), span)
    return Group(Text(title, "bold"), rows, Text(f"{prediction.basis}: {prediction.source}", "dim"))


def rejections(found: tuple[Rejection, ...]) -> Text:
    """Rejected variants, those of one reason in one line, lack of memory first."""
    grouped: dict[str, list[str]] = {}
    for item in sorted(found, key=lambda item: item.rule != "memory"):
        reason = f"{item.reason}{rejection_numbers(item)}"
        grouped.setdefault(reason, []).append(method_and_type(item.method, item.type))
    lines = [Text.assemble((", ".join(dict.fromkeys(n)), "bold"), f"\n  {reason}") for reason, n in grouped.items()]
    return Text("\n").join(lines) if lines else Text("nothing was rejected")


def model_facts(model: ModelSpec) -> list[tuple[str, str]]:
    """A model's shape: what ``qplan models NAME`` prints, in short."""
    size = f"{format_count(model.parameter_count)} parameters"
    if model.mixture is not None:
        size += f", {format_count(model.active_parameter_count)} active"
    return [
        ("model", model.name),
        ("shape", f"{model.architecture}, {size}, {model.n_layer} layers"),
        ("context", f"trained with {model.n_ctx_train:,} tokens"),
        ("from", model.source.location),
    ]
