"""The parent's side of a trial: a child that measures, and one more try with other kernels where its own fail."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from planner.core.errors import MODEL_REFUSED, MissingDependency, QplanError
from planner.execute.process import ChildDied, Stopped, ask_child
from planner.runtimes.service import UNCOMPILED, visible_gpus
from planner.verify.trial import TrialRequest, TrialResult

Progress = Callable[[str, float], None]

FAULTS = (signal.SIGSEGV, signal.SIGILL)
"""How a child dies of llama.cpp's CPU-specific kernels where the processor lacks what it announces."""
_STARTUP_SECONDS = 600.0
"""Loading a large file from a slow disk: 70 GB at 120 MB/s."""
_TIMES_BUDGET = 5.0
"""A child that needs so many times its budget hangs; one prefill of a huge model may exceed the budget itself."""

NO_REPACK_NOTE = (
    "llama.cpp crashed in its CPU-specific kernels (AMX or repacked weights) on this machine, so it was measured "
    "without them; run it with `--no-repack`"
)


def run_trial(
    request: TrialRequest,
    *,
    progress: Progress | None = None,
    timeout_seconds: float | None = None,
    python: Path | None = None,
) -> TrialResult:
    """Carry out ``request`` in a child process.

    Ctrl-C, any other exception here and the death of this process end the child. llama.cpp's AMX kernels fault on
    virtual machines that announce AMX and then refuse ``ldtilecfg``; a child that dies so is followed by one with
    those kernels off, and the result says so. Likewise a kernel that cannot be compiled or loaded here, where the
    request names another.

    Args:
        progress: called with what is being done and the fraction done.
        timeout_seconds: the child is ended after this; ``None``: ten minutes and five times the budget.
        python: interpreter of the environment that holds the artifact's runtime; ``None`` is this one.

    Raises:
        QplanError: what the child raised, of the same class.
        ExecutionFailed: the child crashed, was killed or took too long; the last lines of its log are in it.
    """
    try:
        return _attempt(request, progress, timeout_seconds, python)
    except QplanError as error:
        second = _second(request, error)
        if second is None:
            raise
        note = _note(request, second, error)
    result = _attempt(second, progress, timeout_seconds, python)
    speed = result.speed and replace(result.speed, spare=second.options != request.options)
    return replace(result, speed=speed, notes=(*result.notes, note))


def _second(request: TrialRequest, error: QplanError) -> TrialRequest | None:
    """What to try after a failure; ``None``: the failure is not one of kernels."""
    if isinstance(error, Stopped):
        return None
    died = error.signal_number if isinstance(error, ChildDied) else None
    if not Path(request.model_path).is_dir():
        return replace(request, repack=False) if request.repack and died in FAULTS else None
    by_kernel = isinstance(error, ChildDied | MissingDependency) or error.code == MODEL_REFUSED
    if request.spare_options is None or not by_kernel or died == signal.SIGKILL:
        return None
    return replace(request, options=request.spare_options, spare_options=None)


def _note(request: TrialRequest, second: TrialRequest, error: QplanError) -> str:
    """What was asked for, why it failed, and what was measured instead."""
    if second.repack != request.repack:
        return NO_REPACK_NOTE
    asked, used = (dict(options).get("backend", "its own choice") for options in (request.options, second.options))
    lines = error.numbers.splitlines() or [error.what]
    why = lines[-1 if isinstance(error, ChildDied) else 0]  # a traceback ends with what went wrong
    return f"GPTQModel's kernel {asked} could not be used here, so it was measured with {used}: {why.strip()}"


_TORCH = {"OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
"""Threads of torch that spin while they wait cost ten times the time where cores are shared (2 cores, torch 2.13,
2026-11-23); a measurement fetches nothing."""


def _attempt(
    request: TrialRequest, progress: Progress | None, timeout_seconds: float | None, python: Path | None
) -> TrialResult:
    return ask_child(
        TrialResult,
        "planner.verify.child",
        request,
        what=f"measuring {request.kind}",
        progress=progress,
        environment=_environment(request),
        python=python,
        timeout_seconds=timeout_seconds or _STARTUP_SECONDS + _TIMES_BUDGET * request.budget_seconds,
    )


def _environment(request: TrialRequest) -> dict[str, str]:
    """Variables for the child: which GPUs it sees, and how torch works on a CPU."""
    seen = visible_gpus(request.placement, os.environ)
    if not Path(request.model_path).is_dir():
        return seen
    return seen | _TORCH | (UNCOMPILED if request.placement.gpu_layers == 0 else {})
