"""What quantizing for GPU runtimes takes: calibrated methods layer by layer, and bitsandbytes while it loads."""

from __future__ import annotations

from dataclasses import replace

from planner.core.candidate import Variant
from planner.core.estimates import FORMULA, PUBLISHED, Prediction
from planner.core.model import ModelSpec
from planner.core.plan import Step
from planner.core.units import GIB, MIB
from planner.estimate.making_gguf import CONVERT_BLOCK_BYTES
from planner.estimate.making_rates import (
    DISK_BYTES_PER_SECOND,
    SOURCE,
    START_SECONDS,
    Site,
    cores_worth,
    hash_seconds,
    rates,
    step_memory,
    step_seconds,
)
from planner.estimate.making_runs import CALIBRATION_CHUNKS, CHUNK_TOKENS
from planner.methods import common, get, quantizers

TORCH_START_SECONDS = 6.0
"""torch and transformers: 2 s of processor time to import, and the kernels of the first call (2026-11-23, CPU)."""
GPU_SPREAD = 2.5
"""Calibrated methods on other GPUs, with other samples and versions."""
_TORCH_BYTES = 600 * MIB
"""Process with torch and transformers at work on a GPU, and its allocator's slack."""
_LOADING_BYTES = 440 * MIB
"""Process that loads a model and saves it: bitsandbytes 415, FP8 by llm-compressor 470 MiB (Linux, 2026-11-26)."""
CALIBRATION_TOKENS = 128 * 2048
"""Samples and their length, as GPTQ and AWQ papers and tools use them."""
_GPU_PROCESS_BYTES = 700 * MIB
"""CUDA context and PyTorch's handles, as in ``served_memory``."""
_A100_FLOPS = 312e12
"""Dense bfloat16 of the GPU the GPTQ figures are of."""
LOADED_COPIES = 2.5
"""Of the weights as they are loaded: resident memory of GPTQModel in float32 and llm-compressor in bfloat16 grew by so
many times the weights from 5.8 to 40 million of them (2026-11-26)."""
BYTES_PER_TOKEN = 3.0
"""Of mixed text, with a tokenizer of 2,000 to 150,000 entries: 2 to 4.5."""
CPU_CALIBRATION_SPREAD = 3.0
"""Other CPUs, shapes and thread counts than those of the table's rows."""
_RECAST_BASE_BYTES = 48 * MIB
"""Of a child that converts floats, before blocks (Linux x86-64, 2026-11-26)."""
_TORCH_SOURCE = "the 16-bit weights, torch and its working memory"


def quantizing(model: ModelSpec, variant: Variant, step: Step, site: Site) -> Step:
    """A step that makes a safetensors artifact: its output, and what its quantizer takes on a GPU or on the CPU."""
    size = get(variant.method).size(model, variant).file_bytes
    step = replace(step, predicted_bytes=size, predicted_scratch_bytes=0)
    if variant.method == "none" and variant.type != "fp8":
        block = min(CONVERT_BLOCK_BYTES, 2 * max(tensor.element_count for tensor in model.tensors))
        held = _RECAST_BASE_BYTES + 4.0 * block
        return _with_memory(_recasting(model, step, size), step_memory(held, 1.5 * held, "blocks of the converter"))
    if variant.method == "none":
        seconds = step_seconds(TORCH_START_SECONDS, hash_seconds(size), 2.0 * model.parameter_count + size, ())
        return _with_memory(replace(step, predicted_seconds=seconds), _whole_model(model, size))
    if variant.method == "bitsandbytes":
        step = replace(step, predicted_seconds=_loading(model, variant, size, site))
        return _with_memory(step, _whole_model(model, size))
    if site.hardware.gpus and (step.gpu_layers > 0 or step.calibration is None):
        step = replace(
            step,
            predicted_seconds=_on_gpu(model, variant, site),
            predicted_gpu_memory=calibration_gpu_memory(model),
            predicted_scratch_bytes=2 * model.parameter_count,
        )
        loaded = 2.0 * model.parameter_count + _TORCH_BYTES
        return _with_memory(step, step_memory(loaded + 4 * GIB, 1.2 * loaded + 16 * GIB, _TORCH_SOURCE))
    scratch = size + 4 * model.parameter_count if variant.quantizer is None else 0
    step = replace(step, predicted_seconds=_on_cpu(model, variant, step, site), predicted_scratch_bytes=scratch)
    return _with_memory(step, _calibrating_memory(model, variant, step))


def _with_memory(step: Step, memory: Prediction) -> Step:
    return replace(step, predicted_memory=memory, predicted_peak_bytes=round(memory.high))


def _whole_model(model: ModelSpec, size: int) -> Prediction:
    """The 16-bit weights, mapped, beside what is made of them."""
    loaded = 2.0 * model.parameter_count
    return step_memory(_LOADING_BYTES + loaded + size, 1.3 * (_LOADING_BYTES + loaded + size), _TORCH_SOURCE)


