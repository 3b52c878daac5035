"""The processor on Linux, from ``/proc/cpuinfo`` and sysfs: model, cores, fast cores, SIMD, NUMA nodes."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, replace

from planner.core import devices
from planner.core.data import read_table
from planner.core.hardware import Cpu
from planner.probe.reader import Reader, cpu_list, whole

_MAX_CPUS = 8192
_VENDORS = {"GenuineIntel": "intel", "AuthenticAMD": "amd", "HygonGenuine": "hygon"}
# Implementer and part numbers: Linux arch/arm64/include/asm/cputype.h and util-linux sys-utils/lscpu-arm.c
_ARM_VENDORS = {0x41: "arm", 0x61: "apple", 0x51: "qualcomm", 0xC0: "ampere", 0x48: "hisilicon", 0x4E: "nvidia"}
_ARM_PARTS = {
    (0x41, 0xD03): "Cortex-A53",
    (0x41, 0xD05): "Cortex-A55",
    (0x41, 0xD07): "Cortex-A57",
    (0x41, 0xD08): "Cortex-A72",
    (0x41, 0xD09): "Cortex-A73",
    (0x41, 0xD0A): "Cortex-A75",
    (0x41, 0xD0B): "Cortex-A76",
    (0x41, 0xD0C): "Neoverse-N1",
    (0x41, 0xD0D): "Cortex-A77",
    (0x41, 0xD40): "Neoverse-V1",
    (0x41, 0xD41): "Cortex-A78",
    (0x41, 0xD42): "Cortex-A78AE",
    (0x41, 0xD44): "Cortex-X1",
    (0x41, 0xD46): "Cortex-A510",
    (0x41, 0xD47): "Cortex-A710",
    (0x41, 0xD48): "Cortex-X2",
    (0x41, 0xD49): "Neoverse-N2",
    (0x41, 0xD4D): "Cortex-A715",
    (0x41, 0xD4E): "Cortex-X3",
    (0x41, 0xD4F): "Neoverse-V2",
    (0x41, 0xD80): "Cortex-A520",
    (0x41, 0xD81): "Cortex-A720",
    (0x41, 0xD82): "Cortex-X4",
    (0x41, 0xD83): "Neoverse-V3AE",
    (0x41, 0xD84): "Neoverse-V3",
    (0x41, 0xD85): "Cortex-X925",
    (0x41, 0xD87): "Cortex-A725",
    (0x41, 0xD8E): "Neoverse-N3",
    (0x51, 0x001): "Oryon",
    (0xC0, 0xAC3): "Ampere-1",
    (0xC0, 0xAC4): "Ampere-1a",
    (0x48, 0xD01): "Kunpeng-920",
}
# A core counts as fast from this share of the fastest one's capacity: the A725 of a GB10 has 70 %, a second bin of
# the same A720 on a CIX P1 88 %.
_FAST_SHARE = 0.8


@dataclass(frozen=True, slots=True, kw_only=True)
class CpuInfo:
    """What ``/proc/cpuinfo`` says; ``None`` is unknown."""

    model: str | None = None
    vendor: str | None = None
    flags: frozenset[str] = frozenset()
    logical_count: int | None = None
    cores: tuple[tuple[int, int], ...] = ()
    """(package, core) of each logical processor, where the file has them."""
    board: str | None = None


def _blocks(text: str) -> list[dict[str, str]]:
    """Paragraphs of ``key : value`` lines; keys in lower case. A number of processors beyond reason is cut off."""
    blocks: list[dict[str, str]] = [{}]
    for line in text.splitlines():
        key, colon, value = line.partition(":")
        if not line.strip():
            if blocks[-1]:
                blocks.append({})
            if len(blocks) > _MAX_CPUS:
                break
        elif colon:
            blocks[-1].setdefault(key.strip().lower(), value.strip())
    return [block for block in blocks if block]


def parse_cpuinfo(text: str) -> CpuInfo:
    """``/proc/cpuinfo`` of x86 or ARM as values; whatever is missing or malformed is ``None``."""
    blocks = _blocks(text)
    processors = [block for block in blocks if whole(block.get("processor", ""), low=0, high=1 << 20) is not None]
    if not processors:
        return CpuInfo()
    first = processors[0]
    last = blocks[-1]
    flags = first.get("flags") or first.get("features") or ""
    return CpuInfo(
        model=_usable(first.get("model name")) or _arm_model(processors),
        vendor=_VENDORS.get(first.get("vendor_id", "")) or _ARM_VENDORS.get(_hex(first.get("cpu implementer")) or -1),
        flags=frozenset(flags.split()),
        logical_count=len(processors),
        cores=_core_ids(processors),
        board=_usable(last.get("model")) if "model name" not in last and "cpu family" not in last else None,
    )


def _usable(text: str | None) -> str | None:
    """``text`` unless it is empty, or made of something else than printable characters."""
    if not text or not text.isprintable() or "\ufffd" in text or len(text) > 200:
        return None
    return " ".join(text.split()) if any(c.isalpha() for c in text) else None


def _hex(text: str | None) -> int | None:
    return whole(text or "", low=0, high=0xFFFF)


def _arm_model(processors: list[dict[str, str]]) -> str | None:
    """Names of the ARM cores, the most numerous first: ``Cortex-X925 + Cortex-A725``."""
    names: dict[str, int] = {}
    for block in processors:
        implementer, part = _hex(block.get("cpu implementer")), _hex(block.get("cpu part"))
        if implementer is None or part is None:
            continue
        name = _ARM_PARTS.get((implementer, part), f"ARM core {implementer:#04x}/{part:#05x}")
        names[name] = names.get(name, 0) + 1
    return " + ".join(sorted(names, key=lambda name: -names[name])) or None


def _core_ids(processors: list[dict[str, str]]) -> tuple[tuple[int, int], ...]:
    found = [
        (whole(block.get("physical id", ""), low=0), whole(block.get("core id", ""), low=0)) for block in processors
    ]
    known = tuple((package, core) for package, core in found if package is not None and core is not None)
    return known if len(known) == len(found) else ()


def simd_of(architecture: str, names: Iterable[str], column: str = "cpuinfo") -> tuple[str, ...]:
    """SIMD sets in the spelling of ``data/simd.csv``, sorted, from flags as ``column`` of the table spells them."""
    present = frozenset(names)
    rows = (row for row in read_table("simd.csv") if row["architecture"] == architecture)
    return tuple(sorted(row["simd"] for row in rows if row[column] in present))


def _architecture(machine: str) -> str:
    known = {"amd64": "x86_64", "x86-64": "x86_64", "arm64": "aarch64"}
    return known.get(machine.lower(), machine.lower() or "unknown")


def physical_cores(reader: Reader, info: CpuInfo) -> int | None:
    """Physical cores: distinct (package, core) pairs, else distinct sibling lists in sysfs."""
    if info.cores:
        return len(set(info.cores))
    siblings = {
        reader.line(path) for path in reader.glob("/sys/devices/system/cpu/cpu[0-9]*/topology/thread_siblings_list")
    }
    siblings.discard("")
    return len(siblings) or None


def fast_cores(reader: Reader, info: CpuInfo) -> int | None:
    """Physical cores of the fast kind on a machine with two kinds; ``None`` where all are alike."""
    fast = cpu_list(reader.line("/sys/devices/cpu_core/cpus"))
    if fast and reader.exists("/sys/devices/cpu_atom/cpus"):
        return len({info.cores[cpu] for cpu in fast if cpu < len(info.cores)}) or None
    paths = reader.glob("/sys/devices/system/cpu/cpu[0-9]*/cpu_capacity")
    capacities = [c for c in (whole(reader.line(path), high=1 << 16) for path in paths) if c is not None]
    if not capacities or min(capacities) >= _FAST_SHARE * max(capacities):
        return None
    return sum(capacity >= _FAST_SHARE * max(capacities) for capacity in capacities)


def linux_cpu(reader: Reader, machine: str | None = None) -> tuple[Cpu, list[str]]:
    """The processor and notes on what could not be found out.

    Args:
        reader: where to read from.
        machine: ``x86_64``, ``aarch64``; the interpreter's own by default.
    """
    architecture = _architecture(os.uname().machine if machine is None else machine)
    info = parse_cpuinfo(reader.text("/proc/cpuinfo"))
    board = info.board or _usable(reader.line("/proc/device-tree/model"))
    notes: list[str] = []
    if info.logical_count is None:
        notes.append("/proc/cpuinfo names no processor")
    nodes = cpu_list(reader.line("/sys/devices/system/node/online"))
    cpu = Cpu(
        model=info.model or board or f"unknown {architecture} processor",
        architecture=architecture,
        vendor=info.vendor,
        physical_core_count=physical_cores(reader, info),
        logical_core_count=info.logical_count,
        performance_core_count=fast_cores(reader, info),
        simd=simd_of(architecture, info.flags),
        numa_node_count=len(nodes) or None,
    )
    if not info.flags:
        notes.append("the CPU's SIMD sets are unknown: /proc/cpuinfo has no flags")
    return with_table_row(cpu, board), notes


def with_table_row(cpu: Cpu, board: str | None = None) -> Cpu:
    """``cpu`` with the name of its device row, and that row's fast cores where the system shows none."""
    row = (devices.find(board) if board else None) or devices.find(cpu.model)
    if row is None or row.cpu_core_count is None:
        return cpu
    fast = cpu.performance_core_count
    if fast is None and row.cpu_core_count == cpu.physical_core_count:
        fast = row.cpu_performance_core_count
    return replace(cpu, device=row.device, performance_core_count=fast)
