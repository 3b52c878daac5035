"""What a tuning says: the settings with their speeds, the best, and what the recommended one takes longer."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from planner.core.candidate import Placement, Variant
from planner.core.codec import encode
from planner.core.errors import ExecutionFailed, QplanError
from planner.core.hardware import HardwareProfile
from planner.core.measurement import DECODE, PREFILL, Conditions, Measurement
from planner.core.model import ModelSpec, shape_sha256
from planner.core.tuned import Tuned
from planner.decide.settings import EXACT_KV
from planner.verify import halving
from planner.verify.alternating import quantile
from planner.verify.halving import Regret, Timed
from planner.verify.run import NO_REPACK_NOTE
from planner.verify.tuning_trial import FAILED, NOT_REACHED, TuneAnswer, TuneRequest, TuneRow

if TYPE_CHECKING:
    from planner.workflow.tuning import Subject

_LEAST_SAMPLES = 2
"""A speed with fewer good samples is not remembered."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """Tokens per second over the good samples: the median, and the quantiles of 10 % and 90 %."""

    median: float
    low: float
    high: float
    samples: tuple[float, ...]
    disturbed: bool = False
    """Other programs had the cores in all samples; the fastest stand."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tried:
    """A setting with what became of it."""

    setting: Placement
    status: str
    decode: Speed | None = None
    prefill: Speed | None = None
    cost: Timed | None = None
    """Seconds of what the objective asks for."""
    set_aside_count: int = 0
    rungs: int = 0
    note: str = ""

    @property
    def disturbed(self) -> bool:
        """A speed is of samples that other programs disturbed: it is a lower bound."""
        return any(speed is not None and speed.disturbed for speed in (self.decode, self.prefill))


@dataclass(frozen=True, slots=True, kw_only=True)
class TuneResult:
    """What a tuning found."""

    model: ModelSpec
    variant: Variant
    hardware: HardwareProfile
    request: TuneRequest
    answer: TuneAnswer
    material: str
    whole: bool
    """All layers were run, so that speeds are those of the model."""
    tried: tuple[Tried, ...]
    """The best first, then by how far they came, then what was not measured."""
    recommended: Tried
    predicted: tuple[float | None, float | None]
    """Decode and prefill that had been predicted of the recommended setting."""
    regret: Regret | None
    """What the recommended setting takes longer than the best; ``None`` where it could not be measured."""
    chosen: Tried
    """What is kept: the best, or the recommended one where no difference shows."""
    kept: Tuned | None = None
    notes: tuple[str, ...] = ()

    @property
    def best(self) -> Tried:
        """The fastest that was found."""
        return self.tried[0]


def result_of(subject: Subject, found: TuneAnswer, *, notes: tuple[str, ...], repacked: bool) -> TuneResult:
    """The answer of the child, judged.

    Raises:
        ExecutionFailed: no setting was measured.
    """
    request = subject.request
    tried = [_tried(s, row, request, found) for s, row in zip(request.settings, found.rows, strict=True)]
    if not found.ranking:
        raise ExecutionFailed("no setting could be measured", numbers=tried[0].note, code="nothing-measured")
    ranked = [tried[number] for number in found.ranking]
    others = [one for number, one in enumerate(tried) if number not in found.ranking]
    unfit = [Tried(setting=one.setting, status=FAILED, note=one.reason) for one in subject.space.unfit]
    regret = regret_of(tried[0], ranked[0])
    speed = subject.chosen.estimate.speed
    same_prompt = found.prompt_tokens == request.prompt_tokens
    decode = speed.decode.value if speed.decode else None
    prefill = speed.prefill.value if speed.prefill and same_prompt else None
    return TuneResult(
        model=subject.answer.model,
        variant=subject.chosen.variant,
        hardware=subject.answer.hardware,
        request=request,
        answer=found,
        material=subject.material,
        whole=subject.whole,
        tried=(*ranked, *others, *unfit),
        recommended=tried[0],
        predicted=(decode, prefill),
        regret=regret,
        chosen=worth_keeping(ranked, tried[0]),
        notes=(*notes, *_notes(request, found, repacked)),
    )


