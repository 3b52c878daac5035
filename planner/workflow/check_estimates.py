"""Hold the formulas against llama.cpp itself over the catalog: sizes to the byte, memory per device."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from planner.core.candidate import Placement, Variant
from planner.core.errors import QplanError, UsageError
from planner.core.hardware import Cpu, Gpu, HardwareProfile, Memory
from planner.core.model import ModelSpec
from planner.estimate import kv_cache
from planner.execute.oracle import ask, require_llama_cpp
from planner.methods import gguf, gguf_mix
from planner.workflow.oracle import (
    COMPUTE,
    KV_CACHE,
    TENSORS,
    TOTAL,
    WEIGHTS,
    Comparison,
    Difference,
    compare,
    difference_document,
    failed,
)

DEFAULT_TYPES = ("Q4_0", "Q4_K_M", "Q3_K_L", "IQ3_XS", "IQ2_M", "IQ4_XS", "Q8_0", "MXFP4_MOE")
"""One of each family of mixes."""
MEMORY_TYPE = "Q4_K_M"
"""Memory is compared in this type, or in the first of those asked for: buffers hardly depend on it."""
PLACEMENTS = (
    Placement(context=4096),
    Placement(context=4096, flash_attention=False),
    Placement(context=8192, flash_attention=False, ubatch=2048),
    Placement(context=32768, kv_type="q8_0", ubatch=2048),
    Placement(context=4096, kv_type="q4_0"),
    Placement(context=2048, sequences=4),
    Placement(context=2048, sequences=4, flash_attention=False, ubatch=2048),
)
OFFLOADED_SHARES = (1.0, 0.5, 0.0)
"""Shares of the layers on the GPU, where llama.cpp sees one."""
MOST_TOTAL_ERROR = 0.05
"""Of a device's total; issue of the memory estimates: 5 % at the worst."""
WORST_ROWS = 12
LISTED_ROWS = 500

Progress = Callable[[int, int, str], None]
"""Called with the models done, all models, and the name of the next."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ArchitectureRow:
    """Errors over one architecture: counts of exact figures, and relative errors."""

    architecture: str
    model_count: int
    size_count: int
    size_exact_count: int
    weights_exact_fraction: float | None
    cache_exact_fraction: float | None
    compute_mean: float | None
    compute_worst: float | None
    total_mean: float | None
    total_worst: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class EstimateCheck:
    """All comparisons of one run."""

    tool: str
    gpus: tuple[str, ...]
    comparisons: tuple[Comparison, ...]
    failures: tuple[tuple[str, str], ...]
    """Model and reason where llama.cpp gave no answer at all."""

    @property
    def sizes_exact(self) -> bool:
        """Every size is llama.cpp's to the byte, and both refuse the same."""
        refused = any(found.disagreement for found in self.comparisons)
        return not refused and not any(d.bytes for d in _of(self.comparisons, TENSORS))

    @property
    def worst_total(self) -> float:
        """Largest relative error of a device's total."""
        return max((abs(d.relative) for d in _of(self.comparisons, TOTAL)), default=0.0)

    @property
    def mean_total(self) -> float:
        """Mean relative error of the devices' totals."""
        return _mean(self.comparisons, TOTAL) or 0.0

    @property
    def ok(self) -> bool:
        """Sizes exact, no total beyond :data:`MOST_TOTAL_ERROR`, and every model answered for."""
        return self.sizes_exact and self.worst_total <= MOST_TOTAL_ERROR and not self.failures


