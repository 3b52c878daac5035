"""The model's files on this machine: a local path, or a download through huggingface_hub at the pinned revision."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from planner.core.errors import InputError, MissingDependency, StalePlan
from planner.core.plan import PlanModel
from planner.execute import fetch
from planner.execute.process import Progress, run_child


def local_path(model: PlanModel) -> Path | None:
    """Where the model lies on this machine; ``None`` if it must be fetched from the hub.

    Raises:
        StalePlan: the directory or file of the plan is gone.
        InputError: the plan's model is a bare size.
    """
    if model.kind in {"directory", "gguf"}:
        path = Path(model.location)
        if not path.exists():
            raise StalePlan(f"{path} of the plan's model is gone", hint="make a new plan", code="model-changed")
        return path
    if model.kind in {"hub", "catalog"}:
        return None
    raise InputError(f"a model of kind {model.kind!r} has no weights", code="no-weights")


def missing_bytes(model: PlanModel) -> int | None:
    """Bytes of a hub's model that must be fetched; ``None`` where only the hub knows which files there are."""
    if not model.files or importlib.util.find_spec("huggingface_hub") is None:
        return None
    return fetch.missing_bytes(model)


def download(model: PlanModel, *, log: Path, progress: Progress | None = None) -> Path:
    """Fetch the plan's files, and no others, into the hub's cache, in a child process; where the model lies there.

    Stopped at any moment it leaves nothing half under a final name, and the next call goes on from there. ``HF_HOME``,
    ``HF_ENDPOINT`` and ``HF_TOKEN`` are respected.

    Args:
        model: one whose :func:`local_path` is ``None``.
        log: file for the child's stderr.
        progress: gets the bytes that are there and all.

    Raises:
        MissingDependency: huggingface_hub is not installed.
        InputError: the hub refuses, does not know the repository, or cannot be reached.
        ExecutionFailed: no room in the cache.
        Stopped: a person stopped it.
    """
    if importlib.util.find_spec("huggingface_hub") is None:
        raise MissingDependency(
            f"{model.name} must be downloaded and huggingface_hub is not installed",
            hint="`pip install 'qplan[hub]'`, or plan for a checkpoint directory of your own",
        )
    child = "planner.execute.fetch_child"
    return Path(run_child(child, model, what="download", log=log, progress=progress)["path"])
