"""The model's files on this machine: a local path, or a download through huggingface_hub at the pinned revision."""

from __future__ import annotations

from pathlib import Path

from planner.core.errors import InputError, MissingDependency, StalePlan
from planner.core.plan import PlanModel


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


def download(model: PlanModel) -> Path:
    """Fetch the plan's files, and no others, into the hub's cache; its directory there.

    ``HF_HOME``, ``HF_ENDPOINT`` and ``HF_TOKEN`` are respected.

    Raises:
        MissingDependency: huggingface_hub is not installed.
        InputError: the hub refuses, does not know the repository, or cannot be reached.
    """
    try:
        import huggingface_hub
        from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError
    except ImportError:
        raise MissingDependency(
            f"{model.name} must be downloaded and huggingface_hub is not installed",
            hint="`pip install 'qplan[hub]'`, or plan for a checkpoint directory of your own",
        ) from None
    try:
        paths = [
            huggingface_hub.hf_hub_download(model.location, name, revision=model.revision) for name in _names(model)
        ]
    except GatedRepoError:
        raise InputError(
            f"{model.location} needs its licence accepted",
            hint=f"accept it on the page of {model.location} and set HF_TOKEN",
            code="gated-model",
        ) from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise InputError(
            f"{model.location} could not be downloaded",
            numbers=str(error).splitlines()[0],
            hint="a checkpoint directory works without the hub: `qplan plan DIRECTORY`",
            code="download-failed",
        ) from None
    return Path(paths[0]) if model.is_gguf else Path(paths[0]).parent


def _names(model: PlanModel) -> list[str]:
    """The pinned files; for a catalog model, which pins none, those that the hub lists now, top-level ones first."""
    from planner.models.hub import spec_from_hub

    names = [file.name for file in model.files]
    if not names:
        names = [file.name for file in spec_from_hub(model.location).source.files]
    return sorted(names, key=lambda name: ("/" in name, name))
