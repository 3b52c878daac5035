"""Quantize a checkpoint without a plan: one or more types from one read, predicted beforehand, in a child process."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from planner import FORMAT_VERSION
from planner.core.candidate import Variant
from planner.core.codec import read_json
from planner.core.errors import ExecutionFailed, InputError, UsageError
from planner.core.estimates import Prediction
from planner.core.hardware import HardwareProfile
from planner.core.job import QuantizedFile, QuantizeJob, leave_only_progress
from planner.core.model import ModelSpec
from planner.core.plan import Step
from planner.execute import obtain, preflight
from planner.execute.process import run_child, was_cut_off
from planner.methods import gguf, gguf_recipe, serving
from planner.workflow.survey import calibration_of, survey


class Watcher(Protocol):
    """Who is told how it goes."""

    def downloading(self, what: str) -> Callable[..., None]:
        """A model is fetched from the hub; the returned function gets the bytes that are there and all."""

    def started(self, step: Step) -> Callable[..., None]:
        """The work begins; the returned function gets the bytes done and in all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeOptions:
    """What to make of which model, and where."""

    model: str
    types: tuple[str, ...]
    output: Path
    """A folder, or for one type a file that ends in ``.gguf``."""
    threads: int | None = None
    through: str = "auto"
    imatrix: Path | None = None
    """A finished importance matrix."""
    recipe: Path | None = None
    """In place of types: the report of a mixture, or JSON of tensor name → ggml type."""
    replace: bool = False
    """Replace files that are there."""
    assume_yes: bool = False
    confirm: Callable[[str], bool] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """Everything decided and predicted, nothing done."""

    model: ModelSpec
    hardware: HardwareProfile
    job: QuantizeJob
    step: Step
    """All files together: time, memory and disk."""
    predicted_bytes: tuple[int, ...]
    """Of each file."""


def prepare(options: QuantizeOptions, watcher: Watcher) -> Prepared:
    """Decide what is made and predict what it takes; a model of the hub is fetched first.

    Raises:
        UsageError: a type does not exist, or the model is no checkpoint.
        QplanError: the model is not to be had, or its files would replace others.
    """
    from planner import models
    from planner.estimate.making import forecast_many
    from planner.workflow.applying import tensor_types

    _check_options(options)
    model = models.resolve(options.model)
    directory = _checkpoint(model, options, watcher)
    variants = _variants(options)
    here = survey(output=options.output if options.output.is_dir() else options.output.absolute().parent)
    threads = options.threads or here.cpu.inference_threads()
    names = [_name(model, variant, options) for variant in variants]
    files = tuple(
        QuantizedFile(path=str(name), type=variant.type, tensor_types=tensor_types(directory, variant))
        for name, variant in zip(names, variants, strict=True)
    )
    for name in names:
        if name.exists() and not (options.replace and name.is_file()):
            hint = "--force replaces it" if name.is_file() else "choose another -o"
            raise ExecutionFailed(f"{name} exists", hint=hint, code="output-exists")
    job = QuantizeJob(
        source=str(directory),
        files=files,
        threads=threads,
        model_name=model.name,
        through=options.through,
        imatrix=str(options.imatrix) if options.imatrix else None,
    )
    step = forecast_many(model, variants, here, threads=threads, calibration=calibration_of(here)[0])
    sizes = tuple(gguf.size(model, variant).file_bytes for variant in variants)
    return Prepared(model=model, hardware=here, job=job, step=step, predicted_bytes=sizes)


def _check_options(options: QuantizeOptions) -> None:
    if bool(options.types) == (options.recipe is not None):
        raise UsageError("give either types or a recipe", hint="`--types Q4_K_M,Q8_0`, or `--recipe report.json`")
    if len(set(options.types)) < len(options.types):
        raise UsageError("each type can be made once", numbers=", ".join(options.types))
    if options.imatrix is not None:
        from planner.formats.imatrix import read_imatrix

        read_imatrix(options.imatrix)  # a damaged one is said before the checkpoint is read


def _variants(options: QuantizeOptions) -> tuple[Variant, ...]:
    imatrix = options.imatrix is not None
    if options.recipe is None:
        return tuple(gguf.variant(type_, None, imatrix) for type_ in options.types)
    recipe = gguf_recipe.as_planned(_read_recipe(options.recipe))
    return (dataclasses.replace(gguf.variant(recipe.file_type, None, imatrix), recipe=recipe.types),)


