"""``python -m planner.verify.child``: one measurement, asked and answered as ``execute/process.py`` says."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from planner.core.codec import decode
from planner.core.errors import InputError
from planner.core.hardware import usable_core_count
from planner.execute.process import serve
from planner.verify.trial import QUALITY, SPEED, VLLM, QualityTrial, SpeedTrial, TrialRequest, TrialResult

if TYPE_CHECKING:
    from planner.verify.native import Progress


def work(asked: object, progress: Progress) -> TrialResult:
    """Carry out the request, telling what is being done and the fraction done."""
    request = decode(TrialRequest, asked, what="the request")
    speed: SpeedTrial | None = None
    quality: QualityTrial | None = None
    notes: tuple[str, ...] = ()
    if request.kind == SPEED:
        speed = _speed(request, progress)
    elif request.kind == QUALITY:
        quality, notes = _quality(request, progress)
    else:
        raise InputError(f"{request.kind!r} is no kind of trial", hint=f"{SPEED} or {QUALITY}")
    tool = _tool_version(request)
    return TrialResult(speed=speed, quality=quality, tool_version=tool, notes=notes)


def _tool_version(request: TrialRequest) -> str:
    model = Path(request.model_path)
    if not model.is_dir():
        from planner.verify import native

        return native.tool_version()
    if request.kind == SPEED and dict(request.options).get("runtime") == VLLM:
        from importlib.metadata import version

        return f"vllm {version('vllm')}"
    from planner.verify import torch_engine

    return torch_engine.tool_version(model)


def _speed(request: TrialRequest, progress: Progress) -> SpeedTrial:
    path = Path(request.model_path)
    asked: dict[str, Any] = {
        "repetitions": request.repetitions,
        "decode_tokens": request.decode_tokens,
        "budget_seconds": request.budget_seconds,
        "threads": request.placement.threads or default_threads(),
        "progress": progress,
    }
    options = dict(request.options)
    if options.get("runtime") == VLLM:
        from planner.verify import vllm_speed

        cache = options.get("kv_cache_bytes")
        asked |= {"cache_bytes": int(cache) if cache else None, "quantization": options.get("quantization")}
        return vllm_speed.measure_speed(path, request.placement, **asked)
    if path.is_dir():
        from planner.verify import torch_speed

        return torch_speed.measure_speed(path, request.placement, loading=request.loading, **asked)
    from planner.verify.speed import measure_speed

    return measure_speed(path, request.placement, repack=request.repack, **asked)


def _quality(request: TrialRequest, progress: Progress) -> tuple[QualityTrial, tuple[str, ...]]:
    if request.reference_checkpoint is None:
        reference = Path(request.reference_path) if request.reference_path else None
        return _quality_against(request, reference, progress), ()
    from planner.verify import native
    from planner.verify.reference import Source, sixteen_bit

    native.library()  # before numpy, as in measure_quality
    source = Source(
        checkpoint=Path(request.reference_checkpoint),
        folder=Path(request.model_path).parent,
        memory_bytes=request.reference_memory_bytes,
        keep=Path(request.reference_keep) if request.reference_keep else None,
    )
    with sixteen_bit(source, progress) as (path, note):
        return _quality_against(request, path, progress), (note,)


def _quality_against(request: TrialRequest, reference: Path | None, progress: Progress) -> QualityTrial:
    from planner.verify import native
    from planner.verify.quality import measure_quality

    return measure_quality(
        Path(request.model_path),
        reference,
        read_text(Path(request.text_path or "")),
        context=request.quality_context,
        max_chunks=request.max_chunks,
        threads=request.placement.threads or default_threads(),
        offload=native.Offload.of(request.placement),
        loading=request.loading,
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

    allowed = usable_core_count()
    return max(1, min(psutil.cpu_count(logical=False) or allowed, allowed))


if __name__ == "__main__":
    sys.exit(serve(work))
