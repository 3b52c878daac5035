"""Devices of ``data/devices.csv`` as machines: what a GPU, chip or CPU of the table makes of a typical host."""

from __future__ import annotations

import dataclasses
import re

from planner.core.data import number, read_table
from planner.core.device_table import CPU_KINDS, GPU_KINDS, DeviceRow, find, names, nearest
from planner.core.errors import UsageError
from planner.core.hardware import Cpu, Gpu, HardwareProfile, Memory
from planner.core.units import GIB

__all__ = [
    "BACKENDS",
    "DeviceRow",
    "apple_working_set_bytes",
    "cpu_from_row",
    "find",
    "gpu_from_row",
    "hardware_from_device",
    "link_bytes_per_second",
    "names",
    "nearest",
]

# GT/s per lane and line code of each generation: PCI-SIG base specifications 1.1, 2.1, 3.1, 4.0, 5.0 and 6.0.
_PCIE = {
    1: (2.5, 8 / 10),
    2: (5.0, 8 / 10),
    3: (8.0, 128 / 130),
    4: (16.0, 128 / 130),
    5: (32.0, 128 / 130),
    6: (64.0, 242 / 256),
}
_LINK = re.compile(r"PCIe (\d)(?:\.\d)? x(\d+)")


def link_bytes_per_second(link: str | None) -> float | None:
    """Bytes per second in one direction of a link such as ``PCIe 4.0 x16``: lanes x GT/s x line code / 8.

    Returns:
        31.5e9 for ``PCIe 4.0 x16``; ``None`` for a text that is no PCIe link.
    """
    match = _LINK.fullmatch(link or "")
    if match is None or int(match[1]) not in _PCIE or int(match[2]) not in (1, 2, 4, 8, 12, 16, 32):
        return None
    rate, code = _PCIE[int(match[1])]
    return int(match[2]) * rate * 1e9 * code / 8


# Apple's recommendedMaxWorkingSetSize as llama.cpp prints it: 10922.67 MiB of 16 GiB and 21845.34 of 32 (2/3);
# 49152 of 64 and 73728 of 96 (3/4). https://github.com/ggml-org/llama.cpp/issues/1870, /3213; ollama/ollama#434
_APPLE_LARGE_BYTES = 36 * GIB


def apple_working_set_bytes(ram_bytes: int) -> int:
    """GPU working set that macOS grants by default: two thirds of the RAM, three quarters from 36 GiB on."""
    return ram_bytes * 3 // 4 if ram_bytes >= _APPLE_LARGE_BYTES else ram_bytes * 2 // 3


_BACKENDS = {"nvidia": "cuda", "amd": "rocm", "intel": "sycl", "apple": "metal"}
_ARM_VENDORS = frozenset({"apple", "ampere", "broadcom", "cix", "rockchip", "qualcomm", "nvidia"})
BACKENDS = ("cuda", "rocm", "vulkan", "metal", "sycl", "cpu")
_VENDOR_OF_BACKEND = {"cuda": "nvidia", "rocm": "amd", "metal": "apple"}
"""Back ends that run on one vendor's GPUs only; Vulkan and SYCL drivers exist for several."""


def hardware_from_device(
    name: str, *, count: int = 1, backend: str | None = None, ram_bytes: int | None = None
) -> HardwareProfile:
    """The machine that ``--device NAME`` simulates.

    A discrete GPU stands in a host of its time: cores and memory bandwidth come from ``data/hosts.csv`` by PCIe
    generation and kind, and its RAM is unknown unless given. A chip with unified memory has the largest memory that
    is sold with it unless ``ram_bytes`` says otherwise. A CPU, or ``backend="cpu"``, gives a machine without GPUs.

    Args:
        name: a name that :func:`planner.core.devices.find` knows.
        count: GPUs of this kind, at least 1.
        backend: ``cuda``, ``rocm``, ``vulkan``, ``metal``, ``sycl`` or ``cpu``; by default the vendor's own.
        ram_bytes: RAM of the host, or the unified memory.

    Raises:
        UsageError: an unknown device or backend, or a count below 1.
    """
    row = find(name)
    if row is None:
        raise UsageError(
            f"no device is called {name!r}",
            hint=f"near it: {', '.join(nearest(name)) or 'nothing'}; names are those of data/devices.csv",
            code="unknown-device",
        )
    _check_backend(row.device, row.vendor, backend)
    if count < 1:
        raise UsageError(f"a machine cannot have {count} devices", hint="give 1 or more", code="bad-count")
    if row.kind in GPU_KINDS and not row.unified:
        return _discrete(row, count, backend, ram_bytes)
    return _integrated(row, backend, ram_bytes)


def with_backend(hardware: HardwareProfile, backend: str) -> HardwareProfile:
    """The machine with its GPUs run by ``backend``, as an NVIDIA one by ``vulkan``; ``cpu`` leaves it as it is.

    Raises:
        UsageError: there is no such back end, or none for one of the GPUs.
    """
    for gpu in hardware.gpus:
        _check_backend(gpu.name, gpu.vendor, backend)
    if backend == "cpu":
        return hardware
    return dataclasses.replace(hardware, gpus=tuple(dataclasses.replace(g, backend=backend) for g in hardware.gpus))


