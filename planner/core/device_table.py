"""The device table ``data/devices.csv``: which row a driver's device name means, and what the row says.

How the table was made: sizes of GPUs are nominal GiB (a "24 GB" card carries 24 * 2**30 bytes of chips), and
``driver_memory_bytes`` holds what the driver reports where ECC or a carve-out takes a part of it. Bandwidth is the
vendor's GB/s (10**9). ``fp16_flops_per_second`` is the dense rate of the matrix units, else of the vector units;
on Pascal and Maxwell the FP32 rate, as llama.cpp computes in FP32 there. Each row's notes say what was corrected.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

from planner.core.data import number, read_table
from planner.core.units import GIB

GPU_KINDS = frozenset({"gpu_consumer", "gpu_mobile", "gpu_pro", "gpu_datacenter"})
CPU_KINDS = frozenset({"cpu", "sbc_cpu"})


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceRow:
    """One row of the device table; ``None`` is unknown."""

    device: str
    kind: str
    """``gpu_consumer|mobile|pro|datacenter``, ``apple_soc``, ``apu``, ``soc``, ``cpu`` or ``sbc_cpu``."""
    vendor: str
    """Lower case: ``nvidia``, ``amd``, ``intel``, ``apple``, …"""
    architecture: str
    compute_capability: str | None
    """``8.9`` for NVIDIA, ``gfx1100`` for AMD."""
    memory_bytes: int | None
    """Nominal size; for unified memory the largest configuration sold."""
    memory_min_bytes: int | None
    """The smallest configuration sold, where there are several."""
    driver_memory_bytes: int | None
    """What the driver reports, where it is known to differ from the nominal size."""
    memory_type: str
    unified: bool
    bandwidth_bytes_per_second: float | None
    fp16_flops_per_second: float | None
    fp32_flops_per_second: float | None
    int8_ops_per_second: float | None
    pcie: str | None
    core_count: int | None
    """Shader cores, or GPU cores of an Apple chip."""
    sm_count: int | None
    cpu_core_count: int | None
    cpu_performance_core_count: int | None
    cpu_thread_count: int | None
    simd: tuple[str, ...]
    tdp_watts: float | None
    release: str | None
    source: str
    date: str
    notes: str

    def total_bytes(self) -> int | None:
        """Memory as the driver would report it."""
        return self.driver_memory_bytes or self.memory_bytes


def _count(text: str) -> int | None:
    value = number(text)
    return None if value is None else int(value)


@cache
def _row(name: str) -> DeviceRow:
    raw = _raw()[name]
    return DeviceRow(
        device=raw["device"],
        kind=raw["kind"],
        vendor=raw["vendor"].lower(),
        architecture=raw["architecture"],
        compute_capability=raw["compute_capability"] or None,
        memory_bytes=_count(raw["memory_bytes"]),
        memory_min_bytes=_count(raw["memory_min_bytes"]),
        driver_memory_bytes=_count(raw["driver_memory_bytes"]),
        memory_type=raw["memory_type"],
        unified=raw["unified"] == "1",
        bandwidth_bytes_per_second=number(raw["bandwidth_bytes_per_second"]),
        fp16_flops_per_second=number(raw["fp16_flops_per_second"]),
        fp32_flops_per_second=number(raw["fp32_flops_per_second"]),
        int8_ops_per_second=number(raw["int8_ops_per_second"]),
        pcie=raw["pcie"] or None,
        core_count=_count(raw["core_count"]),
        sm_count=_count(raw["sm_count"]),
        cpu_core_count=_count(raw["cpu_core_count"]),
        cpu_performance_core_count=_count(raw["cpu_performance_core_count"]),
        cpu_thread_count=_count(raw["cpu_thread_count"]),
        simd=tuple(raw["simd"].split()),
        tdp_watts=number(raw["tdp_watts"]),
        release=raw["release"] or None,
        source=raw["source"],
        date=raw["date"],
        notes=raw["notes"],
    )


@cache
def _raw() -> dict[str, dict[str, str]]:
    return {row["device"]: row for row in read_table("devices.csv")}


def names() -> tuple[str, ...]:
    """Every device name of the table, in its order."""
    return tuple(_raw())


# Words that name a maker, a family or a package and tell no two rows apart.
_NOISE_WORDS = (
    "nvidia amd ati intel apple advanced micro devices corporation inc geforce radeon tesla instinct quadro graphics"
    " gpu r tm generation workstation edition processor cpu w with series dgx spark developer kit oam core the"
    " hbm2 hbm2e hbm3 hbm3e gddr5 gddr6 gddr6x gddr7 10th 11th 12th 13th 14th gen"
)
_NOISE = frozenset(_NOISE_WORDS.split())
# Words that make another product of the same number: never ignored.
_VARIANT_WORDS = "ti super mobile max q xt xtx gre d ada pro ultra nvl server se m s mig plus hx ai"
_VARIANTS = frozenset(_VARIANT_WORDS.split())
_WORD = re.compile(r"[a-z0-9]+")
_SIZE = re.compile(r"\b(\d+) ?g(?:i?b)\b")
_GPU_CORES = re.compile(r"\b(\d+)(?:c gpu|[- ]core gpu)")
_CPU_CORES = re.compile(r"\b\w+-core\b(?! gpu)")
# Numbers that are no part of the name: a clock, and the revision of a board ("Raspberry Pi 4 Model B Rev 1.5").
_CLOCK = re.compile(r"@ ?[\d.]+ ?[gm]hz|\brev [\d.]+")
_FORM = re.compile(r"\b(sxm\d?|pcie|nvl)\b")
# A nominal 24 GB card with ECC on reports 22.5 GiB (6 % less); 12 GB against 10 GB is 17 % less.
_SIZE_TOLERANCE = 0.1


@dataclass(frozen=True, slots=True)
class _Key:
    words: frozenset[str]
    size_gb: int | None
    cores: int | None
    form: str | None


@cache
def _key(name: str) -> _Key:
    """The parts of a device name that decide: model words, memory size, GPU cores, form factor."""
    text = _CLOCK.sub(
        " ", name.lower().replace("(r)", " ").replace("(tm)", " ").replace("_", " ").replace("+", " plus ")
    )
    text = text.replace("laptop", "mobile").replace("max-q", "maxq max q")
    size, cores = _SIZE.search(text), _GPU_CORES.search(text)
    form = _FORM.search(text)
    found = form[1].rstrip("0123456789") if form else ("sxm" if "hbm3" in text else None)
    text = _CPU_CORES.sub(" ", _GPU_CORES.sub(" ", _SIZE.sub(" ", _FORM.sub(" ", text))))
    words = frozenset(_WORD.findall(text)) - _NOISE
    if found == "nvl":
        words |= {"nvl"}
    return _Key(words, int(size[1]) if size else None, int(cores[1]) if cores else None, found)


@cache
def _index() -> dict[frozenset[str], tuple[str, ...]]:
    """Model words → names of the rows that have them, as name or as alias."""
    found: dict[frozenset[str], list[str]] = {}
    for name, raw in _raw().items():
        for alias in (name, *filter(None, raw["aliases"].split("|"))):
            entry = found.setdefault(_key(alias).words, [])
            if name not in entry:
                entry.append(name)
    return {words: tuple(entry) for words, entry in found.items()}


@cache
def _aliases() -> dict[str, str]:
    """Names and aliases in lower case → the row's name; a row's own name wins."""
    other = {alias.lower(): name for name, raw in _raw().items() for alias in raw["aliases"].split("|") if alias}
    return other | {name.lower(): name for name in _raw()}


def _candidates(words: frozenset[str]) -> tuple[str, ...]:
    """Rows with just these words, else those whose words are all among them with no variant word left over."""
    index = _index()
    if words in index:
        return index[words]
    inside = [known for known in index if known and known <= words and not (words - known) & _VARIANTS]
    inside = [known for known in inside if any(any(c.isdigit() for c in word) for word in known)]
    return index[max(inside, key=lambda known: (len(known), sorted(known)))] if inside else ()


def _pick(rows: Iterable[DeviceRow], key: _Key, memory_bytes: int | None, core_count: int | None) -> DeviceRow | None:
    size = memory_bytes if memory_bytes else (key.size_gb * GIB if key.size_gb else None)
    cores = core_count or key.cores
    left = [row for row in rows if row.unified or row.memory_bytes is None or size is None or _near(row, size)]
    if cores is not None and (same := [row for row in left if row.core_count == cores]):
        left = same
    if not left:
        return None

    def order(row: DeviceRow) -> tuple[bool, float, int]:
        form = _key(row.device).form
        # NVML writes PCIe into the name of a PCIe card, so a name without a form factor is the SXM module.
        wanted = key.form or ("sxm" if row.kind == "gpu_datacenter" else None)
        off = abs(row.memory_bytes - size) if row.memory_bytes and size and not row.unified else 0.0
        return (form is not None and form != wanted, off, row.core_count or 0)

    return min(left, key=order)


def _near(row: DeviceRow, size: int) -> bool:
    known = [value for value in (row.memory_bytes, row.driver_memory_bytes) if value]
    return any(abs(size - value) <= _SIZE_TOLERANCE * value for value in known)


def find(name: str, *, memory_bytes: int | None = None, core_count: int | None = None) -> DeviceRow | None:
    """The row that ``name`` means: by its exact name, else by the model words of a driver's spelling.

    Args:
        name: ``GeForce RTX 4090``, ``NVIDIA GeForce RTX 4090``, ``NVIDIA H100 80GB HBM3``, ``Apple M3 Max`` …
        memory_bytes: what the driver reports; tells the 10 GB card from the 12 GB one of the same name. A row whose
            size is over a tenth off is another product, and not returned.
        core_count: GPU cores of an Apple chip; without it the smallest version is meant.

    Returns:
        ``None`` where no row is this product.
    """
    if exact := _aliases().get(name.lower()):
        return _row(exact)
    key = _key(name)
    if not key.words:
        return None
    return _pick((_row(found) for found in _candidates(key.words)), key, memory_bytes, core_count)


def nearest(name: str, count: int = 3) -> tuple[str, ...]:
    """At most ``count`` names of the table that resemble ``name``, best first."""
    from difflib import get_close_matches

    lowered = {known.lower(): known for known in names()}
    close = get_close_matches(name.lower(), list(lowered), n=count, cutoff=0.4)
    words = _key(name).words
    sharing = [known for known in names() if words & _key(known).words]
    ordered = [
        *sorted(sharing, key=lambda known: -len(words & _key(known).words))[:count],
        *(lowered[c] for c in close),
    ]
    return tuple(dict.fromkeys(ordered))[:count]
