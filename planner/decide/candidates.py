"""Every way to run a model on a machine: method × type × KV type × offload, each fitting or rejected with numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from planner import methods
from planner.core.candidate import Candidate, Placement, Rejection, Variant
from planner.core.estimates import MemoryEstimate
from planner.core.hardware import HardwareProfile
from planner.core.measurement import Calibration
from planner.core.model import ModelSpec
from planner.core.workload import Workload
from planner.decide import settings
from planner.estimate import estimate, kv_cache
from planner.estimate.memory import memory
from planner.estimate.offload import best_offload, split_that_holds
from planner.estimate.placement import shortage
from planner.methods import gguf, wishes
from planner.runtimes import kernels

Found = Candidate | Rejection


def enumerate_candidates(
    model: ModelSpec, hardware: HardwareProfile, workload: Workload, calibration: Calibration | None
) -> tuple[tuple[Candidate, ...], tuple[Rejection, ...]]:
    """Candidates that fit and meet the workload's limits, and what was rejected.

    Raises:
        InputError: the KV type that was asked for cannot hold this model's heads.
    """
    if workload.kv_type is not None:
        kv_cache.check_type(model, workload.kv_type)
    machine = restricted(hardware, workload)
    found: list[Found] = []
    for wanted in wanted_variants(model, workload):
        variant = kernels.fitting(wanted, machine)
        blockers = _needs_checkpoint(model, variant) or methods.get(variant.method).blockers(model, variant, machine)
        found += blockers[:1] or [place(model, variant, machine, workload, calibration)]
    fitting = tuple(item for item in found if isinstance(item, Candidate))
    return fitting, tuple(item for item in found if isinstance(item, Rejection))


def _needs_checkpoint(model: ModelSpec, variant: Variant) -> tuple[Rejection, ...]:
    """Only llama.cpp starts from a GGUF file."""
    if not model.source.is_gguf or variant.format == "gguf":
        return ()
    reason = "the weights are in a GGUF file; it starts from a safetensors checkpoint"
    return (Rejection(method=variant.method, type=variant.type, reason=reason, rule="needs-checkpoint"),)


def restricted(hardware: HardwareProfile, workload: Workload) -> HardwareProfile:
    """The part of the machine that the workload may use: no GPU if so asked, no more memory than allowed."""
    gpus = () if workload.cpu_only else hardware.gpus
    limit = workload.max_memory_bytes
    if limit is None:
        return dataclasses.replace(hardware, gpus=gpus)
    if gpus:
        capped = tuple(dataclasses.replace(g, memory_free_bytes=min(limit, g.usable_bytes() or limit)) for g in gpus)
        return dataclasses.replace(hardware, gpus=capped)
    ram = dataclasses.replace(hardware.memory, limit_bytes=min(limit, hardware.memory.usable_bytes() or limit))
    return dataclasses.replace(hardware, gpus=gpus, memory=ram)


def wanted_variants(model: ModelSpec, workload: Workload) -> Iterator[Variant]:
    """Variants of the methods and types that the workload allows."""
    for name in workload.methods or methods.names():
        for variant in wishes.variants(name, model, workload):
            if workload.types is None or variant.type.lower() in {t.lower() for t in workload.types}:
                yield _with_imatrix(model, variant, workload.imatrix)


def _with_imatrix(model: ModelSpec, variant: Variant, wish: str) -> Variant:
    """The variant as the workload wants it; there is nothing to quantize in a 16-bit or a finished one."""
    if (
        wish == "auto"
        or variant.method != "gguf"
        or variant.type in gguf.FULL_PRECISION
        or gguf.is_itself(model, variant)
    ):
        return variant
    return dataclasses.replace(variant, imatrix=wish == "on")


def place(
    model: ModelSpec, variant: Variant, hardware: HardwareProfile, workload: Workload, calibration: Calibration | None
) -> Found:
    """The best placement of a variant, or why there is none."""
    tried: list[tuple[Placement, MemoryEstimate]] = []
    no_kernel: list[Rejection] = []
    for placement in placements(model, variant, hardware, workload, calibration):
        kernel = methods.get(variant.method).kernel(model, variant, placement, hardware)
        refused = kernel if isinstance(kernel, Rejection) else kernels.unasked(variant, kernel, workload.methods)
        if isinstance(kernel, Rejection) or refused is not None:
            no_kernel += filter(None, (refused,))
            continue
        used = memory(model, variant, placement, hardware)
        if shortage(used, workload.memory_margin_fraction) is None:
            made = estimate(model, variant, placement, hardware, calibration, used)
            return _within_limits(
                Candidate(variant=variant, placement=placement, estimate=made, kernel=kernel), workload
            )
        tried.append((placement, used))
    return _does_not_fit(variant, tried, no_kernel, workload)


def placements(
    model: ModelSpec,
    variant: Variant,
    hardware: HardwareProfile,
    workload: Workload,
    calibration: Calibration | None = None,
) -> Iterator[Placement]:
    """Placements to try, best first: whole on the GPUs with an exact KV cache, then a q8_0 one, then parted.

    What was tuned here for the model comes before all.
    """
    tuned = settings.tuned(model, variant, hardware, calibration)
    usual = Placement(
        context=workload.context,
        kv_type=workload.kv_type or "f16",
        ubatch=workload.ubatch,
        flash_attention=workload.flash_attention,
        sequences=workload.concurrency,
        threads=settings.threads(model, variant, hardware, workload, calibration).count,
        depth=workload.depth,
        prompt_tokens=workload.prompt_tokens,
    )
    base = settings.with_tuned(usual, tuned, workload)
    if variant.format != "gguf":
        yield from _whole_gpu(model, base, hardware) if hardware.gpus else (base,)
        return
    kv_types = (workload.kv_type,) if workload.kv_type else tuple(dict.fromkeys((base.kv_type, *_kv_types(model))))
    if not hardware.gpus:
        yield from (with_kv_type(base, kv) for kv in kv_types)
        return
    counts, margin = sorted({1, len(hardware.gpus)}), workload.memory_margin_fraction
    full = model.offloadable_count
    if workload.gpu_layers is not None:
        layers = min(workload.gpu_layers, full)
        yield dataclasses.replace(base, gpu_layers=layers, gpu_count=len(hardware.gpus))
        return
    as_tuned = settings.tuned_layers(base, tuned, model, workload)
    if as_tuned is not None:
        yield as_tuned
    for kv in kv_types:
        for count in counts:
            all_layers = dataclasses.replace(with_kv_type(base, kv), gpu_layers=full, gpu_count=count)
            yield split_that_holds(model, variant, all_layers, hardware, margin) or all_layers
    for kv in kv_types:
        parted = dataclasses.replace(with_kv_type(base, kv), gpu_count=len(hardware.gpus))
        found = best_offload(model, variant, parted, hardware, margin)
        if found is not None:
            yield found


def with_kv_type(base: Placement, kv_type: str) -> Placement:
    """``base`` with another KV cache, and with flash attention where llama.cpp demands it."""
    flash = base.flash_attention or (kv_type != base.kv_type and kv_type not in settings.EXACT_KV)
    return dataclasses.replace(base, kv_type=kv_type, flash_attention=flash)


def _kv_types(model: ModelSpec) -> tuple[str, ...]:
    """KV types to try by oneself: exact, and of half the size where its blocks divide the model's heads."""
    return ("f16", "q8_0") if kv_cache.divides_heads(model, "q8_0") else ("f16",)


