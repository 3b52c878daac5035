"""A plan: what will be run, on which machine, from which files, and what it should measure."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

from planner.core.candidate import Placement, Variant
from planner.core.codec import content_sha256, decode, encode
from planner.core.estimates import Estimate, Prediction
from planner.core.finetuning import FinetuneSettings
from planner.core.hardware import STRICT
from planner.core.workload import Workload

FINETUNE = "finetune"
STEP_KINDS = ("convert", "imatrix", "sensitivity", "quantize", FINETUNE, "verify")

BUILT_IN, TEXT, MATRIX = "built-in", "text", "imatrix"
"""Kinds of :class:`CalibrationSource`: the text that comes with qplan, a text of the user's, and a finished matrix."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationSource:
    """What a step calibrates with, pinned: a text that is run through the model, or an importance matrix as it is."""

    __pydantic_config__: ClassVar[dict[str, str]] = STRICT

    kind: str
    """:data:`BUILT_IN`, :data:`TEXT` or :data:`MATRIX`."""
    location: str
    """Path of the file or folder; the name of a built-in text."""
    sha256: str
    size_bytes: int
    chunks: int | None = None
    """Chunks that are used; ``None``: all."""
    chunk_tokens: int = 512
    seed: int = 0
    """Draws the chunks where not all are used."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How a step makes the layers of a safetensors artifact, beside its type and group size."""

    __pydantic_config__: ClassVar[dict[str, str]] = STRICT

    quantizer: str
    """A name in ``data/quantizers.toml``, which tells the environment that it runs in."""
    format: str
    symmetric: bool = True
    act_order: bool = False
    double_quantization: bool = False
    compute_dtype: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One typed step; it names no program and no path outside the output directory.

    ``source`` is the ``name`` of an earlier step whose output it reads, or ``model`` for the plan's model.
    ``output`` is a plain file or directory name inside the output directory.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = STRICT

    name: str
    kind: str
    method: str
    source: str = "model"
    output: str | None = None
    type: str | None = None
    group_size: int | None = None
    settings: Settings | None = None
    """Of a step that makes a safetensors artifact."""
    finetune: FinetuneSettings | None = None
    """Of a step that trains an adapter; ``calibration`` is its data."""
    imatrix: str | None = None
    """Name of the step that makes the importance matrix."""
    calibration: CalibrationSource | None = None
    """What a step that measures the model reads."""
    sensitivity: str | None = None
    """Name of the step that measures how much each tensor bears; the quantizing step chooses types by it."""
    target_bytes: int | None = None
    """Most bytes that the output may have, where the types are chosen for it."""
    tensor_types: tuple[tuple[str, str], ...] = ()
    """Tensor and ggml type of each, as planned; a step with ``sensitivity`` chooses again within ``target_bytes``."""
    probes: int | None = None
    """Parts of the model whose effect on the output is measured one by one."""
    gpu_layers: int = 0
    """Layers on the GPU while the model is run to be measured."""
    outputs: bool = False
    """The importance matrix tells of the output matrix too."""
    intermediate: bool = False
    """The output is only read by a later step and is removed at the end."""
    predicted_bytes: int | None = None
    """Size of the output; preflight asks for this much disk."""
    predicted_peak_bytes: int | None = None
    """Most RAM the step should take; preflight asks for this much memory."""
    predicted_scratch_bytes: int | None = None
    """Disk taken besides the output while the step runs."""
    predicted_memory: Prediction | None = None
    """Peak resident memory in bytes, as the system will report it: pages of mapped files are counted."""
    predicted_gpu_memory: Prediction | None = None
    """Peak memory in bytes of the GPU that does the work."""
    predicted_seconds: Prediction | None = None
    """Time it takes, the hash of the output included."""


def disk_peak_bytes(steps: tuple[Step, ...]) -> int | None:
    """Most disk that ``steps`` take at any moment: outputs stay until the end, scratch goes with its step."""
    kept, peak = 0, 0
    for step in steps:
        if step.predicted_bytes is None:
            return None
        kept += step.predicted_bytes
        peak = max(peak, kept + (step.predicted_scratch_bytes or 0))
    return peak


@dataclass(frozen=True, slots=True, kw_only=True)
class PinnedFile:
    """A file of the model as it was when the plan was made."""

    __pydantic_config__: ClassVar[dict[str, str]] = STRICT

    name: str
    size_bytes: int
    sha256: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanModel:
    """The model a plan is for."""

    __pydantic_config__: ClassVar[dict[str, str]] = STRICT

    name: str
    architecture: str
    kind: str
    location: str
    revision: str | None = None
    parameter_count: int
    shape_sha256: str
    files: tuple[PinnedFile, ...] = ()

    @property
    def is_gguf(self) -> bool:
        """Whether the weights are in a GGUF file, here or on the hub."""
        return self.kind == "gguf" or any(file.name.endswith(".gguf") for file in self.files)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanHardware:
    """The machine a plan is for: the hash, and the plain fields so that a mismatch prints as a diff."""

    __pydantic_config__: ClassVar[dict[str, str]] = STRICT

    identity: str
    name: str
    fields: dict[str, str | int | float | list[str] | None]
    simulated: bool = False
    """Made with ``--profile``: it cannot be applied unless this machine is the same."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Expectation:
    """What a measurement of the result should give; outside ``low`` … ``high`` is exit code 5."""

    __pydantic_config__: ClassVar[dict[str, str]] = STRICT

    quantity: str
    predicted: float
    low: float
    high: float
    basis: str
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Everything ``apply`` needs, and nothing a stranger could abuse."""

    __pydantic_config__: ClassVar[dict[str, str]] = STRICT

    format_version: str
    qplan_version: str
    created_at: str
    model: PlanModel
    hardware: PlanHardware
    workload: Workload
    variant: Variant
    placement: Placement
    estimate: Estimate
    expectations: tuple[Expectation, ...]
    steps: tuple[Step, ...]
    tools: dict[str, str]
    """Versions of the packages that will do the work, as seen when planning (empty: not installed)."""
    artifact: str
    """Name of the final file or directory inside the output directory."""
    reasons: tuple[str, ...] = ()
    content_sha256: str = ""
    """SHA-256 of the canonical JSON of all other fields."""

    def sealed(self) -> Plan:
        """This plan as it reads back from a file (whole numbers become floats), with its ``content_sha256``."""
        settled = decode(Plan, encode(self), what="the plan")
        return dataclasses.replace(settled, content_sha256=settled.computed_sha256())

    def computed_sha256(self) -> str:
        """The hash the content has now."""
        return content_sha256(dataclasses.replace(self, content_sha256=""))

    def making_steps(self) -> tuple[Step, ...]:
        """Steps that make a file, in order."""
        return tuple(step for step in self.steps if step.output is not None)

    def disk_peak_bytes(self) -> int | None:
        """Most disk that all steps together take at any moment; ``None`` where a step's size is not known."""
        return disk_peak_bytes(self.making_steps())

    def artifact_step(self) -> Step:
        """The step that makes the artifact."""
        return next(step for step in self.steps if step.output == self.artifact)

    def finetune_step(self) -> Step | None:
        """The step that trains an adapter, if the plan is for one."""
        return next((step for step in self.steps if step.kind == FINETUNE), None)

    def reference_steps(self) -> tuple[Step, ...]:
        """The step whose 16-bit output quality is measured against, if the plan makes one."""
        return tuple(step for step in self.steps if step.kind == "convert")