def check_estimates(
    models: Sequence[str] = (), types: Sequence[str] = (), *, everything: bool = False, progress: Progress | None = None
) -> EstimateCheck:
    """Compare the formulas with llama.cpp.

    Args:
        models: catalog names; by default the smallest of each architecture, or all with ``everything``.
        types: llama.cpp's file types, each with and without an importance matrix; by default one of each family of
            mixes, or all with ``everything``.

    Raises:
        MissingDependency: llama-cpp-python is not installed.
        UsageError: an unknown type (``unknown-type``).
        ModelNotFound: an unknown name (``unknown-model``).
    """
    require_llama_cpp()
    specs = [_resolved(name) for name in models] if models else _chosen(everything)
    names = _types(types, everything)
    first = ask(specs[0], ())
    hardware = _hardware(len(first.gpus))
    comparisons: list[Comparison] = []
    failures: list[tuple[str, str]] = []
    for done, spec in enumerate(specs):
        if progress:
            progress(done, len(specs), spec.name)
        try:
            comparisons += compare(spec, _cases(spec, names, hardware), hardware)[1]
        except QplanError as error:
            failures.append((spec.name, failed(error)))
    return EstimateCheck(tool=first.tool, gpus=first.gpus, comparisons=tuple(comparisons), failures=tuple(failures))


def _resolved(name: str) -> ModelSpec:
    from planner import models

    return models.resolve(name)


def _chosen(everything: bool) -> list[ModelSpec]:
    """The whole catalog, or the smallest model of each architecture."""
    from planner.models import catalog_entries

    entries = catalog_entries()
    if everything:
        return [_resolved(entry.name) for entry in entries]
    smallest: dict[str, Any] = {}
    for entry in entries:
        known = smallest.get(entry.architecture)
        if known is None or entry.parameter_count < known.parameter_count:
            smallest[entry.architecture] = entry
    return [_resolved(entry.name) for entry in smallest.values()]


def _types(asked: Sequence[str], everything: bool) -> tuple[str, ...]:
    if asked:
        return tuple(gguf_mix.file_type(name.upper()).name for name in asked)
    return tuple(gguf_mix.file_types()) if everything else DEFAULT_TYPES


def _hardware(gpu_count: int) -> HardwareProfile:
    """A machine of any make: llama.cpp's buffers do not depend on it."""
    gpus = (Gpu(name="GPU", vendor="nvidia", backend="cuda"),) if gpu_count else ()
    return HardwareProfile(
        name="oracle", os="linux", cpu=Cpu(model="any", architecture="any"), memory=Memory(), gpus=gpus
    )


def _cases(model: ModelSpec, types: Sequence[str], hardware: HardwareProfile) -> list[tuple[Variant, Placement | None]]:
    cases: list[tuple[Variant, Placement | None]] = []
    for name in types:
        full = name in gguf.FULL_PRECISION
        cases += [(gguf.variant(name, imatrix=known), None) for known in ((False,) if full else (False, True))]
    variant = gguf.variant(MEMORY_TYPE if MEMORY_TYPE in types else types[0])
    return cases + [(variant, placement) for placement in _placements(model, len(hardware.gpus))]


def _placements(model: ModelSpec, gpu_count: int) -> Iterable[Placement]:
    for base in PLACEMENTS:
        fits = kv_cache.divides_heads(model, base.kv_type)
        placement = base if fits else dataclasses.replace(base, kv_type="f16")
        if not gpu_count:
            yield placement
            continue
        for share in OFFLOADED_SHARES:
            layers = round(share * model.offloadable_count)
            yield dataclasses.replace(placement, gpu_layers=layers, gpu_count=1)


def _of(comparisons: Iterable[Comparison], part: str) -> list[Difference]:
    return [d for found in comparisons for d in found.differences if d.part == part]


def _mean(comparisons: Iterable[Comparison], part: str) -> float | None:
    found = [abs(d.relative) for d in _of(comparisons, part)]
    return fmean(found) if found else None


def _worst(comparisons: Iterable[Comparison], part: str) -> float | None:
    return max((abs(d.relative) for d in _of(comparisons, part)), default=None)


def _exact(comparisons: Iterable[Comparison], part: str) -> float | None:
    found = [d.bytes == 0 for d in _of(comparisons, part)]
    return fmean(found) if found else None


