"""Arithmetic without I/O: size, memory, speed and quality of one way to run a model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from planner.core.estimates import Estimate

if TYPE_CHECKING:
    from planner.core.candidate import Placement, Variant
    from planner.core.estimates import MemoryEstimate
    from planner.core.hardware import HardwareProfile
    from planner.core.measurement import Calibration
    from planner.core.model import ModelSpec


def estimate(
    model: ModelSpec,
    variant: Variant,
    placement: Placement,
    hardware: HardwareProfile,
    calibration: Calibration | None = None,
    used: MemoryEstimate | None = None,
) -> Estimate:
    """All predictions for ``variant`` of ``model``, placed as ``placement`` on ``hardware``.

    ``calibration`` is what was measured on this machine; where it has the very model and variant, its numbers
    replace the formulas', and where it has others, it corrects them. ``used`` is the memory of this very case where it
    is known already.
    """
    from planner import methods
    from planner.estimate.memory import memory
    from planner.estimate.quality import quality
    from planner.estimate.speed import speed

    return Estimate(
        size=methods.get(variant.method).size(model, variant),
        memory=memory(model, variant, placement, hardware) if used is None else used,
        speed=speed(model, variant, placement, hardware, calibration),
        quality=quality(model, variant, calibration),
    )
