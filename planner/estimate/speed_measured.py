"""What was measured on this machine: the very case, or others from which the formula is corrected."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import exp, log, sqrt

from planner.core.candidate import Placement, Variant
from planner.core.estimates import MEASURED, Prediction
from planner.core.measurement import DECODE, Calibration, Measurement
from planner.core.model import ModelSpec, shape_sha256
from planner.estimate import speed_formula
from planner.estimate.speed_site import Site, Timing
from planner.estimate.speed_terms import type_class
from planner.estimate.speed_work import Work, typical_layers

SPREAD = 0.03
"""Least half-width of a measured number's interval: two runs of one case on a quiet machine differ by about 2 %."""
RESIDUAL_SIGMA = 0.05
"""Error left after one calibration on the same type: a 7B from TinyLlama's rates was 0.4-9.7 % off in decode."""
DISTANCE_SIGMA = 0.04
"""Growth of that error per factor e of model size between the measured and the asked model."""
FARTHEST_RATIO = 64.0
"""Measurements of models this many times larger or smaller say nothing: a small one runs from the CPU's caches."""
_BITS = {"F16": 16.0, "BF16": 16.0, "Q8_0": 8.5, "Q6_K": 6.56, "Q5_K": 5.7, "Q4_K": 4.85, "Q4_0": 4.6, "IQ4": 4.4}


def same_variant(m: Measurement, variant: Variant) -> bool:
    """Whether ``m`` ran this method, type and group size on this runtime."""
    runtime = {"llama-cpp-python": "llama.cpp"}.get(m.runtime, m.runtime)
    return (m.method, runtime, m.type, m.group_size) == (
        variant.method,
        variant.runtime,
        variant.type,
        variant.group_size,
    )


def _same_conditions(m: Measurement, placement: Placement, quantity: str, layers: int) -> bool:
    c = m.conditions
    threads = c.threads is None or placement.threads is None or c.threads == placement.threads
    where = min(c.gpu_layers, layers) == min(placement.gpu_layers, layers)
    where = where and c.cpu_expert_layers == placement.cpu_expert_layers
    if quantity == DECODE:
        length = c.depth == placement.depth
    else:
        prompt = placement.prompt_tokens
        length = c.prompt_tokens == prompt and min(c.ubatch, prompt) == min(placement.ubatch, prompt)
    kernels = (c.kv_type, c.flash_attention) == (placement.kv_type, placement.flash_attention)
    return threads and where and length and kernels


def exact(
    model: ModelSpec, variant: Variant, placement: Placement, calibration: Calibration, quantity: str
) -> Prediction | None:
    """The newest measurement of this shape, variant and conditions; ``None`` where there is none."""
    shape = shape_sha256(model)
    for m in reversed(calibration.of(quantity)):
        if (
            m.model_sha256 == shape
            and same_variant(m, variant)
            and _same_conditions(m, placement, quantity, model.offloadable_count)
        ):
            return Prediction(
                value=m.value,
                low=min(m.low, m.value * (1 - SPREAD)),
                high=max(m.high, m.value * (1 + SPREAD)),
                basis=MEASURED,
                source=f"measured here with {m.tool_version or m.runtime} at {m.measured_at or 'an unknown time'}",
                terms=(("measured", m.value, "tok/s"),),
            )
    return None


def correction(
    work: Work, variant: Variant, placement: Placement, where: Site, calibration: Calibration, quantity: str
) -> tuple[float, float, int] | None:
    """Measured over predicted on this machine: (factor, sigma of its logarithm, measurements used).

    The factor is a weighted geometric mean over measurements of the same runtime, on the same kind of device: other
    types count a quarter, and a model of another size counts less the further it is.
    """
    total = weighted = squares = 0.0
    nearest, count = 99.0, 0
    size = work.weight_bytes if quantity == DECODE else work.params
    for m in calibration.of(quantity):
        ratio = _ratio(m, work, variant, placement, where, quantity)
        if ratio is None or not m.weights_bytes:
            continue
        distance = abs(log(size / m.weights_bytes))
        if distance > log(FARTHEST_RATIO):
            continue
        weight = (1.0 if type_class(m.type) == type_class(variant.main_type) else 0.25) * exp(-distance / 3)
        total, weighted, squares = total + weight, weighted + weight * log(ratio), squares + weight * log(ratio) ** 2
        nearest, count = min(nearest, distance), count + 1
    if not count or total <= 0:
        return None
    mean = weighted / total
    spread = sqrt(max(0.0, squares / total - mean**2))
    trust = total / (total + 0.05)  # a far model of another type alone moves the formula little
    sigma = sqrt(RESIDUAL_SIGMA**2 + (DISTANCE_SIGMA * nearest) ** 2 + spread**2 + ((1 - trust) * mean) ** 2)
    return exp(mean * trust), sigma, count


def _ratio(
    m: Measurement, work: Work, variant: Variant, placement: Placement, where: Site, quantity: str
) -> float | None:
    runtime = {"llama-cpp-python": "llama.cpp"}.get(m.runtime, m.runtime)
    if not m.weights_bytes or runtime != variant.runtime or (m.conditions.gpu_layers > 0) != bool(where.gpus):
        return None
    like = replace(variant, type=m.type, method=m.method, recipe=())
    load = _load_of(m, work, quantity)
    there = replace(where, host_threads=m.conditions.threads or where.host_threads)
    formula: Callable[[Work, Variant, Site], Timing | None]
    formula = speed_formula.decode if quantity == DECODE else speed_formula.prefill
    timing = formula(load, like, there)
    if timing is None:
        return None
    tokens = 1 if quantity == DECODE else load.prompt
    return m.value * timing.seconds / tokens


def _load_of(m: Measurement, work: Work, quantity: str) -> Work:
    """The load of a measured model of which only the size is known: a Llama-shaped one."""
    assert m.weights_bytes is not None
    bits = _BITS.get(type_class(m.type), 5.0)
    params = m.weights_bytes if quantity != DECODE else m.weights_bytes * 8 / bits
    layers = max(1, round(typical_layers(params)))
    read = params * bits / 8
    on_gpu = bool(m.conditions.gpu_layers)
    prompt = m.conditions.prompt_tokens or work.prompt
    return Work(
        gpu_bytes=read if on_gpu else 0.0,
        host_bytes=0.0 if on_gpu else read,
        params=params,
        layers=layers,
        gpu_layers=layers if on_gpu else 0,
        kv_bytes=m.conditions.depth * 4096.0 * layers,
        prompt=prompt,
        passes=-(-prompt // max(1, m.conditions.ubatch)),
        streamed_bytes=read,
        attention_operations=2.0 * prompt * prompt * layers * layers * 128,
        moe=False,
        hybrid=False,
        gemma=False,
    )