def regret_of(one: Tried, best: Tried) -> Regret | None:
    """What ``one`` takes longer than ``best``; ``None`` where one of them had no cores to itself."""
    if one.cost is None or best.cost is None or one.disturbed or best.disturbed:
        return None
    return halving.regret(one.cost, best.cost)


def worth_keeping(ranked: Sequence[Tried], recommended: Tried) -> Tried:
    """The best; the recommended where that is not surely slower; an exact KV cache where a lossy one is no faster."""
    best = ranked[0]
    if best.disturbed or recommended.disturbed:
        return recommended
    exact = [one for one in ranked if one.setting.kv_type in EXACT_KV]
    for one in (recommended, *exact):
        regret = regret_of(one, best)
        if regret is not None and regret.within_noise and (one is recommended or best.setting.kv_type not in EXACT_KV):
            return one
    return best


def _tried(setting: Placement, row: TuneRow, request: TuneRequest, found: TuneAnswer) -> Tried:
    from planner.verify.tuning import cost

    return Tried(
        setting=setting,
        status=row.status,
        decode=_speed(row.decode_seconds, 1, "decode" in row.disturbed),
        prefill=_speed(row.prefill_seconds, found.prompt_tokens, "prefill" in row.disturbed),
        cost=cost(request, found.prompt_tokens, row.decode_seconds, row.prefill_seconds),
        set_aside_count=row.set_aside_count,
        rungs=row.rungs,
        note=row.note,
    )


def _speed(seconds: Sequence[float], tokens: int, disturbed: bool) -> Speed | None:
    if not seconds:
        return None
    rates = sorted(tokens / taken for taken in seconds)
    low, middle, high = (quantile(rates, share) for share in (0.1, 0.5, 0.9))
    return Speed(median=middle, low=low, high=high, samples=tuple(rates), disturbed=disturbed)


def _notes(request: TuneRequest, found: TuneAnswer, repacked: bool) -> tuple[str, ...]:
    notes = [] if repacked else [NO_REPACK_NOTE]
    late = sum(row.status == NOT_REACHED for row in found.rows)
    if late:
        notes.append(f"the time did not reach for {late} settings; a larger --budget gives more")
    if request.objective != "decode" and found.prompt_tokens < request.prompt_tokens:
        notes.append(f"prompts of {found.prompt_tokens} tokens stand in for {request.prompt_tokens}, to try more")
    aside = sum(row.set_aside_count for row in found.rows)
    taken = aside + sum(len(row.decode_seconds) + len(row.prefill_seconds) for row in found.rows)
    if 2 * aside > taken:
        notes.append(
            f"other programs ran in {aside} of {taken} samples; those were set aside, and what remains is less sure"
        )
    return tuple(notes)


def keep(result: TuneResult) -> TuneResult:
    """Put the chosen setting and the speeds of those that were measured longest into the store."""
    from planner.store import Store

    now = datetime.now(UTC).isoformat(timespec="seconds")
    chosen = result.chosen
    if result.best.disturbed or result.recommended.disturbed:
        note = "nothing is kept: other programs had the cores all the time; try again when they are done"
        return dataclasses.replace(result, notes=(*result.notes, note))
    gain = regret_of(result.recommended, chosen)
    kept = Tuned(
        model=result.model.name,
        model_sha256=shape_sha256(result.model),
        type=result.variant.type,
        objective=result.request.objective,
        on_gpu=bool(result.recommended.setting.gpu_count),
        placement=chosen.setting,
        gain_fraction=max(0.0, gain.fraction) if gain else 0.0,
        hardware_identity=result.hardware.identity(),
        hardware_name=result.hardware.name,
        tool_version=result.answer.tool_version,
        measured_at=now,
    )
    try:
        with Store() as store:
            store.add_tuned(kept)
            store.add(measurements(result, now))
    except QplanError as error:
        note = f"what was found could not be kept: {error.what}"
        return dataclasses.replace(result, notes=(*result.notes, note))
    return dataclasses.replace(result, kept=kept)


