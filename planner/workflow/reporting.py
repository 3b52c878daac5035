"""Reports as pages: what ``report.json`` holds besides the measurements, and where a run's report lies."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from planner.core.candidate import Candidate, Variant
from planner.core.codec import encode, write_atomically
from planner.core.errors import ExecutionFailed, InputError, QplanError
from planner.core.estimates import Prediction
from planner.core.hardware import HardwareProfile
from planner.core.measurement import QUANTITIES
from planner.core.model import ModelSpec
from planner.core.plan import Plan
from planner.core.wording import fullest

if TYPE_CHECKING:
    from planner.core.measurement import Calibration
    from planner.report.page import Run

REPORT = "report.json"
PAGE = "report.html"


def context_of(plan: Plan, model: ModelSpec, here: HardwareProfile) -> dict[str, Any]:
    """What a report keeps of the plan, so that a page can be made of it alone.

    ``plan``, ``hardware``, ``commands``; ``candidates``: every way to run the model that fits here, of any type, by
    what is known before the result is measured; ``speed_by_depth``: decode as the KV cache fills.
    """
    from planner import methods
    from planner.workflow.survey import calibration_of

    calibration, _ = calibration_of(here)
    chosen = Candidate(variant=plan.variant, placement=plan.placement, estimate=plan.estimate)
    return {
        "plan": encode(plan),
        "hardware": encode(dataclasses.replace(here, disk=None)),
        "candidates": _candidates(plan, model, here, calibration),
        "speed_by_depth": _speed_by_depth(plan, model, here, calibration),
        "commands": methods.get(plan.variant.method).commands(model, chosen),
    }


def identity_of(model: ModelSpec, variant: Variant) -> dict[str, Any]:
    """What a report says was measured: the model, and the variant with the runtime that really ran it."""
    return {"model": model.name, "variant": encode(variant)}


def _candidates(
    plan: Plan, model: ModelSpec, here: HardwareProfile, calibration: Calibration | None
) -> list[dict[str, Any]]:
    from planner.decide import decide

    workload = dataclasses.replace(plan.workload, types=None, context=plan.placement.context)
    decision = decide(model, here, workload, calibration)
    others = (decision.chosen, *decision.alternatives) if decision.chosen else ()
    own = Candidate(variant=plan.variant, placement=plan.placement, estimate=plan.estimate)
    points = [_point(c, chosen=False) for c in others if c.variant != plan.variant]
    pareto = next((c.pareto for c in others if c.variant == plan.variant), False)
    return [_point(dataclasses.replace(own, pareto=pareto), chosen=True), *points]


def _point(candidate: Candidate, *, chosen: bool) -> dict[str, Any]:
    return {
        "label": candidate.variant.label(),
        "file_bytes": candidate.estimate.size.file_bytes,
        "memory_bytes": fullest(candidate).needed_bytes,
        "decode": _range(candidate.estimate.speed.decode),
        "perplexity_ratio": _range(candidate.estimate.quality.perplexity_ratio),
        "pareto": candidate.pareto,
        "chosen": chosen,
    }


def _range(prediction: Prediction | None) -> dict[str, Any] | None:
    if prediction is None:
        return None
    return {"value": prediction.value, "low": prediction.low, "high": prediction.high, "basis": prediction.basis}


def _speed_by_depth(
    plan: Plan, model: ModelSpec, here: HardwareProfile, calibration: Calibration | None
) -> list[dict[str, Any]]:
    from planner.estimate import estimate

    depths = [plan.placement.context * part // 8 for part in range(8)]
    found = []
    for depth in dict.fromkeys(depths):
        placement = dataclasses.replace(plan.placement, depth=depth)
        decode = estimate(model, plan.variant, placement, here, calibration).speed.decode
        if decode is not None:
            found.append({"depth": depth, "decode": _range(decode)})
    return found


def check_page(path: Path) -> None:
    """Refuse to replace a page that qplan did not write.

    Raises:
        ExecutionFailed: naming the file.
    """
    from planner.report.page import is_page

    if not path.exists() or (path.exists() and not path.is_file() and not path.is_dir()):
        return
    try:
        ours = path.is_file() and is_page(path.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        ours = False
    if not ours:
        raise ExecutionFailed(
            f"{path} exists and was not written by qplan",
            hint="choose another name or folder with --output, or remove it",
            code="output-exists",
        )


def is_report(document: object) -> bool:
    """Whether a JSON document is the report of a run."""
    return isinstance(document, dict) and "verdicts" in document


def run_report(path: Path) -> Path:
    """The report in ``path`` where that is the folder of a run and no checkpoint itself; else ``path``."""
    report = path / REPORT
    return report if path.is_dir() and report.is_file() and not any(path.glob("*.safetensors")) else path


def find_report(text: str) -> Path:
    """The ``report.json`` of a run: the file itself, the folder it is in, or the artifact it is about.

    Raises:
        InputError: there is none.
    """
    path = Path(text).expanduser()
    if path.is_dir():
        found = path / REPORT
        if not found.is_file() and (path / "config.json").is_file():  # the artifact itself, of a report beside it
            found = path.absolute().parent / REPORT
    elif path.suffix == ".json":
        found = path
    else:
        found = path.absolute().parent / REPORT
    if not found.is_file():
        raise InputError(
            f"{text} has no report",
            numbers=f"looked for {found}",
            hint="`qplan apply` writes report.json beside the artifact; name it, its folder or the artifact",
            code="no-report",
        )
    if found.parent.absolute() != path.absolute() and path.suffix != ".json":
        _check_about(found, path)
    return found


def _check_about(report: Path, artifact: Path) -> None:
    from planner.report.document import read

    about = Path(read(report).artifact).name
    if about != artifact.name:
        raise InputError(
            f"{report} is about {about}, not {artifact.name}",
            hint=f"`qplan verify {artifact}` measures it",
            code="no-report",
        )


def load_run(text: str) -> Run:
    """A run with its report and the header of its artifact.

    Raises:
        InputError: there is no report, or it is damaged.
    """
    from planner.report.bits import bits_of
    from planner.report.bits_checkpoint import bits_of_checkpoint
    from planner.report.document import read
    from planner.report.page import Run

    path = find_report(text)
    report = read(path)
    artifact = path.parent / Path(report.artifact).name
    try:
        bits = bits_of_checkpoint(artifact) if artifact.is_dir() else bits_of(artifact)
        return Run(report=report, where=str(path.parent), bits=bits)
    except (QplanError, OSError) as error:
        note = f"{artifact.name} does not lie beside the report" if not artifact.exists() else str(error)
        return Run(report=report, where=str(path.parent), bits_note=note)


def write_report_page(text: str, output: Path | None = None) -> Path:
    """Write the page of a run, beside its report unless ``output`` says otherwise; its path.

    Raises:
        InputError: no report, or the page cannot be written.
        ExecutionFailed: a file that qplan did not write has the page's name.
    """
    from planner.report.page import report_page

    path = output or find_report(text).parent / PAGE
    check_page(path)
    write_atomically(path, report_page(load_run(text)))
    return path


def write_comparison(runs: tuple[Run, ...], output: Path) -> Path:
    """Write several runs side by side as a page.

    Raises:
        ExecutionFailed: a file that qplan did not write has the page's name.
    """
    from planner.report.page import compare_page

    check_page(output)
    write_atomically(output, compare_page(runs))
    return output


def comparison_document(runs: tuple[Run, ...]) -> list[dict[str, Any]]:
    """The ``runs`` of ``qplan compare --json``."""
    return [_comparison_row(run) for run in runs]


def _comparison_row(run: Run) -> dict[str, Any]:
    report = run.report
    judged = {verdict.quantity: verdict for verdict in report.verdicts}
    plan, variant = report.plan, report.measured_variant
    return {
        "name": report.name,
        "where": run.where,
        "artifact": report.artifact,
        "model": plan.model.name if plan else report.model,
        "method": variant.method if variant else None,
        "type": variant.type if variant else None,
        "group_size": variant.group_size if variant else None,
        "runtime": variant.runtime if variant else None,
        "bits_per_weight": run.bits.bits_per_weight if run.bits else None,
        "ok": report.ok,
        "measured_at": report.measured_at or None,
        "machine": report.hardware.identity() if report.hardware else None,
        "measured": {name: report.measured.get(name) for name in QUANTITIES},
        "same_top_fraction": report.same_top_fraction,
        "predicted": {name: encode(judged[name]) if name in judged else None for name in QUANTITIES},
    }
