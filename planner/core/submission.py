"""What somebody measured on one machine, as a file to share: no name of a host or a person, and no path."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from planner.core.hardware import STRICT
from planner.core.measurement import Conditions

FORMAT = "1.0"
KIND = "qplan-measurements"


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedGpu:
    """A GPU of the machine."""

    __pydantic_config__: ClassVar[dict[str, str]] = STRICT

    name: str
    backend: str
    """``cuda``, ``rocm``, ``vulkan``, ``metal`` or ``sycl``."""
    memory_gib: int | None = None
    device: str | None = None
    """Name of its row in qplan's table of devices."""
    driver: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedHardware:
    """What makes two runs the same machine, and nothing that tells whose it is."""

    __pydantic_config__: ClassVar[dict[str, str]] = STRICT

    identity: str
    """qplan's hash of the fields that decide it; it holds no serial number."""
    os: str
    cpu: str
    physical_core_count: int | None = None
    logical_core_count: int | None = None
    ram_gib: int | None = None
    bandwidth_bytes_per_second: float | None = None
    """Read bandwidth of the RAM, where it was measured."""
    gpus: tuple[SharedGpu, ...] = ()

    @property
    def device(self) -> str:
        """A short name: the first GPU, else the processor."""
        return self.gpus[0].name if self.gpus else self.cpu


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedMeasurement:
    """One measured quantity."""

    __pydantic_config__: ClassVar[dict[str, str]] = STRICT

    quantity: str
    """``decode_tokens_per_second``, ``prefill_tokens_per_second``, ``peak_memory_bytes``, ``file_bytes``,
    ``perplexity_ratio`` or ``kl_divergence_nats``."""
    value: float
    low: float
    high: float
    samples: tuple[float, ...] = ()
    model: str
    model_sha256: str
    """Fingerprint of the model's tensor names and shapes, 64 hexadecimal digits."""
    method: str
    runtime: str
    type: str
    group_size: int | None = None
    imatrix: bool = False
    conditions: Conditions
    predicted: float | None = None
    """What qplan had said before."""
    tool_version: str
    """The runtime and its version."""
    date: str
    """Day of the measurement, ``YYYY-MM-DD``, UTC."""
    weights_bytes: float | None = None
    """Of decode: bytes of weights that a token reads. Of prefill: weights that it multiplies."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """A file of measurements of one machine."""

    __pydantic_config__: ClassVar[dict[str, str]] = STRICT

    format_version: str
    kind: str
    qplan_version: str
    hardware: SharedHardware
    measurements: tuple[SharedMeasurement, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Imported:
    """A submission in the store."""

    sha256: str
    """Of its content."""
    source: str
    """Name of the file it came in."""
    imported_at: str
    submission: Submission


@dataclass(frozen=True, slots=True, kw_only=True)
class Complaint:
    """Why a submission is not believed, with the numbers."""

    where: str
    """As ``measurements[3]``."""
    code: str
    what: str
    numbers: str
