"""Measure an artifact as a plan would run it, and judge it by the plan's expectations."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from planner.core.candidate import Placement, Variant
from planner.core.data import data_path
from planner.core.errors import ExecutionFailed, InputError, MissingDependency, UnsupportedArchitecture
from planner.core.hardware import HardwareProfile
from planner.core.measurement import (
    DECODE,
    FILE_BYTES,
    KL_DIVERGENCE,
    PEAK_MEMORY,
    PERPLEXITY_RATIO,
    PREFILL,
    Conditions,
    Measurement,
)
from planner.core.plan import Expectation
from planner.core.units import GIB, format_bytes
from planner.verify.reference import NO_ROOM
from planner.verify.run import Progress, run_trial
from planner.verify.trial import QUALITY, SPEED, QualityTrial, SpeedTrial, TrialRequest, TrialResult
from planner.verify.verdicts import Measured, Verdict, all_ok, verdicts

HELD_OUT = "demo/heldout.txt"
"""The text, below ``data/``, that quality is measured on where none is given."""
_NORMAL_80 = 1.2816
"""Half-width of a normal distribution's 80 % interval, in standard errors."""
_QUALITY_SHARE = 0.5
"""Of the time budget, when quality is measured too."""
_WORKING_BYTES = GIB
"""Left free of a reference held in memory: logits of 1024 tokens of a large vocabulary twice, and compute buffers."""
_IDLE_SHARE = 0.9
"""Share of its cores' time below which a measured speed is noted as too low."""
_REMEMBER_SHARE = 0.75
"""Below this a speed says more about the other programs: it would mislead all later estimates, and it is no verdict."""


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


@dataclass(frozen=True, slots=True, kw_only=True)
class VerificationResult:
    """Everything measured of one artifact."""

    artifact: str
    measured: Mapping[str, Measured]
    measurements: tuple[Measurement, ...]
    """What later estimates may learn from: all that was measured, but for speeds taken on busy cores."""
    verdicts: tuple[Verdict, ...]
    ok: bool
    """No verdict is outside."""
    speed: SpeedTrial | None
    quality: QualityTrial | None
    tool_version: str
    measured_at: str
    notes: tuple[str, ...]


def verify_artifact(
    artifact: Path,
    *,
    subject: Subject,
    placement: Placement,
    hardware: HardwareProfile,
    reference: Path | None = None,
    keep_reference: Path | None = None,
    text: Path | None = None,
    expectations: Sequence[Expectation] = (),
    progress: Progress | None = None,
    budget_seconds: float = 240.0,
    max_chunks: int | None = None,
) -> VerificationResult:
    """File bytes, peak memory, prefill, decode and, against a 16-bit reference, perplexity ratio and KL divergence.

    Speed with memory and quality are measured in a child process each. What is measured as ``peak_memory_bytes``:
    on a CPU, the peak of the resident set during load, prefill and decode at the planned context, less the resident
    set before the model was opened; with layers on GPUs, the memory taken of the GPU that holds most. What cannot be
    measured is left out with a note.

    Args:
        artifact: a GGUF file, the first part of a split one.
        reference: the 16-bit GGUF it was quantized from, or the checkpoint directory, of which a 16-bit model is made
            for the while; without it no quality is measured.
        keep_reference: a file to keep that 16-bit model in.
        text: held-out text in UTF-8; ``None`` takes the one that comes with qplan.
        budget_seconds: wall time to stay near.

    Raises:
        InputError: the artifact is missing or is no GGUF file; ``text`` was given and is too short or unreadable.
        ExecutionFailed: the child crashed, or the model gives numbers that are not finite.
    """
    files = gguf_files(artifact)
    notes: list[str] = []
    placement = replace(placement, threads=placement.threads or hardware.cpu.inference_threads())
    share = 1 - _QUALITY_SHARE if reference else 1.0
    ask = TrialRequest(kind=SPEED, model_path=str(files[0]), placement=placement, budget_seconds=budget_seconds * share)
    speed_trial = _speed(ask, progress, notes)
    speed = speed_trial.speed if speed_trial else None
    quality_ask = _quality_request(ask, speed, budget_seconds * _QUALITY_SHARE, max_chunks, keep_reference)
    quality_trial = _quality(quality_ask, reference, text, hardware, progress, notes)
    quality = quality_trial.quality if quality_trial else None
    measured = _quantities(files, speed, quality, notes)
    predicted = {expectation.quantity: expectation.predicted for expectation in expectations}
    judged = verdicts(expectations, measured, busy=_crowded(speed))
    tool = next((trial.tool_version for trial in (speed_trial, quality_trial) if trial), "")
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return VerificationResult(
        artifact=str(artifact),
        measured=measured,
        measurements=_measurements(measured, subject, placement, speed, hardware, predicted, tool, now),
        verdicts=judged,
        ok=all_ok(judged),
        speed=speed,
        quality=quality,
        tool_version=tool,
        measured_at=now,
        notes=tuple(notes),
    )