def _check_backend(device: str, device_vendor: str | None, backend: str | None) -> None:
    if backend is not None and backend not in BACKENDS:
        raise UsageError(f"{backend!r} is no back end", hint=f"one of {', '.join(BACKENDS)}", code="unknown-backend")
    vendor = _VENDOR_OF_BACKEND.get(backend or "")
    if vendor is None or vendor == device_vendor:
        return
    fitting = [name for name in BACKENDS if _VENDOR_OF_BACKEND.get(name, device_vendor) == device_vendor]
    raise UsageError(
        f"{device} has no {backend} back end",
        numbers=f"{backend} is for GPUs by {vendor}, this device is by {device_vendor or 'another vendor'}",
        hint=f"leave the back end out, or give one of {', '.join(fitting)}",
        code="backend-mismatch",
    )


def gpu_from_row(
    row: DeviceRow, *, name: str | None = None, backend: str | None = None, ram_bytes: int | None = None
) -> Gpu:
    """The GPU of ``row`` with its published figures; ``ram_bytes`` is the memory of a unified one."""
    total = (ram_bytes or row.total_bytes()) if row.unified else row.total_bytes()
    working_set = apple_working_set_bytes(total) if row.vendor == "apple" and total else None
    return Gpu(
        name=name or row.device,
        vendor=row.vendor,
        backend=backend or _BACKENDS.get(row.vendor, "vulkan"),
        memory_total_bytes=total,
        working_set_bytes=working_set,
        unified_memory=row.unified,
        device=row.device,
        architecture=row.architecture,
        compute_capability=row.compute_capability,
        bandwidth_bytes_per_second=row.bandwidth_bytes_per_second,
        fp16_flops_per_second=row.fp16_flops_per_second,
        link=row.pcie,
        link_bytes_per_second=link_bytes_per_second(row.pcie),
        core_count=row.core_count,
    )


def _host_class(row: DeviceRow) -> str:
    if row.kind == "gpu_mobile":
        return "laptop"
    place = "server" if row.kind == "gpu_datacenter" else "desktop"
    generation = row.pcie[5] if row.pcie else "4"
    return f"{place}-pcie{generation}"


def _discrete(row: DeviceRow, count: int, backend: str | None, ram_bytes: int | None) -> HardwareProfile:
    key = _host_class(row)
    host = next(host for host in read_table("hosts.csv") if host["host"] == key)
    perf, bandwidth = number(host["cpu_performance_core_count"]), number(host["bandwidth_bytes_per_second"])
    note = f"the host is assumed: {host['cpu']} with {host['memory_type']} ({host['source']})"
    if ram_bytes is None:
        note += "; its RAM is unknown"
    gpus = () if backend == "cpu" else (gpu_from_row(row, backend=backend),) * count
    return HardwareProfile(
        name=row.device if count == 1 else f"{count}x {row.device}",
        os="linux",
        cpu=Cpu(
            model=host["cpu"],
            architecture=host["architecture"],
            vendor=host["vendor"],
            physical_core_count=int(host["cpu_core_count"]),
            logical_core_count=int(host["cpu_thread_count"]),
            performance_core_count=int(perf) if perf else None,
            simd=tuple(host["simd"].split()),
        ),
        memory=Memory(total_bytes=ram_bytes, bandwidth_bytes_per_second=bandwidth, bandwidth_basis="typical host"),
        gpus=gpus,
        notes=(note,),
        source=row.source,
        date=row.date,
    )


def _has_gpu(row: DeviceRow) -> bool:
    """Whether llama.cpp has a GPU back end of use on the chip: not for boards, and not for Snapdragon's Adreno."""
    return row.kind not in CPU_KINDS and row.vendor in _BACKENDS


def _integrated(row: DeviceRow, backend: str | None, ram_bytes: int | None) -> HardwareProfile:
    total = ram_bytes or row.total_bytes()
    gpus = (gpu_from_row(row, backend=backend, ram_bytes=ram_bytes),) if _has_gpu(row) and backend != "cpu" else ()
    notes = [] if total else ["its RAM is unknown"]
    if total and ram_bytes is None and row.memory_min_bytes:
        notes.append(f"sold with {row.memory_min_bytes >> 30} to {total >> 30} GiB; the largest is assumed")
    return HardwareProfile(
        name=row.device,
        os="macos" if row.vendor == "apple" else "linux",
        cpu=cpu_from_row(row),
        memory=Memory(
            total_bytes=total,
            bandwidth_bytes_per_second=row.bandwidth_bytes_per_second,
            bandwidth_basis="published" if row.bandwidth_bytes_per_second else None,
        ),
        gpus=gpus,
        notes=tuple(notes),
        source=row.source,
        date=row.date,
    )


def cpu_from_row(row: DeviceRow) -> Cpu:
    """The CPU half of ``row``."""
    risc_v = row.vendor == "spacemit"
    return Cpu(
        model=row.device.split(" (")[0],
        architecture="riscv64" if risc_v else "aarch64" if row.vendor in _ARM_VENDORS else "x86_64",
        vendor=row.vendor,
        physical_core_count=row.cpu_core_count,
        logical_core_count=row.cpu_thread_count,
        performance_core_count=row.cpu_performance_core_count,
        simd=row.simd,
        device=row.device,
    )
