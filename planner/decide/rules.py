"""The decision matrix as data: which rules speak for a machine and a workload, and what they say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from planner.core.candidate import Candidate, Rejection, TraceEntry, method_and_type
from planner.core.data import read_document
from planner.core.hardware import HardwareProfile
from planner.core.units import GIB
from planner.core.workload import Workload

TABLE = "decision_rules.toml"


@dataclass(frozen=True, slots=True, kw_only=True)
class Pattern:
    """Which variants a rule names; an unset field matches all."""

    method: str
    type: str | None = None

    def matches(self, candidate: Candidate) -> bool:
        """Whether the candidate's variant is one of those named."""
        variant = candidate.variant
        return variant.method == self.method and (self.type is None or variant.type == self.type)

    def __str__(self) -> str:
        return method_and_type(self.method, self.type or "").strip() or "16-bit weights"

    def allows(self, other: Pattern) -> bool:
        """Whether some variant is named by both."""
        return self.method == other.method and (self.type is None or other.type in (None, self.type))


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One row of the decision matrix."""

    id: str
    scenario: str
    when: dict[str, Any] = field(hash=False)
    source: str
    date: str
    prefer: tuple[Pattern, ...] = ()
    require: tuple[Pattern, ...] = ()
    worth_percent: float | None = None
    """What its preference is worth, in percent of perplexity; ``None`` is the table's ordinary bonus."""

    def names(self) -> str:
        """The variants it speaks for, as text."""
        return " or ".join(str(pattern) for pattern in self.prefer or self.require)

    def leaves(self, other: Rule) -> bool:
        """Whether this rule, where it is required, leaves anything that ``other`` prefers."""
        return any(mine.allows(theirs) for mine in self.require for theirs in other.prefer)

    def favours(self, candidate: Candidate) -> bool:
        """Whether it speaks for this candidate."""
        return any(pattern.matches(candidate) for pattern in self.prefer or self.require)


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """Exchange rates of an objective: what speed and memory are worth, in percent of perplexity."""

    name: str
    speed_percent_per_doubling: float
    memory_percent_per_halving: float
    speed_enough_tokens_per_second: float


@cache
def all_rules() -> tuple[Rule, ...]:
    """The decision matrix in the order of its file."""
    return tuple(_rule(row) for row in read_document(TABLE)["rule"])


def _rule(row: dict[str, Any]) -> Rule:
    patterns = {key: tuple(Pattern(**pattern) for pattern in row.get(key, ())) for key in ("prefer", "require")}
    return Rule(**{**row, **patterns})


@cache
def objective(name: str) -> Objective:
    """The exchange rates of an objective (the workload has checked its name)."""
    return next(Objective(**row) for row in read_document(TABLE)["objective"] if row["name"] == name)


@dataclass(frozen=True, slots=True, kw_only=True)
class MixtureTerms:
    """When a mixture of types is worth proposing unasked."""

    least_gain_percent: float
    """Of perplexity, over the best standard type."""
    most_seconds: float
    """That measuring the 16-bit model may take."""
    source: str
    date: str


@cache
def mixture_terms() -> MixtureTerms:
    """The terms of a mixture."""
    return MixtureTerms(**read_document(TABLE)["mixture"])


@dataclass(frozen=True, slots=True, kw_only=True)
class SevereLoss:
    """The loss from which on a smaller model of the family at about 4 bits is the better one."""

    least_loss_percent: float
    """Of perplexity, over the 16-bit model."""
    type: str
    """That the smaller model would have."""
    text: str
    """What the limit is taken from."""
    source: str
    date: str


@cache
def severe_loss() -> SevereLoss:
    """The terms of a severe loss."""
    return SevereLoss(**read_document(TABLE)["severe_loss"])


@cache
def bonus_percent() -> float:
    """What a preference is worth, in percent of perplexity."""
    return float(read_document(TABLE)["bonus"]["prefer_percent"])


def whole_in_vram(candidate: Candidate) -> bool:
    """Whether nothing but the token embedding stays on the host."""
    placement = candidate.placement
    on_gpus = placement.gpu_count > 0 and placement.cpu_expert_layers == 0
    return on_gpus and candidate.estimate.memory.host.kv_cache_bytes == 0