def _recasting(model: ModelSpec, step: Step, size: int) -> Step:
    """One thread reads, converts and writes in blocks, as the converter to GGUF does; the output is hashed."""
    source = {"f32": 4.0, "bf16": 2.0, "f16": 2.0}.get(model.dtype.lower(), 2.0) * model.parameter_count
    same = model.dtype.lower() == step.type
    rate = rates()["convert", "same" if same else "F32" if step.type == "f32" else "16bit", "0"]
    work = model.parameter_count / rate
    seconds = step_seconds(START_SECONDS, work + hash_seconds(size), source + size, (("converting", work, "s"),))
    return replace(step, predicted_seconds=seconds)


def _loading(model: ModelSpec, variant: Variant, size: int, site: Site) -> Prediction:
    """bitsandbytes quantizes while it loads: reading bounds it on a GPU, its rate per core on the CPU."""
    moved = 2.0 * model.parameter_count
    rate = rates()["bitsandbytes", variant.type, "0"] * site.threads
    work = model.parameter_count / rate if not site.hardware.gpus else moved / DISK_BYTES_PER_SECOND
    work += hash_seconds(size)
    return step_seconds(TORCH_START_SECONDS, work, moved, (("quantizing", work, "s"),))


def _on_gpu(model: ModelSpec, variant: Variant, site: Site) -> Prediction:
    """Published seconds per billion weights, scaled by the GPU's FP16 rate."""
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


def _on_cpu(model: ModelSpec, variant: Variant, step: Step, site: Site) -> Prediction:
    """Processor time per weight and per weight and token, measured of each quantizer, over the cores."""
    name, table = _made_by(variant), rates()
    weights = float(sum(t.element_count for t in model.tensors if common.is_linear(t)))
    tokens = calibration_tokens(step)
    fixed = weights * table[name, "weight", "0"]
    running = weights * tokens * table[name, "token", "0"]
    start, cores = table[name, "start", "0"], cores_worth(site.threads)
    value = start + (fixed + running) / cores
    return Prediction(
        value=value,
        low=0.6 * start + (value - start) / CPU_CALIBRATION_SPREAD,
        high=2.5 * start + (value - start) * CPU_CALIBRATION_SPREAD,
        basis=FORMULA,
        source=SOURCE,
        terms=(
            ("starting", start, "s"),
            ("tokens", tokens, ""),
            ("running the layers on one core", running, "s"),
            ("quantizing on one core", fixed, "s"),
            ("cores", cores, ""),
        ),
    )


def calibration_tokens(step: Step) -> float:
    """Tokens that a step calibrates with: at most as many as its text has."""
    text = step.calibration
    if text is None:
        return float(CALIBRATION_CHUNKS * CHUNK_TOKENS)
    most = text.size_bytes / BYTES_PER_TOKEN
    return min(float(text.chunks * text.chunk_tokens), most) if text.chunks else most


def _calibrating_memory(model: ModelSpec, variant: Variant, step: Step) -> Prediction:
    """On the CPU: the process, the weights as they are loaded with their copies, what runs through the layers and, of
    GPTQ, Hessians of the widest input. Wide below, as layers that are done may be on the disk.
    """
    name, table = _made_by(variant), rates()
    width = 4.0 if name == "gptq-gptqmodel" else 2.0
    held = LOADED_COPIES * width * model.parameter_count
    inputs = (model.n_ff + 4 * model.n_embd) if variant.method == "awq" else 2 * model.n_embd
    states = width * calibration_tokens(step) * inputs
    hessians = 3 * 4.0 * max(model.n_ff, model.n_embd) ** 2 if variant.method == "gptq" else 0.0
    base = table[name, "base", "0"]
    value = base + held + states + hessians
    terms = (("process", base, "B"), ("layers", held, "B"), ("hidden states", states, "B"), ("Hessians", hessians, "B"))
    low, high = 0.8 * base + 0.3 * (value - base), 1.2 * base + 1.6 * (value - base)
    return Prediction(value=value, low=low, high=high, basis=FORMULA, source=SOURCE, terms=terms)


def _made_by(variant: Variant) -> str:
    """The ``step`` of the table's rows for a method and the program that carries it out."""
    way = quantizers.way_of(variant)
    return f"{variant.method}-{way.quantizer if way else 'gptqmodel'}"


def largest_layer(model: ModelSpec) -> float:
    """Weights of the largest layer."""
    per_layer = [0] * (model.n_layer + 1)
    for tensor in model.tensors:
        per_layer[min(tensor.layer, model.n_layer) if tensor.layer is not None else -1] += tensor.element_count
    return float(max(per_layer[:-1]))


def calibration_gpu_memory(model: ModelSpec) -> Prediction:
    """One layer in 16 bits, the calibration's hidden states in and out of it, and two Hessians of the widest input.

    Source: layer by layer as in Frantar et al. 2022, section 4, https://arxiv.org/abs/2210.17323.
    """
    layer = 2.0 * largest_layer(model)
    states = 2 * 2.0 * CALIBRATION_TOKENS * model.n_embd
    hessians = 2 * 4.0 * max(model.n_ff, model.n_embd) ** 2
    value = layer + states + hessians + _GPU_PROCESS_BYTES
    terms = (("layer", layer, "B"), ("hidden states", states, "B"), ("Hessians", hessians, "B"))
    return Prediction(
        value=value, low=0.5 * value, high=2.4 * value, basis=FORMULA, source="layer-wise calibration", terms=terms
    )
