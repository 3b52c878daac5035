"""GPTQ: second-order post-training quantization (Frantar et al. 2023) to 2, 3, 4 or 8 bits."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

from planner.core.candidate import Candidate, Variant
from planner.core.estimates import SizeEstimate
from planner.core.job import Job
from planner.core.model import ModelSpec, Tensor
from planner.core.plan import Step
from planner.methods import common, compressed, scripts, serving
from planner.runtimes import kernels

TYPES = ("4bit", "3bit", "8bit", "2bit")
GROUP_SIZES = (16, 32, 64, 128, 256, 512, 1024, -1)
"""``SUPPORTS_GROUP_SIZE`` of GPTQModel's TorchQuantLinear, which takes the most of its kernels."""


def variants(model: ModelSpec) -> tuple[Variant, ...]:
    """Every width at group size 128; below 8 bits also the finest groups; activation order where vLLM reads it."""
    coarse = tuple(variant(type_, 128) for type_ in TYPES)
    return coarse + tuple(variant(type_, 32) for type_ in TYPES if type_ != "8bit")


def variant(type_: str, group_size: int | None = 128, *, act_order: bool | None = None) -> Variant:
    """The variant of a type and group size, in activation order if so asked or, unasked, where vLLM reads it.

    Raises:
        UsageError: GPTQ has no such type or group size.
    """
    if type_ not in TYPES:
        raise common.unknown_type("gptq", type_, TYPES)
    if group_size is not None and group_size not in GROUP_SIZES:
        raise common.unknown_group_size("gptq", group_size, GROUP_SIZES)
    ordered = kernels.takes_act_order("vllm", "gptq", type_) if act_order is None else act_order
    return Variant(method="gptq", format="gptq", runtime="vllm", type=type_, group_size=group_size, act_order=ordered)


def bits(variant: Variant) -> int:
    """Bits of a packed weight."""
    return int(variant.type.removesuffix("bit"))


@lru_cache(maxsize=512)
def tensor_bytes(model: ModelSpec, variant: Variant) -> tuple[int, ...]:
    """Per linear layer of ``K`` inputs, ``N`` outputs, ``G`` groups and ``b`` bits: packed weights ``K·N·b/8``,
    packed zeros ``G·N·b/8``, fp16 scales ``2·G·N``, and the int32 group index ``4·K``, which is written with and
    without activation order; the rest stays 16-bit.

    Source: layout of AutoGPTQ and GPTQModel QuantLinear, https://github.com/ModelCloud/GPTQModel.
    """
    width = bits(variant)
    if variant.format == compressed.FORMAT:
        return compressed.tensor_bytes(model, variant, width)
    return tuple(_bytes(tensor, width, variant.group_size) for tensor in model.tensors)


def _bytes(tensor: Tensor, width: int, group_size: int | None) -> int:
    if not common.is_linear(tensor):
        return common.kept_bytes(tensor)
    rows_in, columns_out, count = common.matrices(tensor)
    groups = common.groups(rows_in, group_size)
    packed = 4 * -(-rows_in * width // 32) * columns_out
    zeros = 4 * groups * -(-columns_out * width // 32)
    return count * (packed + zeros + 2 * groups * columns_out + 4 * rows_in)


@lru_cache(maxsize=512)
def size(model: ModelSpec, variant: Variant) -> SizeEstimate:
    """Bytes on disk: four tensors per linear layer."""
    per_linear = compressed.tensors_per_linear(variant) if variant.format == compressed.FORMAT else 4
    return common.safetensors_size(model, tensor_bytes(model, variant), tensors_per_linear=per_linear)


blockers = common.kernel_blockers
"""No kernel of vLLM for it here: the GPU, the group size, or a matrix that no group divides."""
kernel = common.kernel_at


def steps(model: ModelSpec, variant: Variant) -> tuple[Step, ...]:
    """Quantize with calibration text, then verify."""
    return common.steps(model, variant, size(model, variant).file_bytes)


def work(job: Job, progress: Callable[[float, float], None]) -> dict[str, Any]:
    """Carry out the ``quantize`` step, in the environment of its quantizer.

    Raises:
        QplanError: the input is unfit, or the quantizer refused.
    """
    if job.step.settings is not None and job.step.settings.quantizer == "llm-compressor":
        from planner.methods import llm_compressor_run

        return llm_compressor_run.work(job, progress)
    from planner.methods import gptqmodel_run

    return gptqmodel_run.work(job, progress)


def commands(model: ModelSpec, candidate: Candidate) -> dict[str, str]:
    """The quantizer's own script, vLLM and transformers to run."""
    return {"quantize": scripts.quantize(model, candidate.variant), **serving.vllm(model, candidate)}
