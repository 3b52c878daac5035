"""Intel GPUs: discrete ones from sysfs and xpu-smi, integrated ones by their PCI number."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

from planner.core import devices
from planner.core.hardware import Cpu, Gpu, Memory
from planner.probe.amd import with_row
from planner.probe.reader import Reader, whole
from planner.probe.sysfs_gpu import Card, cards, marketing_name, row_of

_VENDOR = "8086"
_MAX_BYTES = 1 << 42
_VRAM_FILES = ("tile0/physical_vram_size_bytes", "lmem_total_bytes", "drm/card0/lmem_total_bytes")


@dataclass(frozen=True, slots=True, kw_only=True)
class XpuDevice:
    """What ``xpu-smi discovery -j`` says about one GPU."""

    name: str | None = None
    pci_device: str | None = None
    memory_total_bytes: int | None = None
    memory_free_bytes: int | None = None
    driver: str | None = None


def parse_xpu_smi(text: str) -> tuple[XpuDevice, ...]:
    """Devices of ``xpu-smi discovery -j``; one device, a list of them, or ``()`` for anything else."""
    try:
        data = json.loads(text)
    except (ValueError, RecursionError):
        return ()
    listed = data.get("device_list", [data]) if isinstance(data, dict) else data
    return tuple(_xpu_device(item) for item in listed if isinstance(item, dict)) if isinstance(listed, list) else ()


def _xpu_device(item: dict[str, Any]) -> XpuDevice:
    total = whole(item.get("memory_physical_size_byte"), low=1 << 26, high=_MAX_BYTES)
    name, pci = item.get("device_name"), item.get("pci_device_id")
    return XpuDevice(
        name=name if isinstance(name, str) and name.isprintable() and name.strip() else None,
        pci_device=pci.lower().removeprefix("0x") if isinstance(pci, str) else None,
        memory_total_bytes=total,
        memory_free_bytes=whole(item.get("memory_free_size_byte"), high=total or _MAX_BYTES) if total else None,
        driver=str(item["driver_version"]) if item.get("driver_version") else None,
    )


def intel_gpus(reader: Reader, memory: Memory, cpu: Cpu) -> tuple[tuple[Gpu, ...], list[str]]:
    """Intel GPUs that are of use for a language model, and notes.

    An integrated one counts only where the device table knows it: older UHD graphics are slower than their CPU.
    """
    found = cards(reader, _VENDOR)
    if not found:
        return (), []
    told = list(parse_xpu_smi(reader.tool("xpu-smi", "discovery", "-j")))
    gpus, notes = [], []
    for card in found:
        match = next((xpu for xpu in told if xpu.pci_device in (None, card.device)), None)
        if match is not None:
            told.remove(match)
        gpu, note = _gpu(reader, card, match or XpuDevice(), memory, cpu)
        if gpu is not None:
            gpus.append(gpu)
        notes += note
    return tuple(gpus), notes


def _gpu(reader: Reader, card: Card, xpu: XpuDevice, memory: Memory, cpu: Cpu) -> tuple[Gpu | None, list[str]]:
    sizes = (whole(reader.line(f"{card.folder}/{file}"), low=1 << 26, high=_MAX_BYTES) for file in _VRAM_FILES)
    total = xpu.memory_total_bytes or next((size for size in sizes if size), None)
    name = marketing_name(reader, card) or xpu.name
    row = row_of(name, total) or (row_of(xpu.name, total) if xpu.name else None)
    gpu = Gpu(
        name=f"Intel {name}" if name and not name.startswith("Intel") else name or f"Intel GPU {card.device}",
        vendor="intel",
        backend="sycl" if reader.exists("/opt/intel/oneapi") else "vulkan",
        memory_total_bytes=total,
        memory_free_bytes=xpu.memory_free_bytes,
        link=card.link,
        link_bytes_per_second=devices.link_bytes_per_second(card.link),
        driver=xpu.driver,
    )
    if row is None and total is None:
        return None, [f"{gpu.name}: left out: integrated graphics that the device table does not know"]
    if row is None:
        return gpu, [f"{gpu.name}: it is not in the device table; its bandwidth is unknown"]
    if row.unified:
        return _integrated(with_row(gpu, devices.find(cpu.device or "") or row), memory)
    notes = [] if total else [f"{gpu.name}: its memory is the published size: the driver reports none"]
    return with_row(gpu, row), notes


def _integrated(gpu: Gpu, memory: Memory) -> tuple[Gpu, list[str]]:
    shared = replace(
        gpu,
        unified_memory=True,
        memory_total_bytes=memory.total_bytes,
        memory_free_bytes=memory.available_bytes,
        link=None,
        link_bytes_per_second=None,
    )
    return shared, [f"{gpu.name}: its memory is the machine's RAM, and counted there"]
