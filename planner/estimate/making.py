"""What making the artifact takes, step by step: time, peak memory, GPU memory and disk.

Rates are in ``data/quantize_rates.csv``: measured per ggml type on one core, and published for calibrated methods.
What was measured on this machine corrects them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from math import exp, log
from statistics import median

from planner.core.candidate import Variant
from planner.core.data import read_table
from planner.core.estimates import CALIBRATED, FORMULA, MEASURED, PUBLISHED, Prediction
from planner.core.hardware import HardwareProfile
from planner.core.measurement import CONVERT_RATE, ONE_PASS_RATE, QUANTIZE_RATE, Calibration, Measurement
from planner.core.model import ModelSpec, shape_sha256
from planner.core.plan import Step
from planner.core.units import GIB, MIB
from planner.formats import ggml
from planner.methods import get, gguf, gguf_mix, gguf_recipe

START_SECONDS = 0.35
"""A child process with numpy, gguf and llama_cpp: the steps of a model of 5.8 million weights take 0.35-0.5 s."""
TORCH_START_SECONDS = 6.0
"""torch and transformers: 2 s of processor time to import, and the kernels of the first call (2026-11-23, CPU)."""
THREAD_EFFICIENCY = 0.9
"""Two threads do 1.8 times the work of one (273 million weights, Q6_K and IQ4_XS, 2026-11-23)."""
DISK_BYTES_PER_SECOND = 1e9
"""Assumed: a solid-state disk on PCIe 3."""
SLOW_DISK_BYTES_PER_SECOND = 0.2e9
"""Assumed for the slow end: a hard disk, or a network volume."""
CPU_SPREAD = 2.2
"""Rates per core on other machines. IQ2_XS of Llama 2 7B on a Ryzen 9 7950X takes 1 / 1.8 of what the table gives
(the ``check`` rows)."""
GPU_SPREAD = 2.5
"""Calibrated methods on other GPUs, with other samples and versions."""
CALIBRATED_SIGMA = 0.25
"""Of the logarithm, for a step like one that was measured here."""

CONVERT_BASE_BYTES = 63 * MIB
QUANTIZE_BASE_BYTES = 56 * MIB
"""Resident memory of a child that converts, and one that quantizes, before tensors (Linux x86-64, 2026-11-23)."""
CONVERT_BLOCK_BYTES = 32 * MIB
PASS_SECONDS_PER_TOKEN = 1e-5
"""Of the vocabulary: read, written, and loaded by llama.cpp to compare token ids (32,000 tokens, 2026-11-26)."""
LARGE_VOCABULARY = 150_000
PASS_BASE_BYTES = 58 * MIB
"""Of a child that quantizes a checkpoint in one pass, before blocks and vocabulary (Linux x86-64, 2026-11-26)."""
PASS_BLOCK_BYTES, PASS_BUFFER_BYTES = 8 * MIB, 256 * MIB
"""A block as it is read, and all of them together: ``BLOCK_BYTES`` and ``BUFFER_BYTES`` of quantize/pipeline.py."""
QUANTIZE_BUFFER_BYTES = 8 * GIB
"""``LLAMA_QUANT_MAX_BUF_SIZE``: source rows, their fp32 copy and the result of one slab of a tensor."""
_VOCABULARY_BYTES = {"spm": 650.0, "bpe": 1300.0}
"""Per token, for reading the tokenizer and checking the converted one. 650: 32,000 tokens of a sentencepiece model;
1300 is assumed for one with merges."""
_TORCH_BYTES = 600 * MIB
"""Process with torch and transformers at work, and its allocator's slack."""
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
CALIBRATION_TOKENS = 128 * 2048
"""Samples and their length, as GPTQ and AWQ papers and tools use them."""
_GPU_PROCESS_BYTES = 700 * MIB
"""CUDA context and PyTorch's handles, as in ``served_memory``."""
_A100_FLOPS = 312e12
"""Dense bfloat16 of the GPU the GPTQ figures are of."""
_SOURCE = "data/quantize_rates.csv"
_TORCH_SOURCE = "the 16-bit weights, torch and its working memory"


@dataclass(frozen=True, slots=True)
class _Site:
    hardware: HardwareProfile
    threads: int
    calibration: Calibration | None


