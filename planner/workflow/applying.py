"""Carry a plan out, measure the result, remember the measurement."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from planner.core.candidate import Variant
from planner.core.codec import read_json
from planner.core.errors import InputError, NeedsConfirmation
from planner.core.hardware import HardwareProfile
from planner.core.model import ModelSpec
from planner.core.plan import Plan, PlanModel, Step
from planner.core.units import format_bytes
from planner.execute import calibration, obtain, preflight, process, receipts, runner
from planner.workflow import environments, reporting, step_report
from planner.workflow.planning import check_hardware
from planner.workflow.survey import survey
from planner.workflow.verifying import DEFAULT_BUDGET_SECONDS, measure, model_of, planned, remember
from planner.workflow.verifying import Outcome as Outcome

if TYPE_CHECKING:
    from planner.execute.receipts import Receipt as Receipt

REPORT = reporting.REPORT


class Watcher(runner.Observer, Protocol):
    """Who is told how an apply goes, the download and the measuring included."""

    def downloading(self, what: str) -> Callable[..., None]:
        """A model is fetched from the hub; the returned function gets the bytes that are there and all."""

    def measuring(self) -> Callable[[str, float], None]:
        """The verification begins; the returned function gets what is measured and the fraction done."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ApplyOptions:
    """How a plan is carried out; none of it changes what is made."""

    output: Path
    assume_yes: bool = False
    confirm: Callable[[str], bool] | None = None
    """Asks a person; ``None`` where there is nobody to ask."""
    keep_intermediate: bool = False
    budget_seconds: float = DEFAULT_BUDGET_SECONDS
    text: Path | None = None
    llama_cpp_directory: str | None = None
    installing: Callable[[environments.Offer], environments.Tell] | None = None
    """Told when the environment of a quantizer is installed."""
    stop: threading.Event | None = None
    """Set by another thread, it ends the apply as Ctrl-C does."""


def check(plan: Plan, output: Path, *, applying: bool = False) -> HardwareProfile:
    """All that must hold before a plan is applied; the machine it was checked on.

    Args:
        plan: the plan.
        output: where it would be applied.
        applying: it will be applied now, so that weights which a step will hash anyway are not hashed before.

    Raises:
        StalePlan: another machine, or the model changed.
        MissingDependency: the quantizer is not installed.
        QplanError: no room on the disk or in memory, or the output is somebody else's.
    """
    here = survey(output=output)
    check_hardware(plan, here)
    preflight.check_tools(plan)
    local = obtain.local_path(plan.model)
    steps = runner.pending(plan, output, reference_needed=True)
    if local is not None:
        hashed_later = applying and any(runner.reads_checkpoint(plan, step) for step in steps)
        preflight.check_model_files(plan, local, hash_weights=not hashed_later)
    for step in plan.steps:
        if step.calibration is not None:
            calibration.check(step.calibration)
    preflight.check_output(plan, output)
    preflight.check_replaceable(output / REPORT, "plan_sha256")
    reporting.check_page(output / reporting.PAGE)
    preflight.check_room(steps, here)
    return here


def apply(plan: Plan, options: ApplyOptions, watcher: Watcher) -> Outcome:
    """Run what is not done yet, measure, write ``report.json`` and ``report.html``, remember.

    Raises:
        QplanError: a check failed, a step failed, or a question could not be asked.
        Interrupted: ``options.stop`` was set.
    """
    output = options.output
    preflight.check_text(options.text)
    check_hardware(plan, survey(output=output))  # before a folder is made, or an environment of gigabytes
    with runner.locked(output), process.stoppable(options.stop):
        environments.prepare(
            lambda: preflight.check_tools(plan),
            assume_yes=options.assume_yes,
            ask=options.confirm,
            tell=options.installing,
        )
        here = check(plan, output, applying=True)
        done = finished(plan, output)
        if done is not None:
            if not (output / reporting.PAGE).exists():
                reporting.write_report_page(str(output))
            return Outcome(report=done, report_path=output / REPORT, nothing_to_do=True)
        place = _workplace(plan, options, here, watcher)
        steps = runner.pending(plan, output, reference_needed=True)
        made = runner.run_steps(plan, steps, place, watcher)
        remember(step_report.measurements(plan, model_of(plan), here, made, steps, place.threads))
        report = _verify_plan(plan, place, here, made, options, watcher)
        removed = () if options.keep_intermediate else runner.clean_up(plan, place)
    return Outcome(report=report, report_path=output / REPORT, removed=removed)


def needs_download(plan: Plan) -> bool:
    """Whether the plan's model comes from the hub."""
    return plan.model.kind in {"hub", "catalog"}


def finished(plan: Plan, output: Path) -> dict[str, Any] | None:
    """The report of an earlier apply of this very plan whose artifact is unchanged."""
    step = plan.artifact_step()
    try:
        report = read_json(output / REPORT)
    except InputError:
        return None
    if not isinstance(report, dict) or report.get("plan_sha256") != plan.content_sha256:
        return None
    return report if receipts.valid(output, step, receipts.keys(plan)[step.name]) else None


