"""Seconds of a making step corrected by what the same step, or steps like it, took on this machine."""

from __future__ import annotations

from dataclasses import replace
from math import exp, log
from statistics import median

from planner.core.estimates import CALIBRATED, MEASURED, Z80, Prediction
from planner.core.measurement import ONE_PASS_RATE, Measurement
from planner.core.model import ModelSpec, shape_sha256
from planner.core.plan import Step
from planner.estimate.making_rates import PASS_SECONDS_PER_TOKEN, SOURCE, START_SECONDS, Site

CALIBRATED_SIGMA = 0.25
"""Of the logarithm, for a step like one that was measured here."""
LARGE_VOCABULARY = 150_000


def corrected(model: ModelSpec, step: Step, formula: Prediction, site: Site, quantity: str) -> Prediction:
    """The formula's seconds corrected by what steps took on this machine; a step of the same model is taken as it was.

    A measurement counts by the share of its time that was work and not start-up: a tiny model says little of a big one.
    """
    known = site.calibration.of(quantity) if site.calibration else ()
    same = [m for m in known if _is_same(m, model, step, site)]
    if same:
        seconds = median(model.parameter_count / m.value for m in same[-3:])
        told = f"measured here ({len(same)} so far)"
        return Prediction(
            value=seconds, low=0.7 * seconds, high=1.5 * seconds, basis=MEASURED, source=told, terms=formula.terms
        )
    total = weighted = 0.0
    # a measurement does not tell its vocabulary, so that of one pass is taken to be large
    idle = START_SECONDS + (PASS_SECONDS_PER_TOKEN * LARGE_VOCABULARY if quantity == ONE_PASS_RATE else 0.0)
    for m in known:
        if not m.predicted or not m.weights_bytes:
            continue
        took, said = m.weights_bytes / m.value, m.weights_bytes / m.predicted
        weight = max(0.0, 1 - idle / said) * (1.0 if m.type == step.type else 0.5)
        total, weighted = total + weight, weighted + weight * log(took / said)
    if total <= 0:
        return formula
    factor, trust = exp(weighted / (total + 0.25)), total / (total + 0.25)
    spread = exp(Z80 * CALIBRATED_SIGMA)
    value = formula.value * factor
    low = (formula.low / formula.value) ** (1 - trust) * spread**-trust
    high = (formula.high / formula.value) ** (1 - trust) * spread**trust
    return replace(
        formula,
        value=value,
        low=value * min(low, 1 / spread),
        high=value * max(high, spread),
        basis=CALIBRATED,
        source=f"{SOURCE}, corrected by what was measured here ({len(known)} so far)",
        terms=(*formula.terms, ("correction", factor, "")),
    )


def _is_same(m: Measurement, model: ModelSpec, step: Step, site: Site) -> bool:
    like = m.type == step.type and m.conditions.threads == site.threads
    return like and m.model_sha256 == shape_sha256(model)
