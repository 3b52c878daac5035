"""bitsandbytes: NF4 and FP4 with double quantization (Dettmers et al. 2023), INT8 (LLM.int8()), at load time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Any

from planner.core.candidate import Candidate, Variant
from planner.core.estimates import SizeEstimate
from planner.core.job import Job
from planner.core.model import ModelSpec, Tensor
from planner.core.plan import Step
from planner.methods import common, serving

TYPES = ("nf4", "fp4", "int8")

_BLOCK = 64
_NESTED_BLOCK = 256
_STATE_BYTES = 16 * 4 + 256 * 4 + 171
"""Per 4-bit tensor: the 16-value code, the 256-value code of the nested absmax, and the quant state as JSON text:
170-172 bytes with bitsandbytes 0.50.2 (tests/data/artifact_sizes.csv)."""
_PLAIN_STATE_BYTES = 16 * 4 + 84
"""The same without double quantization: the code, and a shorter quant state."""
_INT8_FORMAT_BYTES = 1
"""``weight_format`` of an INT8 layer."""
_FUSED_EXPERTS = "_exps."
"""transformers 5 holds a layer's experts in one three-dimensional parameter, no ``nn.Linear``, which is all that
bitsandbytes replaces: experts and router stay 16-bit (Mixtral with transformers 5.23 and bitsandbytes 0.50.2)."""


def variants(model: ModelSpec) -> tuple[Variant, ...]:
    """NF4 first: FP4 is never better in the measurements we have."""
    return tuple(variant(type_) for type_ in ("nf4", "int8"))


def variant(type_: str, group_size: int | None = None) -> Variant:
    """The variant of a type; the block size is fixed by bitsandbytes, and the hardware decides the compute type.

    Raises:
        UsageError: bitsandbytes has no such type.
    """
    if type_ not in TYPES:
        raise common.unknown_type("bitsandbytes", type_, TYPES)
    made = Variant(method="bitsandbytes", format="bitsandbytes", runtime="transformers", type=type_)
    return made if type_ == "int8" else replace(made, double_quantization=True)


@lru_cache(maxsize=512)
def tensor_bytes(model: ModelSpec, variant: Variant) -> tuple[int, ...]:
    """4-bit: ``n/2`` packed, one byte of absmax per 64 weights, one fp32 per 256 of those (double quantization).
    INT8: ``n`` and one fp32 scale per output row. Embeddings, head, norms and fused experts stay 16-bit.

    Source: Dettmers et al. 2023, section 3, and https://github.com/bitsandbytes-foundation/bitsandbytes.
    """
    return tuple(_bytes(tensor, variant.type, variant.double_quantization) for tensor in model.tensors)


def _bytes(tensor: Tensor, type_: str, nested_scales: bool) -> int:
    if not common.is_linear(tensor) or _FUSED_EXPERTS in tensor.name:
        return common.kept_bytes(tensor)
    rows_in, columns_out, count = common.matrices(tensor)
    weights = rows_in * columns_out
    if type_ == "int8":
        return count * (weights + 4 * columns_out + _INT8_FORMAT_BYTES)
    blocks = -(-weights // _BLOCK)
    if not nested_scales:
        return count * (weights // 2 + 4 * blocks + _PLAIN_STATE_BYTES)
    nested = -(-blocks // _NESTED_BLOCK)
    return count * (weights // 2 + blocks + 4 * nested + _STATE_BYTES)


@lru_cache(maxsize=512)
def size(model: ModelSpec, variant: Variant) -> SizeEstimate:
    """Bytes on disk: weight, absmax, nested absmax, two codes and the state per 4-bit layer; weight, scale, format."""
    per_linear = 3 if variant.type == "int8" else 6 if variant.double_quantization else 4
    return common.safetensors_size(model, tensor_bytes(model, variant), tensors_per_linear=per_linear)


blockers = common.kernel_blockers
"""A missing or too old GPU."""
kernel = common.kernel_at


def steps(model: ModelSpec, variant: Variant) -> tuple[Step, ...]:
    """Load quantized, save, then verify."""
    return common.steps(model, variant, size(model, variant).file_bytes)


def work(job: Job, progress: Callable[[float, float], None]) -> dict[str, Any]:
    """Carry out the ``quantize`` step, in the environment of bitsandbytes.

    Raises:
        QplanError: the input is unfit, or bitsandbytes refused.
    """
    from planner.methods import bitsandbytes_run

    return bitsandbytes_run.work(job, progress)


def commands(model: ModelSpec, candidate: Candidate) -> dict[str, str]:
    """A transformers snippet that loads the model quantized."""
    return serving.bitsandbytes(model, candidate)