def forecast(
    model: ModelSpec,
    variant: Variant,
    hardware: HardwareProfile,
    *,
    threads: int | None = None,
    calibration: Calibration | None = None,
    prepare: Callable[[tuple[Step, ...]], tuple[Step, ...]] = lambda steps: steps,
) -> tuple[Step, ...]:
    """The steps that make ``variant``, each with its predicted time, memory and disk.

    Args:
        threads: of the quantizer; by default as many as inference would use.
        calibration: what was measured on this machine.
        prepare: settles what the steps work with, before it is predicted what they take.
    """
    site = _Site(hardware, threads or hardware.cpu.inference_threads(), calibration)
    steps = prepare(get(variant.method).steps(model, variant))
    if variant.method != "gguf":
        return tuple(_served(model, variant, step, site) if step.kind == "quantize" else step for step in steps)
    makers = {
        "convert": _converting,
        "quantize": _passing if gguf.is_one_pass(model, variant) else _quantizing,
        "imatrix": _collecting,
        "sensitivity": _probing,
    }
    return tuple(makers[step.kind](model, variant, step, site) if step.kind in makers else step for step in steps)


def forecast_many(
    model: ModelSpec,
    variants: tuple[Variant, ...],
    hardware: HardwareProfile,
    *,
    threads: int,
    calibration: Calibration | None = None,
) -> Step:
    """One step that makes GGUF files of all ``variants`` from one read of the checkpoint ``model``.

    Its bytes are those of all files; what was measured here of one type corrects a step that makes just that one.
    """
    site = _Site(hardware, threads, calibration)
    types = "+".join(variant.type for variant in variants)
    size = sum(gguf.size(model, variant).file_bytes for variant in variants)
    step = Step(name="quantize", kind="quantize", method="gguf", type=types, output=types, predicted_bytes=size)
    return _one_pass(model, variants, step, site, hashed=False)


@cache
def _rates() -> dict[tuple[str, str, str], float]:
    """(step, type, "1" with an importance matrix) → rate; the median where the table has several rows."""
    found: dict[tuple[str, str, str], list[float]] = {}
    for row in read_table("quantize_rates.csv"):
        found.setdefault((row["step"], row["type"], row["imatrix"]), []).append(float(row["value"]))
    return {key: median(values) for key, values in found.items()}


def quantize_rate(type_: str, imatrix: bool) -> float:
    """Weights per second and core of a ggml type; the slowest known for a type without a row."""
    table = _rates()
    found = table.get(("quantize", type_, "1" if imatrix else "0")) or table.get(("quantize", type_, "0"))
    return found or min(rate for (step, _, _), rate in table.items() if step == "quantize")


def _hash_seconds(size_bytes: int) -> float:
    return size_bytes / _rates()["hash", "sha256", "0"]


def _converting(model: ModelSpec, variant: Variant, step: Step, site: _Site) -> Step:
    """One thread reads, converts and writes in blocks; the output is hashed afterwards."""
    type_, output = str(step.type), int(step.predicted_bytes or 0)
    same = model.dtype.upper() in {type_, {"BF16": "BFLOAT16", "F16": "FLOAT16"}.get(type_, "")}
    rate = _rates()["convert", "same" if same else "F32" if type_ == "F32" else "16bit", "0"]
    weights = model.parameter_count
    work, moved = weights / rate + _hash_seconds(output), 2 * weights + output
    seconds = _seconds(START_SECONDS, work, moved, (("converting", weights / rate, "s"),))
    block = min(CONVERT_BLOCK_BYTES, 2 * gguf.largest_tensor(model)) * (1 if same else 4)
    vocabulary = model.n_vocab * _VOCABULARY_BYTES.get(model.tokenizer or "bpe", 1300.0)
    most = CONVERT_BASE_BYTES + 1.5 * block + 3 * vocabulary
    memory = _memory(CONVERT_BASE_BYTES + block + vocabulary, most, "blocks of the converter, and the vocabulary")
    return replace(
        step,
        predicted_seconds=_corrected(model, step, seconds, site, CONVERT_RATE),
        predicted_memory=memory,
        predicted_peak_bytes=round(memory.high),
        predicted_scratch_bytes=0,
    )