def gguf_files(artifact: Path) -> tuple[Path, ...]:
    """All parts of a GGUF file, in order, their headers read and found sound.

    Raises:
        InputError: it or a part is missing, cut off or damaged, or it is no GGUF file.
    """
    from planner.formats.gguf import open_gguf, shard_names

    if artifact.is_dir():
        raise InputError(
            f"{artifact} is a directory",
            hint="this version measures GGUF files; name the .gguf file",
            code="not-gguf",
        )
    open_gguf(artifact)
    return tuple(artifact.with_name(name) for name in shard_names(artifact.name))


def core_shares(speed: SpeedTrial) -> dict[str, float]:
    """Share of its cores' time that llama.cpp had while each speed was measured; empty where a GPU did the work.

    Its threads spin while they wait for each other, so on an idle machine the share is 1.
    """
    if speed.gpu_layers > 0:
        return {}
    rates = {PREFILL: speed.prefill, DECODE: speed.decode}
    return {name: r.cpu_seconds / (speed.threads * sum(r.seconds_per_sample)) for name, r in rates.items()}


def _crowded(speed: SpeedTrial | None) -> set[str]:
    """Speeds that were measured while other programs had too much of the cores."""
    return {name for name, share in core_shares(speed).items() if share < _REMEMBER_SHARE} if speed else set()


def _busy_notes(speed: SpeedTrial) -> list[str]:
    return [
        f"other programs were busy: llama.cpp had {share:.0%} of its {speed.threads} cores while {quantity} was "
        f"measured, so it is lower than this machine's{'' if share >= _REMEMBER_SHARE else ' and is not remembered'}"
        for quantity, share in core_shares(speed).items()
        if share < _IDLE_SHARE
    ]


def _speed(request: TrialRequest, progress: Progress | None, notes: list[str]) -> TrialResult | None:
    try:
        result = run_trial(request, progress=progress)
    except MissingDependency as error:
        notes.append(f"speed and memory were not measured: {error.what}; {error.hint}")
        return None
    notes.extend(result.notes)
    return result


def _quality_request(
    ask: TrialRequest, speed: SpeedTrial | None, budget_seconds: float, max_chunks: int | None, keep: Path | None
) -> TrialRequest:
    """The request after the one of speed, with the kernels that ran there."""
    return replace(
        ask,
        kind=QUALITY,
        budget_seconds=budget_seconds,
        max_chunks=max_chunks,
        reference_keep=str(keep) if keep else None,
        repack=speed is None or speed.repack,
    )


def _quality(
    request: TrialRequest,
    reference: Path | None,
    text: Path | None,
    hardware: HardwareProfile,
    progress: Progress | None,
    notes: list[str],
) -> TrialResult | None:
    """The quality trial, or a note why there is none."""
    if reference is None:
        notes.append("quality was not measured: there is no 16-bit model to compare with")
        return None
    chosen = text or data_path(HELD_OUT)
    artifact_bytes = sum(file.stat().st_size for file in gguf_files(Path(request.model_path)))
    missing = _why_not(artifact_bytes + _reference_bytes(reference), chosen, text is None, hardware)
    if missing:
        notes.append(f"quality was not measured: {missing}")
        return None
    # Without GPU support in llama.cpp the layers run on the CPU, which changes no logit that matters.
    asked = replace(_with_reference(request, reference, artifact_bytes, hardware), text_path=str(chosen))
    try:
        result = run_trial(asked, progress=progress)
    except (MissingDependency, UnsupportedArchitecture) as error:
        notes.append(f"quality was not measured: {error.what}; {error.hint}")
        return None
    except (InputError, ExecutionFailed) as error:
        if error.code != NO_ROOM and (error.code != "text-too-short" or text is not None):
            raise
        notes.append(f"quality was not measured: {error.what} ({error.numbers})")
        return None
    notes.extend(result.notes)
    quality = result.quality
    if quality and quality.chunk_count < quality.chunk_available_count:
        notes.append(f"quality is of {quality.chunk_count} of {quality.chunk_available_count} chunks of the text")
    if request.placement.kv_type != "f16":
        notes.append(f"quality is of the weights, with a KV cache in f16; the plan's is {request.placement.kv_type}")
    return result


