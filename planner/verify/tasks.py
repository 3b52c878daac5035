"""``python -m planner.verify.tasks``: tasks of lm-evaluation-harness on a model. An extra: ``pip install lm-eval``."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from planner.core.codec import decode
from planner.core.errors import InputError, MissingDependency, UsageError
from planner.core.hardware import STRICT
from planner.execute.process import Progress, serve


@dataclass(frozen=True, slots=True, kw_only=True)
class TasksRequest:
    """Which tasks to run on which model."""

    __pydantic_config__: ClassVar[dict[str, str]] = STRICT

    model_path: str
    """A checkpoint directory, or a GGUF file, whose weights transformers expands before it runs them."""
    tasks: tuple[str, ...]
    task_folder: str | None = None
    """Folder with task definitions of one's own."""
    limit: int | None = None
    """Examples of each task; ``None`` is all."""
    device: str = "cpu"


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskScore:
    """One metric of one task."""

    __pydantic_config__: ClassVar[dict[str, str]] = STRICT

    task: str
    metric: str
    value: float
    standard_error: float | None
    example_count: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class TasksResult:
    """The answer of the child."""

    __pydantic_config__: ClassVar[dict[str, str]] = STRICT

    scores: tuple[TaskScore, ...]
    tool_version: str


def work(asked: object, progress: Progress) -> TasksResult:
    """Run the tasks.

    Raises:
        MissingDependency: lm-eval is not installed.
        UsageError: a task is unknown.
        InputError: a task's data cannot be fetched, or the model cannot be loaded.
    """
    request = decode(TasksRequest, asked, what="the request")
    require_harness()
    import lm_eval
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=request.task_folder)
    unknown = [task for task in request.tasks if not manager.match_tasks([task])]
    if unknown:
        raise UsageError(
            f"lm-evaluation-harness has no task {unknown[0]!r}",
            hint="`lm-eval ls tasks` lists them; --task-folder adds your own",
            code="unknown-task",
        )
    progress("tasks", 0.0)
    try:
        found = lm_eval.simple_evaluate(
            model="hf",
            model_args=_model_arguments(Path(request.model_path)),
            tasks=list(request.tasks),
            task_manager=manager,
            limit=request.limit,
            device=request.device,
            bootstrap_iters=1000,
        )
    except (OSError, ValueError, ConnectionError, ImportError) as error:
        raise InputError(
            "lm-evaluation-harness could not run the tasks",
            numbers=str(error).strip()[:400],
            hint="a task's data come from the hub: once with a network, then from its cache",
            code="tasks-failed",
        ) from None
    return TasksResult(scores=tuple(_scores(found)), tool_version=f"lm-eval {lm_eval.__version__}")


def require_harness() -> None:
    """Refuse tasks before anything was measured, where nothing can run them.

    Raises:
        MissingDependency: lm-eval is not installed.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise MissingDependency("tasks need lm-evaluation-harness", hint="`pip install 'lm-eval[hf]'`")


def _model_arguments(path: Path) -> dict[str, Any]:
    """Arguments of lm-eval's ``hf`` model."""
    if path.is_dir():
        return {"pretrained": str(path), "trust_remote_code": False}
    return {"pretrained": str(path.parent), "gguf_file": path.name, "trust_remote_code": False}


def _scores(found: dict[str, Any]) -> list[TaskScore]:
    scores = []
    counts = found.get("n-samples", {})
    for task, metrics in found["results"].items():
        for key, value in metrics.items():
            metric, _, rest = key.partition(",")
            if metric.endswith("_stderr") or isinstance(value, bool) or not isinstance(value, int | float) or not rest:
                continue
            error = metrics.get(f"{metric}_stderr,{rest}")
            scores.append(
                TaskScore(
                    task=task,
                    metric=metric,
                    value=float(value),
                    standard_error=float(error) if isinstance(error, int | float) else None,
                    example_count=counts.get(task, {}).get("effective"),
                )
            )
    return scores


if __name__ == "__main__":
    sys.exit(serve(work))
