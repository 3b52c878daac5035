"""GGUF: llama.cpp's block types, from Q8_0 down to IQ1_S; runs on the CPU, a GPU, or split between both."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from planner.core.candidate import Candidate, KernelUse, Placement, Rejection, Variant
from planner.core.errors import InputError, UsageError
from planner.core.estimates import SizeEstimate
from planner.core.hardware import HardwareProfile
from planner.core.model import ModelSpec, shape_twin
from planner.core.plan import Step
from planner.core.units import pad
from planner.formats import ggml
from planner.methods import gguf_mix, serving
from planner.runtimes import kernels

if TYPE_CHECKING:
    from planner.core.job import Job

FULL_PRECISION = ("F32", "F16", "BF16")

ALIGNMENT_BYTES = 32
"""``GGUF_DEFAULT_ALIGNMENT``: the header and every tensor are padded to it."""

_TOKENIZER_BYTES_PER_TOKEN = {"spm": 22.62, "bpe": 39.02, "wpm": 20.56}
"""Tokens, scores, token types and merges over the vocabulary: sizes of the vocabulary files
ggml-vocab-llama-spm (32,000 tokens), -qwen2 (151,936) and -bert-bge (30,522) in llama.cpp's models/ folder."""
_MERGES_FROM_TIKTOKEN_BYTES_PER_TOKEN = 60.96
"""ggml-vocab-llama-bpe (128,256 tokens): a vocabulary taken over from tiktoken lists two merges per token."""
_TIKTOKEN_FAMILIES = ("llama-3", "gpt-oss")
_LARGE_SPM_BYTES_PER_TOKEN = 24.84
"""ggml-vocab-gemma-4 (262,144 tokens) without its merges."""
_SENSITIVITY_BYTES_PER_TENSOR = 530
"""A line of JSON with fourteen errors."""
_GENERAL_BYTES = 4096
"""Architecture keys and a chat template of ordinary length."""


def variants(model: ModelSpec) -> tuple[Variant, ...]:
    """Every file type that an ordinary model survives, with an importance matrix where one is demanded or pays.

    A GGUF file that is quantized already has one variant: itself.
    """
    if model.file_type is not None:
        return (variant(model.file_type, imatrix=model.guided),)
    return tuple(
        variant(file_type.name, imatrix=file_type.gains_by_imatrix)
        for file_type in gguf_mix.file_types().values()
        if file_type.usable and (model.mixture is not None or file_type.name != "MXFP4_MOE")
    )


@lru_cache(maxsize=256)
def variant(type_: str, group_size: int | None = None, imatrix: bool | None = None) -> Variant:
    """The variant of a file type; ``imatrix`` defaults to whether the type demands one.

    Raises:
        UsageError: no such type (``unknown-type``), or a group size, which GGUF types fix themselves.
    """
    file_type = gguf_mix.file_type(type_)
    if group_size is not None:
        raise UsageError("GGUF types have no group size", numbers=f"{type_} with {group_size}", code="no-group-size")
    wanted = file_type.requires_imatrix if imatrix is None else imatrix
    return Variant(method="gguf", format="gguf", runtime="llama.cpp", type=type_, imatrix=wanted)


def is_itself(model: ModelSpec, variant: Variant) -> bool:
    """Whether the variant is the quantized GGUF file that the model was read from."""
    return model.file_type is not None and model.file_type == variant.type


def is_own_mix(model: ModelSpec, variant: Variant) -> bool:
    """Whether the types of the tensors are not llama.cpp's choice for the file type: a recipe, or a file of other ones.

    Such files are published under the name of the type that most of their tensors are near.
    """
    if variant.method != "gguf" or not (variant.recipe or is_itself(model, variant)):
        return False
    try:
        standard = gguf_mix.tensor_types(shape_twin(model), variant.type, variant.imatrix)
    except (InputError, UsageError):
        return True
    held = zip(model.tensors, standard, tensor_types(model, variant), strict=True)
    return any(usual != found for tensor, usual, found in held if gguf_mix.is_quantized(tensor))


def tensor_types(model: ModelSpec, variant: Variant) -> tuple[str, ...]:
    """The ggml type of each tensor of ``model.tensors``."""
    if is_itself(model, variant):
        return tuple(tensor.dtype or "F32" for tensor in model.tensors)
    if variant.recipe:
        chosen = dict(variant.recipe)
        return tuple(chosen.get(tensor.name) or gguf_mix.source_type(model, tensor) for tensor in model.tensors)
    return gguf_mix.tensor_types(shape_twin(model), variant.type, variant.imatrix)


