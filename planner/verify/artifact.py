"""Measure an artifact as a plan would run it, and judge it by the plan's expectations."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from planner.core.candidate import Placement
from planner.core.data import data_path
from planner.core.errors import ExecutionFailed, InputError, MissingDependency, UnsupportedArchitecture
from planner.core.estimates import Z80
from planner.core.hardware import HardwareProfile
from planner.core.measurement import (
    DECODE,
    FILE_BYTES,
    KL_DIVERGENCE,
    PEAK_MEMORY,
    PERPLEXITY_RATIO,
    PREFILL,
    Measurement,
)
from planner.core.plan import Expectation
from planner.core.units import GIB, format_bytes
from planner.verify.crowding import busy_notes, crowded
from planner.verify.learned import Subject, measurements
from planner.verify.reference import NO_ROOM
from planner.verify.run import Progress, run_trial
from planner.verify.trial import QUALITY, SPEED, VLLM, QualityTrial, SpeedTrial, TrialRequest, TrialResult
from planner.verify.verdicts import Measured, Verdict, all_ok, error_notes, verdicts

HELD_OUT = "demo/heldout.txt"
"""The text, below ``data/``, that quality is measured on where none is given."""
_QUALITY_SHARE = 0.5
"""Of the time budget, when quality is measured too."""
_WORKING_BYTES = GIB
"""Left free of a reference held in memory: logits of 1024 tokens of a large vocabulary twice, and compute buffers."""


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
    python: Path | None = None,
    options: tuple[tuple[str, str], ...] = (),
    spare_options: tuple[tuple[str, str], ...] | None = None,
    speed_python: Path | None = None,
) -> VerificationResult:
    """File bytes, peak memory, prefill, decode and, against a 16-bit reference, perplexity ratio and KL divergence.

    Speed with memory and quality are measured in a child process each. What is measured as ``peak_memory_bytes``:
    on a CPU, the peak of the resident set during load, prefill and decode at the planned context, less the resident
    set before the model was opened; with layers on GPUs, the memory taken of the GPU that holds most. What cannot be
    measured is left out with a note.

    Args:
        artifact: a GGUF file, the first part of a split one, or the directory of a safetensors checkpoint.
        reference: the 16-bit GGUF it was quantized from, or the checkpoint directory, of which a 16-bit GGUF is made
            for the while where the artifact is one; without it no quality is measured.
        keep_reference: a file to keep that 16-bit model in.
        text: held-out text in UTF-8; ``None`` takes the one that comes with qplan.
        budget_seconds: wall time to stay near.
        python: interpreter of the environment that has the artifact's runtime; ``None``: this one.
        options: what that runtime must be told, as ``(("dtype", "bfloat16"),)``; with the runtime vLLM, transformers
            measures the quality.
        spare_options: in their place where the runtime refuses those; ``None``: then it is an error.
        speed_python: the interpreter for speed and memory where that is another one.

    Raises:
        InputError: the artifact is missing or is no model; ``text`` was given and is too short or unreadable.
        ExecutionFailed: the child crashed, or the model gives numbers that are not finite.
    """
    files = artifact_files(artifact)
    notes: list[str] = []
    placement = replace(placement, threads=placement.threads or hardware.cpu.inference_threads())
    share = 1 - _QUALITY_SHARE if reference else 1.0
    ask = TrialRequest(
        kind=SPEED,
        model_path=str(artifact if artifact.is_dir() else files[0]),
        placement=placement,
        budget_seconds=budget_seconds * share,
        options=options,
        spare_options=spare_options,
    )
    speed_trial = _speed(ask, progress, notes, speed_python or python)
    speed = speed_trial.speed if speed_trial else None
    quality_ask = _quality_request(ask, speed, budget_seconds * _QUALITY_SHARE, max_chunks, keep_reference)
    quality_trial = _quality(quality_ask, reference, text, hardware, progress, notes, python)
    quality = quality_trial.quality if quality_trial else None
    measured = _quantities(files, speed, quality, notes)
    predicted = {expectation.quantity: expectation.predicted for expectation in expectations}
    judged = verdicts(expectations, measured, busy=crowded(speed))
    notes += error_notes(judged)
    tool = next((trial.tool_version for trial in (speed_trial, quality_trial) if trial), "")
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return VerificationResult(
        artifact=str(artifact),
        measured=measured,
        measurements=measurements(
            measured, subject, placement, speed, hardware, predicted=predicted, tool_version=tool, now=now
        ),
        verdicts=judged,
        ok=all_ok(judged),
        speed=speed,
        quality=quality,
        tool_version=tool,
        measured_at=now,
        notes=tuple(notes),
    )


def artifact_files(artifact: Path) -> tuple[Path, ...]:
    """The files that hold an artifact's weights, their headers read and found sound.

    Raises:
        InputError: it is missing or damaged, or no model.
    """
    if not artifact.is_dir():
        return gguf_files(artifact)
    from planner.formats.safetensors import open_checkpoint
    from planner.models.directory import read_config

    read_config(artifact)
    return open_checkpoint(artifact).files


def gguf_files(artifact: Path) -> tuple[Path, ...]:
    """All parts of a GGUF file, in order, their headers read and found sound.

    Raises:
        InputError: it or a part is missing, cut off or damaged, or it is no GGUF file.
    """
    from planner.formats.gguf import open_gguf, shard_names

    if artifact.is_dir():
        raise InputError(
            f"{artifact} is a directory",
            hint="name the .gguf file",
            code="not-gguf",
        )
    open_gguf(artifact)
    return tuple(artifact.with_name(name) for name in shard_names(artifact.name))


def _speed(
    request: TrialRequest, progress: Progress | None, notes: list[str], python: Path | None
) -> TrialResult | None:
    try:
        result = run_trial(request, progress=progress, python=python)
    except MissingDependency as error:
        notes.append(f"speed and memory were not measured: {error.what}; {error.hint}")
        return None
    notes.extend(result.notes)
    return result


def _quality_request(
    ask: TrialRequest, speed: SpeedTrial | None, budget_seconds: float, max_chunks: int | None, keep: Path | None
) -> TrialRequest:
    """The request after the one of speed, with the kernels that ran there."""
    spare = ask.spare_options if speed is not None and speed.spare else None
    return replace(
        ask,
        kind=QUALITY,
        options=ask.options if spare is None else spare,
        spare_options=ask.spare_options if spare is None else None,
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
    python: Path | None,
) -> TrialResult | None:
    """The quality trial, or a note why there is none."""
    if reference is None:
        notes.append("quality was not measured: there is no 16-bit model to compare with")
        return None
    chosen = text or data_path(HELD_OUT)
    by_torch = Path(request.model_path).is_dir()
    artifact_bytes = sum(file.stat().st_size for file in artifact_files(Path(request.model_path)))
    needed = artifact_bytes + _reference_bytes(reference, in_float32=by_torch and not request.placement.gpu_layers)
    missing = _why_not(needed, chosen, text is None, hardware)
    if missing:
        notes.append(f"quality was not measured: {missing}")
        return None
    # Without GPU support in llama.cpp the layers run on the CPU, which changes no logit that matters.
    asked = replace(_with_reference(request, reference, artifact_bytes, hardware), text_path=str(chosen))
    try:
        result = run_trial(asked, progress=progress, python=python)
    except (MissingDependency, UnsupportedArchitecture) as error:
        notes.append(f"quality was not measured: {error.what}; {error.hint}")
        return None
    except (InputError, ExecutionFailed) as error:
        if error.code != NO_ROOM and (error.code != "text-too-short" or text is not None):
            raise
        notes.append(f"quality was not measured: {error.what} ({error.numbers})")
        return None
    notes.extend(result.notes)
    if dict(request.options).get("runtime") == VLLM:
        notes.append(f"quality is of the weights, by {result.tool_version}")
    quality = result.quality
    if quality and quality.chunk_count < quality.chunk_available_count:
        notes.append(f"quality is of {quality.chunk_count} of {quality.chunk_available_count} chunks of the text")
    if request.placement.kv_type != "f16":
        notes.append(f"quality is of the weights, with a KV cache in f16; the plan's is {request.placement.kv_type}")
    return result


def _with_reference(
    request: TrialRequest, reference: Path, artifact_bytes: int, hardware: HardwareProfile
) -> TrialRequest:
    if not reference.is_dir() or Path(request.model_path).is_dir():
        return replace(request, reference_path=str(reference))
    usable = hardware.memory.usable_bytes()
    room = None if usable is None else usable - artifact_bytes - _WORKING_BYTES
    return replace(request, reference_checkpoint=str(reference), reference_memory_bytes=room)


def _reference_bytes(reference: Path, *, in_float32: bool) -> int:
    """Of the 16-bit model, whether it is there or is to be made; transformers computes it in 32 bits on a CPU."""
    if not reference.is_dir():
        return sum(file.stat().st_size for file in gguf_files(reference))
    from planner.formats.safetensors import open_checkpoint

    return (4 if in_float32 else 2) * open_checkpoint(reference).parameter_count


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
    notes.extend(busy_notes(speed))
    for quantity, taken in rates.items():
        if len(taken.samples) == 1:
            notes.append(f"{quantity} is of one sample: a second would have exceeded the time allowed")
    if memory.filled_tokens < speed.context:
        grown = "the cache is allocated whole, the compute buffers grow a little with the rest"
        if speed.runtime == "transformers":
            grown = "transformers allocates it as it grows, so a full one takes more"
        notes.append(f"peak memory is with {memory.filled_tokens} of {speed.context} tokens in the KV cache; {grown}")
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
    ratio, spread = math.exp(comparison.log_ratio), math.exp(Z80 * comparison.log_ratio_standard_error)
    kl = max(0.0, comparison.kl_mean_nats)
    margin = Z80 * comparison.kl_standard_error_nats
    return {
        PERPLEXITY_RATIO: Measured(value=ratio, low=ratio / spread, high=ratio * spread),
        KL_DIVERGENCE: Measured(value=kl, low=max(0.0, kl - margin), high=kl + margin),
    }
