"""Where a model runs, which coefficients hold there, and the time that results."""

from __future__ import annotations

from dataclasses import dataclass

from planner.core.candidate import Placement, Variant
from planner.core.hardware import ASSUMED, Cpu, Gpu, HardwareProfile
from planner.estimate.memory import gpu_shares
from planner.estimate.speed_hardware import chip_class, cpu_class, is_ultra
from planner.estimate.speed_terms import Case, cpu_type_class, type_class
from planner.estimate.speed_work import Work

Terms = tuple[tuple[str, float, str], ...]

_BACKENDS = ("cuda", "rocm", "vulkan", "metal", "sycl")


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """A time with its arithmetic."""

    seconds: float
    terms: Terms
    bound_by: str
    case: Case
    fit: str
    split: bool = False
    interval: tuple[float, float] | None = None
    """10 % and 90 % quantiles of ln(measured / predicted), where they are not the fit's own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """Where the work is done: the devices used and the settings that matter."""

    gpus: tuple[Gpu, ...]
    host_bandwidth: float | None
    host_threads: int
    host_class: str
    tensor_parallel: int = 1
    bandwidth_assumed: bool = False
    """The host's bandwidth is an assumption: nobody measured or published it for this machine."""
    hardware: HardwareProfile
    """The whole machine, for kernels that the table chooses by it."""
    shares: tuple[float, ...] = ()
    """Parts of the offloaded layers that the GPUs get; empty: even."""

    def shared(self) -> tuple[tuple[Gpu, float], ...]:
        """Each GPU that gets layers with its share of them."""
        total = sum(self.shares)
        if total <= 0:
            return tuple((gpu, 1 / len(self.gpus)) for gpu in self.gpus)
        return tuple((gpu, part / total) for gpu, part in zip(self.gpus, self.shares, strict=True) if part > 0)

    @property
    def backend(self) -> str:
        """llama.cpp's back end of the devices used, ``cpu`` without one."""
        return self.gpus[0].backend if self.gpus else "cpu"


def site(placement: Placement, hardware: HardwareProfile) -> Site:
    """The devices that ``placement`` uses on ``hardware``."""
    used = hardware.gpus[: max(1, placement.gpu_count)] if placement.gpu_layers > 0 else ()
    return Site(
        gpus=used,
        host_bandwidth=hardware.memory.bandwidth_bytes_per_second,
        host_threads=_useful_threads(placement.threads, hardware.cpu),
        host_class=cpu_class(hardware.cpu),
        tensor_parallel=max(1, placement.tensor_parallel),
        hardware=hardware,
        shares=gpu_shares(placement, used),
        bandwidth_assumed=(hardware.memory.bandwidth_basis or "").startswith(ASSUMED),
    )


def _useful_threads(asked: int | None, cpu: Cpu) -> int:
    """Threads that add speed: the asked ones up to one for each physical core, else llama.cpp's best choice."""
    if asked is None:
        return cpu.inference_threads()
    return min(asked, cpu.physical_core_count or cpu.logical_core_count or asked)


def gpu_case(work: Work, variant: Variant, gpu: Gpu) -> Case:
    """The coefficients' case of ``variant`` on ``gpu``."""
    return Case(
        backend=gpu.backend if gpu.backend in _BACKENDS else "vulkan",
        chip=chip_class(gpu),
        type_class=type_class(variant.main_type),
        moe=work.moe,
        hybrid=work.hybrid,
        gemma=work.gemma,
        ultra=is_ultra(gpu),
        flash=work.flash,
        runtime=variant.runtime,
        method=variant.method,
    )


def cpu_case(work: Work, variant: Variant, where: Site) -> Case:
    """The coefficients' case of ``variant`` on the host's cores."""
    return Case(backend="cpu", chip=where.host_class, type_class=cpu_type_class(variant.main_type), moe=work.moe)
