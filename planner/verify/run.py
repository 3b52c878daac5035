"""The parent's side of a trial: start the child, pass its progress on, end it with the parent, explain its death."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

from planner.core import errors
from planner.core.codec import canonical_json, decode
from planner.core.errors import ExecutionFailed, QplanError
from planner.verify.trial import TrialRequest, TrialResult

Progress = Callable[[str, float], None]

_PACKAGE_PARENT = Path(__file__).resolve().parents[2]
_LOG_LINES = 12
_FAULTS = (signal.SIGSEGV, signal.SIGILL)
_GRACE_SECONDS = 5.0
_STARTUP_SECONDS = 600.0
"""Loading a large file from a slow disk: 70 GB at 120 MB/s."""
_TIMES_BUDGET = 5.0
"""A child that needs so many times its budget hangs; one prefill of a huge model may exceed the budget itself."""


NO_REPACK_NOTE = (
    "llama.cpp crashed in its CPU-specific kernels (AMX or repacked weights) on this machine, so it was measured "
    "without them; run it with `--no-repack`"
)


class _Crashed(ExecutionFailed):
    """The child died of a signal."""

    default_code = "measure-crashed"

    def __init__(self, what: str, *, numbers: str, hint: str, signal_number: int) -> None:
        super().__init__(what, numbers=numbers, hint=hint)
        self.signal_number = signal_number


def run_trial(
    request: TrialRequest, *, progress: Progress | None = None, timeout_seconds: float | None = None
) -> TrialResult:
    """Carry out ``request`` in a child process.

    Ctrl-C, any other exception here and the death of this process end the child. llama.cpp's AMX kernels fault on
    virtual machines that announce AMX and then refuse ``ldtilecfg``; a child that dies so is followed by one with
    those kernels off, and the result says so.

    Args:
        progress: called with what is being done and the fraction done.
        timeout_seconds: the child is ended after this; ``None``: ten minutes and five times the budget.

    Raises:
        QplanError: what the child raised, of the same class.
        ExecutionFailed: the child crashed, was killed or took too long; the last lines of its log are in it.
    """
    try:
        return _attempt(request, progress, timeout_seconds)
    except _Crashed as error:
        if not request.repack or error.signal_number not in _FAULTS:
            raise
    result = _attempt(replace(request, repack=False), progress, timeout_seconds)
    return replace(result, notes=(*result.notes, NO_REPACK_NOTE))


def _attempt(request: TrialRequest, progress: Progress | None, timeout_seconds: float | None) -> TrialResult:
    limit = timeout_seconds or _STARTUP_SECONDS + _TIMES_BUDGET * request.budget_seconds
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        child = subprocess.Popen(
            [sys.executable, "-m", "planner.verify.child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            encoding="utf-8",
            env=_environment(request),
            start_new_session=True,  # Ctrl-C reaches the child through us, so that it dies without a traceback
        )
        late = threading.Event()

        def end_late() -> None:
            late.set()
            child.kill()

        timer = threading.Timer(limit, end_late)
        timer.start()
        try:
            answer = _converse(child, request, progress)
        finally:
            timer.cancel()
            _end(child)
        return _result(answer, child.returncode, log, limit if late.is_set() else None)


def _environment(request: TrialRequest) -> dict[str, str]:
    environment = dict(os.environ)
    paths = [str(_PACKAGE_PARENT), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    count = request.placement.gpu_count
    if "CUDA_VISIBLE_DEVICES" not in environment:
        environment["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"  # NVML's order, which the profile follows
        if request.placement.gpu_layers == 0 and count == 0:
            environment["CUDA_VISIBLE_DEVICES"] = "-1"  # else llama.cpp would lend the GPU for long prompts
        elif count:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, range(count)))
    return environment


def _converse(
    child: subprocess.Popen[str], request: TrialRequest, progress: Progress | None
) -> Mapping[str, Any] | None:
    """Send the request, read lines until the answer; ``None`` when the child ends without one."""
    if child.stdin is None or child.stdout is None:
        raise AssertionError("the child was started with pipes")
    try:
        child.stdin.write(canonical_json(request) + "\n")
        child.stdin.flush()
    except BrokenPipeError:
        return None
    for line in child.stdout:
        try:
            message = json.loads(line)
        except json.JSONDecodeError:
            return None  # cut off in the middle of a line by its death
        if "progress" not in message:
            return dict(message)
        if progress is not None:
            progress(*message["progress"])
    return None


def _end(child: subprocess.Popen[str]) -> None:
    if child.stdin is not None:
        with contextlib.suppress(BrokenPipeError):
            child.stdin.close()  # the child ends itself when it sees this
    try:
        child.wait(_GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
    if child.stdout is not None:
        child.stdout.close()


def _result(answer: Mapping[str, Any] | None, code: int, log: IO[str], limit: float | None) -> TrialResult:
    if answer is not None and "result" in answer:
        return decode(TrialResult, answer["result"], what="the measuring process's answer")
    tail = _tail(log)
    if answer is not None and "error" in answer:
        raise _same_error(answer["error"], tail)
    if limit is not None:
        raise ExecutionFailed(
            "the measurement took too long and was ended",
            numbers=f"after {limit:.0f} s\n{tail}",
            hint="a smaller context or a shorter text takes less",
            code="measure-timeout",
        )
    raise _Crashed(
        f"the measuring process died: {_cause(code)}",
        numbers=tail,
        hint="not enough memory is the usual cause; close other programs or plan a smaller context"
        if code == -signal.SIGKILL
        else "the lines above are the end of its log",
        signal_number=-code,
    )


def _cause(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"signal {-code} ({signal.Signals(-code).name})"
    except ValueError:
        return f"signal {-code}"


def _tail(log: IO[str]) -> str:
    log.seek(0)
    lines = [line.rstrip() for line in log if line.strip(" .\n")]
    return "\n".join(lines[-_LOG_LINES:])


def _same_error(described: Mapping[str, str], tail: str) -> QplanError:
    kind = getattr(errors, described.get("class", ""), ExecutionFailed)
    if not (isinstance(kind, type) and issubclass(kind, QplanError)):
        kind = ExecutionFailed
    numbers = "\n".join(part for part in (described["numbers"], _complaints(tail)) if part)
    return kind(described["what"], numbers=numbers, hint=described["hint"], code=described["code"])


def _complaints(tail: str) -> str:
    """The lines of the log that say what went wrong; llama.cpp's C interface returns only a null pointer."""
    return "\n".join(line for line in tail.splitlines() if "error" in line.lower() or "failed" in line.lower())
