"""What steps take that run the 16-bit model: collecting an importance matrix, and probing its parts' sensitivity."""

from __future__ import annotations

from dataclasses import replace

from planner.core.candidate import Placement, Variant
from planner.core.estimates import Prediction
from planner.core.model import ModelSpec
from planner.core.plan import Step
from planner.estimate.making_gguf import QUANTIZE_BASE_BYTES
from planner.estimate.making_rates import (
    CPU_SPREAD,
    SOURCE,
    START_SECONDS,
    Site,
    cores_worth,
    quantize_rate,
    step_memory,
)
from planner.estimate.memory import memory
from planner.estimate.speed import speed
from planner.methods import gguf, gguf_mix, gguf_recipe

CHUNK_TOKENS = 512
CALIBRATION_CHUNKS = 128
"""Chunks of text that an importance matrix is collected over unasked, of 512 tokens."""
SENSITIVITY_CHUNKS = 4
UNCHANGED_RUNS = 5
"""Runs besides the probes': thrice as much text to choose from, the chosen, and everything spoiled at once."""
SAMPLE_WEIGHTS = 1 << 17
"""As ``verify/sensitivity.py`` measures: chunks of one probe, and weights of a tensor that go through every type."""
LOGITS_BYTES_PER_ENTRY = 4 * 512 * (SENSITIVITY_CHUNKS / 2 + 1)
"""Logits of a chunk and of the unchanged model, float32, per entry of the vocabulary."""


def collecting(model: ModelSpec, variant: Variant, step: Step, site: Site) -> Step:
    """The calibration text once through the model."""
    chunks = step.calibration.chunks if step.calibration else None
    return _running(model, step, CHUNK_TOKENS * float(chunks or CALIBRATION_CHUNKS), site, 0.0)


def probing(model: ModelSpec, variant: Variant, step: Step, site: Site) -> Step:
    """Each part of the model once spoiled and run, all together once, and a sample of each tensor in all types."""
    quantized = [tensor for tensor in model.tensors if gguf_mix.is_quantized(tensor)]
    runs = min(step.probes or len(quantized), len(quantized)) + UNCHANGED_RUNS
    sampled = float(sum(min(tensor.element_count, SAMPLE_WEIGHTS) for tensor in quantized))
    kinds = sum(1 / quantize_rate(type_, imatrix=True) for type_ in gguf_recipe.WHOLE_ROW_TYPES)
    whole = 3 * sum(tensor.element_count for tensor in quantized) / quantize_rate("Q3_K", imatrix=True)
    cores = cores_worth(site.threads)
    return _running(
        model, step, CHUNK_TOKENS * SENSITIVITY_CHUNKS * float(runs), site, (sampled * kinds + whole) / cores
    )


def _running(model: ModelSpec, step: Step, tokens: float, site: Site, others_seconds: float) -> Step:
    """A step that runs the 16-bit model over ``tokens``: time by the predicted prefill speed, memory as placed."""
    place = Placement(
        context=512, ubatch=512, threads=site.threads, gpu_layers=step.gpu_layers, gpu_count=int(step.gpu_layers > 0)
    )
    whole = gguf.variant("F16")
    rate = speed(model, whole, place, site.hardware, site.calibration).prefill
    seconds = None
    if rate is not None:
        terms = (("running the 16-bit model", tokens / rate.value, "s"), ("kernels", others_seconds, "s"))
        seconds = Prediction(
            value=START_SECONDS + tokens / rate.value + others_seconds,
            low=0.8 * START_SECONDS + tokens / rate.high + others_seconds / CPU_SPREAD,
            high=2.5 * START_SECONDS + tokens / max(rate.low, 1e-9) + others_seconds * CPU_SPREAD,
            basis=rate.basis,
            source=f"prefill of the 16-bit model; {SOURCE}",
            terms=terms,
        )
    used = memory(model, whole, place, site.hardware)
    held = QUANTIZE_BASE_BYTES + used.host.total_bytes + LOGITS_BYTES_PER_ENTRY * model.n_vocab
    found = step_memory(held, 1.4 * held, "the 16-bit model with its buffers, and the logits of a chunk")
    on_gpu = max((device.total_bytes for device in used.devices), default=0)
    return replace(
        step,
        predicted_seconds=seconds,
        predicted_memory=found,
        predicted_peak_bytes=round(found.high),
        predicted_gpu_memory=step_memory(on_gpu, 1.3 * on_gpu, "the 16-bit model's layers") if on_gpu else None,
        predicted_scratch_bytes=0,
    )
