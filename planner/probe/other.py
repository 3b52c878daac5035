"""The processor where there is neither ``/proc`` nor Apple's sysctl: psutil for the cores, py-cpuinfo for the rest."""

from __future__ import annotations

import os
import platform

from planner.core.hardware import Cpu
from planner.probe.cpu import simd_of, with_table_row
from planner.probe.reader import whole


def generic_cpu() -> tuple[Cpu, list[str]]:
    """The processor of Windows, Intel Macs and BSDs, and notes. py-cpuinfo takes over a second."""
    machine = platform.machine().lower()
    architecture = {"amd64": "x86_64", "x64": "x86_64", "arm64": "aarch64"}.get(machine, machine or "unknown")
    info, notes = _cpuinfo()
    name = str(info.get("brand_raw") or platform.processor() or f"unknown {architecture} processor")
    flags = info.get("flags")
    names = {"avx512_vbmi": "avx512vbmi", "avx512_bw": "avx512bw"}
    simd = simd_of(architecture, (names.get(str(flag), str(flag)) for flag in flags)) if isinstance(flags, list) else ()
    cpu = Cpu(
        model=" ".join(name.split()),
        architecture=architecture,
        vendor={"GenuineIntel": "intel", "AuthenticAMD": "amd"}.get(str(info.get("vendor_id_raw"))),
        physical_core_count=_physical(),
        logical_core_count=whole(os.cpu_count(), high=8192),
        simd=simd,
    )
    return with_table_row(cpu), notes


def _cpuinfo() -> tuple[dict[str, object], list[str]]:
    try:
        import cpuinfo

        return dict(cpuinfo.get_cpu_info()), []
    except (ImportError, OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        return {}, [f"the CPU's SIMD sets are unknown: py-cpuinfo gives none ({error})"]


def _physical() -> int | None:
    try:
        import psutil

        return whole(psutil.cpu_count(logical=False), high=8192)
    except (ImportError, OSError, RuntimeError):
        return None
