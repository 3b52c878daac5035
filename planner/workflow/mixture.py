"""Mixtures of types: a file of a wanted size, in which the bits lie where they matter."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from planner.core.candidate import Candidate, Placement, Variant
from planner.core.errors import DoesNotFit, UsageError
from planner.core.hardware import HardwareProfile
from planner.core.model import ModelSpec
from planner.core.units import format_bytes, pad
from planner.core.workload import Workload
from planner.decide.candidates import placements, restricted
from planner.estimate import estimate
from planner.estimate.memory import memory
from planner.estimate.placement import shortage
from planner.methods import gguf, gguf_recipe
from planner.workflow.recommend import Recommendation, unused_bytes
from planner.workflow.survey import calibration_of

_TRIES = 8
"""Corrections until the memory fits; what a file's size adds to it is nearly its size, so two are usual."""
_STEP_BACK = 0.998


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What a mixture shall fill; exactly one is given."""

    size_bytes: int | None = None
    """Of the file."""
    bits_per_weight: float | None = None
    """Of the whole file over all weights."""
    memory_bytes: int | None = None
    """Of all that a run takes on the device that holds the model."""

    @property
    def given(self) -> bool:
        """Whether a mixture is wished at all."""
        return any(value is not None for value in (self.size_bytes, self.bits_per_weight, self.memory_bytes))


def unasked(answer: Recommendation) -> Wish | None:
    """The wish to fill a memory limit that falls between two types; ``None`` where one type fills it."""
    if unused_bytes(answer.model, answer.workload, answer.decision) is None:
        return None
    return Wish(memory_bytes=answer.workload.max_memory_bytes)


def check_wish(wish: Wish) -> None:
    """Refuse two wishes at once.

    Raises:
        UsageError: naming the options.
    """
    values = (wish.size_bytes, wish.bits_per_weight, wish.memory_bytes)
    if sum(value is not None for value in values) > 1:
        raise UsageError("--target-size, --target-bpw and --fit-memory exclude each other", hint="give one of them")


def mixture(answer: Recommendation, wish: Wish) -> tuple[Candidate, int]:
    """The mixture that fills the wish, placed and predicted, and the most bytes its file may have.

    The types are chosen by sensitivities of other models; ``apply`` measures this one's and chooses again within the
    same bytes.

    Raises:
        DoesNotFit: no mixture is that small, or no placement has room.
        UsageError: two wishes, or a model that is quantized already.
    """
    check_wish(wish)
    model, workload = answer.model, answer.workload
    if model.file_type is not None:
        raise UsageError(f"{model.name} is quantized already", hint="start from 16 bits", code="already-quantized")
    if wish.memory_bytes is not None:
        return _fitted(answer, dataclasses.replace(workload, max_memory_bytes=wish.memory_bytes))
    target = wish.size_bytes or int((wish.bits_per_weight or 0) * model.parameter_count / 8)
    variant = mixture_variant(model, target, imatrix=workload.imatrix != "off")
    placement = _placed(model, variant, answer.hardware, workload)
    if placement is None:
        raise DoesNotFit(
            f"{model.name} as {variant.label()} does not fit beside {workload.context} tokens of context",
            numbers=f"the file has {format_bytes(target, 2)}",
            hint="`--fit-memory SIZE` chooses a size that does",
        )
    return _candidate(answer, variant, placement, f"a file of at most {format_bytes(target, 2)} was asked for"), target


def mixture_variant(model: ModelSpec, target_bytes: int, *, imatrix: bool) -> Variant:
    """The variant that a plan is made with, its types by the sensitivities of other models.

    Raises:
        DoesNotFit: no mixture is that small.
    """
    metadata = gguf.metadata_bytes(model)
    recipe = gguf_recipe.plan_recipe(model, metadata, target_bytes, imatrix=imatrix)
    bits = 8 * target_bytes / model.parameter_count
    return Variant(
        method="gguf",
        format="gguf",
        runtime="llama.cpp",
        type=f"{bits:.2f}bpw",
        imatrix=imatrix,
        recipe=recipe.types,
    )


def _fitted(answer: Recommendation, workload: Workload) -> tuple[Candidate, int]:
    """The largest file whose run stays within the workload's memory, whole on the GPUs where there are any."""
    model, imatrix = answer.model, workload.imatrix != "off"
    limit = workload.max_memory_bytes or 0
    workload = dataclasses.replace(workload, memory_margin_fraction=0.0)
    target, best = limit, None
    ceiling = gguf.size(model, gguf.variant("Q8_0")).file_bytes
    for _ in range(_TRIES):
        target = min(target, ceiling)
        variant = mixture_variant(model, target, imatrix=imatrix)
        room = _room(model, variant, answer.hardware, workload)
        if room >= 0:
            best = (variant, target)
            if room < target * (1 - _STEP_BACK) or target == ceiling:
                break
        target = pad(target + room - 31, 32) if room < 0 else target + room
    if best is None:
        raise DoesNotFit(
            f"no mixture of {model.name} fits {format_bytes(limit)} beside {workload.context} tokens of context",
            hint="allow more memory or a shorter --context",
        )
    variant, target = best
    placement = _placed(model, variant, answer.hardware, workload)
    assert placement is not None
    why = f"it fills the {format_bytes(limit)} that a run may take"
    return _candidate(answer, variant, placement, why), target


def _room(model: ModelSpec, variant: Variant, hardware: HardwareProfile, workload: Workload) -> int:
    """Bytes left on the fullest device with the model whole where it runs; negative: bytes that lack."""
    machine = restricted(hardware, workload)
    placement = next(placements(model, variant, machine, workload))
    used = memory(model, variant, placement, machine)
    devices = [d for d in (*used.devices, *(() if used.devices else (used.host,))) if d.capacity_bytes is not None]
    return min((int(d.capacity_bytes or 0) - d.needed_bytes for d in devices), default=0)


def _placed(model: ModelSpec, variant: Variant, hardware: HardwareProfile, workload: Workload) -> Placement | None:
    machine = restricted(hardware, workload)
    return next(
        (
            placement
            for placement in placements(model, variant, machine, workload)
            if shortage(memory(model, variant, placement, machine), workload.memory_margin_fraction) is None
        ),
        None,
    )


def _candidate(answer: Recommendation, variant: Variant, placement: Placement, why: str) -> Candidate:
    calibration, _ = calibration_of(answer.hardware)
    types = sorted({type_ for _, type_ in variant.recipe})
    reasons = (
        f"a mixture of {', '.join(types)}: {why}",
        "its types are planned by the sensitivities of other models; apply measures this one's and chooses again",
    )
    made = estimate(answer.model, variant, placement, answer.hardware, calibration)
    return Candidate(variant=variant, placement=placement, estimate=made, reasons=reasons)
