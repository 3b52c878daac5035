"""How to fine-tune a model on a machine: compute type, base, sequence length, batch and checkpointing that fit."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from planner import methods
from planner.core.candidate import Rejection, Variant
from planner.core.errors import UsageError
from planner.core.finetuning import (
    BASES,
    NF4,
    OPTIMIZERS,
    SIXTEEN_BIT,
    FinetuneChoice,
    FinetuneDecision,
    FinetuneSettings,
    FinetuneWish,
)
from planner.core.hardware import HardwareProfile
from planner.core.model import ModelSpec
from planner.core.units import format_bytes, format_count, format_seconds
from planner.core.workload import Workload
from planner.decide.candidates import restricted
from planner.estimate.finetuning import estimate
from planner.runtimes import kernels

RANK = 16
"""Any rank serves where all linear layers are adapted: Dettmers et al. 2023, section 4 and appendix A (8 to 256)."""
BATCH = 16
LEARNING_RATE, LARGE_LEARNING_RATE = 2e-4, 1e-4
LARGE_PARAMETERS = 20e9
"""Batch of 16 sequences, 2e-4 for 7 B and 13 B, 1e-4 for 33 B and 65 B, gradients cut at 0.3: the same, appendix B."""
MAX_GRADIENT_NORM = 0.3
SEQUENCE_LENGTHS = (2048, 1024, 512)
"""Tried in turn unless one is asked for. Activations grow with it; instructions with their answers are mostly shorter
than the first."""
SHORTEST_HINTED = 64
_GPU_BACKENDS = ("cuda", "rocm")
"""What torch calls ``cuda``."""


def decide_finetuning(model: ModelSpec, hardware: HardwareProfile, workload: Workload) -> FinetuneDecision:
    """The best fine-tuning that fits, the other base where it fits too, and what does not with the numbers.

    Raises:
        UsageError: the wish holds what this device or this model cannot do.
    """
    machine, wish = restricted(hardware, workload), workload.finetuning
    device = device_of(machine)
    machine = machine if device == "cuda" else dataclasses.replace(machine, gpus=())
    check_wish(wish, device, model)
    choices: list[FinetuneChoice] = []
    rejected: list[Rejection] = []
    for base in (wish.base,) if wish.base else BASES:
        blocked = _blocked(model, base, machine)
        found = blocked or _largest(model, base, machine, workload, device)
        choices += [found] if isinstance(found, FinetuneChoice) else []
        rejected += [found] if isinstance(found, Rejection) else []
    if not choices:
        return FinetuneDecision(chosen=None, rejected=tuple(rejected), hint=_hint(model, machine, workload, device))
    best, others = choices[0], tuple(choices[1:])
    best = dataclasses.replace(best, reasons=_reasons(best, others, machine, wish))
    return FinetuneDecision(chosen=best, alternatives=others, rejected=tuple(rejected))


def device_of(machine: HardwareProfile) -> str:
    """``cuda`` where torch can train on a GPU of the machine, else ``cpu``."""
    return "cuda" if machine.gpus and machine.gpus[0].backend in _GPU_BACKENDS else "cpu"


def check_wish(wish: FinetuneWish, device: str, model: ModelSpec) -> None:
    """Refuse what cannot be.

    Raises:
        UsageError: with what can.
    """
    for what, value, known in (("base", wish.base, BASES), ("optimizer", wish.optimizer, OPTIMIZERS)):
        if value is not None and value not in known:
            raise UsageError(f"{value!r} is no {what} of a fine-tuning", hint=f"one of {', '.join(known)}")
    if device == "cpu" and (wish.optimizer or "").startswith("paged"):
        raise UsageError("a paged optimizer needs a GPU to page from", hint="--optimizer adamw_torch or adamw_8bit")
    if wish.batch and wish.micro_batch and wish.batch % wish.micro_batch:
        raise UsageError(
            "the batch is no multiple of the micro-batch",
            numbers=f"{wish.batch} and {wish.micro_batch}",
            hint="choose a micro-batch that divides it",
        )
    if (wish.sequence_length or 0) > model.n_ctx_train:
        raise UsageError(
            f"{model.name} knows sequences of at most {model.n_ctx_train} tokens",
            numbers=f"{wish.sequence_length} were asked for",
            hint=f"--sequence-length {model.n_ctx_train}",
        )
    if model.source.is_gguf:
        raise UsageError(
            "a GGUF file cannot be fine-tuned",
            hint="name the checkpoint that it was made of: a directory with safetensors files, or a hub id",
            code="needs-checkpoint",
        )


def _blocked(model: ModelSpec, base: str, machine: HardwareProfile) -> Rejection | None:
    """The row of the kernel table that forbids 4-bit weights on this device; that it predicts no speed forbids none."""
    if base != NF4:
        return None
    variant = base_variant(model, base)
    found = next(iter(methods.get(variant.method).blockers(model, variant, machine)), None)
    slow = {row.id for row in kernels.kernels_of(variant.runtime, variant.method) if not row.predicted}
    return None if found is None or found.rule in slow else found


def base_variant(model: ModelSpec, base: str) -> Variant:
    """The frozen weights as a variant."""
    if base == NF4:
        return next(v for v in methods.get("bitsandbytes").variants(model) if v.type == NF4)
    return methods.get("none").variants(model)[0]


def compute_dtype(machine: HardwareProfile, device: str) -> str:
    """What the GPU is to multiply in; float32 on a CPU, as the fine-tunings ran whose memory was counted there."""
    return "float32" if device == "cpu" else kernels.multiplying_dtype(machine)


def _largest(
    model: ModelSpec, base: str, machine: HardwareProfile, workload: Workload, device: str
) -> FinetuneChoice | Rejection:
    """The first of the settings, in order of preference, that fits; else the numbers of the one that lacks least."""
    least: FinetuneChoice | None = None
    for settings in candidates(model, base, machine, workload.finetuning, device):
        choice = FinetuneChoice(settings=settings, estimate=estimate(model, settings, machine))
        if fits(choice, workload.memory_margin_fraction):
            return choice
        if least is None or choice.estimate.needed_bytes < least.estimate.needed_bytes:
            least = choice
    assert least is not None
    capacity = least.estimate.capacity_bytes or 0
    return Rejection(
        method="bitsandbytes" if base == NF4 else "none",
        type="nf4 + LoRA" if base == NF4 else "16-bit + LoRA",
        reason=f"fine-tuning does not fit on {least.estimate.device} with {_what(least.settings)}",
        needed=least.estimate.needed_bytes,
        available=int(capacity * (1 - workload.memory_margin_fraction)),
        unit="bytes",
        rule="memory",
    )


def _what(settings: FinetuneSettings) -> str:
    many = "a sequence" if settings.micro_batch == 1 else f"{settings.micro_batch} sequences"
    how = ", checkpointed" if settings.gradient_checkpointing else ""
    return f"{many} of {settings.sequence_length} tokens at once{how}"


def candidates(
    model: ModelSpec, base: str, machine: HardwareProfile, wish: FinetuneWish, device: str
) -> Iterator[FinetuneSettings]:
    """Settings to try, best first: long sequences before short, everything kept before checkpointing, many at once."""
    first = min(SEQUENCE_LENGTHS[0], model.n_ctx_train)
    lengths = (first, *(length for length in SEQUENCE_LENGTHS[1:] if length < first))
    batch = wish.batch or (wish.micro_batch and max(BATCH // wish.micro_batch, 1) * wish.micro_batch) or BATCH
    large = model.parameter_count > LARGE_PARAMETERS
    rank = wish.rank or RANK
    for length in (wish.sequence_length,) if wish.sequence_length else lengths:
        for checkpointing in (False, True):
            for micro_batch in (wish.micro_batch,) if wish.micro_batch else _divisors(batch):
                yield FinetuneSettings(
                    base=base,
                    device=device,
                    compute_dtype=compute_dtype(machine, device),
                    rank=rank,
                    alpha=rank,
                    sequence_length=length,
                    micro_batch=micro_batch,
                    accumulation=batch // micro_batch,
                    gradient_checkpointing=checkpointing,
                    optimizer=wish.optimizer or ("paged_adamw_8bit" if device == "cuda" else "adamw_torch"),
                    learning_rate=wish.learning_rate or (LARGE_LEARNING_RATE if large else LEARNING_RATE),
                    max_gradient_norm=MAX_GRADIENT_NORM,
                    steps=wish.steps or 0,
                )


def _divisors(batch: int) -> tuple[int, ...]:
    return tuple(n for n in range(batch, 0, -1) if batch % n == 0)


def fits(choice: FinetuneChoice, margin_fraction: float) -> bool:
    """Whether the device has room; one of unknown capacity is taken to be large enough."""
    capacity = choice.estimate.capacity_bytes
    return capacity is None or choice.estimate.needed_bytes <= capacity * (1 - margin_fraction)


def _hint(model: ModelSpec, machine: HardwareProfile, workload: Workload, device: str) -> str:
    """The longest sequence that would fit, or that only a smaller model does."""
    length = (workload.finetuning.sequence_length or SEQUENCE_LENGTHS[-1]) // 2
    while length >= SHORTEST_HINTED:
        wish = dataclasses.replace(workload.finetuning, sequence_length=length, micro_batch=1, batch=None)
        shorter = dataclasses.replace(workload, finetuning=wish)
        for base in (wish.base,) if wish.base else BASES:
            if not _blocked(model, base, machine) and isinstance(
                _largest(model, base, machine, shorter, device), FinetuneChoice
            ):
                return f"`--sequence-length {length}` fits"
        length //= 2
    return "only a smaller model, or a device with more memory, will do"


def _reasons(
    best: FinetuneChoice, others: tuple[FinetuneChoice, ...], machine: HardwareProfile, wish: FinetuneWish
) -> tuple[str, ...]:
    settings, made = best.settings, best.estimate
    room = f" of {format_bytes(made.capacity_bytes)} usable" if made.capacity_bytes else ""
    share = format_count(made.trainable_parameter_count)
    reasons = [
        _dtype_reason(settings, machine),
        f"it takes {format_bytes(made.needed_bytes)}{room} on {made.device}: {_what(settings)}, "
        f"{settings.accumulation} times for a step of {settings.batch}",
        f"LoRA of rank {settings.rank} on all linear layers trains {share} weights",
    ]
    if settings.gradient_checkpointing:
        reasons.append("without checkpointing not even one sequence fits; it computes every layer forward twice")
    if wish.sequence_length is None and settings.sequence_length < SEQUENCE_LENGTHS[0]:
        reasons.append(f"sequences of {settings.sequence_length}: longer ones do not fit, or the model knows no longer")
    reasons += [_against(other, best) for other in others]
    return tuple(reasons)


def _dtype_reason(settings: FinetuneSettings, machine: HardwareProfile) -> str:
    if settings.device == "cpu":
        return "float32: no GPU that torch trains on is used, and 16-bit products are slow on most processors"
    capability = machine.gpus[0].compute_capability
    known = f"compute capability {capability}" if capability else "its compute capability is not known"
    if settings.compute_dtype == "bfloat16":
        return f"bfloat16: {machine.gpus[0].name} has it ({known})" if capability else "bfloat16: AMD GPUs have it"
    return f"float16 with loss scaling: bfloat16 needs compute capability 8.0 ({known})"


def _against(other: FinetuneChoice, best: FinetuneChoice) -> str:
    name = "LoRA on 16-bit weights" if other.settings.base == SIXTEEN_BIT else "QLoRA"
    text = (
        f"{name} fits too (`--lora-base {other.settings.base}`): {format_bytes(other.estimate.needed_bytes)} "
        f"against {format_bytes(best.estimate.needed_bytes)} for {_what(other.settings)}"
    )
    mine, theirs = best.estimate.seconds_per_step, other.estimate.seconds_per_step
    if mine and theirs:
        text += f", {format_seconds(theirs.value)} against {format_seconds(mine.value)} a step"
    if other.settings.base == SIXTEEN_BIT:
        text += "; nothing is lost to quantization, and no weights are unpacked"
    return text
