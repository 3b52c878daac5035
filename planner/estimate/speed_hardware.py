"""Which generation a processor belongs to, and the nominal arithmetic rate the speed model scales by."""

from __future__ import annotations

import re
from functools import cache

from planner.core.device_table import find
from planner.core.hardware import Cpu, Gpu

# Typical boost clock in GHz per generation (vendor specifications, TechPowerUp 2025-12; Apple: measured GPU clocks
# as published on https://github.com/philipturner/metal-benchmarks). Only ratios matter: the fit absorbs the level.
CLOCK_GHZ = {
    "maxwell": 1.1,
    "pascal": 1.7,
    "gp100": 1.4,
    "tu116": 1.7,
    "volta": 1.45,
    "turing": 1.7,
    "ga100": 1.41,
    "ampere": 1.75,
    "ada": 2.5,
    "hopper": 1.75,
    "blackwell": 2.5,
    "gb100": 1.85,
    "spark": 2.5,
    "orin": 1.3,
    "m1": 1.28,
    "m2": 1.4,
    "m3": 1.4,
    "m4": 1.58,
    "m5": 1.6,
    "gcn": 1.5,
    "rdna1": 1.8,
    "rdna2": 2.3,
    "rdna3": 2.4,
    "rdna3.5": 2.8,
    "rdna4": 2.9,
    "cdna": 1.6,
    "xe": 2.3,
    "xe2": 2.7,
    "xe-lp": 1.9,
    "pvc": 1.6,
}

# Dense FP16 matrix rate over nominal FP32 rate, for devices whose core count is not published (H20, Instinct).
_MATRIX_RATIO = {"hopper": 17.7, "ga100": 16.0, "cdna": 8.0, "volta": 8.0, "gb100": 30.0}

MATRIX_SHARE = {
    **dict.fromkeys(("m1", "m2", "m3", "m4"), 0.66),
    "m5": 1.6,
    "pascal": 0.85,
    "tu116": 0.85,
    "gp100": 0.4,
    "volta": 2.0,
    "turing": 1.75,
    "ga100": 3.7,
    "hopper": 2.4,  # llama.cpp's products of quantized weights use mma.sync, which leaves a part of the units idle
    "ampere": 1.75,
    "ada": 1.7,
    "blackwell": 1.9,
    "gb100": 1.9,
    "spark": 1.3,  # 140 W for GPU and CPU together hold it back: the power factor of a card would be 0.7
    "orin": 1.5,
    "rdna2": 0.9,
    "rdna3": 1.4,
    "rdna3.5": 1.3,
    "rdna4": 2.6,
    "cdna": 2.5,
    "xe": 0.8,
    "xe2": 0.8,
    "pvc": 0.5,
}
"""Matrix rate that prompts reach over the nominal FP32 rate, from one or two published rows per chip: where the fit of
``gpu_prefill`` starts."""
OTHER_SHARE = 0.6

_LIBRARIES_LEAD = ("ga100", "hopper", "gb100", "cdna")
"""Data-center chips on which the vendors' libraries do better than llama.cpp's kernels."""
_LIBRARY_SHARE = 0.65
"""Share of the nominal FP16 rate that large products reach there. An assumption: no published row shows it."""
_POWER_EXPONENT = 0.4
"""How the matrix rate grows with :func:`power_ratio`, as ``gpu_prefill`` is fitted."""

REFERENCE_WATTS = 10.0
"""Watts per nominal FP32 TFLOP/s to which :func:`power_ratio` is 1: about a GeForce RTX 3090."""

_APPLE_ALUS = 128
"""FP32 lanes of an Apple GPU core."""

_PATTERNS = (
    (r"apple (m\d)", None),
    (r"maxwell", "maxwell"),
    (r"pascal", "pascal"),
    (r"volta", "volta"),
    (r"turing", "turing"),
    (r"hopper", "hopper"),
    (r"ada", "ada"),
    (r"cdna", "cdna"),
    (r"gcn|vega", "gcn"),
    (r"rdna ?1", "rdna1"),
    (r"rdna ?2", "rdna2"),
    (r"rdna ?3\.5", "rdna3.5"),
    (r"rdna ?3", "rdna3"),
    (r"rdna ?4", "rdna4"),
    (r"xe2", "xe2"),
    (r"xe-hpg", "xe"),
    (r"xe-l", "xe-lp"),
    (r"generation 12", "pvc"),
)


