"""What every forecast of a making step is built from: where it runs, the table of rates, seconds and memory.

Rates are in ``data/quantize_rates.csv``: measured per ggml type on one core, and published for calibrated methods.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from statistics import median

from planner.core.data import read_table
from planner.core.estimates import FORMULA, Prediction
from planner.core.hardware import HardwareProfile
from planner.core.measurement import Calibration
from planner.core.units import GIB

START_SECONDS = 0.35
"""A child process with numpy, gguf and llama_cpp: the steps of a model of 5.8 million weights take 0.35-0.5 s."""
PASS_SECONDS_PER_TOKEN = 1e-5
"""Of the vocabulary, in one pass: read, written, and loaded by llama.cpp to compare token ids (32,000 tokens,
2026-11-26)."""
THREAD_EFFICIENCY = 0.9
"""Two threads do 1.8 times the work of one (273 million weights, Q6_K and IQ4_XS, 2026-11-23)."""
DISK_BYTES_PER_SECOND = 1e9
"""Assumed: a solid-state disk on PCIe 3."""
SLOW_DISK_BYTES_PER_SECOND = 0.2e9
"""Assumed for the slow end: a hard disk, or a network volume."""
CPU_SPREAD = 2.2
"""Rates per core on other machines. IQ2_XS of Llama 2 7B on a Ryzen 9 7950X takes 1 / 1.8 of what the table gives
(the ``check`` rows)."""
SOURCE = "data/quantize_rates.csv"


@dataclass(frozen=True, slots=True)
class Site:
    """Where a step runs, and what steps took there before."""

    hardware: HardwareProfile
    threads: int
    """Of the quantizer."""
    calibration: Calibration | None
    """What was measured on this machine."""


@cache
def rates() -> dict[tuple[str, str, str], float]:
    """(step, type, "1" with an importance matrix) → rate; the median where the table has several rows."""
    found: dict[tuple[str, str, str], list[float]] = {}
    for row in read_table("quantize_rates.csv"):
        found.setdefault((row["step"], row["type"], row["imatrix"]), []).append(float(row["value"]))
    return {key: median(values) for key, values in found.items()}


def quantize_rate(type_: str, imatrix: bool) -> float:
    """Weights per second and core of a ggml type; the slowest known for a type without a row."""
    table = rates()
    found = table.get(("quantize", type_, "1" if imatrix else "0")) or table.get(("quantize", type_, "0"))
    return found or min(rate for (step, _, _), rate in table.items() if step == "quantize")


def hash_seconds(size_bytes: int) -> float:
    """Of one thread that takes the SHA-256 of ``size_bytes``."""
    return size_bytes / rates()["hash", "sha256", "0"]


def cores_worth(threads: int) -> float:
    """How many times the work of one thread ``threads`` do in the same time."""
    return max(1.0, 1 + THREAD_EFFICIENCY * (threads - 1))


def step_memory(value: float, high: float, source: str) -> Prediction:
    """``value`` bytes, give or take 15 % or, above, what makes ``high`` of them."""
    return Prediction(value=value, low=0.85 * value, high=max(high, 1.15 * value), basis=FORMULA, source=source)


def step_seconds(
    start: float, work: float, moved_bytes: float, terms: tuple[tuple[str, float, str], ...], *, aside: bool = False
) -> Prediction:
    """``start + work`` and the time of the disk, of which the quick end sees nothing: the page cache takes it.

    ``aside``: threads of their own read and write, so that only what exceeds the work is waited for.
    """
    disk = moved_bytes / DISK_BYTES_PER_SECOND
    waiting = max(0.0, 0.25 * disk - work) if aside else 0.25 * disk
    value = start + work + waiting
    slow = max(0.0, moved_bytes - 1 * GIB) / SLOW_DISK_BYTES_PER_SECOND
    return Prediction(
        value=value,
        low=0.8 * start + work / CPU_SPREAD,
        high=2.5 * start + max(work * CPU_SPREAD + disk, work + slow),
        basis=FORMULA,
        source=SOURCE,
        terms=(("starting", start, "s"), *terms, ("reading and writing", waiting, "s")),
    )
