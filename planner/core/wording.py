"""How values are written for a person: the same words and digits on the command line, in the wizard and in reports."""

from __future__ import annotations

from collections.abc import Callable

from planner.core.candidate import Candidate, Placement, Rejection
from planner.core.estimates import DeviceMemory, Prediction
from planner.core.finetuning import NF4, FinetuneChoice, FinetuneSettings
from planner.core.hardware import HardwareProfile
from planner.core.measurement import (
    CONVERT_RATE,
    DECODE,
    FILE_BYTES,
    KL_DIVERGENCE,
    LOSS_RATIO,
    ONE_PASS_RATE,
    PEAK_MEMORY,
    PERPLEXITY_RATIO,
    PREFILL,
    QUANTIZE_RATE,
    STEP_SECONDS,
    TRAINABLE_PARAMETERS,
    TRAINING_RATE,
)
from planner.core.units import format_bytes, format_count, format_rate, format_seconds

TITLES = {
    FILE_BYTES: "file",
    PEAK_MEMORY: "peak memory",
    PREFILL: "prefill, tokens/s",
    DECODE: "decode, tokens/s",
    PERPLEXITY_RATIO: "perplexity ratio",
    KL_DIVERGENCE: "KL divergence, nats",
    STEP_SECONDS: "time",
    CONVERT_RATE: "convert, weights/s",
    QUANTIZE_RATE: "quantize, weights/s",
    ONE_PASS_RATE: "one pass, weights/s",
    TRAINABLE_PARAMETERS: "trained weights",
    TRAINING_RATE: "training, tokens/s",
    LOSS_RATIO: "loss after / before",
}
"""What a measured quantity is called at the head of a row."""


def bare_title(quantity: str) -> str:
    """A quantity's title without its unit; of one that has no title, its name."""
    return TITLES.get(quantity, quantity).partition(",")[0]


def quantity(name: str, value: float | None) -> str:
    """A value of a quantity in its unit."""
    if value is None:
        return "-"
    if name in {FILE_BYTES, PEAK_MEMORY}:
        return format_bytes(value, 2)
    if name == STEP_SECONDS:
        return format_seconds(value)
    if name in {CONVERT_RATE, QUANTIZE_RATE, ONE_PASS_RATE}:
        return format_count(value)
    if name == TRAINABLE_PARAMETERS:
        return f"{value:,.0f}"
    return format_rate(value) if name in {PREFILL, DECODE, TRAINING_RATE} else f"{value:.4f}"


def quantity_span(name: str, low: float, high: float) -> str:
    """The range of a quantity: ``7.31 - 43.96 MiB``."""
    return span(quantity(name, low), quantity(name, high))


def span(low: str, high: str) -> str:
    """Two written values as a range, a unit that they share once: ``7.31 - 43.96 MiB``, ``0.9 s - 1 min 20 s``."""
    number, _, unit = low.partition(" ")
    shared = " " not in unit and unit == high.partition(" ")[2]
    return f"{number if shared else low} - {high}"


def ranged(prediction: Prediction | None, show: Callable[[float], str]) -> str:
    """A prediction with its range: ``48.3 (41.0-55.1)``; ``unknown`` where there is none."""
    if prediction is None:
        return "unknown"
    return f"{show(prediction.value)} ({show(prediction.low)}-{show(prediction.high)})"


def short_rate(value: float) -> str:
    """Tokens per second for a table: whole from 20 on."""
    return f"{value:,.0f}" if value >= 20 else f"{value:.1f}" if value >= 2 else f"{value:.2f}"


def short_percent(ratio: float) -> str:
    """A perplexity ratio as a change in percent for a table: ``+1.2``, ``+764``."""
    percent = round(100 * (ratio - 1), 1) + 0.0  # no "-0.0"
    return f"{percent:+.1f}" if percent < 100 else f"{percent:+.0f}"


def layers_cell(gpu_layers: int, cpu_expert_layers: int) -> str:
    """Layers on the GPUs for a table, less the layers whose experts are in RAM: ``49-12e``."""
    return f"{gpu_layers}-{cpu_expert_layers}e" if cpu_expert_layers else str(gpu_layers)


