"""From a model's name and a workload to a decision for a machine."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from planner.core.errors import UsageError
from planner.core.finetuning import FinetuneDecision
from planner.core.hardware import HardwareProfile
from planner.core.measurement import Calibration
from planner.core.model import ModelSpec
from planner.core.units import GIB, format_bytes
from planner.core.workload import KV_TYPES, OBJECTIVES, Workload
from planner.decide import Decision, decide
from planner.decide.mixture import ENOUGH_BITS
from planner.workflow.survey import calibration_of, survey
from planner.workflow.way_out import with_way_out

_FULL = 0.92
"""Share of a memory limit that the margin leaves to use, less what is not worth a word."""
LEAST_CONTEXT = 2048
"""Shortest context that is taken unasked: a question with a page of text and its answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recommendation:
    """A decision with everything it rests on."""

    model: ModelSpec
    hardware: HardwareProfile
    workload: Workload
    decision: Decision
    simulated: bool
    """The machine is a profile, not this one."""
    notes: tuple[str, ...] = ()
    """What could not be used, and why."""
    finetuning: FinetuneDecision | None = None
    """Of the objective ``finetune``."""

    @property
    def fits(self) -> bool:
        """There is a way to do what was asked for."""
        return (self.decision if self.finetuning is None else self.finetuning).chosen is not None


def recommend(
    model_text: str,
    workload: Workload,
    *,
    profile: str | None = None,
    output: Path | None = None,
    measure: bool = False,
) -> Recommendation:
    """How to run a model best.

    Args:
        model_text: catalog name, checkpoint directory, GGUF file, hub id or bare size.
        workload: what for.
        profile: a captured machine to plan for instead of this one.
        output: where the model would be written.
        measure: measure the memory bandwidth if it never was on this machine.

    Raises:
        UsageError: the workload asks for something that does not exist.
        ModelNotFound: no model has this name.
        InputError: the model's files are unreadable.
    """
    from planner import models

    check_workload(workload)
    model = models.resolve(model_text)
    check_types(model, workload)
    hardware = survey(profile, output=output, measure=measure)
    return recommend_for(model, hardware, workload, simulated=profile is not None)


def recommend_for(
    model: ModelSpec, hardware: HardwareProfile, workload: Workload, *, simulated: bool = False
) -> Recommendation:
    """:func:`recommend` for a model and a machine that are known already: 20 ms once both have been asked about.

    Raises:
        UsageError: the workload asks for something that does not exist.
    """
    check_workload(workload)
    check_types(model, workload)
    calibration, notes = calibration_of(hardware)
    tries = contexts_to_try(model, workload)
    for context in tries:
        tried = dataclasses.replace(workload, context=context)
        decision = decide(model, hardware, tried, calibration)
        if decision.chosen is not None or not any(r.rule == "memory" for r in decision.rejected):
            break
    decision = with_way_out(decision, model)
    return Recommendation(
        model=model,
        hardware=hardware,
        workload=tried,
        decision=decision,
        simulated=simulated,
        finetuning=_finetuning(model, hardware, workload),
        notes=(
            *notes,
            *_context_notes(model, tried, tries, decision),
            *_unused_notes(model, tried, decision),
            *_calibration_notes(simulated, calibration),
        ),
    )


def _finetuning(model: ModelSpec, hardware: HardwareProfile, workload: Workload) -> FinetuneDecision | None:
    if workload.objective != "finetune":
        return None
    from planner.decide.finetuning import decide_finetuning

    return decide_finetuning(model, hardware, workload)


def contexts_to_try(model: ModelSpec, workload: Workload) -> tuple[int, ...]:
    """The context that was asked for; where none was, 8192 or what the model was trained with, then halves of it."""
    if workload.context_fixed:
        return (workload.context,)
    first = min(workload.context, model.n_ctx_train)
    return (first, *(half for half in (first // 2, first // 4) if half >= LEAST_CONTEXT))


def _context_notes(model: ModelSpec, used: Workload, tries: tuple[int, ...], decision: Decision) -> tuple[str, ...]:
    if used.context > model.n_ctx_train:
        return (f"{model.name} was trained with {model.n_ctx_train} tokens of context; beyond them it gets worse",)
    if used.context < tries[0]:
        if decision.chosen is None:
            return (
                f"no context from {tries[0]} down to {used.context} tokens is possible; this is for {used.context}",
            )
        if used.min_decode_tokens_per_second is not None:
            return (f"{tries[0]} tokens of context do not fit, or are too slow; this is for {used.context}",)
        return (f"{tries[0]} tokens of context do not fit; this is for {used.context}",)
    return ()


def unused_bytes(model: ModelSpec, workload: Workload, decision: Decision) -> int | None:
    """What a mixture of types would fill, where a memory limit was given and falls between two types; else ``None``."""
    chosen, limit = decision.chosen, workload.max_memory_bytes
    if chosen is None or limit is None or chosen.variant.method != "gguf" or model.file_type is not None:
        return None
    used = chosen.estimate.memory
    needed = max(device.needed_bytes for device in (used.devices or (used.host,)))
    gains = chosen.estimate.size.bits_per_weight < ENOUGH_BITS
    return limit - needed if gains and workload.types is None and needed < _FULL * limit else None


def _unused_notes(model: ModelSpec, workload: Workload, decision: Decision) -> tuple[str, ...]:
    unused, limit = unused_bytes(model, workload, decision), workload.max_memory_bytes
    if unused is None or limit is None:
        return ()
    return (
        f"{format_bytes(unused)} of {format_bytes(limit)} stay unused: `qplan plan {model.name} --fit-memory "
        f"{limit / GIB:g}GiB` fills them with a mixture of types, chosen by measuring the checkpoint",
    )


def _calibration_notes(simulated: bool, calibration: Calibration | None) -> tuple[str, ...]:
    if simulated or (calibration is not None and calibration.rates):
        return ()
    return ("`qplan calibrate` measures this machine in a minute and makes the speeds below tighter",)


def check_workload(workload: Workload) -> None:
    """Refuse values that no model can satisfy.

    Raises:
        UsageError: with the known values.
    """
    from planner import methods

    if workload.objective not in OBJECTIVES:
        raise UsageError(f"{workload.objective!r} is no objective", hint=f"one of {', '.join(OBJECTIVES)}")
    if workload.kv_type is not None and workload.kv_type not in KV_TYPES:
        raise UsageError(f"{workload.kv_type!r} is no KV cache type", hint=f"one of {', '.join(KV_TYPES)}")
    for name, value in (("context", workload.context), ("concurrency", workload.concurrency)):
        if value < 1:
            raise UsageError(f"{name} must be at least 1", numbers=f"got {value}")
    for method in workload.methods or ():
        methods.row(method)


def check_types(model: ModelSpec, workload: Workload) -> None:
    """Refuse a type that none of the wanted methods can make of the model.

    Raises:
        UsageError: with the known types.
    """
    from planner import methods
    from planner.methods import wishes

    wanted = workload.methods or methods.names()
    known = [type_ for name in wanted for type_ in wishes.types(name, model, workload)]
    for asked in workload.types or ():
        if asked.lower() not in {type_.lower() for type_ in known}:
            raise UsageError(
                f"{asked!r} is no type that {', '.join(wanted)} can make of {model.name}",
                hint=f"one of {', '.join(dict.fromkeys(known))}",
                code="unknown-type",
            )
