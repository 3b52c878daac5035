"""NVIDIA GPUs through NVML: every call goes through :func:`ask`, which has a default for "not supported"."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Any

from planner.core import devices
from planner.core.hardware import Gpu, Memory
from planner.probe.reader import Reader, whole

_MAX_BYTES = 1 << 42
_MAX_GPUS = 64
# Chips whose memory is the machine's RAM, so that NVML has no framebuffer to report.
_UNIFIED_NAMES = ("gb10", "orin", "thor", "xavier", "tegra", "jetson")
_DRIVER_FILES = (
    "/dev/nvidiactl",
    "/dev/dxg",  # WSL 2
    "/proc/driver/nvidia/version",
    "/usr/lib/wsl/lib/libnvidia-ml.so.1",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class NvmlDevice:
    """What NVML answered about one GPU, as it came; ``None`` where it had no answer."""

    name: Any = None
    memory_total: Any = None
    memory_free: Any = None
    compute_capability: Any = None
    """(major, minor)."""
    pcie_generation: Any = None
    """The highest that card and slot agree on: an idle card drops its link to generation 1."""
    pcie_width: Any = None
    memory_clock_mhz: Any = None
    memory_bus_bits: Any = None
    core_count: Any = None
    mig_mode: Any = None
    """(current, pending); 1 is on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NvmlCapture:
    """Everything NVML answered."""

    driver: Any = None
    gpus: tuple[NvmlDevice, ...] = ()
    failure: str | None = None


def present(reader: Reader) -> bool:
    """Whether an NVIDIA driver may be there, without importing pynvml (30 ms)."""
    if os.name == "nt":
        return reader.has_tool("nvidia-smi")
    return any(reader.exists(path) for path in _DRIVER_FILES) or reader.has_tool("nvidia-smi")


def ask(nvml: Any, function: str, *arguments: Any) -> Any:
    """``nvml.function(*arguments)``, or ``None`` where the library or the device does not support it."""
    call = getattr(nvml, function, None)
    if call is None:
        return None
    try:
        return call(*arguments)
    except (nvml.NVMLError, UnicodeDecodeError, OSError):
        return None


def capture(nvml: Any = None) -> NvmlCapture:
    """All answers of NVML on this machine; ``nvml`` is the pynvml module or a stand-in with its functions."""
    if nvml is None:
        try:
            import pynvml
        except ImportError:
            return NvmlCapture(failure="an NVIDIA driver is present, but the package nvidia-ml-py is not installed")
        nvml = pynvml
    try:
        nvml.nvmlInit()
    except (nvml.NVMLError, OSError) as error:
        return NvmlCapture(failure=f"NVML does not start: {error}")
    try:
        count = whole(ask(nvml, "nvmlDeviceGetCount"), low=0, high=_MAX_GPUS)
        if count is None:
            return NvmlCapture(failure="NVML does not say how many GPUs there are")
        handles = [
            handle for i in range(count) for handle in _instances(nvml, ask(nvml, "nvmlDeviceGetHandleByIndex", i))
        ]
        driver = ask(nvml, "nvmlSystemGetDriverVersion")
        return NvmlCapture(driver=driver, gpus=tuple(_device(nvml, handle) for handle in handles))
    finally:
        ask(nvml, "nvmlShutdown")


def _instances(nvml: Any, handle: Any) -> list[Any]:
    """The device itself, or its MIG instances where it is split into such."""
    if handle is None:
        return []
    mode = ask(nvml, "nvmlDeviceGetMigMode", handle)
    if not mode or mode[0] != 1:
        return [handle]
    count = whole(ask(nvml, "nvmlDeviceGetMaxMigDeviceCount", handle), low=0, high=16) or 0
    found = [ask(nvml, "nvmlDeviceGetMigDeviceHandleByIndex", handle, index) for index in range(count)]
    return [instance for instance in found if instance is not None] or [handle]


def _device(nvml: Any, handle: Any) -> NvmlDevice:
    memory = ask(nvml, "nvmlDeviceGetMemoryInfo", handle)
    clock = getattr(nvml, "NVML_CLOCK_MEM", 2)
    return NvmlDevice(
        name=ask(nvml, "nvmlDeviceGetName", handle),
        memory_total=getattr(memory, "total", None),
        memory_free=getattr(memory, "free", None),
        compute_capability=ask(nvml, "nvmlDeviceGetCudaComputeCapability", handle),
        pcie_generation=ask(nvml, "nvmlDeviceGetMaxPcieLinkGeneration", handle),
        pcie_width=ask(nvml, "nvmlDeviceGetMaxPcieLinkWidth", handle),
        memory_clock_mhz=ask(nvml, "nvmlDeviceGetMaxClockInfo", handle, clock),
        memory_bus_bits=ask(nvml, "nvmlDeviceGetMemoryBusWidth", handle),
        core_count=ask(nvml, "nvmlDeviceGetNumGpuCores", handle),
        mig_mode=ask(nvml, "nvmlDeviceGetMigMode", handle),
    )


def parse(captured: NvmlCapture, memory: Memory) -> tuple[tuple[Gpu, ...], list[str]]:
    """The GPUs of a capture, and notes.

    Args:
        captured: what NVML answered.
        memory: RAM of the host, which is the memory of a GPU that has none of its own.
    """
    if captured.failure:
        return (), [captured.failure]
    gpus, notes = [], []
    driver = _text(captured.driver)
    for index, raw in enumerate(captured.gpus):
        gpu, found = _gpu(raw, memory, driver)
        gpus.append(gpu)
        notes += [f"GPU {index} ({gpu.name}): {note}" for note in found]
    return tuple(gpus), notes


def _text(value: Any) -> str | None:
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    text = " ".join(str(value or "").replace("\0", "").split())
    return text if text.isprintable() and text.lower() not in ("", "n/a", "[n/a]", "unknown") else None