def by_architecture(check: EstimateCheck) -> tuple[ArchitectureRow, ...]:
    """One row per architecture, the largest error of a total first."""
    groups: dict[str, list[Comparison]] = {}
    for found in check.comparisons:
        groups.setdefault(found.model.architecture, []).append(found)
    rows = [_row(name, own) for name, own in groups.items()]
    return tuple(sorted(rows, key=lambda row: (row.size_exact_count - row.size_count, -(row.total_worst or 0.0))))


def _row(architecture: str, own: list[Comparison]) -> ArchitectureRow:
    sizes = _of(own, TENSORS)
    wrong = sum(found.disagreement is not None for found in own)
    return ArchitectureRow(
        architecture=architecture,
        model_count=len({found.model.name for found in own}),
        size_count=len(sizes) + wrong,
        size_exact_count=sum(d.bytes == 0 for d in sizes),
        weights_exact_fraction=_exact(own, WEIGHTS),
        cache_exact_fraction=_exact(own, KV_CACHE),
        compute_mean=_mean(own, COMPUTE),
        compute_worst=_worst(own, COMPUTE),
        total_mean=_mean(own, TOTAL),
        total_worst=_worst(own, TOTAL),
    )


def worst(check: EstimateCheck, count: int = WORST_ROWS) -> tuple[tuple[Comparison, Difference], ...]:
    """The largest relative differences that are not 0: sizes first, then everything else."""
    found = [(c, d) for c in check.comparisons for d in c.differences if d.bytes]
    return tuple(sorted(found, key=lambda pair: (pair[1].part != TENSORS, -abs(pair[1].relative)))[:count])


def placement_label(placement: Placement | None) -> str:
    """As ``ctx 4096, q8_0 KV, ubatch 2048, 4 sequences, no FA``."""
    if placement is None:
        return ""
    parts = [f"ctx {placement.context}"]
    parts += [f"{placement.gpu_layers} on GPU"] if placement.gpu_count else []
    parts += [f"{placement.kv_type} KV"] if placement.kv_type != "f16" else []
    parts += [f"ubatch {placement.ubatch}"] if placement.ubatch != Placement(context=1).ubatch else []
    parts += [f"{placement.sequences} sequences"] if placement.sequences > 1 else []
    return ", ".join(parts + ([] if placement.flash_attention else ["no FA"]))


def check_document(check: EstimateCheck) -> dict[str, Any]:
    """What ``qplan doctor --check-estimates --json`` prints."""
    from planner import FORMAT_VERSION
    from planner.core.codec import encode

    return {
        "format_version": FORMAT_VERSION,
        "tool": check.tool,
        "gpus": list(check.gpus),
        "ok": check.ok,
        "sizes_exact": check.sizes_exact,
        "mean_total_error": round(check.mean_total, 6),
        "worst_total_error": round(check.worst_total, 6),
        "architectures": [encode(row) for row in by_architecture(check)],
        "worst": [
            {
                "model": found.model.name,
                "type": found.variant.type,
                "imatrix": found.variant.imatrix,
                "placement": encode(found.placement) if found.placement else None,
                **difference_document(difference),
            }
            for found, difference in worst(check, LISTED_ROWS)
        ],
        "disagreements": [
            {"model": c.model.name, "type": c.variant.type, "imatrix": c.variant.imatrix, "reason": c.disagreement}
            for c in check.comparisons
            if c.disagreement
        ],
        "failures": [{"model": name, "reason": reason} for name, reason in check.failures],
        "notes": sorted({note for found in check.comparisons for note in found.notes}),
    }


def names_of(text: str | None) -> tuple[str, ...]:
    """The names of a comma-separated list.

    Raises:
        UsageError: a list without a name.
    """
    names = tuple(part.strip() for part in (text or "").split(",") if part.strip())
    if text is not None and not names:
        raise UsageError("the list names nothing", numbers=repr(text), hint="as `--models llama-2-7b,qwen3-4b`")
    return names
