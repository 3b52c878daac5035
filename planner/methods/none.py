"""No quantization: the 16-bit weights as published, or FP8 for which no calibration is needed."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

from planner.core.candidate import Candidate, Variant
from planner.core.estimates import SizeEstimate
from planner.core.job import Job
from planner.core.model import ModelSpec, Tensor
from planner.core.plan import Step
from planner.methods import common, scripts, serving

TYPES = ("bf16", "f16", "f32", "fp8")
FP8 = "fp8"
_WIDTH_BYTES = {"bf16": 2, "f16": 2, "f32": 4}


def variants(model: ModelSpec) -> tuple[Variant, ...]:
    """The 16-bit type the model was published in, bf16 where that is unknown."""
    return (variant("f16" if model.dtype.lower() == "f16" else "bf16"),)


def variant(type_: str, group_size: int | None = None) -> Variant:
    """The variant of a 16- or 32-bit type, or of FP8 in the layout of compressed-tensors.

    Raises:
        UsageError: there is no such type.
    """
    if type_ not in TYPES:
        raise common.unknown_type("none", type_, TYPES)
    format_ = "compressed-tensors" if type_ == FP8 else "safetensors"
    return Variant(method="none", format=format_, runtime="vllm", type=type_)


@lru_cache(maxsize=512)
def tensor_bytes(model: ModelSpec, variant: Variant) -> tuple[int, ...]:
    """Two or four bytes per weight; FP8: one byte per weight of a linear layer and a 16-bit scale per output.

    Source of the FP8 layout: the dynamic per-token scheme with a scale per channel,
    https://docs.vllm.ai/en/latest/features/quantization/fp8.html; embeddings, head, norms and routers stay 16-bit.
    """
    if variant.type == FP8:
        return tuple(_fp8_bytes(tensor) for tensor in model.tensors)
    return tuple(common.kept_bytes(tensor, _WIDTH_BYTES[variant.type]) for tensor in model.tensors)


def _fp8_bytes(tensor: Tensor) -> int:
    if not common.is_linear(tensor):
        return common.kept_bytes(tensor)
    rows_in, columns_out, count = common.matrices(tensor)
    return count * columns_out * (rows_in + 2)


@lru_cache(maxsize=512)
def size(model: ModelSpec, variant: Variant) -> SizeEstimate:
    """Bytes on disk."""
    return common.safetensors_size(
        model, tensor_bytes(model, variant), tensors_per_linear=2 if variant.type == FP8 else 1
    )


blockers = common.kernel_blockers
"""A missing or too old GPU: without one, the GGUF types F16 and BF16 run the same weights."""
kernel = common.kernel_at


def steps(model: ModelSpec, variant: Variant) -> tuple[Step, ...]:
    """Convert to the type, then verify."""
    return common.steps(model, variant, size(model, variant).file_bytes)


def work(job: Job, progress: Callable[[float, float], None]) -> dict[str, Any]:
    """Carry out the ``quantize`` step: other floats in qplan's own environment, FP8 in llm-compressor's.

    Raises:
        QplanError: the input is unfit, or the quantizer refused.
    """
    if job.step.type == FP8:
        from planner.methods import llm_compressor_run

        return llm_compressor_run.work(job, progress)
    from planner.methods import none_run

    return none_run.work(job, progress)


def commands(model: ModelSpec, candidate: Candidate) -> dict[str, str]:
    """vLLM and transformers, on the weights as published; vLLM makes FP8 of them while it loads."""
    type_ = candidate.variant.type
    if type_ != FP8:
        published = type_ == variants(model)[0].type
        script = "nothing to do: the published weights are used" if published else scripts.recast(model, type_)
        return {"quantize": script, **serving.vllm(model, candidate)}
    serve = serving.vllm(model, candidate)["serve"]
    return {"quantize": "nothing to do: vLLM makes FP8 of the published weights as it loads them", "serve": serve}
