"""Measure an artifact as it is run here, compare with its plan or with what is predicted, remember the measurement."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from planner.core.candidate import Candidate, KernelUse, Placement, Variant
from planner.core.codec import read_json
from planner.core.errors import InputError, MissingDependency, QplanError
from planner.core.hardware import HardwareProfile
from planner.core.measurement import Measurement
from planner.core.model import ModelSpec, shape_sha256
from planner.core.plan import Expectation, Plan
from planner.execute import preflight
from planner.methods.common import products
from planner.runtimes import kernels
from planner.verify.trial import VLLM
from planner.workflow import reporting
from planner.workflow.planning import check_hardware, plan_of
from planner.workflow.survey import survey

if TYPE_CHECKING:
    from planner.verify.artifact import VerificationResult

DEFAULT_BUDGET_SECONDS = 240.0
_CONTEXT = 4096
"""Of an artifact without a plan, or what its model was trained with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What an apply or a verify gave."""

    report: dict[str, Any]
    report_path: Path | None
    nothing_to_do: bool = False
    removed: tuple[str, ...] = ()

    @property
    def page_path(self) -> Path | None:
        """The report as an HTML page."""
        return self.report_path and self.report_path.with_name(reporting.PAGE)

    @property
    def ok(self) -> bool:
        """Every measured quantity is inside its expectation."""
        return bool(self.report["ok"])


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """What is measured and how it is run here."""

    model: ModelSpec
    variant: Variant
    placement: Placement
    expectations: tuple[Expectation, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelOptions:
    """What a runtime must be told to run an artifact by the kernel that the table has for it."""

    arguments: tuple[tuple[str, str], ...] = ()
    spare: tuple[tuple[str, str], ...] | None = None
    """In their place where the kernel cannot be compiled; empty: the runtime's own choice."""
    notes: tuple[str, ...] = ()


def artifact_of(target: Path, output: Path | None) -> tuple[Plan | None, Path]:
    """The plan that ``target`` is, or was made by, and the artifact; no plan where ``target`` is an artifact itself.

    Args:
        target: a plan, a report, the folder of a run, or an artifact.
        output: where a plan's artifact lies; ``None``: beside the plan or the report.

    Raises:
        InputError: the document is no plan or report, or the artifact is not there.
        StalePlan: the plan was edited.
    """
    path = reporting.run_report(target)
    if path.suffix != ".json":
        return None, path
    document = read_json(path)
    plan = plan_of(document.get("plan") if reporting.is_report(document) else document, str(path))
    artifact = (output or path.absolute().parent) / plan.artifact
    if not artifact.exists():
        hint = "`qplan apply` makes it; --output DIR says where it lies"
        raise InputError(f"{artifact} does not exist", hint=hint, code="no-artifact")
    return plan, artifact


def verify(
    artifact: Path,
    *,
    plan: Plan | None = None,
    reference: Path | None = None,
    text: Path | None = None,
    budget_seconds: float = DEFAULT_BUDGET_SECONDS,
    progress: Callable[[str, float], None] | None = None,
) -> Outcome:
    """Measure a GGUF file or a checkpoint directory on this machine and compare with its plan, or with the predictions.

    Raises:
        InputError: the artifact is missing or no model.
        MissingDependency: the environment of its runtime is not installed.
        StalePlan: the plan is for another machine.
    """
    from planner.verify.artifact import artifact_files
    from planner.verify.report import report_document

    artifact_files(artifact)
    if reference is not None:
        artifact_files(reference)
    preflight.check_text(text)
    here = survey(output=artifact.absolute().parent)
    if plan is not None:
        check_hardware(plan, here)
        subject = planned(plan, model_of(plan) if artifact.is_dir() else _resolved(artifact), here)
    else:
        subject = unplanned(artifact, reference, here)
    result = measure(
        artifact, subject, here, reference=reference, budget_seconds=budget_seconds, text=text, progress=progress
    )
    document = report_document(result, plan_sha256=plan.content_sha256 if plan else None, hardware=here)
    return Outcome(report=document | reporting.identity_of(subject.model, subject.variant), report_path=None)


def _resolved(path: Path) -> ModelSpec:
    from planner import models

    return models.resolve(str(path))