def _quantizing(model: ModelSpec, variant: Variant, step: Step, site: _Site) -> Step:
    """All threads work on slabs of one tensor at a time; tensors that keep their type are copied."""
    types = gguf.tensor_types(model, variant)
    work = read = 0.0
    for type_, tensor in zip(types, model.tensors, strict=True):
        source = gguf_mix.source_type(model, tensor)
        read += ggml.tensor_bytes(source, tensor.shape)
        if type_ != source:
            work += tensor.element_count / quantize_rate(type_, variant.imatrix)
    output = int(step.predicted_bytes or 0)
    cpu = work / max(1.0, 1 + THREAD_EFFICIENCY * (site.threads - 1))
    terms = (("quantizing on one core", work, "s"), ("threads", float(site.threads), ""))
    seconds = _seconds(START_SECONDS, cpu + _hash_seconds(output), read + output, terms)
    memory = quantize_memory(model, types)
    return replace(
        step,
        predicted_seconds=_corrected(model, step, seconds, site, QUANTIZE_RATE),
        predicted_memory=memory,
        predicted_peak_bytes=round(memory.high),
        predicted_scratch_bytes=0,
    )


def _running(model: ModelSpec, step: Step, tokens: float, site: _Site, others_seconds: float) -> Step:
    """A step that runs the 16-bit model over ``tokens``: time by the predicted prefill speed, memory as placed."""
    from planner.core.candidate import Placement
    from planner.estimate.memory import memory
    from planner.estimate.speed import speed

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
            source=f"prefill of the 16-bit model; {_SOURCE}",
            terms=terms,
        )
    used = memory(model, whole, place, site.hardware)
    held = QUANTIZE_BASE_BYTES + used.host.total_bytes + LOGITS_BYTES_PER_ENTRY * model.n_vocab
    found = _memory(held, 1.4 * held, "the 16-bit model with its buffers, and the logits of a chunk")
    on_gpu = max((device.total_bytes for device in used.devices), default=0)
    return replace(
        step,
        predicted_seconds=seconds,
        predicted_memory=found,
        predicted_peak_bytes=round(found.high),
        predicted_gpu_memory=_memory(on_gpu, 1.3 * on_gpu, "the 16-bit model's layers") if on_gpu else None,
        predicted_scratch_bytes=0,
    )


def _passing(model: ModelSpec, variant: Variant, step: Step, site: _Site) -> Step:
    return _one_pass(model, (variant,), step, site, hashed=True)


def _one_pass(model: ModelSpec, variants: tuple[Variant, ...], step: Step, site: _Site, *, hashed: bool) -> Step:
    """Reading, hashing, quantizing and writing side by side: all share the cores, and reading, hashing and writing
    have one thread each. Outputs share the bytes of a tensor that has the same type in them.
    """
    kinds = [gguf_mix.tensor_types(model, variant.type, variant.imatrix) for variant in variants]
    kernels = 0.0
    for index, tensor in enumerate(model.tensors):
        for type_, imatrix in {(types[index], v.imatrix) for types, v in zip(kinds, variants, strict=True)}:
            if type_ not in gguf.FULL_PRECISION:
                kernels += tensor.element_count / quantize_rate(type_, imatrix)
    output, source = int(step.predicted_bytes or 0), _source_bytes(model)
    hashing, writing = _hash_seconds(source), output / _rates()["pass", "write", "0"]
    widening = source / _rates()["pass", _width_kind(model), "0"]
    cores = max(1.0, 1 + THREAD_EFFICIENCY * (min(site.threads, site.hardware.cpu.physical_core_count or 1) - 1))
    work = max((kernels + widening + hashing + writing) / cores, hashing, writing)
    terms = (
        ("quantizing on one core", kernels, "s"),
        ("reading and widening on one core", widening, "s"),
        ("hashing the checkpoint on one core", hashing, "s"),
        ("writing on one core", writing, "s"),
        ("cores", cores, ""),
    )
    start = START_SECONDS + PASS_SECONDS_PER_TOKEN * model.n_vocab
    seconds = _seconds(start, work + hashed * _hash_seconds(output), source + output, terms, aside=True)
    memory = _one_pass_memory(model, source, output, site.threads)
    return replace(
        step,
        predicted_seconds=_corrected(model, step, seconds, site, ONE_PASS_RATE),
        predicted_memory=memory,
        predicted_peak_bytes=round(memory.high),
        predicted_scratch_bytes=0,
    )


