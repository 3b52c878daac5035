"""The machine as a value: what the probe found, what a profile says, what a plan is pinned to."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from typing import ClassVar

from planner.core.strict import STRICT as STRICT

ASSUMED = "assumed"
"""How the basis of a bandwidth begins that nobody measured or published for this machine."""


def usable_core_count() -> int:
    """Logical processors that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One accelerator. Unknown is ``None``; memory is this device's own and is never summed."""

    __pydantic_config__: ClassVar[dict[str, str]] = STRICT

    name: str
    vendor: str
    """``nvidia``, ``amd``, ``intel`` or ``apple``."""
    backend: str
    """What llama.cpp would use: ``cuda``, ``rocm``, ``vulkan``, ``metal`` or ``sycl``."""
    memory_total_bytes: int | None = None
    memory_free_bytes: int | None = None
    working_set_bytes: int | None = None
    """What the driver lets one process use, where that is less than the total (Apple Silicon, APUs)."""
    unified_memory: bool = False
    """The GPU's memory is the machine's RAM: counted once, on the GPU."""
    device: str | None = None
    """Name of its row in ``data/devices.csv``."""
    architecture: str | None = None
    compute_capability: str | None = None
    bandwidth_bytes_per_second: float | None = None
    fp16_flops_per_second: float | None = None
    """Dense FP16 rate of the matrix units, or of the vector units where there are none."""
    link: str | None = None
    """Host link as in ``PCIe 4.0 x16``."""
    link_bytes_per_second: float | None = None
    driver: str | None = None
    core_count: int | None = None

    def usable_bytes(self) -> int | None:
        """What a plan may count on: the free memory, else the working set, else the total."""
        known = [v for v in (self.memory_free_bytes, self.working_set_bytes, self.memory_total_bytes) if v is not None]
        return min(known) if known else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Cpu:
    """The processor. ``simd`` is sorted and in the spelling of ``data/simd.csv`` (``avx2``, ``neon``, …)."""

    __pydantic_config__: ClassVar[dict[str, str]] = STRICT

    model: str
    architecture: str
    """``x86_64`` or ``aarch64``."""
    vendor: str | None = None
    physical_core_count: int | None = None
    logical_core_count: int | None = None
    performance_core_count: int | None = None
    """Cores of the fast kind, on a machine that has two kinds."""
    simd: tuple[str, ...] = ()
    numa_node_count: int | None = None
    device: str | None = None
    """Name of its row in ``data/devices.csv``."""

    def inference_threads(self) -> int:
        """Threads llama.cpp should use: the fast physical cores, as hyper-threads and slow cores only wait."""
        counts = (self.performance_core_count, self.physical_core_count, self.logical_core_count)
        return next((count for count in counts if count), 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """RAM of the host."""

    __pydantic_config__: ClassVar[dict[str, str]] = STRICT

    total_bytes: int | None = None
    available_bytes: int | None = None
    limit_bytes: int | None = None
    """The control group's limit, where one is set."""
    bandwidth_bytes_per_second: float | None = None
    """Read bandwidth with all cores; ``bandwidth_basis`` says whether it was measured or published."""
    bandwidth_basis: str | None = None

    def usable_bytes(self) -> int | None:
        """What a plan may count on: available memory within the control group's limit."""
        known = [v for v in (self.available_bytes, self.limit_bytes, self.total_bytes) if v is not None]
        return min(known) if known else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Disk:
    """The file system a model would be written to."""

    __pydantic_config__: ClassVar[dict[str, str]] = STRICT

    path: str
    free_bytes: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class HardwareProfile:
    """A machine: probed here, or read from ``profiles/``."""

    __pydantic_config__: ClassVar[dict[str, str]] = STRICT

    name: str
    os: str
    cpu: Cpu
    memory: Memory
    gpus: tuple[Gpu, ...] = ()
    disk: Disk | None = None
    notes: tuple[str, ...] = ()
    """What could not be found out, and why."""
    source: str = "probe"
    """``probe``, or where a profile's figures come from."""
    date: str | None = None

    def identity_fields(self) -> dict[str, object]:
        """The plain fields that make two runs the same machine: no free memory, no driver, no path."""
        return {
            "os": self.os,
            "cpu": self.cpu.model,
            "physical_cores": self.cpu.physical_core_count,
            "logical_cores": self.cpu.logical_core_count,
            "ram_gib": round(self.memory.total_bytes / 2**30) if self.memory.total_bytes else None,
            "gpus": [
                f"{gpu.name} {round(gpu.memory_total_bytes / 2**30) if gpu.memory_total_bytes else '?'} GiB"
                for gpu in self.gpus
            ],
        }

    def identity(self) -> str:
        """A short stable hash of :meth:`identity_fields`, for the store and for plans."""
        canonical = json.dumps(self.identity_fields(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()[:16]
