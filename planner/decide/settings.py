"""How the runtime is set: as the user says > as tuned here for this model > as calibrated here > as the probe tells."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from planner.core.candidate import Candidate, Placement, Variant
from planner.core.hardware import HardwareProfile
from planner.core.measurement import Calibration
from planner.core.model import ModelSpec, shape_sha256
from planner.core.tuned import Tuned, setting_line
from planner.core.workload import Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class Threads:
    """A number of threads and where it comes from."""

    count: int
    basis: str
    """A clause for a person."""


def threads(
    model: ModelSpec,
    variant: Variant,
    hardware: HardwareProfile,
    workload: Workload,
    calibration: Calibration | None,
) -> Threads:
    """The thread count to plan with."""
    if workload.threads:
        return Threads(count=workload.threads, basis="as asked for")
    usual = hardware.cpu.inference_threads()
    if calibration is not None:
        found = tuned(model, variant, hardware, calibration) or _of_any_type(model, hardware, calibration)
        if found is not None and found.placement.threads:
            return Threads(count=found.placement.threads, basis=f"tuned here for {found.model} as {found.type}")
        best = calibration.rates.best_threads(usual)
        if best is not None:
            return Threads(count=best, basis="the fastest decode that `qplan calibrate` found here")
    return Threads(count=usual, basis="the fast physical cores; `qplan tune` measures others")


def tuned(
    model: ModelSpec, variant: Variant, hardware: HardwareProfile, calibration: Calibration | None
) -> Tuned | None:
    """The newest tuning of this model in this type, with the GPUs or without as ``hardware`` has them."""
    if calibration is None or variant.method != "gguf" or variant.recipe:
        return None
    return next((row for row in _of_model(model, hardware, calibration) if row.type == variant.type), None)


def _of_any_type(model: ModelSpec, hardware: HardwareProfile, calibration: Calibration) -> Tuned | None:
    """Threads carry over to other types of a model."""
    return next(iter(_of_model(model, hardware, calibration)), None)


def _of_model(model: ModelSpec, hardware: HardwareProfile, calibration: Calibration) -> list[Tuned]:
    """Newest first."""
    if not calibration.tuned:
        return []
    shape, on_gpu = shape_sha256(model), bool(hardware.gpus)
    return [row for row in reversed(calibration.tuned) if (row.model_sha256, row.on_gpu) == (shape, on_gpu)]


def with_tuned(base: Placement, found: Tuned | None, workload: Workload) -> Placement:
    """``base`` with what was tuned, but for what the user set otherwise than it is by itself; no layers yet."""
    if found is None:
        return base
    best, usual = found.placement, Workload()
    kept: dict[str, object] = {}
    if workload.ubatch == usual.ubatch:
        kept |= {"ubatch": best.ubatch, "batch": best.batch}
    if workload.flash_attention == usual.flash_attention:
        kept["flash_attention"] = best.flash_attention or (workload.kv_type or "f16") not in EXACT_KV
    if workload.kv_type is None:
        kept["kv_type"] = best.kv_type
    return dataclasses.replace(base, **kept)  # type: ignore[arg-type]


EXACT_KV = ("f32", "f16", "bf16")
"""KV cache types without loss; llama.cpp runs the others with flash attention only."""


def tuned_layers(base: Placement, found: Tuned | None, model: ModelSpec, workload: Workload) -> Placement | None:
    """``base`` with the tuned layers on the GPUs, where it was tuned for this very context and users."""
    if found is None or not found.on_gpu:
        return None
    best = found.placement
    if (best.context, best.sequences) != (workload.context, workload.concurrency):
        return None
    return dataclasses.replace(
        base,
        kv_type=workload.kv_type or best.kv_type,
        gpu_layers=min(best.gpu_layers, model.offloadable_count),
        gpu_count=best.gpu_count,
        cpu_expert_layers=best.cpu_expert_layers,
        tensor_split=best.tensor_split,
    )


def reason(
    chosen: Candidate,
    model: ModelSpec,
    hardware: HardwareProfile,
    workload: Workload,
    calibration: Calibration | None,
) -> str:
    """Where the settings of the chosen candidate come from; empty where no thread of the host matters."""
    found = tuned(model, chosen.variant, hardware, calibration)
    if found is not None:
        day = found.measured_at[:10] or "an unknown day"
        return (
            f"settings as `qplan tune` found them here for {found.objective} ({day}): {setting_line(found.placement)}"
        )
    if chosen.variant.format != "gguf" or chosen.placement.gpu_layers >= model.offloadable_count:
        return ""
    found_threads = threads(model, chosen.variant, hardware, workload, calibration)
    return f"{found_threads.count} thread{'s' * (found_threads.count != 1)}: {found_threads.basis}"