def model_of(plan: Plan) -> ModelSpec:
    """The plan's model, under the name and at the revision that the plan pinned."""
    from planner import models

    pinned = plan.model
    text = pinned.name if pinned.kind == "catalog" else pinned.location
    if pinned.kind == "hub" and pinned.revision and not pinned.is_gguf:
        text = f"{text}@{pinned.revision}"
    return dataclasses.replace(models.resolve(text), name=pinned.name)


def planned(plan: Plan, model: ModelSpec, here: HardwareProfile) -> Subject:
    """What a plan says; where its runtime is not here, the one that stands in, with the predictions of that one."""
    variant = runnable(plan.variant, here if plan.placement.gpu_layers else None)
    if variant == plan.variant:
        return Subject(model=model, variant=variant, placement=plan.placement, expectations=plan.expectations)
    placement = dataclasses.replace(plan.placement, tensor_parallel=1, gpu_count=min(1, plan.placement.gpu_count))
    expected = _expectations(model, variant, placement, here)
    notes = _note(plan.variant, variant)
    return Subject(model=model, variant=variant, placement=placement, expectations=expected, notes=notes)


def runnable(variant: Variant, here: HardwareProfile | None = None) -> Variant:
    """The variant under a runtime that is measured here: vLLM's files are run by transformers where there is no vLLM.

    Args:
        here: the machine whose GPU vLLM would use; ``None``: it would use none.
    """
    if variant.format == "gguf":
        return variant
    on_cuda = here is not None and any(gpu.backend == "cuda" for gpu in here.gpus)
    if variant.runtime == VLLM and on_cuda and importlib.util.find_spec("vllm") is not None:
        return variant
    return dataclasses.replace(variant, runtime="transformers")


def _note(planned_variant: Variant, variant: Variant) -> tuple[str, ...]:
    """What to know where another runtime is measured than was planned."""
    if variant.runtime == planned_variant.runtime:
        return ()
    through = " with GPTQModel" if variant.method in ("awq", "gptq") else ""
    return (
        f"measured under transformers{through}, not {planned_variant.runtime}: the predictions beside it are for that",
    )


def unplanned(artifact: Path, reference: Path | None, here: HardwareProfile) -> Subject:
    """How an artifact is run here where no plan says: its variant by its own header, all of it on one device."""
    from planner.methods import gguf
    from planner.models.directory import quantized_spec
    from planner.models.gguf_file import file_type_of
    from planner.workflow.quality import checkpoint_variant

    if not artifact.is_dir():
        model, variant = _resolved(artifact), gguf.variant(file_type_of(artifact))
        placement = Placement(context=min(_CONTEXT, model.n_ctx_train), threads=here.cpu.inference_threads())
    else:
        model = quantized_spec(artifact)
        if reference is not None:  # under the name of what it was made from, its measurements are found again
            model = dataclasses.replace(model, name=_resolved(reference).name)
        variant, placement = runnable(checkpoint_variant(artifact)), _whole(model, here)
    expected = _expectations(model, variant, placement, here)
    return Subject(model=model, variant=variant, placement=placement, expectations=expected)


def _whole(model: ModelSpec, here: HardwareProfile) -> Placement:
    """All layers on the first CUDA GPU, else on the CPU."""
    base = Placement(context=min(_CONTEXT, model.n_ctx_train), threads=here.cpu.inference_threads())
    if not any(gpu.backend == "cuda" for gpu in here.gpus):
        return base
    return dataclasses.replace(base, gpu_layers=model.offloadable_count, gpu_count=1)


def _expectations(
    model: ModelSpec, variant: Variant, placement: Placement, here: HardwareProfile
) -> tuple[Expectation, ...]:
    from planner.estimate import estimate
    from planner.workflow.planning import expectations
    from planner.workflow.survey import calibration_of

    made = estimate(model, variant, placement, here, calibration_of(here)[0])
    return expectations(model, Candidate(variant=variant, placement=placement, estimate=made), here)


