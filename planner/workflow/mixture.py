"""Mixtures of types: a file of a wanted size, in which the bits lie where they matter."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from planner.core.candidate import Candidate, Placement, Variant
from planner.core.errors import DoesNotFit, UsageError
from planner.core.hardware import HardwareProfile
from planner.core.model import ModelSpec
from planner.core.units import format_bytes
from planner.core.workload import Workload
from planner.decide.candidates import placements, restricted
from planner.decide.mixture import fill, limit_bytes, variant_of
from planner.estimate import estimate
from planner.estimate.memory import memory
from planner.estimate.placement import shortage
from planner.workflow.planning import best_executable
from planner.workflow.recommend import Recommendation
from planner.workflow.survey import calibration_of


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
    """The wish for the mixture that the recommendation chose; ``None`` where it chose a type."""
    chosen = best_executable(answer)
    if chosen is None or not chosen.variant.recipe:
        return None
    return Wish(memory_bytes=limit_bytes(answer.hardware, answer.workload))


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
    variant = variant_of(model, target, imatrix=workload.imatrix != "off")
    placement = _placed(model, variant, answer.hardware, workload)
    if placement is None:
        raise DoesNotFit(
            f"{model.name} as {variant.label()} does not fit beside {workload.context} tokens of context",
            numbers=f"the file has {format_bytes(target, 2)}",
            hint="`--fit-memory SIZE` chooses a size that does",
        )
    return _candidate(answer, variant, placement, f"a file of at most {format_bytes(target, 2)} was asked for"), target


def _fitted(answer: Recommendation, workload: Workload) -> tuple[Candidate, int]:
    """The largest file whose run stays within the workload's memory, whole on the GPUs where there are any."""
    model, limit = answer.model, workload.max_memory_bytes or 0
    found = fill(model, answer.hardware, workload)
    if found is None:
        raise DoesNotFit(
            f"no mixture of {model.name} fits {format_bytes(limit)} beside {workload.context} tokens of context",
            hint="allow more memory or a shorter --context",
        )
    variant, target = found
    exact = dataclasses.replace(workload, memory_margin_fraction=0.0)
    placement = _placed(model, variant, answer.hardware, exact)
    assert placement is not None
    why = f"it fills the {format_bytes(limit)} that a run may take"
    return _candidate(answer, variant, placement, why), target


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
