"""The use case behind ``qplan imatrix``: a matrix of a model that is on this machine."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from planner import FORMAT_VERSION, models
from planner.core.errors import InputError
from planner.core.job import Job
from planner.core.model import ModelSpec
from planner.core.plan import Step
from planner.execute import calibration as texts
from planner.execute import preflight
from planner.execute.process import run_child
from planner.formats.gguf_header import MAGIC
from planner.methods import gguf
from planner.models.fingerprint import sha256_of


@dataclass(frozen=True, slots=True, kw_only=True)
class ImatrixWish:
    """What to compute, from what, and how."""

    model: str
    output: Path
    text: Path | None = None
    chunks: int | None = None
    seed: int = 0
    outputs: bool = False
    threads: int | None = None
    gpu_layers: int = 0


def make_imatrix(wish: ImatrixWish, progress: Callable[[str, float], None]) -> dict[str, Any]:
    """Compute the matrix and write it; what was used and found.

    A checkpoint is converted to 16 bits into a temporary folder beside the output first.

    Raises:
        InputError: the model is not on this machine, or the text is unfit.
        ExecutionFailed: the output is somebody else's file, or a child failed.
        MissingDependency: llama-cpp-python is not installed.
    """
    preflight.check_packages("gguf")
    _check_replaceable(wish.output)
    model = models.resolve(wish.model)
    source = Path(model.source.location)
    if model.source.kind not in ("directory", "gguf") or not source.exists():
        raise InputError(
            f"{wish.model} is not on this machine",
            hint="name a checkpoint directory or a GGUF file; `qplan plan` downloads a model and makes its own matrix",
            code="not-local",
        )
    text = texts.from_text(wish.text, wish.chunks, wish.seed) if wish.text else texts.built_in(wish.chunks, wish.seed)
    step = Step(
        name="imatrix",
        kind="imatrix",
        method="gguf",
        calibration=text,
        gpu_layers=wish.gpu_layers,
        outputs=wish.outputs,
    )
    began = time.monotonic()
    folder = wish.output.absolute().parent
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".qplan-", dir=folder) as scratch:
        threads = wish.threads or _threads()
        full = source if model.source.is_gguf else _converted(model, source, Path(scratch), threads, progress)
        job = Job(step=step, source=str(full), output=str(wish.output), model_name=model.name, threads=threads)
        made = run_child(
            "planner.verify.step_child",
            job,
            what="computing the importance matrix",
            log=Path(scratch) / "log",
            progress=lambda done, total: progress("collect activations", done / total),
        )
    return {
        "format_version": FORMAT_VERSION,
        "model": model.name,
        "output": str(wish.output),
        "size_bytes": wish.output.stat().st_size,
        "sha256": sha256_of(wish.output),
        "seconds": round(time.monotonic() - began, 3),
        **made["details"],
        "notes": made["notes"],
    }


def _threads() -> int:
    from planner.workflow.survey import survey

    return survey().cpu.inference_threads()


def _converted(
    model: ModelSpec, source: Path, folder: Path, threads: int, progress: Callable[[str, float], None]
) -> Path:
    """The checkpoint as a 16-bit GGUF file in ``folder``."""
    variant = gguf.variant("F16" if model.dtype.upper() in {"F16", "FLOAT16"} else "BF16")
    step = next(step for step in gguf.steps(model, variant) if step.kind == "convert")
    job = Job(step=step, source=str(source), output=str(folder / "model.gguf"), model_name=model.name, threads=threads)
    run_child(
        "planner.execute.child",
        job,
        what="converting the checkpoint",
        log=folder / "convert.log",
        progress=lambda done, total: progress("convert", done / total if total else 0.0),
    )
    return folder / "model.gguf"


def _check_replaceable(output: Path) -> None:
    """Only an earlier matrix is replaced.

    Raises:
        InputError: the file is another's.
    """
    if output.is_dir() or (output.is_file() and not _is_matrix(output)):
        raise InputError(
            f"{output} exists and is no importance matrix",
            hint="choose another name with -o, or remove it",
            code="output-exists",
        )


def _is_matrix(path: Path) -> bool:
    from planner.core.errors import QplanError
    from planner.formats.gguf import read_header

    try:
        with path.open("rb") as file:
            return file.read(4) == MAGIC and read_header(path).metadata.get("general.type") == "imatrix"
    except (OSError, QplanError):
        return False
