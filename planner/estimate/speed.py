"""Tokens per second of one sequence: measured here > calibrated here > published for the device > fitted model."""

from __future__ import annotations

from dataclasses import replace
from math import exp, log

from planner.core.candidate import Placement, Variant
from planner.core.estimates import CALIBRATED, FORMULA, PUBLISHED, Z80, Prediction, SpeedEstimate
from planner.core.hardware import HardwareProfile
from planner.core.measurement import DECODE, PREFILL, Calibration
from planner.core.model import ModelSpec
from planner.estimate import speed_calibrated, speed_formula, speed_measured, speed_published, torch_cpu
from planner.estimate.speed_model import device_factor, document, interval, stratum, unmeasured_labels
from planner.estimate.speed_site import Site, Timing, site
from planner.estimate.speed_work import Work, work

LEAST_SPREAD = 0.1
"""Least half-width of a fitted interval, as a logarithm: where the held-out rows of a stratum all lie on one side, the
next device may lie on the other."""
ASSUMED_SPREAD = 3.0
"""What an assumed host bandwidth of 51 GB/s may be off by: ``data/hosts.csv`` and ``data/devices.csv`` hold CPUs from
17 GB/s (Raspberry Pi 5) to 154 GB/s within this factor; servers beyond it are worth a second's measurement."""


def speed(
    model: ModelSpec,
    variant: Variant,
    placement: Placement,
    hardware: HardwareProfile,
    calibration: Calibration | None = None,
) -> SpeedEstimate:
    """Tokens per second of decode at ``placement.depth`` cached tokens and of a ``placement.prompt_tokens`` prefill.

    Each is a :class:`Prediction` with an 80 % interval, its basis, source and terms; ``None`` where a bandwidth it
    needs is unknown, with a note.
    """
    where = site(placement, hardware)
    load = work(model, variant, placement)
    timings = {quantity: _timing(load, variant, where, quantity) for quantity in (DECODE, PREFILL)}
    predictions = {
        quantity: (calibration and _here(model, variant, placement, hardware, calibration, quantity))
        or _elsewhere(model, variant, placement, where, load, calibration, quantity, timings[quantity])
        for quantity in (DECODE, PREFILL)
    }
    timing = timings[DECODE]
    return SpeedEstimate(
        decode=predictions[DECODE],
        prefill=predictions[PREFILL],
        bound_by=timing.bound_by if timing else None,
        notes=_notes(variant, where, predictions),
    )


def _notes(variant: Variant, where: Site, predictions: dict[str, Prediction | None]) -> tuple[str, ...]:
    notes = []
    if predictions[DECODE] is None:
        if variant.method != "gguf" and not where.gpus:
            notes.append(f"no speed figures of {variant.runtime} without a GPU")
        else:
            notes.append("decode speed is unknown: the memory bandwidth is unknown")
    if predictions[PREFILL] is None and predictions[DECODE] is not None:
        notes.append("prefill speed is unknown: the device's arithmetic rate is unknown")
    if len(where.gpus) > 1:
        notes.append("several GPUs: one after the other, each with its share of the layers")
    return tuple(notes)


def _here(
    model: ModelSpec,
    variant: Variant,
    placement: Placement,
    hardware: HardwareProfile,
    calibration: Calibration,
    quantity: str,
) -> Prediction | None:
    """The very case measured on this machine, else from its calibrated rates.

    Where rates cover a case, measurements of other cases do not correct them: rates come from alternated slices of the
    same kernels, and are closer than a ratio of one measurement to a fitted model.
    """
    measured = speed_measured.exact(model, variant, placement, calibration, quantity)
    if measured is not None:
        return measured
    return speed_calibrated.predict(model, variant, placement, hardware, calibration.rates, quantity)


def _elsewhere(
    model: ModelSpec,
    variant: Variant,
    placement: Placement,
    where: Site,
    load: Work,
    calibration: Calibration | None,
    quantity: str,
    timing: Timing | None,
) -> Prediction | None:
    if timing is None:
        return None
    if calibration is not None:
        found = speed_measured.correction(load, variant, placement, where, calibration, quantity)
        if found is not None:
            return _calibrated(load, timing, quantity, *found)
    published = _published(model, variant, placement, where, load, timing, quantity)
    return published or _fitted(load, timing, where, quantity)


