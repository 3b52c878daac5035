"""Mixtures of types as candidates: where memory falls between two types, the mixture that would fill it."""

from __future__ import annotations

import dataclasses

from planner.core.candidate import Candidate, Placement, Variant
from planner.core.errors import DoesNotFit, InputError
from planner.core.hardware import HardwareProfile
from planner.core.measurement import Calibration
from planner.core.model import ModelSpec
from planner.core.units import pad
from planner.core.workload import Workload
from planner.decide import rules
from planner.decide.candidates import place, placements, restricted
from planner.estimate import making_runs
from planner.estimate.memory import memory
from planner.estimate.placement import shortage
from planner.estimate.speed import speed
from planner.methods import gguf, gguf_recipe

ENOUGH_BITS = 8.0
"""Bits per weight from which more make no difference that shows: a mixture of 8.0 leaves a KL divergence of 0.0002 nats
on the demo model (benchmarks/budget.py, 2026-11-26)."""
FULL = 0.97
"""Share of a device's memory beyond which the rest, less than a type's step, is not worth the measuring."""
_TRIES = 8
"""Corrections until the memory fits; what a file's size adds to it is nearly its size, so two are usual."""
_STEP_BACK = 0.998
_MEASURING_MARGIN = 0.06
"""Of the memory that the 16-bit model is measured in."""
_PROBING_SECONDS = 600.0
"""What probing takes unasked, as ``workflow/measuring.py`` asks for."""
_SKETCH = 0
"""States of the knapsack's last search: for a candidate the relaxation is near enough, in a tenth of the time."""


def variant_of(model: ModelSpec, target_bytes: int, *, imatrix: bool, most_states: int | None = None) -> Variant:
    """The mixture of at most so many bytes, its types by the sensitivities of other models.

    Raises:
        DoesNotFit: no mixture is that small.
    """
    metadata = gguf.metadata_bytes(model)
    recipe = gguf_recipe.plan_recipe(model, metadata, target_bytes, imatrix=imatrix, most_states=most_states)
    bits = 8 * target_bytes / model.parameter_count
    return Variant(
        method="gguf",
        format="gguf",
        runtime="llama.cpp",
        type=f"{bits:.2f}bpw",
        imatrix=imatrix,
        recipe=recipe.types,
    )


def fill(
    model: ModelSpec,
    hardware: HardwareProfile,
    workload: Workload,
    *,
    first_bytes: int | None = None,
    most_states: int | None = None,
) -> tuple[Variant, int] | None:
    """The largest file whose run stays within the workload's memory limit, and that file's bytes; ``None``: no file.

    Whole on the GPUs where there are any.

    Args:
        first_bytes: of the file that is tried first.
        most_states: how thoroughly types are chosen.
    """
    limit = workload.max_memory_bytes or 0
    workload = dataclasses.replace(workload, memory_margin_fraction=0.0)
    machine, imatrix = restricted(hardware, workload), workload.imatrix != "off"
    target, best = first_bytes or limit, None
    ceiling = gguf.size(model, gguf.variant("Q8_0")).file_bytes
    for _ in range(_TRIES):
        target = min(target, ceiling)
        variant = variant_of(model, target, imatrix=imatrix, most_states=most_states)
        room = _room(model, variant, machine, workload)
        if room >= 0:
            best = (variant, target)
            if room < target * (1 - _STEP_BACK) or target == ceiling:
                break
        target = pad(target + room - 31, 32) if room < 0 else target + room
    return best


def _room(model: ModelSpec, variant: Variant, machine: HardwareProfile, workload: Workload) -> int:
    """Bytes left on the fullest device with the model whole where it runs; negative: bytes that lack."""
    used = memory(model, variant, next(placements(model, variant, machine, workload)), machine)
    devices = [d for d in (*used.devices, *(() if used.devices else (used.host,))) if d.capacity_bytes is not None]
    return min((int(d.capacity_bytes or 0) - d.needed_bytes for d in devices), default=0)


def limit_bytes(hardware: HardwareProfile, workload: Workload) -> int | None:
    """What a run may take: the limit asked for, else the first GPU's memory or the RAM, less the margin."""
    if workload.max_memory_bytes is not None:
        return workload.max_memory_bytes
    gpus = () if workload.cpu_only else hardware.gpus
    usable = gpus[0].usable_bytes() if gpus else hardware.memory.usable_bytes()
    return None if usable is None else int(usable * (1 - workload.memory_margin_fraction))