def _gpu(raw: NvmlDevice, memory: Memory, driver: str | None) -> tuple[Gpu, list[str]]:
    notes: list[str] = []
    name = _text(raw.name) or "NVIDIA GPU"
    total = whole(raw.memory_total, low=1 << 26, high=_MAX_BYTES)
    free = whole(raw.memory_free, high=total or _MAX_BYTES)
    row = devices.find(name, memory_bytes=total)
    unified = (row is not None and row.unified) or any(word in name.lower() for word in _UNIFIED_NAMES)
    if unified:
        total, free = memory.total_bytes, memory.available_bytes
        notes.append("its memory is the machine's RAM, and counted there")
    elif total is None:
        notes.append("the driver does not report its memory")
    elif free is None:
        notes.append("the driver does not report how much of its memory is free")
    if isinstance(raw.mig_mode, (tuple, list)) and raw.mig_mode and raw.mig_mode[0] == 1:
        notes.append("it is split by MIG, and each instance has a part of the bandwidth")
    link = None if unified else _link(raw)
    bandwidth = row.bandwidth_bytes_per_second if row else _clocked_bandwidth(raw)
    if row is None:
        basis = "bandwidth is from its memory clock and bus" if bandwidth else "its bandwidth is unknown"
        notes.append(f"it is not in the device table; {basis}")
    gpu = Gpu(
        name=name,
        vendor="nvidia",
        backend="cuda",
        memory_total_bytes=total,
        memory_free_bytes=free,
        unified_memory=unified,
        device=row.device if row else None,
        architecture=row.architecture if row else None,
        compute_capability=_capability(raw.compute_capability) or (row.compute_capability if row else None),
        bandwidth_bytes_per_second=bandwidth,
        fp16_flops_per_second=row.fp16_flops_per_second if row else None,
        link=link,
        link_bytes_per_second=devices.link_bytes_per_second(link),
        driver=driver,
        core_count=whole(raw.core_count, high=1 << 20) or (row.core_count if row else None),
    )
    return gpu, notes


def _capability(value: Any) -> str | None:
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        return None
    major, minor = whole(value[0], high=99), whole(value[1], low=0, high=9)
    return None if major is None or minor is None else f"{major}.{minor}"


def _link(raw: NvmlDevice) -> str | None:
    generation, width = whole(raw.pcie_generation, high=6), whole(raw.pcie_width, high=32)
    return None if generation is None or width is None else f"PCIe {generation}.0 x{width}"


def _clocked_bandwidth(raw: NvmlDevice) -> float | None:
    """2 transfers per clock x bus width: 2 x 10,501 MHz x 384 bit / 8 = 1,008 GB/s on an RTX 4090."""
    clock, bus = whole(raw.memory_clock_mhz, low=100, high=100_000), whole(raw.memory_bus_bits, low=32, high=16_384)
    return None if clock is None or bus is None else 2 * clock * 1e6 * bus / 8


def visible(gpus: tuple[Gpu, ...], setting: str | None) -> tuple[tuple[Gpu, ...], list[str]]:
    """The GPUs that ``CUDA_VISIBLE_DEVICES`` leaves, and a note if it takes one away.

    Only indices are understood; with UUIDs all GPUs stay and the note says so.
    """
    if setting is None:
        return gpus, []
    chosen: list[Gpu] = []
    for part in filter(None, (part.strip() for part in setting.split(","))):
        if part.lstrip("-").isdigit():
            index = whole(part, low=0, high=len(gpus) - 1)
            if index is None:
                break  # CUDA stops at the first index that does not exist
            chosen.append(gpus[index])
        elif part.lower() in ("nodevfiles", "none", "void"):
            break
        else:
            return gpus, [f"CUDA_VISIBLE_DEVICES={setting} is not by index and was not applied"]
    notes = (
        [f"CUDA_VISIBLE_DEVICES={setting} leaves {len(chosen)} of {len(gpus)} GPUs"] if len(chosen) < len(gpus) else []
    )
    return tuple(chosen), notes


def nvidia_gpus(reader: Reader, memory: Memory) -> tuple[tuple[Gpu, ...], list[str]]:
    """NVIDIA GPUs of this machine and notes; a Jetson without NVML is known by its board."""
    board = " ".join(reader.line("/proc/device-tree/model").split())
    gpus: tuple[Gpu, ...] = ()
    notes: list[str] = []
    if present(reader):
        gpus, notes = parse(capture(), memory)
    if not gpus and "jetson" in board.lower():
        return (_jetson(board, memory),), [f"{board}: its GPU is known by the board's name"]
    gpus = tuple(_board_row(gpu, board) for gpu in gpus)
    left, hidden = visible(gpus, os.environ.get("CUDA_VISIBLE_DEVICES"))
    return left, notes + hidden


def _jetson(board: str, memory: Memory) -> Gpu:
    gpu = Gpu(
        name=board,
        vendor="nvidia",
        backend="cuda",
        unified_memory=True,
        memory_total_bytes=memory.total_bytes,
        memory_free_bytes=memory.available_bytes,
    )
    return _board_row(gpu, board)


def _board_row(gpu: Gpu, board: str) -> Gpu:
    """A Jetson's GPU says only ``Orin (nvgpu)``; the board's name has the row."""
    row = devices.find(board) if gpu.device is None and gpu.unified_memory and board else None
    if row is None:
        return gpu
    return replace(
        gpu,
        device=row.device,
        architecture=row.architecture,
        compute_capability=gpu.compute_capability or row.compute_capability,
        bandwidth_bytes_per_second=row.bandwidth_bytes_per_second,
        fp16_flops_per_second=row.fp16_flops_per_second,
        core_count=row.core_count,
    )
