"""What converting a checkpoint, quantizing a 16-bit GGUF file, and doing both in one pass take."""

from __future__ import annotations

from dataclasses import replace

from planner.core.candidate import Variant
from planner.core.estimates import Prediction
from planner.core.measurement import CONVERT_RATE, ONE_PASS_RATE, QUANTIZE_RATE
from planner.core.model import ModelSpec
from planner.core.plan import Step
from planner.core.units import GIB, MIB
from planner.estimate.making_measured import corrected
from planner.estimate.making_rates import (
    PASS_SECONDS_PER_TOKEN,
    START_SECONDS,
    Site,
    cores_worth,
    hash_seconds,
    quantize_rate,
    rates,
    step_memory,
    step_seconds,
)
from planner.formats import ggml
from planner.methods import gguf, gguf_mix

CONVERT_BASE_BYTES = 63 * MIB
QUANTIZE_BASE_BYTES = 56 * MIB
"""Resident memory of a child that converts, and one that quantizes, before tensors (Linux x86-64, 2026-11-23)."""
CONVERT_BLOCK_BYTES = 32 * MIB
PASS_BASE_BYTES = 58 * MIB
"""Of a child that quantizes a checkpoint in one pass, before blocks and vocabulary (Linux x86-64, 2026-11-26)."""
PASS_BLOCK_BYTES, PASS_BUFFER_BYTES = 8 * MIB, 256 * MIB
"""A block as it is read, and all of them together: ``BLOCK_BYTES`` and ``BUFFER_BYTES`` of quantize/pipeline.py."""
QUANTIZE_BUFFER_BYTES = 8 * GIB
"""``LLAMA_QUANT_MAX_BUF_SIZE``: source rows, their fp32 copy and the result of one slab of a tensor."""
_VOCABULARY_BYTES = {"spm": 650.0, "bpe": 1300.0}
"""Per token, for reading the tokenizer and checking the converted one. 650: 32,000 tokens of a sentencepiece model;
1300 is assumed for one with merges."""


def converting(model: ModelSpec, variant: Variant, step: Step, site: Site) -> Step:
    """One thread reads, converts and writes in blocks; the output is hashed afterwards."""
    type_, output = str(step.type), int(step.predicted_bytes or 0)
    same = model.dtype.upper() in {type_, {"BF16": "BFLOAT16", "F16": "FLOAT16"}.get(type_, "")}
    rate = rates()["convert", "same" if same else "F32" if type_ == "F32" else "16bit", "0"]
    weights = model.parameter_count
    work, moved = weights / rate + hash_seconds(output), 2 * weights + output
    seconds = step_seconds(START_SECONDS, work, moved, (("converting", weights / rate, "s"),))
    block = min(CONVERT_BLOCK_BYTES, 2 * gguf.largest_tensor(model)) * (1 if same else 4)
    vocabulary = model.n_vocab * _VOCABULARY_BYTES.get(model.tokenizer or "bpe", 1300.0)
    most = CONVERT_BASE_BYTES + 1.5 * block + 3 * vocabulary
    memory = step_memory(CONVERT_BASE_BYTES + block + vocabulary, most, "blocks of the converter, and the vocabulary")
    return replace(
        step,
        predicted_seconds=corrected(model, step, seconds, site, CONVERT_RATE),
        predicted_memory=memory,
        predicted_peak_bytes=round(memory.high),
        predicted_scratch_bytes=0,
    )


def quantizing(model: ModelSpec, variant: Variant, step: Step, site: Site) -> Step:
    """All threads work on slabs of one tensor at a time; tensors that keep their type are copied."""
    types = gguf.tensor_types(model, variant)
    work = read = 0.0
    for type_, tensor in zip(types, model.tensors, strict=True):
        source = gguf_mix.source_type(model, tensor)
        read += ggml.tensor_bytes(source, tensor.shape)
        if type_ != source:
            work += tensor.element_count / quantize_rate(type_, variant.imatrix)
    output = int(step.predicted_bytes or 0)
    cpu = work / cores_worth(site.threads)
    terms = (("quantizing on one core", work, "s"), ("threads", float(site.threads), ""))
    seconds = step_seconds(START_SECONDS, cpu + hash_seconds(output), read + output, terms)
    memory = quantize_memory(model, types)
    return replace(
        step,
        predicted_seconds=corrected(model, step, seconds, site, QUANTIZE_RATE),
        predicted_memory=memory,
        predicted_peak_bytes=round(memory.high),
        predicted_scratch_bytes=0,
    )


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
    return step_memory(total, 1.15 * total, "buffers of llama_model_quantize for the largest tensor")


def one_pass(model: ModelSpec, variant: Variant, step: Step, site: Site) -> Step:
    """Converting and quantizing at once, without a 16-bit file between; the output is hashed afterwards."""
    return one_pass_of_many(model, (variant,), step, site, hashed=True)


def one_pass_of_many(model: ModelSpec, variants: tuple[Variant, ...], step: Step, site: Site, *, hashed: bool) -> Step:
    """Reading, hashing, quantizing and writing side by side: all share the cores, and reading, hashing and writing
    have one thread each. Outputs share the bytes of a tensor that has the same type in them.
    """
    kinds = [gguf.tensor_types(model, variant) for variant in variants]
    kernels = 0.0
    for index, tensor in enumerate(model.tensors):
        for type_, imatrix in {(types[index], v.imatrix) for types, v in zip(kinds, variants, strict=True)}:
            if type_ not in gguf.FULL_PRECISION:
                kernels += tensor.element_count / quantize_rate(type_, imatrix)
    output, source = int(step.predicted_bytes or 0), _source_bytes(model)
    hashing, writing = hash_seconds(source), output / rates()["pass", "write", "0"]
    widening = source / rates()["pass", _width_kind(model), "0"]
    cores = cores_worth(min(site.threads, site.hardware.cpu.physical_core_count or 1))
    work = max((kernels + widening + hashing + writing) / cores, hashing, writing)
    terms = (
        ("quantizing on one core", kernels, "s"),
        ("reading and widening on one core", widening, "s"),
        ("hashing the checkpoint on one core", hashing, "s"),
        ("writing on one core", writing, "s"),
        ("cores", cores, ""),
    )
    start = START_SECONDS + PASS_SECONDS_PER_TOKEN * model.n_vocab
    seconds = step_seconds(start, work + hashed * hash_seconds(output), source + output, terms, aside=True)
    memory = _one_pass_memory(model, source, output, site.threads)
    return replace(
        step,
        predicted_seconds=corrected(model, step, seconds, site, ONE_PASS_RATE),
        predicted_memory=memory,
        predicted_peak_bytes=round(memory.high),
        predicted_scratch_bytes=0,
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
    return step_memory(value, value + results + 2 * vocabulary, "blocks in flight, and the vocabulary")
