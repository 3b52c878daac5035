"""``python -m planner.execute.fetch_child``: the files of a plan's model from the hub."""

from __future__ import annotations

from typing import Any

from planner.core.codec import decode
from planner.core.plan import PlanModel
from planner.execute.fetch import fetch
from planner.execute.process import Progress, serve


def work(request: dict[str, Any], progress: Progress) -> dict[str, str]:
    """Fetch; the answer holds where the model lies."""
    return {"path": str(fetch(decode(PlanModel, request, what="the model"), progress))}


if __name__ == "__main__":
    raise SystemExit(serve(work))