def _workplace(plan: Plan, options: ApplyOptions, here: HardwareProfile, watcher: Watcher) -> runner.Workplace:
    model = obtain.local_path(plan.model)
    if model is None:
        confirm_download(plan.model, assume_yes=options.assume_yes, confirm=options.confirm)
        log = options.output / receipts.FOLDER / "download.log"
        model = obtain.download(plan.model, log=log, progress=watcher.downloading(plan.model.location))
        preflight.check_model_files(plan, model, hash_weights=not gguf_in_one_pass(plan))
    return runner.Workplace(
        output=options.output,
        model=model,
        threads=plan.placement.threads or here.cpu.inference_threads(),
        llama_cpp_directory=options.llama_cpp_directory,
        tensor_types=tensor_types(model, plan.variant) if gguf_in_one_pass(plan) else None,
    )


def gguf_in_one_pass(plan: Plan) -> bool:
    """Whether a step of the plan quantizes the checkpoint itself."""
    return any(runner.reads_checkpoint(plan, step) for step in plan.steps)


def tensor_types(checkpoint: Path, variant: Variant) -> dict[str, str]:
    """GGUF tensor name → ggml type of every tensor that the checkpoint, as it is on the disk, is converted to."""
    from planner import models
    from planner.convert.mapping import stream
    from planner.convert.support import open_config
    from planner.formats.safetensors import open_checkpoint
    from planner.methods import gguf

    made = {tensor.name for tensor in stream(open_checkpoint(checkpoint), open_config(checkpoint)[0])}
    model = models.resolve(str(checkpoint))
    # an output matrix that is stored although it is tied is left out, and then the mix is that of a tied model
    model = dataclasses.replace(model, tensors=tuple(tensor for tensor in model.tensors if tensor.name in made))
    return dict(zip((tensor.name for tensor in model.tensors), gguf.tensor_types(model, variant), strict=True))


def confirm_download(model: PlanModel, *, assume_yes: bool, confirm: Callable[[str], bool] | None) -> None:
    """Ask before fetching gigabytes; what is in the hub's cache already needs no question.

    Raises:
        NeedsConfirmation: there is nobody to ask, or the answer was no.
    """
    missing = obtain.missing_bytes(model)
    if assume_yes or missing == 0:
        return
    size = 2 * model.parameter_count if missing is None else missing
    question = f"Download {model.location}, about {format_bytes(size)}?"
    if confirm is None or not confirm(question):
        raise NeedsConfirmation(
            f"{model.location} must be downloaded",
            numbers=f"about {format_bytes(size)}",
            hint="--yes agrees beforehand",
            code="download-needs-yes",
        )


def _verify_plan(
    plan: Plan,
    place: runner.Workplace,
    here: HardwareProfile,
    made: tuple[receipts.Receipt, ...],
    options: ApplyOptions,
    watcher: Watcher,
) -> dict[str, Any]:
    from planner.verify.report import report_document, write_report

    if plan.finetune_step() is not None:
        return _report_training(plan, place, here, made)
    # without a step that makes the 16-bit model: the model itself, a GGUF file or the checkpoint
    reference = next((place.path(plan, step.name) for step in plan.reference_steps()), place.model)
    model = model_of(plan)
    context = reporting.context_of(plan, model, here)
    subject = planned(plan, model, here)
    result = measure(
        place.output / plan.artifact,
        subject,
        here,
        reference=reference,
        keep_reference=_kept_reference(plan, model, options),
        budget_seconds=options.budget_seconds,
        text=options.text,
        progress=watcher.measuring(),
    )
    document = report_document(
        result,
        plan_sha256=plan.content_sha256,
        steps=step_report.rows(plan, made),
        recipe=dict(next((receipt.tensor_types for receipt in made if receipt.tensor_types), ())),
        hardware=here,
        tools=plan.tools,
    )
    document |= context | reporting.identity_of(model, subject.variant)
    write_report(place.output / REPORT, document)
    reporting.write_report_page(str(place.output))
    return document


def _report_training(
    plan: Plan, place: runner.Workplace, here: HardwareProfile, made: tuple[receipts.Receipt, ...]
) -> dict[str, Any]:
    """A fine-tuning measures itself while it runs: only the report is left to write."""
    from planner.verify.report import write_report
    from planner.workflow import finetuning

    artifact = place.output / plan.artifact
    document = finetuning.report_document(plan, made, here, artifact)
    document |= reporting.context_of(plan, model_of(plan), here)
    document["commands"] = finetuning.commands_of(plan, place.output)
    write_report(place.output / REPORT, document)
    reporting.write_report_page(str(place.output))
    return document


def _kept_reference(plan: Plan, model: ModelSpec, options: ApplyOptions) -> Path | None:
    """Where the 16-bit model is kept, if that is wanted and no step makes it.

    Raises:
        ExecutionFailed: there is a file of this name already that no apply of ours began.
    """
    if not options.keep_intermediate or not gguf_in_one_pass(plan):
        return None
    from planner.methods import gguf

    step = Step(name="reference", kind="convert", method="gguf", output=gguf.reference_name(model, plan.variant))
    path = options.output / str(step.output)
    preflight.check_ours(path, ours=receipts.begun(options.output, step))
    receipts.begin(options.output, step)
    return path
