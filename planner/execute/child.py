"""``python -m planner.execute.child``: carry out one step."""

from __future__ import annotations

import sys
from typing import Any, cast

from planner.core.codec import decode
from planner.core.job import Job
from planner.execute.process import Progress, serve


def work(request: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """Hand the job to its method; the answer holds the peak memory and what the method reports."""
    from planner import methods

    job = decode(Job, request, what="the job")
    method = cast("Any", methods.get(job.step.method))
    report: dict[str, Any] = method.work(job, progress)
    return {**report, "peak_memory_bytes": peak_memory_bytes()}


def peak_memory_bytes() -> int | None:
    """Peak resident set of this process; ``None`` where the system does not tell."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB (getrusage(2))


if __name__ == "__main__":
    raise SystemExit(serve(work))