def measure(
    artifact: Path,
    subject: Subject,
    here: HardwareProfile,
    *,
    reference: Path | None,
    keep_reference: Path | None = None,
    budget_seconds: float,
    text: Path | None,
    progress: Callable[[str, float], None] | None,
) -> VerificationResult:
    """Measure, and put what was measured into the store.

    Raises:
        MissingDependency: the environment of the runtime is not installed.
    """
    from planner.estimate.weights import bytes_read_per_token
    from planner.verify import learned
    from planner.verify.artifact import verify_artifact

    model, variant, placement = subject.model, subject.variant, subject.placement
    kernel = kernel_options(variant, here, model=model, on_gpu=placement.gpu_layers > 0)
    of_vllm = _vllm_options(subject)
    result = verify_artifact(
        artifact,
        subject=learned.Subject(
            model=model.name,
            model_sha256=shape_sha256(model),
            variant=variant,
            decode_weights_bytes=float(sum(bytes_read_per_token(model, variant, placement))),
            prefill_weight_count=float(model.active_parameter_count),
        ),
        placement=placement,
        hardware=here,
        reference=reference,
        keep_reference=keep_reference,
        text=text,
        expectations=subject.expectations,
        progress=progress,
        budget_seconds=budget_seconds,
        python=python_of(artifact, variant, reference),
        options=(*kernel.arguments, *of_vllm),
        spare_options=None if kernel.spare is None else (*kernel.spare, *of_vllm),
        speed_python=Path(sys.executable) if variant.runtime == VLLM else None,
    )
    notes = (*subject.notes, *kernel.notes, *result.notes, *remember(result.measurements))
    return dataclasses.replace(result, notes=notes)


def _vllm_options(subject: Subject) -> tuple[tuple[str, str], ...]:
    """That vLLM measures speed, with a KV cache of the planned context; empty under other runtimes."""
    if subject.variant.runtime != VLLM:
        return ()
    from planner.estimate.served_memory import cache_bytes

    return (("runtime", VLLM), ("kv_cache_bytes", str(cache_bytes(subject.model, subject.placement))))


def kernel_options(variant: Variant, here: HardwareProfile, *, model: ModelSpec | None, on_gpu: bool) -> KernelOptions:
    """What the runtime must be told to take the kernel that the table has for the variant here, and what to know of it.

    Args:
        model: its shapes decide with; ``None``: they are not known.
    """
    if variant.format == "gguf":
        return KernelOptions()
    shapes = products(model) if model is not None else ()
    best = kernels.validate(variant, shapes, here, gpus_used=on_gpu)
    if not isinstance(best, KernelUse):
        return KernelOptions()
    row = kernels.row_of(best)
    if row is None or not row.compiled:
        return KernelOptions(arguments=best.arguments)
    ready = kernels.validate(variant, shapes, here, gpus_used=on_gpu, compiler=False)
    spare = ready.arguments if isinstance(ready, KernelUse) else ()
    if nvcc_is_here():
        note = f"{best.name} is compiled the first time it is used, which takes minutes"
        return KernelOptions(arguments=best.arguments, spare=spare, notes=(note,))
    note = f"{best.name} is compiled with nvcc of the CUDA toolkit, which is not here"
    if isinstance(ready, KernelUse):
        note += f": measured with {ready.name}"
    return KernelOptions(arguments=spare, notes=(note,))


def nvcc_is_here() -> bool:
    """Whether there is a compiler for CUDA, where GPTQModel looks for it: the PATH, CUDA_HOME, /usr/local/cuda."""
    homes = [home for name in ("CUDA_HOME", "CUDA_PATH") if (home := os.environ.get(name))]
    return shutil.which("nvcc") is not None or any(
        (Path(home) / "bin" / "nvcc").is_file() for home in (*homes, "/usr/local/cuda")
    )


def python_of(artifact: Path, variant: Variant | None, reference: Path | None) -> Path | None:
    """The interpreter that has what runs an artifact; ``None``: this one, which llama.cpp runs in.

    Raises:
        MissingDependency: the environment is not installed.
    """
    if not artifact.is_dir() or (reference is not None and not reference.is_dir()):
        return None
    from planner.execute import environments

    wanted = environments.running(variant.method if variant else environments.UNQUANTIZED)
    try:
        return environments.python_for(wanted.name)
    except MissingDependency:
        here = all(importlib.util.find_spec(package) for package in ("transformers", "torch"))
        if here and (variant is None or variant.method == "none"):
            return None  # a checkpoint that is not quantized asks for nothing else
        raise


def remember(measurements: tuple[Measurement, ...]) -> tuple[str, ...]:
    """Put measurements into the store; a store that cannot be written costs a note, not the result."""
    from planner.store import Store

    try:
        with Store() as store:
            store.add(measurements)
    except QplanError as error:
        return (f"the measurement could not be kept for later estimates: {error.what}",)
    return ()