def speaks(rule: Rule, candidate: Candidate, hardware: HardwareProfile, workload: Workload) -> bool:
    """Whether every condition of the rule holds for this candidate."""
    gpus = () if workload.cpu_only else hardware.gpus
    largest_gib = max((gpu.usable_bytes() or 0 for gpu in gpus), default=0) / GIB
    checks: dict[str, Callable[[Any], bool]] = {
        "gpu": lambda want: bool(gpus) == want,
        "vendor": lambda want: any(gpu.vendor == want for gpu in gpus),
        "gpu_count_min": lambda want: len(gpus) >= want,
        "vram_min_gib": lambda want: largest_gib >= want,
        "vram_below_gib": lambda want: largest_gib < want,
        "objective": lambda want: workload.objective == want,
        "concurrency_min": lambda want: workload.concurrency >= want,
        "whole_in_vram": lambda want: whole_in_vram(candidate) == want,
    }
    return all(checks[key](want) for key, want in rule.when.items())


def require(
    candidates: tuple[Candidate, ...], hardware: HardwareProfile, workload: Workload
) -> tuple[tuple[Candidate, ...], tuple[Rejection, ...], tuple[Rule, ...]]:
    """Candidates that the ``require`` rules leave, the others as rejections, and the rules that spoke."""
    allowed, refused, spoken = list(candidates), [], []
    for rule in all_rules():
        if not rule.require or not any(speaks(rule, c, hardware, workload) for c in candidates):
            continue
        spoken.append(rule)
        refused += [_refusal(rule, c) for c in allowed if not rule.favours(c)]
        allowed = [c for c in allowed if rule.favours(c)]
    return tuple(allowed), tuple(refused), tuple(spoken)


def _refusal(rule: Rule, candidate: Candidate) -> Rejection:
    variant = candidate.variant
    reason = f"{rule.scenario}: only {rule.names()} will do"
    return Rejection(method=variant.method, type=variant.type, reason=reason, rule=rule.id)


def bonus(candidate: Candidate, hardware: HardwareProfile, workload: Workload) -> float:
    """Percent of perplexity that the preferences add for this candidate: the strongest rule counts, not their sum."""
    spoken = (r for r in all_rules() if r.prefer and r.favours(candidate) and speaks(r, candidate, hardware, workload))
    return max((bonus_percent() if r.worth_percent is None else r.worth_percent for r in spoken), default=0.0)


def trace(
    ranked: tuple[Candidate, ...], required: tuple[Rule, ...], hardware: HardwareProfile, workload: Workload
) -> tuple[TraceEntry, ...]:
    """What every rule said that speaks for the way that was chosen, and whether the numbers agreed with it."""
    entries = [TraceEntry(rule=r.id, effect=f"{r.scenario}: only {r.names()}", source=r.source) for r in required]
    for rule in all_rules():
        if not rule.prefer or not ranked or not speaks(rule, ranked[0], hardware, workload):
            continue
        entries.append(
            TraceEntry(rule=rule.id, effect=_verdict(rule, ranked, required, hardware, workload), source=rule.source)
        )
    return tuple(entries)


def _verdict(
    rule: Rule,
    ranked: tuple[Candidate, ...],
    required: tuple[Rule, ...],
    hardware: HardwareProfile,
    workload: Workload,
) -> str:
    chosen = ranked[0]
    if rule.favours(chosen) and speaks(rule, chosen, hardware, workload):
        return f"{rule.scenario}: agrees"
    best = next((c for c in ranked if rule.favours(c) and speaks(rule, c, hardware, workload)), None)
    if best is None and (stronger := next((r for r in required if not r.leaves(rule)), None)):
        return f"{rule.scenario}: set aside, as {stronger.names()} is required [{stronger.id}]"
    if best is None:
        return f"{rule.scenario}: {rule.names()} does not fit or cannot run here"
    gap = (chosen.score or 0.0) - (best.score or 0.0)
    return (
        f"{rule.scenario}: the numbers overrule it, {chosen.variant.label()} is ahead of "
        f"{best.variant.label()} by {gap:.2f} points"
    )
