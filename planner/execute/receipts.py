"""Receipts: what a finished step made, so that a rerun resumes and an identical output is a no-op."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

from planner.core.codec import canonical_json, content_sha256, decode, read_json, write_atomically
from planner.core.errors import InputError
from planner.core.hardware import STRICT
from planner.core.plan import Plan, Step
from planner.execute import artifacts

FOLDER = ".qplan"


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """A finished step. ``key`` hashes all that decides the output's bytes."""

    __pydantic_config__: ClassVar[dict[str, str]] = STRICT

    step: str
    key: str
    output: str
    size_bytes: int
    """Of a folder: the bytes of its weights."""
    sha256: str
    """Of a folder: the hash of its files' hashes and names."""
    seconds: float
    peak_memory_bytes: int | None = None
    finished_at: str
    resumed: bool = False
    """It went on from what a killed run had left, so that its time is not that of the whole step."""
    notes: tuple[str, ...] = ()
    details: dict[str, str | int | float] = field(default_factory=dict)
    """What a measuring step used and found: tokens, seed, text."""
    tensor_types: tuple[tuple[str, str], ...] = ()
    """Tensor and ggml type of each that a mixture gave a type of its own."""


def step_key(plan: Plan, step: Step, source_key: str) -> str:
    """Hash of the step, its input and the tools: the same key means the same bytes."""
    content = {
        "kind": step.kind,
        "method": step.method,
        "type": step.type,
        "group_size": step.group_size,
        "imatrix": step.imatrix,
        "calibration": step.calibration and replace(step.calibration, location=""),
        **({"settings": step.settings, "gpu": step.gpu_layers > 0} if step.settings else {}),
        **({"finetune": step.finetune} if step.finetune else {}),
        "target": [step.target_bytes, step.probes, step.tensor_types if step.sensitivity is None else ()],
        "source": source_key,
        "tools": plan.tools,
    }
    return content_sha256(content)


def model_key(plan: Plan) -> str:
    """Hash of the model's name, shapes and pinned files."""
    return content_sha256({"name": plan.model.name, "shape": plan.model.shape_sha256, "files": plan.model.files})


def keys(plan: Plan) -> dict[str, str]:
    """The key of every step that makes something, in order."""
    known = {"model": model_key(plan)}
    for step in plan.steps:
        if step.output is not None:
            read = (step.source, step.imatrix, step.sensitivity)
            known[step.name] = step_key(plan, step, "".join(known[name] for name in read if name))
    return known


def path_of(output: Path, step: str) -> Path:
    """Where a step's receipt lies."""
    return output / FOLDER / f"{step}.json"


def write(output: Path, receipt: Receipt) -> None:
    """Keep a receipt."""
    write_atomically(path_of(output, receipt.step), canonical_json(receipt) + "\n")
    _begun_path(output, receipt.step).unlink(missing_ok=True)


def begin(output: Path, step: Step) -> None:
    """Note that a step is about to make its output: killed before its receipt, the file is still known as ours."""
    write_atomically(_begun_path(output, step.name), canonical_json({"output": step.output}) + "\n")


def begun(output: Path, step: Step) -> bool:
    """Whether a step that would make this very output was started here and left no receipt."""
    with contextlib.suppress(InputError):
        noted = read_json(_begun_path(output, step.name))
        return isinstance(noted, dict) and noted.get("output") == step.output
    return False


def _begun_path(output: Path, step: str) -> Path:
    return output / FOLDER / f"{step}.begun.json"


def read(output: Path, step: str) -> Receipt | None:
    """A step's receipt; ``None`` if there is none or it is damaged (the step then runs again)."""
    with contextlib.suppress(InputError):
        return decode(Receipt, read_json(path_of(output, step)), what="the receipt")
    return None


def valid(output: Path, step: Step, key: str) -> Receipt | None:
    """The receipt of a step whose output is still there, unchanged and made from the same input."""
    receipt = read(output, step.name)
    if receipt is None or receipt.key != key or receipt.output != step.output:
        return None
    made = output / receipt.output
    try:
        same = artifacts.size_bytes(made) == receipt.size_bytes and artifacts.sha256(made) == receipt.sha256
    except (OSError, InputError):
        return None
    return receipt if same else None