def tensor_bytes(model: ModelSpec, variant: Variant) -> tuple[int, ...]:
    """Bytes of each tensor of ``model.tensors`` in the file, without padding: what llama.cpp's dry run adds up.

    Raises:
        InputError: llama.cpp refuses this type for this model (``row-not-divisible``).
    """
    return _tensor_bytes(shape_twin(model), variant)


@lru_cache(maxsize=512)
def _tensor_bytes(model: ModelSpec, variant: Variant) -> tuple[int, ...]:
    types = tensor_types(model, variant)
    return tuple(map(ggml.tensor_bytes, types, [tensor.shape for tensor in model.tensors]))


@lru_cache(maxsize=512)
def metadata_bytes(model: ModelSpec) -> int:
    """Estimated bytes before the tensors: keys, vocabulary, and one record per tensor (this part exact).

    A record is the name with its length, the dimensions with their count, the type and the offset:
    ``8 + name + 4 + 8 * dimensions + 4 + 8`` bytes (ggml/docs/gguf.md).
    """
    records = sum(24 + len(tensor.name.encode()) + 8 * len(tensor.shape) for tensor in model.tensors)
    tokenizer = round(model.n_vocab * _tokenizer_bytes_per_token(model))
    return pad(_GENERAL_BYTES + records + tokenizer, ALIGNMENT_BYTES)


def _tokenizer_bytes_per_token(model: ModelSpec) -> float:
    kind = model.tokenizer or "bpe"
    if kind == "bpe" and model.family.startswith(_TIKTOKEN_FAMILIES):
        return _MERGES_FROM_TIKTOKEN_BYTES_PER_TOKEN
    if kind == "spm" and model.n_vocab > 200_000:
        return _LARGE_SPM_BYTES_PER_TOKEN
    return _TOKENIZER_BYTES_PER_TOKEN.get(kind, _TOKENIZER_BYTES_PER_TOKEN["bpe"])


@lru_cache(maxsize=512)
def size(model: ModelSpec, variant: Variant) -> SizeEstimate:
    """Size of the file: tensors exactly, metadata estimated.

    Raises:
        InputError: llama.cpp refuses this type for this model (``row-not-divisible``).
    """
    tensors = tensor_bytes(model, variant)
    total, metadata = sum(tensors), metadata_bytes(model)
    if is_itself(model, variant) and model.source.files:
        metadata = sum(file.size_bytes for file in model.source.files) - sum(pad(e, ALIGNMENT_BYTES) for e in tensors)
    return SizeEstimate(
        tensor_bytes=total,
        metadata_bytes=metadata,
        file_bytes=metadata + sum(pad(each, ALIGNMENT_BYTES) for each in tensors),
        bits_per_weight=8 * total / model.parameter_count,
    )


def blockers(model: ModelSpec, variant: Variant, hardware: HardwareProfile) -> tuple[Rejection, ...]:
    """Types that llama.cpp refuses for this model, and those that must not have the importance matrix they need.

    No machine is refused: llama.cpp runs on all of them.
    """
    if is_itself(model, variant):
        return ()
    if not variant.recipe and gguf_mix.file_type(variant.type).requires_imatrix and not variant.imatrix:
        reason = "llama.cpp refuses it without an importance matrix, and `--imatrix off` rules one out"
        return (_rejected(variant, reason, rule="needs-imatrix"),)
    if model.source.is_gguf and model.dtype.upper() not in FULL_PRECISION:
        reason = f"the model is {model.dtype} already; quantizing it again would lose quality twice"
        return (_rejected(variant, reason, rule="already-quantized"),)
    try:
        tensor_types(model, variant)
    except InputError as error:
        return (_rejected(variant, error.what, rule=error.code),)
    return ()


def _rejected(variant: Variant, reason: str, rule: str) -> Rejection:
    return Rejection(method="gguf", type=variant.type, reason=reason, rule=rule)


def kernel(
    model: ModelSpec, variant: Variant, placement: Placement, hardware: HardwareProfile
) -> KernelUse | Rejection:
    """The back end of llama.cpp that runs it; with any layer on a GPU, that GPU's."""
    return kernels.validate(variant, (), hardware, gpus_used=placement.gpu_layers > 0)


