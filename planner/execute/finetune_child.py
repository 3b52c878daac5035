"""``python -m planner.execute.finetune_child``: train an adapter with the very script that is left beside it."""

from __future__ import annotations

import runpy
import shutil
import tempfile
from pathlib import Path
from typing import Any

from planner.core.codec import decode
from planner.core.errors import InputError
from planner.core.job import Job
from planner.execute.process import Progress, serve
from planner.execute.resident import peak_resident_bytes
from planner.methods import torch_run
from planner.methods.directory_run import atomic_directory
from planner.runtimes import finetuning

_LEFT_OVER = "checkpoints"


def work(request: object, progress: Progress) -> dict[str, Any]:
    """A ``finetune`` step; the answer holds the peak memory and what the script tells."""
    job = decode(Job, request, what="the job")
    if job.step.finetune is None or job.step.calibration is None or job.calibration_text is None:
        raise InputError(f"the step {job.step.name!r} names nothing to train with", code="bad-plan")
    torch_run.prepare_process(job)
    suffix = ".jsonl" if job.step.calibration.location.endswith(".jsonl") else ".txt"
    with atomic_directory(Path(job.output)) as partial, tempfile.TemporaryDirectory(prefix="qplan-") as folder:
        data = Path(folder) / f"data{suffix}"
        data.write_text(job.calibration_text, encoding="utf-8")
        script = partial / finetuning.SCRIPT
        text = finetuning.script(job.step.finetune, job.source, threads=job.threads)
        script.write_text(text, encoding="utf-8")
        told = _run(script, data, partial, progress)
        shutil.rmtree(partial / _LEFT_OVER, ignore_errors=True)
    details = {name: value for name, value in told.items() if isinstance(value, (int, float))}
    details |= {"first_step_loss": told["losses"][0], "last_step_loss": told["losses"][-1]}
    return {"details": details, "peak_memory_bytes": peak_resident_bytes()}


def _run(script: Path, data: Path, output: Path, progress: Progress) -> dict[str, Any]:
    """Call the script's ``main`` as its command line would.

    Raises:
        InputError: the data are not what the script takes.
    """

    def tell(step: int, of: int, loss: float) -> None:
        progress(step, of)

    try:
        found: dict[str, Any] = runpy.run_path(str(script), run_name="qplan_training")["main"](
            ["--data", str(data), "--output", str(output)], tell
        )
    except SystemExit as error:
        raise InputError(
            "the data cannot be trained on",
            numbers=str(error.code).replace(str(data), "the dataset"),
            hint="give more text with --dataset, or a shorter --sequence-length",
            code="bad-dataset",
        ) from None
    return found


if __name__ == "__main__":
    raise SystemExit(serve(work))
