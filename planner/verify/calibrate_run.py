"""The parent's side of a calibration: a child for each device, and one more try where llama.cpp's CPU kernels fault."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace

from planner.execute.process import ChildDied, ask_child
from planner.verify.calibration_trial import CalibrationAnswer, CalibrationRequest
from planner.verify.run import FAULTS

Progress = Callable[[str, float], None]

_GRACE_SECONDS = 120.0
"""A step that was begun is finished: reading one prompt of a large model's slice on a slow core."""


def run_calibration(
    request: CalibrationRequest, *, gpu_index: int | None = None, progress: Progress | None = None
) -> tuple[CalibrationAnswer, bool]:
    """Carry out ``request`` in a child process; the answer, and whether the CPU's own layouts could be used.

    Args:
        gpu_index: the GPU that the child may see, in NVML's order; ``None``: none.
        progress: called with what is being done and the fraction done.

    Raises:
        QplanError: what the child raised, of the same class.
        ExecutionFailed: the child crashed, was killed or took far longer than its budget.
    """
    try:
        return _attempt(request, gpu_index, progress), True
    except ChildDied as error:
        if not request.repack or error.signal_number not in FAULTS:
            raise
    return _attempt(replace(request, repack=False), gpu_index, progress), False


def _attempt(request: CalibrationRequest, gpu_index: int | None, progress: Progress | None) -> CalibrationAnswer:
    return ask_child(
        CalibrationAnswer,
        "planner.verify.calibrate_child",
        request,
        what="calibrating",
        progress=progress,
        environment=_environment(gpu_index),
        timeout_seconds=2 * request.budget_seconds + _GRACE_SECONDS,
    )


def _environment(gpu_index: int | None) -> dict[str, str]:
    if gpu_index is None:
        return {"CUDA_VISIBLE_DEVICES": "-1"}  # else llama.cpp would lend the GPU for long prompts
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    chosen = visible.split(",")[gpu_index] if visible and gpu_index < len(visible.split(",")) else str(gpu_index)
    return {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": chosen}