def _whole_gpu(model: ModelSpec, base: Placement, hardware: HardwareProfile) -> Iterator[Placement]:
    """One GPU, then tensor parallelism over a power of two of them."""
    count = 1
    while count <= len(hardware.gpus):
        yield dataclasses.replace(base, gpu_layers=model.offloadable_count, tensor_parallel=count, gpu_count=count)
        count *= 2


def _within_limits(candidate: Candidate, workload: Workload) -> Found:
    variant, decode = candidate.variant, candidate.estimate.speed.decode
    least = workload.min_decode_tokens_per_second
    if least is not None and decode is not None and decode.value < least:
        return Rejection(
            method=variant.method,
            type=variant.type,
            reason=f"decodes at {decode.value:.1f} tokens/s, {least:g} were asked for",
            needed=least,
            available=round(decode.value, 2),
            unit="tokens/s",
            rule="min-decode",
        )
    return candidate


def _does_not_fit(
    variant: Variant,
    tried: list[tuple[Placement, MemoryEstimate]],
    no_kernel: list[Rejection],
    workload: Workload,
) -> Rejection:
    """The rejection with the numbers of the attempt that lacked least, or the kernel row that forbade a wider split."""
    lacks = [lack for _, used in tried if (lack := shortage(used, workload.memory_margin_fraction)) is not None]
    if not lacks:
        none = Rejection(
            method=variant.method, type=variant.type, reason="no placement is possible", rule="no-placement"
        )
        return no_kernel[0] if no_kernel else none
    least = min(lacks, key=lambda lack: lack.lacking_bytes)
    reason = f"does not fit on {least.device} with {workload.context} tokens of context"
    if variant.format == "gguf" and workload.gpu_layers is None and least.device != tried[0][1].host.name:
        reason += ", nor with layers left in RAM"
    if no_kernel:
        reason += f"; over more GPUs: {no_kernel[0].reason} [{no_kernel[0].rule}]"
    return Rejection(
        method=variant.method,
        type=variant.type,
        reason=reason,
        source=no_kernel[0].source if no_kernel else None,
        needed=least.needed_bytes,
        available=least.available_bytes,
        unit="bytes",
        rule="memory",
    )