def _collecting(model: ModelSpec, variant: Variant, step: Step, site: _Site) -> Step:
    """The calibration text once through the model."""
    chunks = step.calibration.chunks if step.calibration else None
    return _running(model, step, CHUNK_TOKENS * float(chunks or CALIBRATION_CHUNKS), site, 0.0)


def _probing(model: ModelSpec, variant: Variant, step: Step, site: _Site) -> Step:
    """Each part of the model once spoiled and run, all together once, and a sample of each tensor in all types."""
    quantized = [tensor for tensor in model.tensors if gguf_mix.is_quantized(tensor)]
    runs = min(step.probes or len(quantized), len(quantized)) + UNCHANGED_RUNS
    sampled = float(sum(min(tensor.element_count, SAMPLE_WEIGHTS) for tensor in quantized))
    kinds = sum(1 / quantize_rate(type_, imatrix=True) for type_ in gguf_recipe.WHOLE_ROW_TYPES)
    whole = 3 * sum(tensor.element_count for tensor in quantized) / quantize_rate("Q3_K", imatrix=True)
    cores = max(1.0, 1 + THREAD_EFFICIENCY * (site.threads - 1))
    return _running(
        model, step, CHUNK_TOKENS * SENSITIVITY_CHUNKS * float(runs), site, (sampled * kinds + whole) / cores
    )


def _source_bytes(model: ModelSpec) -> int:
    return round(model.parameter_count * {"f32": 4.0, "fp8": 1.0}.get(model.dtype.lower(), 2.0))


def _width_kind(model: ModelSpec) -> str:
    """Which row of the table tells how fast a type becomes float32: bfloat16 and float16 go straight to the kernel."""
    return {"f32": "F32", "fp8": "F8"}.get(model.dtype.lower(), "16bit")


