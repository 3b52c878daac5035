"""AWQ: activation-aware 4-bit weights (Lin et al. 2023), in the GEMM layout that vLLM and transformers read."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

from planner.core.candidate import Candidate, Variant
from planner.core.estimates import SizeEstimate
from planner.core.job import Job
from planner.core.model import ModelSpec, Tensor
from planner.core.plan import Step
from planner.core.units import pad
from planner.methods import common, compressed, scripts, serving

GEMV = "awq-gemv"
TYPES = ("4bit", "3bit")
"""3 bits as in the AWQ paper: estimated when asked for, never proposed, as no kernel of vLLM reads it."""
GROUP_SIZES = (32, 64, 128, -1)


def variants(model: ModelSpec) -> tuple[Variant, ...]:
    """4-bit at group size 128, the one every kernel has, then the finer ones."""
    return tuple(variant("4bit", size) for size in (128, 64, 32))


def variant(type_: str, group_size: int | None = 128) -> Variant:
    """The variant of a type and group size.

    Raises:
        UsageError: AWQ has no such type or group size.
    """
    if type_ not in TYPES:
        raise common.unknown_type("awq", type_, TYPES)
    if group_size is not None and group_size not in GROUP_SIZES:
        raise common.unknown_group_size("awq", group_size, GROUP_SIZES)
    return Variant(method="awq", format="awq-gemm", runtime="vllm", type=type_, group_size=group_size, symmetric=False)


@lru_cache(maxsize=512)
def tensor_bytes(model: ModelSpec, variant: Variant) -> tuple[int, ...]:
    """Per linear layer of ``K`` inputs and ``N`` outputs in ``G`` groups: packed weights ``K·N/2``,
    packed zeros ``G·N/2``, fp16 scales ``2·G·N`` bytes (the packed parts at 4 bits); the rest stays 16-bit.

    Source: layout of AutoAWQ's WQLinear_GEMM, https://github.com/casper-hansen/AutoAWQ.
    """
    bits = int(variant.type.removesuffix("bit"))
    if variant.format == compressed.FORMAT:
        return compressed.tensor_bytes(model, variant, bits)
    if variant.format == GEMV:
        return tuple(_gemv_bytes(tensor, variant.group_size or 128) for tensor in model.tensors)
    return tuple(_bytes(tensor, variant.group_size, bits) for tensor in model.tensors)


def _gemv_bytes(tensor: Tensor, group_size: int) -> int:
    """The layout for one row at a time: zeros are padded to whole words of the kernel's stride, scales to as many.

    Source: ``calculate_zeros_width`` in awq/modules/linear/gemv.py of AutoAWQ 0.2.9.
    """
    if not common.is_linear(tensor):
        return common.kept_bytes(tensor)
    rows_in, columns_out, count = common.matrices(tensor)
    stride = {64: 2, 32: 4}.get(group_size, 1)
    words = pad(-(-(rows_in // group_size) // 8), stride)
    return count * columns_out * (rows_in // 2 + 4 * words + 2 * 8 * words)


def _bytes(tensor: Tensor, group_size: int | None, bits: int) -> int:
    if not common.is_linear(tensor):
        return common.kept_bytes(tensor)
    rows_in, columns_out, count = common.matrices(tensor)
    groups = common.groups(rows_in, group_size)
    return count * (bits * (rows_in * columns_out + groups * columns_out) // 8 + 2 * groups * columns_out)


@lru_cache(maxsize=512)
def size(model: ModelSpec, variant: Variant) -> SizeEstimate:
    """Bytes on disk: three tensors per linear layer."""
    per_linear = compressed.tensors_per_linear(variant) if variant.format == compressed.FORMAT else 3
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
    chosen = job.step.settings.quantizer if job.step.settings else ""
    if chosen == "llm-compressor":
        from planner.methods import llm_compressor_run

        return llm_compressor_run.work(job, progress)
    if chosen == "autoawq":
        from planner.methods import autoawq_run

        return autoawq_run.work(job, progress)
    from planner.methods import gptqmodel_run

    return gptqmodel_run.work(job, progress)


def commands(model: ModelSpec, candidate: Candidate) -> dict[str, str]:
    """The quantizer's own script, vLLM and transformers to run."""
    return {"quantize": scripts.quantize(model, candidate.variant), **serving.vllm(model, candidate)}
