"""``python -m planner.execute.child``: carry out one step."""

from __future__ import annotations

from typing import Any, cast

from planner.core.codec import decode
from planner.core.job import Job
from planner.execute.process import Progress, serve
from planner.execute.resident import peak_resident_bytes


def work(request: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """Hand the job to its method; the answer holds the peak memory and what the method reports."""
    from planner import methods

    job = decode(Job, request, what="the job")
    method = cast("Any", methods.get(job.step.method))
    report: dict[str, Any] = method.work(job, progress)
    return {**report, "peak_memory_bytes": peak_resident_bytes()}


if __name__ == "__main__":
    raise SystemExit(serve(work))