def offer(
    model: ModelSpec,
    hardware: HardwareProfile,
    workload: Workload,
    calibration: Calibration | None,
    ranked: tuple[Candidate, ...],
) -> Candidate | None:
    """The mixture that fills the memory which the largest standard type leaves; ``None`` where there is no point.

    There is one where a GGUF type runs whole on its device, memory is left beside the largest that does, and this
    machine can measure the 16-bit model. Whether it is better than the types is for the ranking to say.
    """
    largest, limit = _largest_whole(model, hardware, workload, ranked), limit_bytes(hardware, workload)
    if largest is None or limit is None or not _may_mix(model, workload, largest):
        return None
    used = largest.estimate.memory
    room = limit - max(device.needed_bytes for device in (used.devices or (used.host,)))
    if room < (1 - FULL) * limit or not can_measure(model, hardware, calibration):
        return None
    wanted = dataclasses.replace(workload, max_memory_bytes=limit, kv_type=largest.placement.kv_type)
    first = largest.estimate.size.file_bytes + room
    try:
        found = fill(model, hardware, wanted, first_bytes=first, most_states=_SKETCH)
    except (DoesNotFit, InputError):
        return None
    if found is None or 8 * found[1] / model.parameter_count <= largest.estimate.size.bits_per_weight:
        return None
    # a limit that was asked for may be filled; of a machine's own memory the margin stays free
    margin = workload.memory_margin_fraction if workload.max_memory_bytes is None else 0.0
    seated = dataclasses.replace(workload, kv_type=wanted.kv_type, memory_margin_fraction=margin)
    made = place(model, found[0], restricted(hardware, seated), seated, calibration)
    return made if isinstance(made, Candidate) else None


def _may_mix(model: ModelSpec, workload: Workload, largest: Candidate) -> bool:
    """Whether a mixture could be made of the model, is allowed, and would gain."""
    makeable = model.source.kind != "size" and model.file_type is None and workload.types is None
    gains = largest.estimate.size.bits_per_weight < ENOUGH_BITS
    return makeable and gains and workload.imatrix != "off" and workload.gpu_layers is None


def _largest_whole(
    model: ModelSpec, hardware: HardwareProfile, workload: Workload, ranked: tuple[Candidate, ...]
) -> Candidate | None:
    """The GGUF candidate of most bits that is placed as the best of them, if that one is whole where it runs."""
    types = [c for c in ranked if c.variant.method == "gguf"]
    if not types:
        return None
    seat, asked = _seat(types[0].placement), dataclasses.replace(workload, kv_type=types[0].placement.kv_type)
    if seat != _seat(next(placements(model, types[0].variant, restricted(hardware, workload), asked))):
        return None
    whole = (c for c in types if _seat(c.placement) == seat)
    return max(whole, key=lambda c: c.estimate.size.bits_per_weight)


def _seat(placement: Placement) -> tuple[object, ...]:
    """What tells two ways of placing a model apart."""
    return placement.kv_type, placement.gpu_layers, placement.gpu_count, placement.cpu_expert_layers


def measuring_layers(model: ModelSpec, hardware: HardwareProfile) -> int:
    """All layers of the 16-bit model where one GPU holds them, else none: what is measured is the same."""
    if not hardware.gpus:
        return 0
    place = Placement(context=512, gpu_layers=model.offloadable_count, gpu_count=1)
    used = memory(model, gguf.variant("F16"), place, hardware)
    return model.offloadable_count if shortage(used, _MEASURING_MARGIN) is None else 0


def can_measure(model: ModelSpec, hardware: HardwareProfile, calibration: Calibration | None) -> bool:
    """Whether importance matrix and sensitivities can be measured here: memory, disk and time."""
    layers, full = measuring_layers(model, hardware), gguf.variant("F16")
    place = Placement(
        context=512, gpu_layers=layers, gpu_count=int(layers > 0), threads=hardware.cpu.inference_threads()
    )
    free = hardware.disk.free_bytes if hardware.disk else None
    if free is not None and gguf.size(model, full).file_bytes > free:
        return False
    if shortage(memory(model, full, place, hardware), _MEASURING_MARGIN) is not None:
        return False
    rate = speed(model, full, place, hardware, calibration).prefill
    if rate is None:
        return False
    tokens = making_runs.CHUNK_TOKENS * making_runs.CALIBRATION_CHUNKS
    return tokens / rate.value + _PROBING_SECONDS <= rules.mixture_terms().most_seconds
