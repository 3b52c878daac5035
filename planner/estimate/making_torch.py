"""What quantizing for GPU runtimes takes: calibrated methods layer by layer, and bitsandbytes while it loads."""

from __future__ import annotations

from dataclasses import replace

from planner.core.candidate import Variant
from planner.core.estimates import FORMULA, PUBLISHED, Prediction
from planner.core.model import ModelSpec
from planner.core.plan import Step
from planner.core.units import GIB, MIB
from planner.estimate.making_rates import DISK_BYTES_PER_SECOND, SOURCE, Site, rates, step_memory, step_seconds
from planner.methods import get

TORCH_START_SECONDS = 6.0
"""torch and transformers: 2 s of processor time to import, and the kernels of the first call (2026-11-23, CPU)."""
GPU_SPREAD = 2.5
"""Calibrated methods on other GPUs, with other samples and versions."""
_TORCH_BYTES = 600 * MIB
"""Process with torch and transformers at work, and its allocator's slack."""
CALIBRATION_TOKENS = 128 * 2048
"""Samples and their length, as GPTQ and AWQ papers and tools use them."""
_GPU_PROCESS_BYTES = 700 * MIB
"""CUDA context and PyTorch's handles, as in ``served_memory``."""
_A100_FLOPS = 312e12
"""Dense bfloat16 of the GPU the GPTQ figures are of."""
_TORCH_SOURCE = "the 16-bit weights, torch and its working memory"


def quantizing(model: ModelSpec, variant: Variant, step: Step, site: Site) -> Step:
    """A step of a method for GPUs: its output, and what a quantizer on a GPU or, uncalibrated, on the CPU takes."""
    size = get(variant.method).size(model, variant).file_bytes
    step = replace(step, predicted_bytes=size, predicted_scratch_bytes=0)
    if variant.method == "none":
        return replace(step, predicted_bytes=0) if variant.type != "fp8" else step
    loaded = 2.0 * model.parameter_count + _TORCH_BYTES
    if variant.method == "bitsandbytes":
        memory = step_memory(loaded + size, 1.1 * loaded + size, _TORCH_SOURCE)
        return replace(step, predicted_seconds=_loading(model, variant, site), predicted_memory=memory,
                       predicted_peak_bytes=round(memory.high))  # fmt: skip
    memory = step_memory(loaded + 4 * GIB, 1.2 * loaded + 16 * GIB, _TORCH_SOURCE)
    return replace(
        step,
        predicted_scratch_bytes=2 * model.parameter_count,
        predicted_seconds=_calibrating(model, variant, site),
        predicted_memory=memory,
        predicted_peak_bytes=round(memory.high),
        predicted_gpu_memory=calibration_gpu_memory(model) if site.hardware.gpus else None,
    )


def _loading(model: ModelSpec, variant: Variant, site: Site) -> Prediction:
    """bitsandbytes quantizes while it loads: reading bounds it on a GPU, its rate per core on the CPU."""
    moved = 2.0 * model.parameter_count
    rate = rates()["bitsandbytes", variant.type, "0"] * site.threads
    work = model.parameter_count / rate if not site.hardware.gpus else moved / DISK_BYTES_PER_SECOND
    return step_seconds(TORCH_START_SECONDS, work, moved, (("quantizing", work, "s"),))


def _calibrating(model: ModelSpec, variant: Variant, site: Site) -> Prediction | None:
    """Published seconds per billion weights, scaled by the GPU's FP16 rate; unknown without a GPU."""
    if not site.hardware.gpus:
        return None
    per_billion = rates()[variant.method, "4bit", "0"]
    flops = site.hardware.gpus[0].fp16_flops_per_second
    scale = max(0.3, _A100_FLOPS / flops) if flops else 1.0
    value = TORCH_START_SECONDS + model.parameter_count / 1e9 * per_billion * scale
    return Prediction(
        value=value,
        low=value / GPU_SPREAD,
        high=value * GPU_SPREAD,
        basis=PUBLISHED,
        source=SOURCE,
        terms=(("seconds per billion weights", per_billion, "s"), ("of an A100's time", scale, "")),
    )


def calibration_gpu_memory(model: ModelSpec) -> Prediction:
    """One layer in 16 bits, the calibration's hidden states in and out of it, and two Hessians of the widest input.

    Source: layer by layer as in Frantar et al. 2022, section 4, https://arxiv.org/abs/2210.17323.
    """
    per_layer = [0] * (model.n_layer + 1)
    for tensor in model.tensors:
        per_layer[min(tensor.layer, model.n_layer) if tensor.layer is not None else -1] += tensor.element_count
    layer = 2.0 * max(per_layer[:-1])
    states = 2 * 2.0 * CALIBRATION_TOKENS * model.n_embd
    hessians = 2 * 4.0 * max(model.n_ff, model.n_embd) ** 2
    value = layer + states + hessians + _GPU_PROCESS_BYTES
    terms = (("layer", layer, "B"), ("hidden states", states, "B"), ("Hessians", hessians, "B"))
    return Prediction(
        value=value, low=0.5 * value, high=2.4 * value, basis=FORMULA, source="layer-wise calibration", terms=terms
    )
