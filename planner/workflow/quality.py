"""Measure how good an artifact is: against the model it was made from, on a text, and on tasks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import exp
from pathlib import Path
from typing import Any

from planner import FORMAT_VERSION
from planner.core.candidate import Placement, Variant
from planner.core.codec import encode
from planner.core.data import data_path, read_table
from planner.core.errors import InputError, UsageError
from planner.core.measurement import KL_DIVERGENCE, PERPLEXITY_RATIO, Measurement
from planner.core.model import ModelSpec, shape_sha256
from planner.execute import preflight
from planner.execute.process import ask_child
from planner.verify.artifact import HELD_OUT, gguf_files, quality_quantities
from planner.verify.learned import Subject, measurements
from planner.verify.run import run_trial
from planner.verify.tasks import TasksRequest, TasksResult, require_harness
from planner.verify.trial import QUALITY, QualityTrial, TrialRequest, TrialResult
from planner.workflow.survey import survey
from planner.workflow.verifying import kernel_options, python_of, remember, runnable

TASK_SECONDS = 24 * 3600.0
"""A benchmark over thousands of questions on a CPU may take a day."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QualityOptions:
    """What is measured, and how long."""

    reference: str | None = None
    """The 16-bit model: a GGUF file, a checkpoint directory, ``demo``."""
    text: Path | None = None
    context: int = 512
    chunks: int | None = None
    budget_seconds: float = 600.0
    gpu_layers: int = 0
    tasks: tuple[str, ...] = ()
    task_folder: Path | None = None
    task_limit: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What was found of one artifact."""

    artifact: Path
    reference: Path | None
    model: ModelSpec | None
    variant: Variant | None
    trial: TrialResult
    tasks: TasksResult | None
    measurements: tuple[Measurement, ...]
    predicted: dict[str, Any]
    notes: tuple[str, ...]

    @property
    def quality(self) -> QualityTrial:
        """The trial of the text."""
        assert self.trial.quality is not None
        return self.trial.quality


def measure(artifact: Path, options: QualityOptions, progress: Callable[[str, float], None] | None = None) -> Measured:
    """Score a text with the artifact and its reference, run tasks, and remember what was found.

    Raises:
        InputError: a file is missing or no model, the text is too short, or the two models' tokens differ.
        MissingDependency: what runs this kind of artifact is not installed.
        ExecutionFailed: a child crashed, or gave numbers that are not finite.
    """
    preflight.check_text(options.text)
    if options.tasks:
        require_harness()
    _check_runnable(artifact)
    reference, model = _reference(options.reference)
    here = survey(output=artifact.absolute().parent)
    placement = Placement(context=options.context, threads=here.cpu.inference_threads(), gpu_layers=options.gpu_layers)
    request = TrialRequest(
        kind=QUALITY,
        model_path=str(artifact),
        reference_path=None if reference is None else str(reference),
        text_path=str(options.text or data_path(HELD_OUT)),
        placement=placement,
        quality_context=options.context,
        max_chunks=options.chunks,
        budget_seconds=options.budget_seconds,
    )
    variant, notes = _variant_of(artifact)
    if variant is not None and artifact.is_dir() and variant.method != "none":
        kernel = kernel_options(variant, here, model=model, on_gpu=options.gpu_layers > 0)
        request = replace(request, options=kernel.arguments, spare_options=kernel.spare)
        notes = (*notes, *kernel.notes)
    trial = run_trial(request, progress=progress, python=python_of(artifact, variant, reference))
    tasks = _tasks(artifact, options, progress) if options.tasks else None
    kept: tuple[Measurement, ...] = ()
    predicted: dict[str, Any] = {}
    assert trial.quality is not None
    if model is not None and variant is not None and trial.quality.comparison is not None:
        predicted = _predicted(model, variant)
        subject = Subject(model=model.name, model_sha256=shape_sha256(model), variant=variant)
        kept = measurements(
            quality_quantities(trial.quality),
            subject,
            placement,
            None,
            here,
            predicted={name: p["value"] for name, p in predicted.items()},
            tool_version=trial.tool_version,
        )
        notes += remember(kept)
    return Measured(
        artifact=artifact,
        reference=reference,
        model=model,
        variant=variant,
        trial=trial,
        tasks=tasks,
        measurements=kept,
        predicted=predicted,
        notes=(*trial.notes, *notes, *_chunk_note(trial.quality)),
    )


def document(found: Measured) -> dict[str, Any]:
    """What ``qplan quality --json`` prints."""
    quality, variant = found.quality, found.variant
    comparison = quality.comparison
    return {
        "format_version": FORMAT_VERSION,
        "artifact": str(found.artifact),
        "reference": None if found.reference is None else str(found.reference),
        "model": None if found.model is None else found.model.name,
        "method": None if variant is None else variant.method,
        "type": None if variant is None else variant.type,
        "group_size": None if variant is None else variant.group_size,
        "perplexity": encode(quality.perplexity),
        "perplexity_ratio": None if comparison is None else exp(comparison.log_ratio),
        "comparison": None if comparison is None else encode(comparison),
        "predicted": found.predicted,
        "tasks": [] if found.tasks is None else encode(list(found.tasks.scores)),
        "text_sha256": quality.text_sha256,
        "context": quality.context,
        "chunk_count": quality.chunk_count,
        "chunk_available_count": quality.chunk_available_count,
        "token_count": quality.token_count,
        "measured_with": found.trial.tool_version,
        "remembered": [m.quantity for m in found.measurements],
        "notes": list(found.notes),
    }


def _chunk_note(quality: QualityTrial) -> tuple[str, ...]:
    if quality.chunk_count == quality.chunk_available_count:
        return ()
    return (f"of {quality.chunk_count} of {quality.chunk_available_count} chunks of the text",)


def _check_runnable(path: Path) -> None:
    """A sound GGUF file or a directory with a configuration."""
    if not path.is_dir():
        gguf_files(path)
    elif not (path / "config.json").is_file():
        raise InputError(f"{path} holds no config.json", hint="name the checkpoint's directory", code="not-a-model")


def _reference(text: str | None) -> tuple[Path | None, ModelSpec | None]:
    """Where the 16-bit model lies, and its shapes.

    Raises:
        InputError: it is not on this machine.
    """
    if text is None:
        return None, None
    from planner import models

    model = models.resolve(text)
    path = Path(model.source.location).expanduser()
    if model.source.kind not in ("directory", "gguf") or not path.exists():
        raise InputError(
            f"the weights of {text} are not on this machine",
            numbers=f"it is known from the {model.source.kind}",
            hint="--reference takes a checkpoint directory or a GGUF file",
            code="no-weights",
        )
    _check_runnable(path)
    return path, model


def _variant_of(artifact: Path) -> tuple[Variant | None, tuple[str, ...]]:
    """How the artifact was quantized, as its own header says; ``None`` with a note where qplan has no such variant."""
    from planner.methods import gguf
    from planner.models.gguf_file import file_type_of, made_with_imatrix

    try:
        if not artifact.is_dir():
            # a file that says nothing of a matrix, of a type that demands one, had one
            return gguf.variant(file_type_of(artifact), imatrix=made_with_imatrix(artifact) or None), ()
        return runnable(checkpoint_variant(artifact)), ()
    except (InputError, UsageError) as error:
        return None, (f"not remembered: {error.what}",)


def checkpoint_variant(folder: Path) -> Variant:
    """The variant that ``quantization_config`` describes.

    Raises:
        InputError: a method that qplan has no row for.
    """
    from planner.methods import awq, bitsandbytes, gptq, none
    from planner.models.directory import read_config

    config = read_config(folder)
    stated = config.get("quantization_config")
    if not stated:
        dtype = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")
        return none.variant({"float32": "f32", "float16": "f16"}.get(dtype, "bf16"))
    method = stated.get("quant_method")
    if method == "bitsandbytes":
        return bitsandbytes.variant(
            str(stated.get("bnb_4bit_quant_type", "nf4")) if stated.get("load_in_4bit") else "int8"
        )
    group = int(stated.get("group_size", -1))
    if method == "gptq":
        return gptq.variant(f"{stated.get('bits')}bit", group, act_order=bool(stated.get("desc_act")))
    if method == "awq":
        return awq.variant(f"{stated.get('bits')}bit", group)
    raise InputError(f"its quantization {method!r} is none that qplan predicts", code="unknown-method")


def _predicted(model: ModelSpec, variant: Variant) -> dict[str, Any]:
    """What the estimate says without what was measured of this very variant before."""
    from planner.estimate.quality import quality

    made = quality(model, variant)
    found = {PERPLEXITY_RATIO: made.perplexity_ratio, KL_DIVERGENCE: made.kl_divergence_nats}
    return {name: encode(replace(p, terms=())) for name, p in found.items() if p is not None}


def _tasks(artifact: Path, options: QualityOptions, progress: Callable[[str, float], None] | None) -> TasksResult:
    request = TasksRequest(
        model_path=str(artifact.absolute()),
        tasks=options.tasks,
        task_folder=None if options.task_folder is None else str(options.task_folder),
        limit=options.task_limit,
        device="cuda" if options.gpu_layers else "cpu",
    )
    return ask_child(
        TasksResult,
        "planner.verify.tasks",
        request,
        what="running the tasks",
        progress=progress,
        timeout_seconds=TASK_SECONDS,
    )


def published(model_text: str) -> tuple[dict[str, str], ...]:
    """Rows of ``data/published_quality.csv`` for a model: what the estimates rest on, and what was set aside and why.

    Raises:
        ModelNotFound: no model has this name.
        InputError: nothing is published of it.
    """
    from planner import models

    model = models.resolve(model_text)
    names = {model.name, f"{model.name}-instruct", f"{model.name}-chat", model_text.lower()}
    rows = tuple(row for row in read_table("published_quality.csv") if row["model"] in names)
    if not rows:
        known = sorted({row["model"] for row in read_table("published_quality.csv")})
        raise InputError(
            f"no quality is published of {model.name} in data/published_quality.csv",
            numbers=f"of {len(known)} models: {', '.join(known)}",
            hint=f"`qplan explain {model_text} --type Q4_K_M` shows what the formula says",
            code="nothing-published",
        )
    return rows
