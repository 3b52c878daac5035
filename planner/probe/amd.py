"""AMD GPUs from sysfs: VRAM, GTT of integrated ones, gfx version from the KFD topology, names by PCI numbers."""

from __future__ import annotations

from dataclasses import replace

from planner.core import devices
from planner.core.device_table import DeviceRow
from planner.core.hardware import Cpu, Gpu, Memory
from planner.probe.reader import Reader, whole
from planner.probe.sysfs_gpu import Card, cards, marketing_name, row_of

_VENDOR = "1002"
_MAX_BYTES = 1 << 42
_KFD = "/sys/class/kfd/kfd/topology/nodes"


def gfx_versions(reader: Reader) -> dict[int, str]:
    """KFD device number → gfx name, as ``{0x744c: "gfx1100"}``, from the topology's properties."""
    found: dict[int, str] = {}
    for path in reader.glob(f"{_KFD}/[0-9]*/properties"):
        values = dict(line.split(" ", 1) for line in reader.text(path).splitlines() if " " in line)
        device, version = whole(values.get("device_id", "")), whole(values.get("gfx_target_version", ""), high=999_999)
        if device is not None and version is not None:
            found.setdefault(device, gfx_name(version))
    return found


def gfx_name(version: int) -> str:
    """``110000`` → ``gfx1100``, ``90402`` → ``gfx942``, ``90010`` → ``gfx90a``: two digits each, the last in hex."""
    major, minor, step = version // 10_000, version // 100 % 100, version % 100
    return f"gfx{major}{minor}{step:x}"


def amd_gpus(reader: Reader, memory: Memory, cpu: Cpu) -> tuple[tuple[Gpu, ...], list[str]]:
    """AMD GPUs and notes. An integrated one shares the RAM: its VRAM is a carve-out, GTT the part it may map."""
    gpus, notes = [], []
    versions = gfx_versions(reader)
    for card in cards(reader, _VENDOR):
        gpu, found = _gpu(reader, card, memory, cpu, versions)
        if gpu is None:
            notes += found
            continue
        gpus.append(gpu)
        notes += [f"{gpu.name}: {note}" for note in found]
    return tuple(gpus), notes


def _gpu(
    reader: Reader, card: Card, memory: Memory, cpu: Cpu, versions: dict[int, str]
) -> tuple[Gpu | None, list[str]]:
    total = whole(reader.line(f"{card.folder}/mem_info_vram_total"), low=1 << 24, high=_MAX_BYTES)
    used = whole(reader.line(f"{card.folder}/mem_info_vram_used"), low=0, high=total or 0)
    name = reader.line(f"{card.folder}/product_name") or marketing_name(reader, card)
    row = row_of(name, total)
    gfx = versions.get(int(card.device, 16)) if card.device else None
    gpu = Gpu(
        name=_full_name(name, card),
        vendor="amd",
        backend="rocm" if gfx and reader.exists("/opt/rocm") else "vulkan",
        memory_total_bytes=total,
        memory_free_bytes=_left(total, used),
        compute_capability=gfx,
        link=card.link,
        link_bytes_per_second=devices.link_bytes_per_second(card.link),
        driver=reader.line("/sys/module/amdgpu/version") or None,
    )
    if (row is not None and row.unified) or _shares_ram(row, total, cpu, name):
        row = row if row is not None else devices.find(cpu.device or "")
        if row is None or not row.unified:
            return None, [f"{gpu.name}: left out: integrated graphics that the device table does not know"]
        gpu, notes = _integrated(reader, card, gpu, memory)
    else:
        notes = [] if total is not None else ["its memory is unknown: the driver gives no mem_info_vram_total"]
    if row is None:
        return gpu, [*notes, "it is not in the device table; its bandwidth is unknown"]
    return with_row(gpu, row), notes


def _left(total: int | None, used: int | None) -> int | None:
    return total - used if total is not None and used is not None and used < total else None


def _full_name(name: str | None, card: Card) -> str:
    if not name:
        return f"AMD GPU {card.device or 'of unknown model'}"
    return name if name.lower().startswith("amd") else f"AMD {name}"


def _shares_ram(row: DeviceRow | None, total: int | None, cpu: Cpu, name: str | None) -> bool:
    """Whether a GPU that no row describes is an integrated one: its processor says Radeon, or its VRAM is tiny.

    BIOSes carve out 64 MiB to 512 MiB for them by default; discrete cards of this size ended in 2010.
    """
    if row is not None or (name and " rx " in f" {name.lower()} "):
        return False
    return "radeon" in cpu.model.lower() or (total is not None and total <= 1 << 29)


def _integrated(reader: Reader, card: Card, gpu: Gpu, memory: Memory) -> tuple[Gpu, list[str]]:
    gtt = whole(reader.line(f"{card.folder}/mem_info_gtt_total"), low=1 << 24, high=_MAX_BYTES)
    vram = gpu.memory_total_bytes or 0
    # The carve-out is not part of MemTotal, so both are this chip's memory.
    total = memory.total_bytes + vram if memory.total_bytes else None
    free = memory.available_bytes + (gpu.memory_free_bytes or 0) if memory.available_bytes else None
    reach = min(gtt + vram, total) if gtt and total else None
    note = "its memory is the machine's RAM, and counted there"
    if reach is not None:
        note += f"; it may map {reach >> 20} MiB (VRAM + GTT)"
    unified = replace(
        gpu,
        unified_memory=True,
        memory_total_bytes=total,
        memory_free_bytes=free,
        working_set_bytes=reach,
        link=None,
        link_bytes_per_second=None,
    )
    return unified, [note]


def with_row(gpu: Gpu, row: DeviceRow) -> Gpu:
    """``gpu`` with the published figures of its row where the system has none."""
    return replace(
        gpu,
        device=row.device,
        architecture=row.architecture,
        compute_capability=gpu.compute_capability or row.compute_capability,
        memory_total_bytes=gpu.memory_total_bytes or (None if row.unified else row.total_bytes()),
        bandwidth_bytes_per_second=row.bandwidth_bytes_per_second,
        fp16_flops_per_second=row.fp16_flops_per_second,
        core_count=gpu.core_count or row.core_count,
    )
