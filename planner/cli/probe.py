"""``qplan probe``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from planner.cli.options import existing, json_option, profile_option
from planner.cli.output import console, escape, facts, print_json
from planner.core.errors import Exit
from planner.core.units import format_bytes

if TYPE_CHECKING:
    from planner.core.hardware import Gpu, HardwareProfile


@click.command("probe")
@profile_option
@click.option("--output", default=".", show_default=True, help="Where a model would be written.")
@click.option("--save", metavar="FILE", help="Write what was found as a profile (TOML).")
@click.option("--no-bandwidth", is_flag=True, help="Do not measure the memory bandwidth (about a second).")
@json_option
def command(profile: str | None, output: str, save: str | None, no_bandwidth: bool, as_json: bool) -> int:
    """Show what this machine has: GPUs, CPU, memory and its bandwidth, disk."""
    from planner.workflow.survey import save_profile, survey

    found = survey(profile, output=existing(output), measure=not no_bandwidth, again=True)
    if save:
        written = save_profile(found, existing(save))
        click.echo(f"wrote {written}", err=True)
    if as_json:
        from planner import FORMAT_VERSION
        from planner.workflow.documents import hardware_document

        print_json({"format_version": FORMAT_VERSION, **hardware_document(found)})
    else:
        show(found)
    return Exit.DONE


def show(hardware: HardwareProfile) -> None:
    """The machine as a page."""
    out = console()
    out.print(f"[bold]{escape(hardware.name)}[/]  {hardware.os}  [dim]identity {hardware.identity()}[/]")
    cpu, memory = hardware.cpu, hardware.memory
    rows = [("GPU", _gpu_line(gpu)) for gpu in hardware.gpus]
    rows.append(("CPU", f"{cpu.model} ({cpu.architecture})"))
    rows.append(("cores", _cores_line(hardware)))
    rows.append(("SIMD", " ".join(cpu.simd) or "unknown"))
    rows.append(("RAM", f"{format_bytes(memory.total_bytes)}, {format_bytes(memory.usable_bytes())} usable"))
    if memory.limit_bytes is not None:
        rows.append(("limit", f"{format_bytes(memory.limit_bytes)} (control group)"))
    rows.append(("bandwidth", _bandwidth(memory.bandwidth_bytes_per_second, memory.bandwidth_basis)))
    if hardware.disk is not None:
        rows.append(("disk", f"{format_bytes(hardware.disk.free_bytes)} free at {hardware.disk.path}"))
    out.print(facts(rows))
    for note in hardware.notes:
        out.print(f"[dim]note: {escape(note)}[/]")


def _gpu_line(gpu: Gpu) -> str:
    parts = [gpu.name, f"{format_bytes(gpu.memory_total_bytes)}, {format_bytes(gpu.usable_bytes())} usable"]
    if gpu.unified_memory:
        parts.append("unified memory")
    if gpu.compute_capability:
        parts.append(f"compute capability {gpu.compute_capability}")
    parts.append(_bandwidth(gpu.bandwidth_bytes_per_second, None))
    if gpu.link:
        parts.append(gpu.link)
    if gpu.driver:
        parts.append(f"driver {gpu.driver}")
    return " · ".join(parts)


def _cores_line(hardware: HardwareProfile) -> str:
    cpu = hardware.cpu
    parts = [f"{cpu.physical_core_count or 'unknown'} physical", f"{cpu.logical_core_count or 'unknown'} logical"]
    if cpu.performance_core_count:
        parts.append(f"{cpu.performance_core_count} performance")
    if cpu.numa_node_count and cpu.numa_node_count > 1:
        parts.append(f"{cpu.numa_node_count} NUMA nodes")
    return ", ".join(parts)


def _bandwidth(value: float | None, basis: str | None) -> str:
    if value is None:
        return "bandwidth unknown"
    return f"{value / 1e9:.0f} GB/s{f' ({basis})' if basis else ''}"
