"""``python -m planner.verify.child``: one measurement, asked by a line of JSON on stdin.

Answers with lines of JSON on stdout: ``{"progress": [what, fraction]}`` any number of times, then one
``{"result": …}`` or ``{"error": …}``. llama.cpp's log goes to stderr. When stdin closes, the parent is gone and the
child ends at once.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from planner.core.codec import decode, encode
from planner.core.errors import InputError, QplanError
from planner.verify.trial import QUALITY, SPEED, QualityTrial, SpeedTrial, TrialRequest, TrialResult

if TYPE_CHECKING:
    from planner.verify.native import Progress

_PARENT_GONE = 70
_PROGRESS_SECONDS = 0.1


def run(request: TrialRequest, answer: TextIO) -> TrialResult:
    """Carry out ``request``, telling the progress on ``answer``."""
    from planner.verify import native

    progress = _throttled(answer)
    speed: SpeedTrial | None = None
    quality: QualityTrial | None = None
    if request.kind == SPEED:
        speed = _speed(request, progress)
    elif request.kind == QUALITY:
        quality = _quality(request, progress)
    else:
        raise InputError(f"{request.kind!r} is no kind of trial", hint=f"{SPEED} or {QUALITY}")
    return TrialResult(speed=speed, quality=quality, tool_version=native.tool_version())


def _throttled(answer: TextIO) -> Progress:
    """Progress lines, at most one in 0.1 s for the same work: loading reports every tensor."""
    last = ("", 0.0)

    def progress(what: str, fraction: float) -> None:
        nonlocal last
        now = time.monotonic()
        if what != last[0] or now - last[1] >= _PROGRESS_SECONDS:
            last = (what, now)
            _say(answer, {"progress": [what, round(fraction, 3)]})

    return progress


def _speed(request: TrialRequest, progress: Progress) -> SpeedTrial:
    from planner.verify.speed import measure_speed

    return measure_speed(
        Path(request.model_path),
        request.placement,
        repetitions=request.repetitions,
        decode_tokens=request.decode_tokens,
        budget_seconds=request.budget_seconds,
        threads=request.placement.threads or default_threads(),
        repack=request.repack,
        progress=progress,
    )


def _quality(request: TrialRequest, progress: Progress) -> QualityTrial:
    from planner.verify.quality import measure_quality

    return measure_quality(
        Path(request.model_path),
        Path(request.reference_path) if request.reference_path else None,
        read_text(Path(request.text_path or "")),
        context=request.quality_context,
        max_chunks=request.max_chunks,
        threads=request.placement.threads or default_threads(),
        gpu_layers=request.placement.gpu_layers,
        like_llama_cpp=request.like_llama_cpp,
        budget_seconds=request.budget_seconds,
        repack=request.repack,
        progress=progress,
    )


def read_text(path: Path) -> str:
    """The held-out text.

    Raises:
        InputError: it is missing, unreadable or not UTF-8.
    """
    try:
        return path.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the text {path} cannot be read", numbers=str(error), code="bad-text") from None


def default_threads() -> int:
    """Physical cores this process may use; logical ones where they cannot be told apart."""
    import psutil

    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(psutil.cpu_count(logical=False) or allowed, allowed))


def _say(answer: TextIO, message: object) -> None:
    answer.write(json.dumps(message) + "\n")
    answer.flush()


def _end_with_parent() -> None:
    while sys.stdin.read(1 << 16):
        continue
    os._exit(_PARENT_GONE)


def _parsed(line: str) -> object:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError("the request is not JSON", numbers=str(error), code="bad-document") from None


def main() -> int:
    """Read the request, measure, answer; 0 when there is a result."""
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # nothing a library prints may mix with the answer
    line = sys.stdin.readline()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        result = run(decode(TrialRequest, _parsed(line), what="the request"), answer)
    except QplanError as error:
        described = {"what": error.what, "numbers": error.numbers, "hint": error.hint, "code": error.code}
        _say(answer, {"error": {"class": type(error).__name__, **described}})
        return 1
    _say(answer, {"result": encode(result)})
    return 0


if __name__ == "__main__":
    sys.exit(main())
