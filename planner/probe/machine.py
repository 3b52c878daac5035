"""This machine: all sources put together into one :class:`~planner.core.hardware.HardwareProfile`."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from planner.core import devices
from planner.core.hardware import Cpu, Gpu, HardwareProfile, Memory
from planner.probe import bandwidth as measured
from planner.probe.amd import amd_gpus
from planner.probe.cpu import linux_cpu
from planner.probe.disk import free_disk
from planner.probe.intel import intel_gpus
from planner.probe.nvml import nvidia_gpus
from planner.probe.ram import linux_memory, system_memory
from planner.probe.reader import Reader

_Found = tuple[Cpu, Memory, tuple[Gpu, ...], list[str]]


def probe(
    *,
    output: Path | None = None,
    measure_bandwidth: bool = True,
    again: bool = False,
    runner: Reader | None = None,
) -> HardwareProfile:
    """This machine as it is now. A source that is absent or lies leaves ``None`` and a note; nothing is raised.

    Args:
        output: where a model would be written, for the free disk space; the working directory by default.
        measure_bandwidth: measure the memory bandwidth (about a second) if it never was on this machine; otherwise
            the last measurement counts, else the published figure.
        again: measure it although it was measured before; the larger figure is kept.
        runner: where files and tools are read; the machine itself by default.
    """
    reader = runner or Reader()
    if sys.platform == "darwin" and os.uname().machine == "arm64":
        from planner.probe.apple import apple_machine

        cpu, memory, gpus, notes = apple_machine(reader)
    elif sys.platform == "linux":
        cpu, memory, gpus, notes = linux_machine(reader)
    else:
        cpu, memory, gpus, notes = _other_machine(reader)
    memory, more = with_bandwidth(reader, cpu, memory, measure=measure_bandwidth, again=again)
    disk, disk_notes = free_disk(output)
    return HardwareProfile(
        name="this machine",
        os={"darwin": "macos", "win32": "windows"}.get(sys.platform, sys.platform),
        cpu=cpu,
        memory=memory,
        gpus=gpus,
        disk=disk,
        notes=(*notes, *more, *disk_notes),
        date=datetime.now(UTC).date().isoformat(),
    )


def linux_machine(reader: Reader, machine: str | None = None) -> _Found:
    """A Linux machine; ``machine`` is the architecture where it is not the interpreter's."""
    cpu, cpu_notes = linux_cpu(reader, machine)
    memory, memory_notes = linux_memory(reader)
    found = [nvidia_gpus(reader, memory), amd_gpus(reader, memory, cpu), intel_gpus(reader, memory, cpu)]
    gpus = tuple(gpu for some, _ in found for gpu in some)
    gpus, choice = prefer_discrete(gpus)
    return cpu, memory, gpus, [*cpu_notes, *memory_notes, *(note for _, notes in found for note in notes), *choice]


def prefer_discrete(gpus: tuple[Gpu, ...]) -> tuple[tuple[Gpu, ...], list[str]]:
    """Only the discrete GPUs where there are any: work split with an integrated one waits for it."""
    discrete = tuple(gpu for gpu in gpus if not gpu.unified_memory)
    if not discrete or len(discrete) == len(gpus):
        return gpus, []
    return discrete, [f"{gpu.name}: left out beside a discrete GPU" for gpu in gpus if gpu.unified_memory]


def _other_machine(reader: Reader) -> _Found:
    from planner.probe.other import generic_cpu

    cpu, cpu_notes = generic_cpu()
    memory, memory_notes = system_memory()
    gpus, gpu_notes = nvidia_gpus(reader, memory)
    return cpu, memory, gpus, [*cpu_notes, *memory_notes, *gpu_notes]


def with_bandwidth(
    reader: Reader, cpu: Cpu, memory: Memory, *, measure: bool, again: bool = False
) -> tuple[Memory, list[str]]:
    """``memory`` with its bandwidth: measured before, measured now, published, or unknown with a note."""
    known = measured.cached(cpu, memory)
    if measure and (known is None or again):
        known = measured.measure(reader, cpu, memory) or known
    if known is not None:
        basis = f"measured {known.date} with {known.thread_count} threads"
        return replace(memory, bandwidth_bytes_per_second=known.bytes_per_second, bandwidth_basis=basis), []
    row = devices.find(cpu.device) if cpu.device else None
    if row is not None and row.bandwidth_bytes_per_second:
        return replace(
            memory, bandwidth_bytes_per_second=row.bandwidth_bytes_per_second, bandwidth_basis="published"
        ), []
    return memory, ["the memory bandwidth is unknown: it was never measured here (`qplan probe` does)"]