def _with_reference(
    request: TrialRequest, reference: Path, artifact_bytes: int, hardware: HardwareProfile
) -> TrialRequest:
    if not reference.is_dir():
        return replace(request, reference_path=str(reference))
    usable = hardware.memory.usable_bytes()
    room = None if usable is None else usable - artifact_bytes - _WORKING_BYTES
    return replace(request, reference_checkpoint=str(reference), reference_memory_bytes=room)


def _reference_bytes(reference: Path) -> int:
    """Of the 16-bit model, whether it is there or is to be made."""
    if not reference.is_dir():
        return sum(file.stat().st_size for file in gguf_files(reference))
    from planner.formats.safetensors import open_checkpoint

    return 2 * open_checkpoint(reference).parameter_count


def _why_not(needed: int, text: Path, is_default: bool, hardware: HardwareProfile) -> str | None:
    if is_default and not text.is_file():
        return "the held-out text is missing from this installation; give one with --text"
    usable = hardware.memory.usable_bytes()
    if usable is not None and needed > usable:
        return f"both models take {format_bytes(needed)} together, {format_bytes(usable)} of RAM is free"
    return None


def _exact(value: float) -> Measured:
    return Measured(value=value, low=value, high=value)


def _quantities(
    files: tuple[Path, ...], speed: SpeedTrial | None, quality: QualityTrial | None, notes: list[str]
) -> dict[str, Measured]:
    """Everything that was measured, by its quantity."""
    measured = {FILE_BYTES: _exact(sum(file.stat().st_size for file in files))}
    measured |= _speed_quantities(speed, notes) if speed else {}
    measured |= quality_quantities(quality) if quality else {}
    return measured


def _speed_quantities(speed: SpeedTrial, notes: list[str]) -> dict[str, Measured]:
    memory, rates = speed.memory, {PREFILL: speed.prefill, DECODE: speed.decode}
    notes.extend(_busy_notes(speed))
    for quantity, taken in rates.items():
        if len(taken.samples) == 1:
            notes.append(f"{quantity} is of one sample: a second would have exceeded the time allowed")
    if memory.filled_tokens < speed.context:
        notes.append(
            f"peak memory is with {memory.filled_tokens} of {speed.context} tokens in the KV cache; the cache is "
            "allocated whole, the compute buffers grow a little with the rest"
        )
    peak = max((device.used_bytes for device in memory.devices), default=0) or memory.peak_bytes
    return {PEAK_MEMORY: _exact(peak)} | {
        quantity: Measured(value=r.median, low=min(r.samples), high=max(r.samples), samples=r.samples)
        for quantity, r in rates.items()
    }


def quality_quantities(quality: QualityTrial) -> dict[str, Measured]:
    """Perplexity ratio and KL divergence with 80 % intervals by their standard errors; empty without a reference."""
    comparison = quality.comparison
    if comparison is None:
        return {}
    ratio, spread = math.exp(comparison.log_ratio), math.exp(_NORMAL_80 * comparison.log_ratio_standard_error)
    kl = max(0.0, comparison.kl_mean_nats)
    margin = _NORMAL_80 * comparison.kl_standard_error_nats
    return {
        PERPLEXITY_RATIO: Measured(value=ratio, low=ratio / spread, high=ratio * spread),
        KL_DIVERGENCE: Measured(value=kl, low=max(0.0, kl - margin), high=kl + margin),
    }


def _measurements(
    measured: Mapping[str, Measured],
    subject: Subject,
    placement: Placement,
    speed: SpeedTrial | None,
    hardware: HardwareProfile,
    predicted: Mapping[str, float],
    tool_version: str,
    now: str,
) -> tuple[Measurement, ...]:
    scale = {DECODE: subject.decode_weights_bytes, PREFILL: subject.prefill_weight_count}
    variant, conditions = subject.variant, _conditions(placement, speed)
    crowded = _crowded(speed)
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
            measured_at=now,
            weights_bytes=scale.get(quantity),
        )
        for quantity, value in measured.items()
        if quantity not in crowded
    )


def quality_measurements(
    quality: QualityTrial,
    subject: Subject,
    placement: Placement,
    hardware: HardwareProfile,
    *,
    predicted: Mapping[str, float],
    tool_version: str,
) -> tuple[Measurement, ...]:
    """What later estimates may learn from a quality trial of its own."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return _measurements(quality_quantities(quality), subject, placement, None, hardware, predicted, tool_version, now)


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