def _read_recipe(path: Path) -> tuple[tuple[str, str], ...]:
    """Tensor names and types of a report of a mixture, or of plain JSON.

    Raises:
        InputError: it is neither, or names a type that no mixture may have.
    """
    found = read_json(path)
    types = found.get("recipe", found) if isinstance(found, dict) else None
    if not isinstance(types, dict) or not types or not all(isinstance(type_, str) for type_ in types.values()):
        raise InputError(
            f"{path} holds no recipe",
            hint="the report.json of a plan with --target-size, --target-bpw or --fit-memory does, or JSON of "
            "tensor name to ggml type",
            code="bad-recipe",
        )
    recipe = tuple(sorted(types.items()))
    if wrong := gguf_recipe.fault(recipe):
        raise InputError(f"the recipe in {path} cannot be used", numbers=wrong, code="bad-recipe")
    return recipe


def _checkpoint(model: ModelSpec, options: QuantizeOptions, watcher: Watcher) -> Path:
    from planner.workflow.applying import confirm_download
    from planner.workflow.planning import conversion_note
    from planner.workflow.sealing import plan_model

    if model.source.is_gguf or model.source.kind == "size":
        raise UsageError(
            f"{options.model} is no checkpoint",
            hint="give a checkpoint directory, a hub id or a catalog name; `qplan plan` takes 16-bit GGUF files too",
            code="not-a-checkpoint",
        )
    if not model.convertible:
        raise UsageError(
            f"qplan does not convert {model.name} itself",
            numbers=conversion_note(model) or f"architecture {model.architecture}",
            hint="`qplan plan`, then `qplan apply --llama-cpp DIR`, goes by llama.cpp's converter",
            code="no-converter",
        )
    pinned = plan_model(model, weights=False)
    found = obtain.local_path(pinned)
    if found is None:
        confirm_download(pinned, assume_yes=options.assume_yes, confirm=options.confirm)
        with tempfile.TemporaryDirectory(prefix="qplan-") as folder:
            tell = watcher.downloading(pinned.location)
            found = obtain.download(pinned, log=Path(folder) / "log", progress=tell)
    return found


def _name(model: ModelSpec, variant: Any, options: QuantizeOptions) -> Path:
    if options.output.suffix == ".gguf":
        if len(options.types) > 1:
            raise UsageError(
                f"{len(options.types)} types need a folder", numbers=str(options.output), hint="`-o DIR`", code="usage"
            )
        return options.output
    return options.output / serving.artifact_name(model, variant)


def quantize(prepared: Prepared, watcher: Watcher) -> dict[str, Any]:
    """Carry it out; the document of what was predicted and what came of it.

    Raises:
        QplanError: no room, or the engine's.
    """
    preflight.check_room((prepared.step,), prepared.hardware)
    for file in prepared.job.files:
        _make_folder(Path(file.path).parent)
    began = time.monotonic()
    try:
        with tempfile.TemporaryDirectory(prefix="qplan-") as folder:
            made = run_child(
                "planner.execute.quantize_child",
                prepared.job,
                what="quantizing",
                log=Path(folder) / "log",
                progress=watcher.started(prepared.step),
            )
    except BaseException as error:
        if was_cut_off(error):
            leave_only_progress([Path(file.path) for file in prepared.job.files])
        raise
    return document(prepared, made, time.monotonic() - began)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ExecutionFailed(
            f"{folder} cannot be made", numbers=str(error), hint="choose another -o", code="output-not-writable"
        ) from None


def document(prepared: Prepared, made: dict[str, Any] | None, seconds: float | None) -> dict[str, Any]:
    """What ``qplan quantize --json`` prints; ``made`` and ``seconds`` are ``None`` for a dry run."""
    files = zip(prepared.job.files, prepared.predicted_bytes, strict=True)
    step, told = prepared.step, made or {}
    return {
        "format_version": FORMAT_VERSION,
        "model": prepared.model.name,
        "source": prepared.job.source,
        "threads": prepared.job.threads,
        "files": [
            {
                "type": file.type,
                "path": file.path,
                "predicted_bytes": predicted,
                "bytes": Path(file.path).stat().st_size if made is not None else None,
            }
            for file, predicted in files
        ],
        "seconds": _beside(step.predicted_seconds, seconds),
        "resumed": told.get("resumed"),
        "peak_memory_bytes": _beside(step.predicted_memory, told.get("peak_memory_bytes")),
        "read_bytes": told.get("read_bytes"),
        "written_bytes": told.get("written_bytes"),
        "cpu_seconds": told.get("cpu_seconds"),
        "source_sha256": told.get("source_sha256"),
        "notes": told.get("notes", []),
    }


def _beside(predicted: Prediction | None, measured: float | None) -> dict[str, Any]:
    known = {"predicted": predicted.value, "low": predicted.low, "high": predicted.high} if predicted else {}
    source = {"basis": predicted.basis, "source": predicted.source} if predicted else {}
    return {**known, "measured": measured, **source}