def steps(model: ModelSpec, variant: Variant) -> tuple[Step, ...]:
    """Straight from the checkpoint to the final file, or by way of 16 bits where something must be measured on those.

    A checkpoint of a family that qplan does not convert itself becomes a 16-bit file first, by llama.cpp's converter;
    it keeps the published type where GGUF has it, so that the reference is the model itself.
    """
    target = serving.artifact_name(model, variant)
    made = size(model, variant).file_bytes
    verify = Step(name="verify", kind="verify", method="gguf", source="quantize")
    if is_one_pass(model, variant):
        return (_quantize_step(model, variant, "model", target, made), verify)
    if model.source.is_gguf:
        measured = _measuring_steps(model, variant, "model")
        quantize = _quantize_step(model, variant, "model", target, made)
        return (*measured, quantize, verify)
    if variant.type in FULL_PRECISION:
        convert = _convert_step(model, variant.type, target, intermediate=False)
        return (convert, dataclasses.replace(verify, source="convert"))
    full = reference_type(model)
    convert = _convert_step(model, full, reference_name(model, variant), intermediate=True)
    measured = _measuring_steps(model, variant, "convert")
    return (convert, *measured, _quantize_step(model, variant, "convert", target, made), verify)


def _measuring_steps(model: ModelSpec, variant: Variant, source: str) -> tuple[Step, ...]:
    """What is measured on the 16-bit model before it is quantized: the importance matrix, and for a mixture how much
    each tensor bears. Both stay: another size of the same model needs no new ones."""
    name, made = serving.name_stem(model), []
    if variant.imatrix:
        size = sum(8 + 4 * tensor.shape[0] for tensor in model.tensors if gguf_mix.is_quantized(tensor))
        made.append(
            Step(
                name="imatrix",
                kind="imatrix",
                method="gguf",
                source=source,
                output=f"{name}.imatrix.gguf",
                predicted_bytes=size + 160 * len(model.tensors),
            )
        )
    if variant.recipe:
        made.append(
            Step(
                name="sensitivity",
                kind="sensitivity",
                method="gguf",
                source=source,
                imatrix="imatrix" if variant.imatrix else None,
                output=f"{name}.sensitivity.json",
                predicted_bytes=_SENSITIVITY_BYTES_PER_TENSOR * len(model.tensors),
            )
        )
    return tuple(made)


def is_one_pass(model: ModelSpec, variant: Variant) -> bool:
    """Whether a checkpoint becomes ``variant`` without a 16-bit file in between.

    Importance matrix and sensitivities are measured on the 16-bit model, so that it is there to be quantized from.
    """
    straight = variant.type not in FULL_PRECISION and not variant.imatrix and not variant.recipe
    return straight and model.convertible and not model.source.is_gguf


def reference_type(model: ModelSpec) -> str:
    """The 16-bit type that a checkpoint is converted to: its own; BF16 for 8-bit floats and F16 for float32."""
    return "F16" if model.dtype.upper() in {"F16", "FLOAT16", "F32", "FLOAT32"} else "BF16"


def reference_name(model: ModelSpec, variant: Variant) -> str:
    """What a file with the model in 16 bits is called beside the artifact."""
    return serving.artifact_name(model, dataclasses.replace(variant, type=reference_type(model), imatrix=False))


def _convert_step(model: ModelSpec, type_: str, output: str, *, intermediate: bool) -> Step:
    return Step(
        name="convert",
        kind="convert",
        method="gguf",
        output=output,
        type=type_,
        intermediate=intermediate,
        predicted_bytes=size(model, variant(type_)).file_bytes,
    )


def _quantize_step(model: ModelSpec, variant: Variant, source: str, output: str, made: int) -> Step:
    return Step(
        name="quantize",
        kind="quantize",
        method="gguf",
        source=source,
        output=output,
        type=variant.type,
        imatrix="imatrix" if variant.imatrix else None,
        sensitivity="sensitivity" if variant.recipe else None,
        tensor_types=variant.recipe,
        predicted_bytes=made,
    )


def largest_tensor(model: ModelSpec) -> int:
    """Weights of the largest tensor: both steps hold one at a time, as fp32 beside its source and result."""
    return max(tensor.element_count for tensor in model.tensors)


def commands(model: ModelSpec, candidate: Candidate) -> dict[str, str]:
    """llama.cpp's own tools, llama-cpp-python and Ollama."""
    return serving.llama_cpp(model, candidate)


def work(job: Job, progress: Callable[[float, float], None]) -> dict[str, Any]:
    """Carry out a step; only in a child process."""
    from planner.methods import gguf_run

    return gguf_run.work(job, progress)