def measurements(result: TuneResult, now: str) -> tuple[Measurement, ...]:
    """Speeds of the settings in the last rung, the best last, as the newest of a case counts; none of slices."""
    if not result.whole:
        return ()
    from planner.estimate.weights import bytes_read_per_token

    last = max(one.rungs for one in result.tried)
    found = []
    for one in reversed(result.tried):
        if one.rungs < last:
            continue
        read = float(sum(bytes_read_per_token(result.model, result.variant, one.setting)))
        scales = {DECODE: read, PREFILL: float(result.model.active_parameter_count)}
        said = result.predicted if one is result.recommended else (None, None)
        for quantity, speed, before in zip((DECODE, PREFILL), (one.decode, one.prefill), said, strict=True):
            if speed is not None and not speed.disturbed and len(speed.samples) >= _LEAST_SAMPLES:
                found.append(_measurement(result, one, quantity, speed, before, scales[quantity], now))
    return tuple(found)


def _measurement(
    result: TuneResult, one: Tried, quantity: str, speed: Speed, predicted: float | None, scale: float, now: str
) -> Measurement:
    setting, variant, answer = one.setting, result.variant, result.answer
    return Measurement(
        quantity=quantity,
        value=speed.median,
        low=speed.low,
        high=speed.high,
        samples=speed.samples,
        model=result.model.name,
        model_sha256=shape_sha256(result.model),
        method=variant.method,
        runtime=variant.runtime,
        type=variant.type,
        group_size=variant.group_size,
        imatrix=variant.imatrix,
        conditions=Conditions(
            context=answer.context,
            depth=answer.depth,
            prompt_tokens=answer.prompt_tokens,
            gpu_layers=setting.gpu_layers,
            threads=setting.threads,
            kv_type=setting.kv_type,
            ubatch=setting.ubatch,
            flash_attention=setting.flash_attention,
            cpu_expert_layers=setting.cpu_expert_layers,
        ),
        predicted=predicted,
        hardware_identity=result.hardware.identity(),
        hardware_name=result.hardware.name,
        tool_version=answer.tool_version,
        measured_at=now,
        weights_bytes=scale,
    )


def document(result: TuneResult) -> dict[str, Any]:
    """What ``qplan tune --json`` prints."""
    from planner import FORMAT_VERSION

    regret = result.regret
    return {
        "format_version": FORMAT_VERSION,
        "model": result.model.name,
        "type": result.variant.type,
        "objective": result.request.objective,
        "depth": result.answer.depth,
        "prompt_tokens": result.answer.prompt_tokens,
        "material": result.material,
        "whole_model": result.whole,
        "hardware_identity": result.hardware.identity(),
        "tool_version": result.answer.tool_version,
        "seconds": round(result.answer.seconds, 2),
        "settings": [_row(one, result) for one in result.tried],
        "best": _row(result.best, result),
        "recommended": _row(result.recommended, result),
        "regret": None if regret is None else {**encode(regret), "within_noise": regret.within_noise},
        "chosen": _row(result.chosen, result),
        "kept": result.kept is not None,
        "notes": list(result.notes),
    }


def _row(one: Tried, result: TuneResult) -> dict[str, Any]:
    setting, regret = one.setting, regret_of(one, result.best)
    return {
        "threads": setting.threads,
        "gpu_layers": setting.gpu_layers,
        "ubatch": setting.ubatch,
        "batch": setting.batch,
        "flash_attention": setting.flash_attention,
        "kv_type": setting.kv_type,
        "status": one.status,
        "decode_tokens_per_second": encode(one.decode),
        "prefill_tokens_per_second": encode(one.prefill),
        "seconds": one.cost.seconds if one.cost else None,
        "slower_than_best": None if regret is None else regret.fraction,
        "set_aside_count": one.set_aside_count,
        "rungs": one.rungs,
        "note": one.note,
    }