def placement_line(placement: Placement) -> str:
    """Where the layers lie and how the runtime is set, in a line."""
    parts = []
    if placement.gpu_count:
        parts.append(f"{placement.gpu_layers} layers on {placement.gpu_count} GPU{'s' * (placement.gpu_count > 1)}")
    else:
        parts.append(f"CPU, {placement.threads} threads")
    if placement.cpu_expert_layers:
        parts.append(f"experts of {placement.cpu_expert_layers} layers in RAM")
    if placement.tensor_split:
        parts.append(f"split {':'.join(f'{share:g}' for share in placement.tensor_split)}")
    if placement.tensor_parallel > 1:
        parts.append(f"tensor parallel {placement.tensor_parallel}")
    parts.append(f"KV cache {placement.kv_type}")
    parts.append(f"flash attention {'on' if placement.flash_attention else 'off'}")
    return ", ".join(parts)


def machine_line(hardware: HardwareProfile) -> str:
    """The machine in a line: GPUs with their memory, CPU, RAM."""
    parts = [f"{gpu.name} {format_bytes(gpu.memory_total_bytes)}" for gpu in hardware.gpus]
    parts.append(f"{hardware.cpu.model}, {hardware.cpu.physical_core_count or '?'} cores")
    parts.append(f"{format_bytes(hardware.memory.total_bytes)} RAM")
    return " · ".join(parts)


def fullest(candidate: Candidate) -> DeviceMemory:
    """The device of which a candidate needs most."""
    used = candidate.estimate.memory
    return max((*used.devices, used.host), key=lambda device: device.needed_bytes)


def finetune_label(settings: FinetuneSettings) -> str:
    """A fine-tuning in short: ``QLoRA r16``."""
    return f"{'QLoRA' if settings.base == NF4 else 'LoRA'} r{settings.rank}"


def finetune_facts(choice: FinetuneChoice) -> list[tuple[str, str]]:
    """The settings of a fine-tuning and what they take, each with its name."""
    settings, made = choice.settings, choice.estimate
    name = "QLoRA: NF4 with double quantization" if settings.base == NF4 else "LoRA on 16-bit weights"
    kept = "inputs of layers (gradient checkpointing)" if settings.gradient_checkpointing else "all activations"
    seconds = made.seconds_per_step
    steps = f", {settings.steps} steps" if settings.steps else ""
    return [
        ("base", f"{name}, {settings.compute_dtype}"),
        ("LoRA", f"rank {settings.rank}, {settings.target_modules}, {made.trainable_parameter_count:,} weights"),
        ("step", f"{settings.micro_batch} x {settings.accumulation} sequences of {settings.sequence_length} tokens"),
        ("keeps", kept),
        ("trains", f"{settings.optimizer}, learning rate {settings.learning_rate:g}{steps}"),
        ("time", f"{ranged(seconds, format_seconds)} a step" if seconds else "unknown"),
        ("adapter", format_bytes(made.adapter_bytes)),
    ]


def finetune_memory(choice: FinetuneChoice) -> list[tuple[str, str, str]]:
    """The memory of training by term, with its sum: name, bytes, and the source of a term or the range of the sum."""
    made, peak = choice.estimate, choice.estimate.peak_memory
    return [
        *((term.name, format_bytes(term.bytes), term.source) for term in made.terms),
        ("peak", format_bytes(peak.value), span(format_bytes(peak.low), format_bytes(peak.high))),
        ("the runtime besides", format_bytes(made.overhead_bytes), ""),
        ("usable", format_bytes(made.capacity_bytes), ""),
    ]


def rejection_numbers(item: Rejection) -> str:
    """The numbers that decided, as a suffix: ``: needs 21.9 GiB, has 11.1 GiB``."""
    if item.needed is None or item.available is None:
        return ""
    if item.unit == "bytes":
        return f": needs {format_bytes(item.needed)}, has {format_bytes(item.available)}"
    return f": needs {item.needed:g}, has {item.available:g} {item.unit}"
