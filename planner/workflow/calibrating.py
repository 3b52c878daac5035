"""Measure this machine with slices of models, and keep the rates that follow."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from planner.core import rates as kinds
from planner.core.errors import ExecutionFailed, InputError, UsageError
from planner.core.hardware import Gpu, HardwareProfile, usable_core_count
from planner.core.model import ModelSpec, shape_sha256
from planner.core.rates import Rate, gpu_key
from planner.workflow.survey import survey

if TYPE_CHECKING:
    from planner.verify.calibration_trial import CalibrationAnswer, CalibrationRequest

Progress = Callable[[str, float], None]

QUICK_SECONDS, DEFAULT_SECONDS, THOROUGH_SECONDS = 15.0, 60.0, 240.0
_QUICK_TYPES = ("Q4_K", "Q6_K", "Q8_0")
_TYPES = (*_QUICK_TYPES, "Q4_0", "Q5_K", "F16", "Q3_K", "IQ4_XS", "Q2_K", "Q5_0")
"""Tensor types of the file types that are recommended most, the most frequent first."""
_THOROUGH_TYPES = (*_TYPES, "BF16", "IQ3_S", "IQ4_NL", "Q4_1", "Q5_1", "IQ2_S", "IQ3_XXS", "MXFP4")
_SHARE_OF_MEMORY = 0.6
_LEAST_MEMORY_BYTES = 2 << 30
EXAMPLE_MODEL, EXAMPLE_TYPE = "llama-3.1-8b", "Q4_K_M"
"""What the curve of a calibration for any model is drawn for."""
_CPU_SHARE = 0.5
"""Of the budget, on a machine with GPUs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibrated:
    """What one calibration found."""

    hardware: HardwareProfile
    rates: tuple[Rate, ...]
    seconds: float
    notes: tuple[str, ...] = ()
    best_threads: int | None = None
    """Thread count of the fastest decode."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrateOptions:
    """What to measure and for how long."""

    budget_seconds: float = DEFAULT_SECONDS
    model: str | None = None
    types: tuple[str, ...] = ()
    """File types with ``model``, else tensor types; empty: those that fit the budget."""
    threads: tuple[int, ...] = ()
    imatrix: bool = False
    gpu: bool = True
    scale: float = 1.0


def calibrate(options: CalibrateOptions, progress: Progress | None = None) -> Calibrated:
    """Measure, derive rates and keep them; nothing is kept when it is interrupted.

    Raises:
        UsageError: a type or thread count makes no sense.
        MissingDependency: llama-cpp-python is not installed.
        ExecutionFailed: the measuring process failed, or nothing could be measured.
    """
    from planner.store import Store

    here = survey(measure=True)
    model = _model(options)
    with Store() as store:  # a store that cannot be written is found before a minute is spent
        store.rates(here.identity())
    found, notes, seconds = _measure(options, here, model, progress)
    if all(rate.work == kinds.MEMORY_READ for rate in found):
        raise ExecutionFailed(
            "nothing could be measured",
            numbers="; ".join(notes),
            hint="give it more time with --seconds, or close other programs",
            code="nothing-measured",
        )
    stamped = _stamped(found, here)
    with Store() as store:
        store.add_rates(stamped)
    fastest = kinds.Rates(stamped).best_threads(here.cpu.inference_threads())
    return Calibrated(hardware=here, rates=stamped, seconds=seconds, notes=notes, best_threads=fastest)


def _model(options: CalibrateOptions) -> ModelSpec | None:
    from planner import models
    from planner.execute.random_gguf import writable_types
    from planner.methods import gguf

    if options.model is None:
        unknown = [type_ for type_ in options.types if type_ not in writable_types()]
        if unknown:
            raise UsageError(
                f"{unknown[0]!r} is no tensor type", hint=f"one of {', '.join(writable_types())}", code="unknown-type"
            )
        return None
    model = models.resolve(options.model)
    for type_ in options.types:
        gguf.tensor_types(model, gguf.variant(type_, imatrix=options.imatrix))
    return model


def _measure(
    options: CalibrateOptions, here: HardwareProfile, model: ModelSpec | None, progress: Progress | None
) -> tuple[list[Rate], tuple[str, ...], float]:
    from planner.verify.calibrate_run import run_calibration

    gpus = _distinct_gpus(here) if options.gpu else []
    found: list[Rate] = []
    notes: list[str] = []
    seconds = 0.0
    budgets = _budgets(options.budget_seconds, len(gpus))
    devices: list[tuple[int, Gpu] | None] = [None, *gpus]
    for number, (device, budget) in enumerate(zip(devices, budgets, strict=True)):
        request = calibration_request(options, here, model, budget, device is not None)
        tell = _part_of(progress, number, len(devices), "CPU" if device is None else device[1].name)
        answer, repacked = run_calibration(request, gpu_index=None if device is None else device[0], progress=tell)
        key = kinds.CPU if device is None else gpu_key(device[1])
        made = _rates(answer, request, model, key, found)
        found += [dataclasses.replace(rate, tool_version=answer.tool_version) for rate in made]
        notes += _notes(answer, repacked)
        seconds += answer.seconds
    found += _bandwidth(here)
    return found, tuple(notes), seconds


def _budgets(total: float, gpu_count: int) -> list[float]:
    if not gpu_count:
        return [total]
    return [total * _CPU_SHARE, *([total * (1 - _CPU_SHARE) / gpu_count] * gpu_count)]


def _distinct_gpus(here: HardwareProfile) -> list[tuple[int, Gpu]]:
    """One GPU of each kind that the installed llama.cpp can use."""
    found: dict[str, tuple[int, Gpu]] = {}
    for index, gpu in enumerate(here.gpus):
        found.setdefault(gpu_key(gpu), (index, gpu))
    return list(found.values()) if found and supports_gpus() else []


def supports_gpus() -> bool:
    """Asked in a child, so that no driver is started in this process."""
    import subprocess
    import sys

    code = "import llama_cpp, sys; sys.exit(0 if llama_cpp.llama_supports_gpu_offload() else 3)"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


def calibration_request(
    options: CalibrateOptions, here: HardwareProfile, model: ModelSpec | None, budget: float, gpu: bool
) -> CalibrationRequest:
    """What the child for one device is asked.

    Raises:
        InputError: too little memory is free.
    """
    from planner.probe.bandwidth import cache_bytes
    from planner.probe.reader import Reader
    from planner.verify.calibration_trial import CalibrationRequest

    usable = here.memory.usable_bytes()
    if usable is not None and usable < _LEAST_MEMORY_BYTES:
        raise InputError(
            "too little memory is free to calibrate",
            numbers=f"{usable / 2**30:.1f} GiB, slices take up to {_LEAST_MEMORY_BYTES / 2**30:.0f} GiB",
            hint="close other programs",
            code="too-little-memory",
        )
    budget_types = _QUICK_TYPES if budget < 30 else _TYPES if budget < 120 else _THOROUGH_TYPES
    return CalibrationRequest(
        budget_seconds=budget,
        threads=options.threads or thread_counts(here)[: 2 if model else None],
        gpu=gpu,
        types=options.types or ((model.file_type or "Q4_K_M",) if model else budget_types),
        kv_types=("f16",) if budget < 30 else ("f16", "q8_0"),
        model=options.model,
        imatrix=options.imatrix,
        cache_bytes=0 if options.scale < 1 else cache_bytes(Reader()) or 0,
        memory_bytes=None if usable is None else int(usable * _SHARE_OF_MEMORY),
        scale=options.scale,
    )


def thread_counts(here: HardwareProfile) -> tuple[int, ...]:
    """Physical cores, one, all logical ones, and powers of two between: the first two are measured for every type."""
    allowed = usable_core_count()
    best = min(here.cpu.inference_threads(), allowed)
    between = [count for count in (2, 4, 8, 16, 32, 64, 128) if count < best]
    logical = min(here.cpu.logical_core_count or best, allowed)
    return tuple(dict.fromkeys((best, 1, logical, *reversed(between))))


def _part_of(progress: Progress | None, number: int, count: int, device: str) -> Progress | None:
    if progress is None:
        return None
    return lambda what, fraction: progress(f"{device}: {what}", (number + fraction) / count)


def _rates(
    answer: CalibrationAnswer,
    request: CalibrationRequest,
    model: ModelSpec | None,
    device: str,
    host_rates: list[Rate],
) -> tuple[Rate, ...]:
    from planner.estimate import slice_rates, slices

    kit = slices.GPU_KIT if request.gpu else slices.CPU_KIT
    if model is not None:
        return slice_rates.model_rates_of(answer.observations, kit, model, shape_sha256(model), device)
    kit = kit if request.scale == 1 else slices.scaled(kit, request.scale)
    made = slice_rates.rates_of(answer.observations, kit, device)
    return (*made, *slice_rates.link_rates_of(answer.observations, kit, device, host_rates)) if request.gpu else made


def _notes(answer: CalibrationAnswer, repacked: bool) -> list[str]:
    from planner.verify.run import NO_REPACK_NOTE

    notes = [] if repacked else [NO_REPACK_NOTE]
    if answer.left_out:
        notes.append(f"the time did not reach for {', '.join(answer.left_out)}; --seconds gives more")
    clean = sum(seen.clean_count for seen in answer.observations)
    disturbed = sum(seen.disturbed_count for seen in answer.observations)
    if disturbed > clean:
        notes.append(
            f"other programs took the cores in {disturbed} of {clean + disturbed} samples; those were set aside, "
            "and what remains is less sure"
        )
    return notes


def _bandwidth(here: HardwareProfile) -> list[Rate]:
    rate = here.memory.bandwidth_bytes_per_second
    if rate is None or not (here.memory.bandwidth_basis or "").startswith("measured"):
        return []
    threads = here.cpu.inference_threads()
    return [Rate(work=kinds.MEMORY_READ, value=rate, low=rate, high=rate, threads=threads)]


def _stamped(found: list[Rate], here: HardwareProfile) -> tuple[Rate, ...]:
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return tuple(
        dataclasses.replace(rate, hardware_identity=here.identity(), hardware_name=here.name, measured_at=now)
        for rate in found
    )


def depth_curve(
    found: Calibrated, model_name: str | None, type_: str | None
) -> tuple[str, tuple[tuple[int, float], ...]]:
    """Decode against cached tokens as it is predicted from now on: (what for, (depth, tokens per second) …).

    Of the model that was calibrated, else of one that fits most machines. Empty where the rates do not cover it.
    """
    from planner import models
    from planner.core.candidate import Placement
    from planner.core.measurement import DECODE
    from planner.core.rates import Rates
    from planner.estimate.speed_calibrated import predict
    from planner.methods import gguf

    model = models.resolve(model_name or EXAMPLE_MODEL)
    variant = gguf.variant(type_ or model.file_type or EXAMPLE_TYPE, imatrix=False)
    rates, points = Rates(found.rates), []
    on_gpu = any(gpu_key(gpu) == rate.device for gpu in found.hardware.gpus[:1] for rate in found.rates)
    for depth in (0, 512, 1024, 2048, 4096, 8192, 16384):
        placement = Placement(
            context=max(depth, 512),
            depth=depth,
            gpu_layers=model.offloadable_count if on_gpu else 0,
            gpu_count=int(on_gpu),
        )
        guess = predict(model, variant, placement, found.hardware, rates, DECODE)
        if guess is not None and depth < model.n_ctx_train:
            points.append((depth, guess.value))
    return f"{model.name} as {variant.type}", tuple(points)


def stored_rates(*, all_machines: bool = False) -> tuple[Rate, ...]:
    """What was calibrated on this machine, or on all."""
    from planner.store import Store, default_path

    if not default_path().exists():
        return ()
    with Store(read_only=True) as store:
        return store.rates(None if all_machines else survey().identity())


def forget() -> int:
    """Drop what was calibrated on this machine; how many rates that were."""
    from planner.store import Store, default_path

    if not default_path().exists():
        return 0
    with Store() as store:
        return store.forget_rates(survey().identity())
