"""What a method's doing half is asked: one step with real paths. It crosses a process boundary."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from planner.core.hardware import STRICT
from planner.core.plan import Step


def partial_path(output: Path) -> Path:
    """The temporary name beside ``output`` under which it is written until it is complete."""
    return output.with_name(f".{output.name}.partial")


def journal_path(output: Path) -> Path:
    """Where a step that can be resumed notes how far the partial file of ``output`` is."""
    return output.with_name(f".{output.name}.partial.journal")


def keeps_progress(output: Path) -> bool:
    """Whether an unfinished ``output`` is worth going on from: its journal tells of data on the disk."""
    try:
        return b"units" in journal_path(output).read_bytes()
    except OSError:
        return False


def remove(path: Path) -> None:
    """Remove a file, or a folder with all that is in it; what is not there is no error."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def leave_only_progress(outputs: Sequence[Path]) -> None:
    """Remove what an interrupted step left of ``outputs``, unless a journal beside the first tells how far they are.

    They may be many GB; where there is a journal, the next run goes on from them.
    """
    if keeps_progress(outputs[0]):
        return
    for output in outputs:
        remove(partial_path(output))
    journal_path(outputs[0]).unlink(missing_ok=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedFile:
    """One file to be made of a checkpoint."""

    __pydantic_config__: ClassVar[dict[str, str]] = STRICT

    path: str
    type: str
    """llama.cpp's file type: ``Q4_K_M`` …"""
    tensor_types: dict[str, str]
    """GGUF tensor name → ggml type of every tensor."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeJob:
    """Several files of one checkpoint, which is read once."""

    __pydantic_config__: ClassVar[dict[str, str]] = STRICT

    source: str
    files: tuple[QuantizedFile, ...]
    threads: int = 1
    model_name: str | None = None
    through: str = "auto"
    imatrix: str | None = None
    """File of an importance matrix that guides the kernels."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One step to carry out.

    ``output`` is written completely or not at all: to :func:`partial_path`, then renamed.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = STRICT

    step: Step
    source: str
    """Path of the input: a checkpoint directory or a file."""
    output: str
    imatrix: str | None = None
    """Path of the importance matrix, where the step names one."""
    sensitivity: str | None = None
    """Path of the measured sensitivities, where the step names them."""
    model_name: str | None = None
    """What the artifact calls the model."""
    tensor_types: dict[str, str] | None = None
    """GGUF tensor name → ggml type of every tensor, where the step quantizes a checkpoint."""
    pins: dict[str, str] | None = None
    """SHA-256 that the weight files must have, by name; the step that reads them checks it."""
    threads: int = 1
    calibration_text: str | None = None
    """The text of ``step.calibration``, which was checked against its hash."""
    llama_cpp_directory: str | None = None
    """A llama.cpp checkout whose convert script handles families that qplan does not."""
