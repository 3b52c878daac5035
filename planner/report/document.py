"""``report.json`` as values: what a page needs of it, checked, whoever wrote the file."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from planner.core.candidate import Variant
from planner.core.codec import canonical_json, decode, read_json
from planner.core.errors import InputError
from planner.core.hardware import HardwareProfile
from planner.core.measurement import Conditions
from planner.core.plan import Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """One quantity: predicted, its range, and what was measured."""

    quantity: str
    predicted: float
    low: float
    high: float
    measured: float | None = None
    ok: bool | None = None
    position: str = "not measured"

    @property
    def ratio(self) -> float | None:
        """measured / predicted."""
        return self.measured / self.predicted if self.measured is not None and self.predicted else None


@dataclass(frozen=True, slots=True, kw_only=True)
class StepDone:
    """A receipt with what had been predicted of the step."""

    step: str
    output: str
    size_bytes: int
    sha256: str
    seconds: float
    peak_memory_bytes: int | None = None
    verdicts: tuple[Judged, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Range:
    """A prediction without its arithmetic: value, 80 % interval, basis."""

    value: float
    low: float
    high: float
    basis: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A candidate of the decision, as a point among the others."""

    label: str
    file_bytes: int
    memory_bytes: int
    decode: Range | None = None
    perplexity_ratio: Range | None = None
    pareto: bool = False
    chosen: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Depth:
    """Predicted decode speed with ``depth`` tokens in the KV cache."""

    depth: int
    decode: Range


@dataclass(frozen=True, slots=True, kw_only=True)
class Taken:
    """A measurement that the report kept, as far as a page needs it."""

    quantity: str
    value: float
    low: float
    high: float
    conditions: Conditions = field(default_factory=Conditions)


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """What the comparison with the 16-bit model found besides the quantities."""

    same_top_fraction: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """The quality trial, as far as a page needs it."""

    comparison: Compared | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """A run. What older reports lack is empty."""

    artifact: str
    verdicts: tuple[Judged, ...]
    measured: dict[str, float | None]
    ok: bool = True
    steps: tuple[StepDone, ...] = ()
    notes: tuple[str, ...] = ()
    tools: dict[str, str] = field(default_factory=dict)
    measured_at: str = ""
    measurements: tuple[Taken, ...] = ()
    plan: Plan | None = None
    hardware: HardwareProfile | None = None
    candidates: tuple[Point, ...] = ()
    speed_by_depth: tuple[Depth, ...] = ()
    commands: dict[str, str] = field(default_factory=dict)
    model: str | None = None
    variant: Variant | None = None
    """What was measured, with the runtime that ran it."""
    quality: Quality | None = None

    @property
    def name(self) -> str:
        """``demo, GGUF Q4_K_M``; the artifact's name where the report holds no plan."""
        return f"{self.plan.model.name}, {self.plan.variant.label()}" if self.plan else Path(self.artifact).name

    @property
    def measured_variant(self) -> Variant | None:
        """The variant under the runtime that ran it; older reports only know the plan's."""
        return self.variant or (self.plan.variant if self.plan else None)

    @property
    def same_top_fraction(self) -> float | None:
        """Share of tokens of which the model and its 16-bit original thought the same the likeliest."""
        compared = self.quality.comparison if self.quality else None
        return compared.same_top_fraction if compared else None


def parse(document: object, what: str) -> Report:
    """A report out of parsed JSON.

    Raises:
        InputError: it is no report of qplan, or holds numbers that are not finite.
    """
    if not isinstance(document, dict) or "verdicts" not in document:
        raise InputError(
            f"{what} is no report of qplan",
            hint="`qplan apply` writes report.json beside the artifact",
            code="no-report",
        )
    try:
        canonical_json(document)
    except ValueError as error:
        raise InputError(f"{what} is no report of qplan", numbers=str(error), code="bad-document") from None
    return decode(Report, document, what=what)


def read(path: Path) -> Report:
    """The report in the file ``path``.

    Raises:
        InputError: the file is missing, unreadable or no report.
    """
    loaded: Any = read_json(path)
    return parse(loaded, str(path))
