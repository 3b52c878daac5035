"""Run the steps of a plan that are not done yet, each in a child process, each leaving a receipt."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

from planner.core.job import Job, keeps_progress, leave_only_progress, partial_path, remove
from planner.core.plan import BUILT_IN, FINETUNE, Plan, Step
from planner.execute import artifacts, calibration, domains, environments, receipts
from planner.execute.locks import exclusive
from planner.execute.process import Progress, run_child, was_cut_off
from planner.models.fingerprint import WEIGHT_SUFFIXES

_CHILD = "planner.execute.child"
_CHILDREN = {
    "imatrix": "planner.verify.step_child",
    "sensitivity": "planner.verify.step_child",
    FINETUNE: "planner.execute.finetune_child",
}
"""Steps that run the model through llama.cpp belong to what measures; it stands above this layer, so its child is
named and not imported."""


class Observer(Protocol):
    """Who is told how an apply goes: a progress bar, a log, a test."""

    def started(self, step: Step) -> Progress:
        """A step begins; the returned function gets its progress."""

    def told(self, text: str) -> None:
        """Something that a person should know before the next step begins."""

    def finished(self, step: Step, receipt: receipts.Receipt, *, reused: bool) -> None:
        """A step is done, or was done before."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workplace:
    """Where a plan is carried out."""

    output: Path
    model: Path
    """The checkpoint directory or GGUF file."""
    threads: int
    llama_cpp_directory: str | None = None
    tensor_types: dict[str, str] | None = None
    """GGUF tensor name → ggml type, for a step that quantizes the checkpoint itself."""

    def path(self, plan: Plan, name: str) -> Path:
        """Path of what the step ``name`` makes; ``model`` is the model itself."""
        if name == "model":
            return self.model
        step = next(step for step in plan.steps if step.name == name)
        assert step.output is not None
        return self.output / step.output


@contextlib.contextmanager
def locked(output: Path) -> Iterator[None]:
    """The output directory for one apply at a time.

    Raises:
        ExecutionFailed: another process is applying into it, or it cannot be written.
    """
    with exclusive(
        output / receipts.FOLDER / "lock",
        busy=f"another qplan is applying into {output}",
        unwritable=f"{output} cannot be written",
        hint="wait for it, or choose another --output",
        unwritable_hint="choose another folder with --output",
    ):
        yield


def pending(plan: Plan, output: Path, *, reference_needed: bool) -> tuple[Step, ...]:
    """Steps to run: those without a valid receipt whose output something pending, or the verification, reads.

    ``reference_needed``: the 16-bit model must be there for the verification's quality.
    """
    keys = receipts.keys(plan)
    wanted = {plan.artifact_step().name} | ({r.name for r in plan.reference_steps()} if reference_needed else set())
    todo: list[Step] = []
    for step in reversed(plan.making_steps()):
        if step.name in wanted and receipts.valid(output, step, keys[step.name]) is None:
            todo.append(step)
            wanted |= {step.source, step.imatrix or "", step.sensitivity or ""}
    return tuple(reversed(todo))


def run_steps(
    plan: Plan, steps: tuple[Step, ...], place: Workplace, observer: Observer
) -> tuple[receipts.Receipt, ...]:
    """Run ``steps`` in order; a finished one has its output under the final name and a receipt.

    Raises:
        ExecutionFailed: a step failed; earlier ones keep their receipts and a rerun goes on from there.
    """
    keys = receipts.keys(plan)
    made = []
    for step in plan.making_steps():
        if step in steps:
            receipts.begin(place.output, step)
            if found := left_behind(place.path(plan, step.name)):
                observer.told(found)
            receipt = _run_step(plan, step, place, keys[step.name], observer.started(step))
            receipts.write(place.output, receipt)
            observer.finished(step, receipt, reused=False)
            made.append(receipt)
        elif (old := receipts.read(place.output, step.name)) is not None:
            observer.finished(step, old, reused=True)
            made.append(old)
    return tuple(made)


