"""Apple Silicon: sysctl for chip, cores, RAM and SIMD; ioreg or system_profiler for the GPU's cores."""

from __future__ import annotations

import json
import re
from dataclasses import replace

from planner.core import devices
from planner.core.hardware import Cpu, Gpu, Memory
from planner.probe.cpu import simd_of
from planner.probe.reader import Reader, whole

_KEYS = (
    "machdep.cpu.brand_string",
    "hw.memsize",
    "hw.physicalcpu",
    "hw.logicalcpu",
    "hw.perflevel0.physicalcpu",
    "hw.perflevel1.physicalcpu",
    "hw.optional",
    "iogpu.wired_limit_mb",
)
_MAX_BYTES = 1 << 50
_GPU_CORES = re.compile(r'"gpu-core-count"\s*=\s*(\d{1,4})\b')
_PAGE = re.compile(r"page size of (\d{1,7}) bytes")
_PAGES = re.compile(r"^Pages (free|inactive|speculative|purgeable):\s+(\d{1,15})\.?\s*$", re.MULTILINE)


def parse_sysctl(text: str) -> dict[str, str]:
    """``key: value`` lines of ``sysctl``."""
    pairs = (line.partition(":") for line in text.splitlines())
    return {key.strip(): value.strip() for key, colon, value in pairs if colon and key.strip()}


def parse_gpu_cores(ioreg: str, profiler: str) -> int | None:
    """GPU cores from ``ioreg -rc AGXAccelerator`` or from ``system_profiler SPDisplaysDataType -json``."""
    if match := _GPU_CORES.search(ioreg):
        return whole(match[1], high=512)
    try:
        data = json.loads(profiler)
    except (ValueError, RecursionError):
        return None
    listed = data.get("SPDisplaysDataType") if isinstance(data, dict) else None
    for item in listed if isinstance(listed, list) else ():
        if isinstance(item, dict) and (cores := whole(item.get("sppci_cores", ""), high=512)):
            return cores
    return None


def parse_vm_stat(text: str) -> int | None:
    """Bytes that can be had without swapping: free, inactive, speculative and purgeable pages of ``vm_stat``."""
    size = _PAGE.search(text)
    pages = [int(match[2]) for match in _PAGES.finditer(text)]
    if size is None or not pages:
        return None
    return whole(int(size[1]) * sum(pages), high=_MAX_BYTES)


def parse_cpu(values: dict[str, str]) -> tuple[Cpu, list[str]]:
    """The processor from sysctl's values."""
    model = values.get("machdep.cpu.brand_string", "")
    known = bool(model) and model.isprintable() and "\ufffd" not in model
    physical = whole(values.get("hw.physicalcpu", ""), high=1024)
    fast = whole(values.get("hw.perflevel0.physicalcpu", ""), high=1024)
    slow = whole(values.get("hw.perflevel1.physicalcpu", ""), high=1024)
    present = [key for key, value in values.items() if value == "1"]
    cpu = Cpu(
        model=model if known else "Apple processor",
        architecture="aarch64",
        vendor="apple",
        physical_core_count=physical,
        logical_core_count=whole(values.get("hw.logicalcpu", ""), high=1024),
        performance_core_count=fast if slow else None,
        simd=simd_of("aarch64", present, column="sysctl"),
    )
    return cpu, [] if known else ["sysctl does not name the chip"]


def parse_machine(
    sysctl: str, ioreg: str = "", profiler: str = "", vm_stat: str = ""
) -> tuple[Cpu, Memory, tuple[Gpu, ...], list[str]]:
    """A Mac from what its tools printed.

    The GPU may use what ``iogpu.wired_limit_mb`` says if it was set, else macOS's default share of the RAM.
    """
    values = parse_sysctl(sysctl)
    cpu, notes = parse_cpu(values)
    total = whole(values.get("hw.memsize", ""), low=1 << 30, high=_MAX_BYTES)
    free = parse_vm_stat(vm_stat)
    cores = parse_gpu_cores(ioreg, profiler)
    row = devices.find(cpu.model, core_count=cores)
    row = row if row is not None and row.kind == "apple_soc" else None
    if total is None:
        notes.append("sysctl does not say how much RAM there is")
    if cores is None:
        notes.append("the number of GPU cores is unknown: the smallest GPU of this chip is assumed")
    if row is None:
        notes.append(f"{cpu.model} is not in the device table; its bandwidth is unknown")
    limit = whole(values.get("iogpu.wired_limit_mb", ""), high=1 << 24)
    gpu = Gpu(
        name=f"{cpu.model} ({cores}-core GPU)" if cores else cpu.model,
        vendor="apple",
        backend="metal",
        memory_total_bytes=total,
        memory_free_bytes=free if total and free and free <= total else None,
        working_set_bytes=(limit << 20 if limit else devices.apple_working_set_bytes(total)) if total else None,
        unified_memory=True,
        device=row.device if row else None,
        architecture=row.architecture if row else None,
        bandwidth_bytes_per_second=row.bandwidth_bytes_per_second if row else None,
        fp16_flops_per_second=row.fp16_flops_per_second if row else None,
        core_count=cores,
    )
    memory = Memory(total_bytes=total, available_bytes=gpu.memory_free_bytes)
    return replace(cpu, device=row.device if row else None), memory, (gpu,), notes


def apple_machine(reader: Reader) -> tuple[Cpu, Memory, tuple[Gpu, ...], list[str]]:
    """This Mac with Apple Silicon."""
    # A key that does not exist makes sysctl fail after printing the others, so each is asked alone.
    sysctl = "\n".join(reader.tool("sysctl", key) for key in _KEYS)
    ioreg = reader.tool("ioreg", "-rc", "AGXAccelerator", "-d1")
    profiler = "" if _GPU_CORES.search(ioreg) else reader.tool("system_profiler", "SPDisplaysDataType", "-json")
    return parse_machine(sysctl, ioreg, profiler, reader.tool("vm_stat"))
