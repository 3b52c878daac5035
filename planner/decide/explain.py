"""Reasons with numbers, for the chosen candidate and against the others."""

from __future__ import annotations

import dataclasses

from planner.core.candidate import Candidate
from planner.core.hardware import HardwareProfile
from planner.core.measurement import Calibration
from planner.core.model import ModelSpec
from planner.core.units import format_bytes, format_rate
from planner.core.workload import Workload
from planner.decide import loss, settings
from planner.decide.rank import memory_bytes, quality_ratio
from planner.decide.rules import whole_in_vram


def with_reasons(
    ranked: tuple[Candidate, ...],
    model: ModelSpec,
    hardware: HardwareProfile,
    workload: Workload,
    calibration: Calibration | None,
) -> tuple[Candidate, ...]:
    """The same candidates, the first with the reasons for it, the others with how they differ from it."""
    how_set = settings.reason(ranked[0], model, hardware, workload, calibration)
    first = dataclasses.replace(ranked[0], reasons=_why(ranked, model, workload, how_set))
    rest = (dataclasses.replace(c, reasons=(difference(c, ranked[0]),)) for c in ranked[1:])
    return (first, *rest)


def _why(ranked: tuple[Candidate, ...], model: ModelSpec, workload: Workload, how_set: str) -> tuple[str, ...]:
    chosen = ranked[0]
    reasons = [
        _mixture_reason(chosen),
        _fit_reason(chosen, model),
        _speed_reason(chosen),
        _quality_reason(chosen),
        loss.reason(chosen),
        how_set,
    ]
    if chosen.placement.kv_type == "q8_0" and workload.kv_type is None and "KV q8_0" not in how_set:
        reasons.append("the KV cache is q8_0, because an f16 one leaves no room for this placement")
    if len(ranked) > 1:
        reasons.append(f"next best is {ranked[1].variant.label()}: {difference(ranked[1], chosen)}")
    return tuple(reason for reason in reasons if reason)


def _mixture_reason(candidate: Candidate) -> str:
    if not candidate.variant.recipe:
        return ""
    types = sorted({type_ for _, type_ in candidate.variant.recipe})
    size = format_bytes(candidate.estimate.size.file_bytes)
    return (
        f"mixture to {size} of {', '.join(types)}: memory falls between two types, and this fills it; its types are "
        "sketched by the sensitivities of other models, `qplan apply` measures this one's and chooses again"
    )


def _fit_reason(candidate: Candidate, model: ModelSpec) -> str:
    used, placement = candidate.estimate.memory, candidate.placement
    full = max((*used.devices, used.host), key=lambda d: d.needed_bytes / d.capacity_bytes if d.capacity_bytes else 0)
    room = f" of {format_bytes(full.capacity_bytes)} usable" if full.capacity_bytes else ""
    takes = f"it takes {format_bytes(full.needed_bytes)}{room} on {full.name}"
    if not used.devices:
        return f"no GPU is used, {takes}"
    if whole_in_vram(candidate):
        return f"the whole model lies in GPU memory: {takes}"
    if placement.cpu_expert_layers:
        experts = f"the experts of {placement.cpu_expert_layers} of {model.n_layer} layers stay in RAM"
        if placement.gpu_layers > model.n_layer:
            return f"all layers are on the GPU but {experts}: {takes}"
        return f"{placement.gpu_layers} of {model.offloadable_count} layers are on the GPU and {experts}: {takes}"
    return f"{placement.gpu_layers} of {model.offloadable_count} layers fit on the GPU: {takes}"


def _speed_reason(candidate: Candidate) -> str:
    speed = candidate.estimate.speed
    if speed.decode is None:
        return ""
    bound = f", bound by {speed.bound_by}" if speed.bound_by else ""
    low, high = format_rate(speed.decode.low), format_rate(speed.decode.high)
    return f"it decodes about {format_rate(speed.decode.value)} tokens/s ({low}-{high}){bound}"


def _quality_reason(candidate: Candidate) -> str:
    ratio = candidate.estimate.quality.perplexity_ratio
    if ratio is None:
        return ""
    change = f"{percent(ratio.value)} ({percent(ratio.low)} to {percent(ratio.high)})"
    if ratio.value < 1:  # a measured one within its error of none
        return f"perplexity differs by {change} from the 16-bit model"
    return f"perplexity rises by {change} over the 16-bit model"


def percent(ratio: float) -> str:
    """A ratio as a signed change: ``1.0123`` → ``+1.23 %``."""
    return f"{round(100 * (ratio - 1), 2) + 0.0:+.2f} %"  # no "-0.00"


def difference(candidate: Candidate, chosen: Candidate) -> str:
    """How a candidate differs from the chosen one, in memory, speed and quality."""
    parts = [f"{format_bytes(memory_bytes(candidate))} against {format_bytes(memory_bytes(chosen))}"]
    mine, theirs = candidate.estimate.speed.decode, chosen.estimate.speed.decode
    if mine and theirs:
        parts.append(f"{format_rate(mine.value)} against {format_rate(theirs.value)} tokens/s")
    parts.append(f"perplexity {percent(quality_ratio(candidate))} against {percent(quality_ratio(chosen))}")
    return ", ".join(parts)
