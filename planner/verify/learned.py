"""What later estimates may learn from a verification: measurements for the store."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

from planner.core.candidate import Placement, Variant
from planner.core.hardware import HardwareProfile
from planner.core.measurement import DECODE, PREFILL, Conditions, Measurement
from planner.verify.crowding import crowded
from planner.verify.trial import SpeedTrial
from planner.verify.verdicts import Measured


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """What is measured, for the store: measurements of the same shape and variant calibrate later estimates."""

    model: str
    model_sha256: str
    variant: Variant
    decode_weights_bytes: float | None = None
    """Bytes of weights that one token reads."""
    prefill_weight_count: float | None = None
    """Weights that one token multiplies."""


def measurements(
    measured: Mapping[str, Measured],
    subject: Subject,
    placement: Placement,
    speed: SpeedTrial | None,
    hardware: HardwareProfile,
    *,
    predicted: Mapping[str, float],
    tool_version: str,
    now: str | None = None,
) -> tuple[Measurement, ...]:
    """All that was measured, but for speeds taken on busy cores."""
    scale = {DECODE: subject.decode_weights_bytes, PREFILL: subject.prefill_weight_count}
    variant, conditions = subject.variant, _conditions(placement, speed)
    left_out = crowded(speed)
    return tuple(
        Measurement(
            quantity=quantity,
            value=value.value,
            low=value.low,
            high=value.high,
            samples=value.samples,
            model=subject.model,
            model_sha256=subject.model_sha256,
            method=variant.method,
            runtime=variant.runtime,
            type=variant.type,
            group_size=variant.group_size,
            imatrix=variant.imatrix,
            conditions=conditions,
            predicted=predicted.get(quantity),
            hardware_identity=hardware.identity(),
            hardware_name=hardware.name,
            tool_version=tool_version,
            measured_at=now or datetime.now(UTC).isoformat(timespec="seconds"),
            weights_bytes=scale.get(quantity),
        )
        for quantity, value in measured.items()
        if quantity not in left_out
    )


def _conditions(placement: Placement, speed: SpeedTrial | None) -> Conditions:
    return Conditions(
        context=placement.context,
        depth=speed.depth if speed else placement.depth,
        prompt_tokens=speed.prompt_tokens if speed else placement.prompt_tokens,
        gpu_layers=placement.gpu_layers,
        threads=speed.threads if speed else placement.threads,
        kv_type=placement.kv_type,
        ubatch=placement.ubatch,
        flash_attention=placement.flash_attention,
        cpu_expert_layers=placement.cpu_expert_layers,
    )
