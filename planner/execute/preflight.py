"""Checks before anything is written: the model's files, the tools, the disk, the memory, the output's name."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

from planner.core.codec import read_json
from planner.core.errors import ExecutionFailed, InputError, MissingDependency, StalePlan
from planner.core.hardware import HardwareProfile
from planner.core.plan import Plan, Step, disk_peak_bytes
from planner.core.units import MIB, format_bytes
from planner.execute import environments, receipts
from planner.models.fingerprint import WEIGHT_SUFFIXES, sha256_of

DISK_MARGIN_BYTES = 64 * MIB
"""Left free beside the outputs: the file system's own needs and the logs."""
_PACKAGES = {"gguf": ("llama_cpp", "gguf", "numpy", "sentencepiece"), "none": ("numpy",)}
_EXTRA = "gguf"
"""The extra that brings all of them."""


def missing_packages(method: str) -> tuple[str, ...]:
    """Packages that the method's doing half needs and this environment lacks."""
    return tuple(name for name in _PACKAGES.get(method, ()) if importlib.util.find_spec(name) is None)


def check_tools(plan: Plan) -> None:
    """Refuse a plan whose quantizer is not installed.

    Raises:
        MissingDependency: with the extra that brings it, or what installs its environment.
    """
    for step in plan.making_steps():
        name = environments.of_step(step)
        if name:
            environments.python_for(name)
        else:
            check_packages(step.method)


def check_packages(method: str) -> None:
    """Refuse what a method's doing half is needed for where it is not installed.

    Raises:
        MissingDependency: with the extra that brings it.
    """
    lacking = missing_packages(method)
    if lacking:
        raise MissingDependency(
            f"{method} needs packages that are not installed: {', '.join(lacking)}",
            hint=f"`pip install 'qplan[{_EXTRA}]'` (compiles llama.cpp, 7-15 minutes)",
        )


def check_model_files(plan: Plan, model: Path, *, hash_weights: bool = True) -> None:
    """Refuse a plan whose model changed since it was made.

    Args:
        plan: pins the files.
        model: the checkpoint directory or GGUF file.
        hash_weights: False where the step that reads the weights hashes them; their size is looked at now.

    Raises:
        StalePlan: naming the file and what changed.
    """
    folder = model if model.is_dir() else model.parent
    for pinned in plan.model.files:
        path = folder / pinned.name
        try:
            size = path.stat().st_size
        except OSError:
            raise StalePlan(
                f"{path} of the plan's model is gone", hint="make a new plan", code="model-changed"
            ) from None
        same = size == pinned.size_bytes
        if same and pinned.sha256 is not None and (hash_weights or not pinned.name.endswith(WEIGHT_SUFFIXES)):
            same = sha256_of(path) == pinned.sha256
        if not same:
            raise StalePlan(
                f"{path} changed since the plan was made",
                numbers=f"planned for {pinned.size_bytes} bytes, found {size}",
                hint="make a new plan with `qplan plan`",
                code="model-changed",
            )


def check_output(plan: Plan, output: Path) -> None:
    """Refuse a folder that cannot be written, and to replace a file that this plan did not make.

    Raises:
        ExecutionFailed: naming the folder or the file.
    """
    there = next((folder for folder in (output, *output.absolute().parents) if folder.exists()), output)
    if not (there.is_dir() and os.access(there, os.W_OK)):
        raise ExecutionFailed(
            f"{output} cannot be written",
            numbers=f"{there} is {'read-only' if there.is_dir() else 'no folder'}",
            hint="choose another folder with --output",
            code="output-not-writable",
        )
    for step in plan.making_steps():
        path = output / str(step.output)
        receipt = receipts.read(output, step.name)
        ours = receipts.begun(output, step) or (receipt is not None and receipt.output == step.output)
        check_ours(path, ours=ours)


def check_ours(path: Path, *, ours: bool) -> None:
    """Refuse to replace a file or folder that was not made here.

    Raises:
        ExecutionFailed: naming it.
    """
    if path.exists() and not (ours and (path.is_file() or path.is_dir())):
        raise ExecutionFailed(
            f"{path} exists and was not made by this plan",
            hint="choose another folder with --output, or remove it",
            code="output-exists",
        )


def check_replaceable(path: Path, key: str) -> None:
    """Refuse to replace a file that qplan did not write.

    Args:
        path: what is about to be written.
        key: a key that every document of this kind has.

    Raises:
        ExecutionFailed: naming the file.
    """
    if not path.is_file() and not path.is_dir():
        return
    try:
        document = read_json(path)
    except InputError:
        document = None
    if not isinstance(document, dict) or key not in document:
        raise ExecutionFailed(
            f"{path} exists and was not written by qplan",
            hint="choose another name or folder with --output, or remove it",
            code="output-exists",
        )


def check_text(text: Path | None) -> None:
    """Refuse a held-out text that cannot be read now rather than after the quantizing.

    Raises:
        InputError: naming the file.
    """
    if text is not None and not (text.is_file() and os.access(text, os.R_OK)):
        raise InputError(f"the text {text} is no file that can be read", hint="--text takes a file", code="bad-text")


def check_room(steps: tuple[Step, ...], here: HardwareProfile) -> None:
    """Refuse to start what the disk or the memory cannot hold.

    Raises:
        ExecutionFailed: ``no-space`` or ``no-memory`` with needed and free.
    """
    needed = (disk_peak_bytes(steps) or sum(step.predicted_bytes or 0 for step in steps)) + DISK_MARGIN_BYTES
    free = here.disk.free_bytes if here.disk else None
    if steps and free is not None and needed > free:
        raise ExecutionFailed(
            f"not enough disk space at {here.disk.path if here.disk else 'the output'}",
            numbers=f"needs {format_bytes(needed)}, {format_bytes(free)} free",
            hint="free some space or choose another --output",
            code="no-space",
        )
    for step in steps:
        _check_memory(step, step.predicted_peak_bytes, here.memory.usable_bytes(), "memory")
        if here.gpus and step.predicted_gpu_memory is not None:
            wanted = round(step.predicted_gpu_memory.value)
            _check_memory(step, wanted, here.gpus[0].usable_bytes(), f"memory on {here.gpus[0].name}")


def _check_memory(step: Step, needed: int | None, available: int | None, what: str) -> None:
    if needed is None or available is None or needed <= available:
        return
    raise ExecutionFailed(
        f"not enough {what} for the step {step.name!r}",
        numbers=f"needs {format_bytes(needed)}, {format_bytes(available)} available",
        hint="close other programs, or quantize on a machine with more memory",
        code="no-memory",
    )