def chip_class(gpu: Gpu) -> str:
    """The generation of ``gpu``: ``ada``, ``m2``, ``rdna3`` …; ``unknown`` where nothing tells."""
    architecture, capability = (gpu.architecture or gpu.name).lower(), gpu.compute_capability or ""
    if capability == "6.0":
        return "gp100"  # no 8-bit dot product
    if capability == "7.5" and re.search(r"gtx 16|t1200|t600|t400|t1000", (gpu.device or gpu.name).lower()):
        return "tu116"  # Turing without matrix units
    if "ampere" in architecture or "blackwell" in architecture:
        special = {"8.0": "ga100", "8.7": "orin", "10.0": "gb100", "10.3": "gb100", "11.0": "spark", "12.1": "spark"}
        return special.get(capability, "ampere" if "ampere" in architecture else "blackwell")
    for pattern, name in _PATTERNS:
        if match := re.search(pattern, architecture):
            return name or match[1]
    by_capability = {"5": "maxwell", "6": "pascal", "7": "turing", "9": "hopper", "10": "gb100", "12": "blackwell"}
    if gpu.vendor == "nvidia" and capability:
        return {"7.0": "volta", "8.0": "ga100", "8.7": "orin", "8.9": "ada", "8.6": "ampere"}.get(
            capability, by_capability.get(capability.split(".")[0], "unknown")
        )
    return "unknown"


def is_ultra(gpu: Gpu) -> bool:
    """Whether ``gpu`` is two dies with one memory (Apple Ultra)."""
    return "ultra" in (gpu.device or gpu.name).lower() and gpu.vendor == "apple"


def compute_rate(gpu: Gpu, chip: str) -> float | None:
    """Nominal FP32 operations per second: two per core and clock; ``None`` where nothing is known."""
    clock = CLOCK_GHZ.get(chip)
    if gpu.core_count and clock:
        lanes = _APPLE_ALUS if gpu.vendor == "apple" else 1
        return gpu.core_count * lanes * 2e9 * clock
    if gpu.fp16_flops_per_second:
        return gpu.fp16_flops_per_second / _MATRIX_RATIO.get(chip, 2.0)
    return None


def served_matrix_rate(gpu: Gpu) -> float | None:
    """FP16 operations per second that products in a serving runtime can reach; ``None`` where nothing is known.

    On cards what prompts in 16 bits reach in llama.cpp: a professional Ada is no faster than a GeForce of the same
    power, whose nominal rate is half.
    """
    chip, nominal = chip_class(gpu), gpu.fp16_flops_per_second
    compute = compute_rate(gpu, chip)
    if nominal and (compute is None or chip in _LIBRARIES_LEAD):
        return nominal * _LIBRARY_SHARE
    if compute is None:
        return None
    reached: float = compute * MATRIX_SHARE.get(chip, OTHER_SHARE) * power_ratio(gpu, compute) ** _POWER_EXPONENT
    return min(nominal, reached) if nominal else reached


def power_ratio(gpu: Gpu, compute: float) -> float:
    """Watts per nominal operation against a card that they never slow down much; 1 where the power is unknown.

    Matrix products run into the power limit: an L4 (72 W) or a laptop's chip never reaches the clock that ``compute``
    is made of. The exponent is fitted.
    """
    watts = None if gpu.unified_memory else _watts(gpu.device)
    return watts / (compute / 1e12) / REFERENCE_WATTS if watts else 1.0


@cache
def _watts(device: str | None) -> float | None:
    row = find(device) if device else None
    return None if row is None else row.tdp_watts


def cpu_class(cpu: Cpu) -> str:
    """What decides a core's rate.

    ``avx512`` (with its 8-bit dot products), ``avx2``, ``x86``, ``apple``, ``i8mm``, ``dotprod``, ``neon``,
    ``inorder`` (Cortex-A53 and A55 alone) or ``riscv``.
    """
    simd = set(cpu.simd)
    if "apple" in (cpu.vendor or "").lower() or cpu.model.lower().startswith("apple"):
        return "apple"
    if cpu.architecture == "x86_64":
        if "avx512_vnni" in simd:
            return "avx512"
        return "avx2" if "avx2" in simd else "x86"
    if cpu.architecture.startswith("riscv"):
        return "riscv"
    cores = f"{cpu.model} {_architecture(cpu.device)}"
    if re.search(r"A5[35]\b", cores) and not re.search(r"A7\d|A78|X\d", cores):
        return "inorder"
    if "i8mm" in simd:
        return "i8mm"
    return "dotprod" if simd & {"dotprod", "asimddp"} else "neon"


@cache
def _architecture(device: str | None) -> str:
    row = find(device) if device else None
    return "" if row is None else row.architecture