def _one_pass_memory(model: ModelSpec, source: int, output: int, threads: int) -> Prediction:
    """Blocks on their way in and out, the vocabulary and the process (planner/quantize/pipeline.py)."""
    buffers = threads + 3
    block = max(MIB, min(PASS_BLOCK_BYTES, PASS_BUFFER_BYTES // buffers))
    read = min(buffers * block, source)
    results = min((threads + 1) * block * output / source, output)
    vocabulary = model.n_vocab * _VOCABULARY_BYTES.get(model.tokenizer or "bpe", 1300.0)
    value = PASS_BASE_BYTES + read + results + vocabulary + threads * MIB
    return _memory(value, value + results + 2 * vocabulary, "blocks in flight, and the vocabulary")


def quantize_memory(model: ModelSpec, types: tuple[str, ...]) -> Prediction:
    """The largest tensor: its mapped source, its fp32 copy and its result, the last two at most 8 GiB.

    Source: ``llama_model_quantize_impl`` of llama.cpp (src/llama-quant.cpp).
    """
    most = 0.0
    for type_, tensor in zip(types, model.tensors, strict=True):
        source = gguf_mix.source_type(model, tensor)
        mapped = ggml.tensor_bytes(source, tensor.shape)
        made = 4 * tensor.element_count + ggml.tensor_bytes(type_, tensor.shape) if type_ != source else 0
        most = max(most, mapped + min(made, QUANTIZE_BUFFER_BYTES))
    total = QUANTIZE_BASE_BYTES + most
    return _memory(total, 1.15 * total, "buffers of llama_model_quantize for the largest tensor")


def _memory(value: float, high: float, source: str) -> Prediction:
    return Prediction(value=value, low=0.85 * value, high=max(high, 1.15 * value), basis=FORMULA, source=source)


def _seconds(
    start: float, work: float, moved_bytes: float, terms: tuple[tuple[str, float, str], ...], *, aside: bool = False
) -> Prediction:
    """``start + work`` and the time of the disk, of which the quick end sees nothing: the page cache takes it.

    ``aside``: threads of their own read and write, so that only what exceeds the work is waited for.
    """
    disk = moved_bytes / DISK_BYTES_PER_SECOND
    waiting = max(0.0, 0.25 * disk - work) if aside else 0.25 * disk
    value = start + work + waiting
    slow = max(0.0, moved_bytes - 1 * GIB) / SLOW_DISK_BYTES_PER_SECOND
    return Prediction(
        value=value,
        low=0.8 * start + work / CPU_SPREAD,
        high=2.5 * start + max(work * CPU_SPREAD + disk, work + slow),
        basis=FORMULA,
        source=_SOURCE,
        terms=(("starting", start, "s"), *terms, ("reading and writing", waiting, "s")),
    )


def _corrected(model: ModelSpec, step: Step, formula: Prediction, site: _Site, quantity: str) -> Prediction:
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
    spread = exp(1.2816 * CALIBRATED_SIGMA)
    value = formula.value * factor
    low = (formula.low / formula.value) ** (1 - trust) * spread**-trust
    high = (formula.high / formula.value) ** (1 - trust) * spread**trust
    return replace(
        formula,
        value=value,
        low=value * min(low, 1 / spread),
        high=value * max(high, spread),
        basis=CALIBRATED,
        source=f"{_SOURCE}, corrected by what was measured here ({len(known)} so far)",
        terms=(*formula.terms, ("correction", factor, "")),
    )


def _is_same(m: Measurement, model: ModelSpec, step: Step, site: _Site) -> bool:
    like = m.type == step.type and m.conditions.threads == site.threads
    return like and m.model_sha256 == shape_sha256(model)


def uncorrected_rate(model: ModelSpec, variant: Variant, step: Step, hardware: HardwareProfile, threads: int) -> float:
    """Weights per second of a step by the formula alone, which is what a measurement of it is kept with."""
    plain = forecast(model, variant, hardware, threads=threads)
    found = next(made for made in plain if made.name == step.name)
    assert found.predicted_seconds is not None
    return model.parameter_count / found.predicted_seconds.value


def _served(model: ModelSpec, variant: Variant, step: Step, site: _Site) -> Step:
    """A step of a method for GPUs: its output, and what a quantizer on a GPU or, uncalibrated, on the CPU takes."""
    size = get(variant.method).size(model, variant).file_bytes
    step = replace(step, predicted_bytes=size, predicted_scratch_bytes=0)
    if variant.method == "none":
        return replace(step, predicted_bytes=0) if variant.type != "fp8" else step
    loaded = 2.0 * model.parameter_count + _TORCH_BYTES
    if variant.method == "bitsandbytes":
        memory = _memory(loaded + size, 1.1 * loaded + size, _TORCH_SOURCE)
        return replace(step, predicted_seconds=_loading(model, variant, site), predicted_memory=memory,
                       predicted_peak_bytes=round(memory.high))  # fmt: skip
    memory = _memory(loaded + 4 * GIB, 1.2 * loaded + 16 * GIB, _TORCH_SOURCE)
    return replace(
        step,
        predicted_scratch_bytes=2 * model.parameter_count,
        predicted_seconds=_calibrating(model, variant, site),
        predicted_memory=memory,
        predicted_peak_bytes=round(memory.high),
        predicted_gpu_memory=calibration_gpu_memory(model) if site.hardware.gpus else None,
    )


def _loading(model: ModelSpec, variant: Variant, site: _Site) -> Prediction:
    """bitsandbytes quantizes while it loads: reading bounds it on a GPU, its rate per core on the CPU."""
    moved = 2.0 * model.parameter_count
    rate = _rates()["bitsandbytes", variant.type, "0"] * site.threads
    work = model.parameter_count / rate if not site.hardware.gpus else moved / DISK_BYTES_PER_SECOND
    return _seconds(TORCH_START_SECONDS, work, moved, (("quantizing", work, "s"),))


def _calibrating(model: ModelSpec, variant: Variant, site: _Site) -> Prediction | None:
    """Published seconds per billion weights, scaled by the GPU's FP16 rate; unknown without a GPU."""
    if not site.hardware.gpus:
        return None
    per_billion = _rates()[variant.method, "4bit", "0"]
    flops = site.hardware.gpus[0].fp16_flops_per_second
    scale = max(0.3, _A100_FLOPS / flops) if flops else 1.0
    value = TORCH_START_SECONDS + model.parameter_count / 1e9 * per_billion * scale
    return Prediction(
        value=value,
        low=value / GPU_SPREAD,
        high=value * GPU_SPREAD,
        basis=PUBLISHED,
        source=_SOURCE,
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
