"""What the steps that measure a model before it is quantized work with: text, number of probes, layers on the GPU."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from planner.core.candidate import Candidate, Placement
from planner.core.errors import UsageError
from planner.core.hardware import HardwareProfile
from planner.core.model import ModelSpec
from planner.core.plan import CalibrationSource, Step
from planner.decide.mixture import measuring_layers
from planner.estimate import making_runs
from planner.execute import calibration as texts
from planner.methods import gguf, quantizers
from planner.workflow.recommend import Recommendation

if TYPE_CHECKING:
    from planner.workflow.planning import Measuring

PROBING_SECONDS = 600.0
"""What probing the parts of a model may take unasked."""
_LEAST_PROBES = 12
"""Each kind of tensor of an ordinary model once."""


def prepared(
    steps: tuple[Step, ...], answer: Recommendation, chosen: Candidate, measuring: Measuring
) -> tuple[Step, ...]:
    """The steps with everything that decides what they measure and make.

    Raises:
        InputError: the text or the matrix that was named cannot be read.
    """
    if any(step.settings is not None for step in steps):
        return tuple(_settled(step, answer, measuring) for step in steps)
    if not any(step.kind in ("imatrix", "sensitivity") for step in steps):
        return steps
    text, matrix = _materials(measuring)
    layers = measuring_layers(answer.model, answer.hardware)
    probes = measuring.probes or _affordable(answer.model, chosen, answer.hardware, layers)

    def settled(step: Step) -> Step:
        if step.kind == "imatrix":
            return dataclasses.replace(step, calibration=matrix or text, gpu_layers=layers)
        if step.kind == "sensitivity":
            few = dataclasses.replace(text, chunks=making_runs.SENSITIVITY_CHUNKS)
            return dataclasses.replace(step, calibration=few, gpu_layers=layers, probes=probes)
        if step.kind == "quantize" and step.sensitivity is not None:
            return dataclasses.replace(step, target_bytes=measuring.target_bytes)
        return step

    return tuple(map(settled, steps))


def _settled(step: Step, answer: Recommendation, measuring: Measuring) -> Step:
    """A step of a method for GPUs with its text, and whether it uses the GPU."""
    if step.settings is None:
        return step
    whole = answer.model.offloadable_count if answer.hardware.gpus and not answer.workload.cpu_only else 0
    uses_gpu = step.settings.quantizer != "qplan"
    step = dataclasses.replace(step, gpu_layers=whole if uses_gpu else 0)
    if step.method not in quantizers.CALIBRATED:
        return step
    text, matrix = _materials(measuring)
    if matrix is not None:
        raise UsageError(
            f"{step.method} calibrates with a text, not with an importance matrix",
            hint="give a text with --calibration, or leave it out",
            code="no-matrix",
        )
    tokens = min(measuring.chunk_tokens or making_runs.CHUNK_TOKENS, answer.model.n_ctx_train)
    return dataclasses.replace(step, calibration=dataclasses.replace(text, chunk_tokens=tokens))


def _materials(measuring: Measuring) -> tuple[CalibrationSource, CalibrationSource | None]:
    """The text to run through the model, and the finished matrix where one was named."""
    path, chunks = measuring.calibration, measuring.chunks or making_runs.CALIBRATION_CHUNKS
    if path is not None and texts.is_matrix(path):
        return texts.built_in(chunks, measuring.seed), texts.from_matrix(path)
    if path is not None:
        return texts.from_text(path, chunks, measuring.seed), None
    return texts.built_in(chunks, measuring.seed), None


def _affordable(model: ModelSpec, chosen: Candidate, hardware: HardwareProfile, gpu_layers: int) -> int:
    """As many probes as the predicted prefill speed allows in :data:`PROBING_SECONDS`."""
    from planner.estimate.speed import speed

    place = Placement(
        context=512, threads=chosen.placement.threads, gpu_layers=gpu_layers, gpu_count=int(gpu_layers > 0)
    )
    rate = speed(model, gguf.variant("F16"), place, hardware).prefill
    if rate is None:
        return _LEAST_PROBES
    seconds = making_runs.SENSITIVITY_CHUNKS * making_runs.CHUNK_TOKENS / rate.value
    return max(_LEAST_PROBES, min(len(model.tensors), int(PROBING_SECONDS / seconds)))