def _run_step(plan: Plan, step: Step, place: Workplace, key: str, progress: Progress) -> receipts.Receipt:
    output = place.path(plan, step.name)
    job = Job(
        step=step,
        source=str(place.path(plan, step.source)),
        output=str(output),
        imatrix=str(place.path(plan, step.imatrix)) if step.imatrix else None,
        sensitivity=str(place.path(plan, step.sensitivity)) if step.sensitivity else None,
        model_name=plan.model.name,
        tensor_types=place.tensor_types if reads_checkpoint(plan, step) else None,
        pins=_pins(plan) if reads_checkpoint(plan, step) else None,
        threads=place.threads,
        calibration_text=_calibration_text(step),
        llama_cpp_directory=place.llama_cpp_directory,
    )
    before = _left_before(output)
    started = time.monotonic()
    log = place.output / receipts.FOLDER / f"{step.name}.log"
    try:
        child = _CHILDREN.get(step.kind, _CHILD)
        python = interpreter(step)
        result = run_child(child, job, what=f"step {step.name}", log=log, progress=progress, python=python)
    except BaseException as error:
        if was_cut_off(error):
            leave_only_progress([output])
        raise
    return receipts.Receipt(
        step=step.name,
        key=key,
        output=output.name,
        size_bytes=artifacts.size_bytes(output),
        sha256=artifacts.sha256(output),
        seconds=round(time.monotonic() - started, 3),
        peak_memory_bytes=result.get("peak_memory_bytes"),
        finished_at=datetime.now(UTC).isoformat(timespec="seconds"),
        resumed=bool(result.get("resumed")),
        notes=(*result.get("notes", ()), *_calibration_notes(step), *before),
        details=result.get("details", {}),
        tensor_types=tuple((name, type_) for name, type_ in result.get("tensor_types", ())),
    )


def interpreter(step: Step) -> Path | None:
    """Of the environment that a step's quantizer runs in; ``None``: qplan's own.

    Raises:
        MissingDependency: it is not installed.
    """
    name = environments.of_step(step)
    return environments.python_for(name) if name else None


def _calibration_text(step: Step) -> str | None:
    """The text, for a method's doing half, which stands below what reads it."""
    if (step.settings is None and step.finetune is None) or step.calibration is None:
        return None
    return calibration.text(step.calibration)


def _calibration_notes(step: Step) -> tuple[str, ...]:
    """What the domain of the text may cost; a step that makes a matrix says so itself."""
    if step.settings is None or step.calibration is None:
        return ()
    return (domains.warning(general=step.calibration.kind == BUILT_IN),)


def left_behind(output: Path) -> str | None:
    """What a run that was killed left of an output, and what the next one does with it; ``None``: nothing."""
    if not partial_path(output).exists():
        return None
    if keeps_progress(output):
        return f"{output.name} was interrupted: it goes on from what is done"
    return f"{output.name} was interrupted: it begins anew"


def _left_before(output: Path) -> tuple[str, ...]:
    """The note of an earlier interruption; what cannot be gone on from is removed."""
    found = left_behind(output)
    leave_only_progress([output])
    return (found,) if found else ()


def reads_checkpoint(plan: Plan, step: Step) -> bool:
    """Whether ``step`` quantizes the model's own checkpoint: it hashes the weights while it reads them."""
    return step.kind == "quantize" and step.source == "model" and not plan.model.is_gguf and step.method == "gguf"


def _pins(plan: Plan) -> dict[str, str]:
    pinned = (file for file in plan.model.files if file.sha256 and file.name.endswith(WEIGHT_SUFFIXES))
    return {file.name: str(file.sha256) for file in pinned}


def clean_up(plan: Plan, place: Workplace) -> tuple[str, ...]:
    """Remove the intermediate outputs; the names of those removed."""
    removed = []
    for step in plan.making_steps():
        path = place.path(plan, step.name)
        if step.intermediate and path.exists():
            remove(path)
            removed.append(path.name)
    return tuple(removed)
