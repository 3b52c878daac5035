"""``python -m planner.execute.quantize_child``: several files from one read of a checkpoint."""

from __future__ import annotations

from typing import Any

from planner.core.codec import decode
from planner.core.job import QuantizeJob
from planner.execute.process import Progress, serve
from planner.execute.resident import peak_resident_bytes


def work(request: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """Quantize; the answer holds the peak memory and what the engine reports."""
    from planner.methods.gguf_run import quantize_many

    report = quantize_many(decode(QuantizeJob, request, what="the job"), progress)
    return {**report, "peak_memory_bytes": peak_resident_bytes()}


if __name__ == "__main__":
    raise SystemExit(serve(work))