def _timing(load: Work, variant: Variant, where: Site, quantity: str) -> Timing | None:
    return (speed_formula.decode if quantity == DECODE else speed_formula.prefill)(load, variant, where)


def _rate(load: Work, timing: Timing, quantity: str) -> float:
    return (1 if quantity == DECODE else load.prompt) / timing.seconds


def _calibrated(load: Work, timing: Timing, quantity: str, factor: float, sigma: float, count: int) -> Prediction:
    value = _rate(load, timing, quantity) * factor
    return Prediction(
        value=value,
        low=value * exp(-Z80 * sigma),
        high=value * exp(Z80 * sigma),
        basis=CALIBRATED,
        source=f"fitted model corrected by {count} measurement{'s' if count > 1 else ''} on this machine",
        terms=(*timing.terms, ("correction measured here", factor, "x")),
    )


def _published(
    model: ModelSpec,
    variant: Variant,
    placement: Placement,
    where: Site,
    load: Work,
    timing: Timing,
    quantity: str,
) -> Prediction | None:
    if timing.split or len(where.gpus) != 1 or variant.method != "gguf" or placement.sequences > 1:
        return None
    gpu = where.gpus[0]
    logs, sources = [], []
    for row in speed_published.find(gpu.device, gpu.backend, model.name, variant.type):
        rate = row.decode if quantity == DECODE else row.prefill
        if rate is None or (quantity == PREFILL and not row.prompt):
            continue
        as_run = (
            replace(placement, depth=row.depth) if quantity == DECODE else replace(placement, prompt_tokens=row.prompt)
        )
        run = work(model, variant, as_run)
        ran = _timing(run, variant, where, quantity)
        if ran is not None:
            logs.append(log(rate * _rate(load, timing, quantity) / _rate(run, ran, quantity)))
            sources.append(f"{row.source} ({row.date})")
    if not logs:
        return None
    value = exp(sum(logs) / len(logs))
    low, high = interval(timing.fit, "published")
    return Prediction(
        value=value,
        low=value * exp(low),
        high=value * exp(high),
        basis=PUBLISHED,
        source=sources[0] if len(set(sources)) == 1 else f"{sources[0]} and {len(set(sources)) - 1} more",
        terms=(*timing.terms, ("published over fitted", value / _rate(load, timing, quantity), "x")),
    )


def _fitted(load: Work, timing: Timing, where: Site, quantity: str) -> Prediction:
    value = _rate(load, timing, quantity)
    device = where.gpus[0].device if where.gpus else None
    factor = None if timing.split or len(where.gpus) != 1 else device_factor(timing.fit, device, timing.case.backend)
    labels: tuple[str, ...] = ("known-device", stratum(timing.case))
    if factor is None and timing.interval is None:
        labels = unmeasured_labels(timing.fit, timing.case)
    low, high = timing.interval or interval(timing.fit, *(("split",) if timing.split else labels))
    small = sum(seconds for name, seconds, _ in timing.terms if name in speed_formula.SMALL_WORK) / timing.seconds
    wider = small * log(speed_formula.SMALL_WORK_SPREAD)
    if where.bandwidth_assumed and (timing.split or not where.gpus):
        wider += log(ASSUMED_SPREAD)
    low, high = low - wider, high + wider
    value *= factor or 1.0
    source = str(document()["source"]) if timing.interval is None else torch_cpu.source()
    if factor is not None:
        source += f", corrected by the rows of {device}"
    return Prediction(
        value=value,
        low=value * exp(min(low, -LEAST_SPREAD)),
        high=value * exp(max(high, LEAST_SPREAD)),
        basis=FORMULA,
        source=source,
        terms=timing.terms if factor is None else (*timing.terms, ("device's rows over fitted", factor, "x")),
    )
