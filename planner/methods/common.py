"""What the GPU methods share: which tensors are linear layers, and how a safetensors artifact adds up."""

from __future__ import annotations

import re
from functools import cache, lru_cache

from planner.core.candidate import KernelUse, Placement, Rejection, Variant
from planner.core.errors import UsageError
from planner.core.estimates import SizeEstimate
from planner.core.hardware import HardwareProfile
from planner.core.model import ModelSpec, Tensor
from planner.core.plan import Step
from planner.methods import quantizers, serving
from planner.runtimes import kernels
from planner.runtimes.kernels import Matrix

_NOT_IN_CHECKPOINT = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
_KEPT = ("norm", "ffn_gate_inp", "ssm_", "attn_sinks", "exp_probs")
_HEADER_BYTES_PER_TENSOR = 116
"""One entry of a safetensors header: name, dtype, shape, two offsets, as JSON.
Mean over checkpoints written by transformers 5.23 (names of 40-70 characters)."""


def is_linear(tensor: Tensor) -> bool:
    """Whether GPU quantizers replace this tensor: a weight matrix inside a block that is no norm and no router."""
    return tensor.layer is not None and len(tensor.shape) >= 2 and _may_be_linear(tensor.name)


@cache
def _may_be_linear(name: str) -> bool:
    return name.endswith(".weight") and not any(part in name for part in _KEPT)


def matrices(tensor: Tensor) -> tuple[int, int, int]:
    """``(rows_in, columns_out, count)``: a stacked expert tensor holds ``count`` matrices."""
    count = tensor.shape[2] if len(tensor.shape) > 2 else 1
    return tensor.shape[0], tensor.shape[1], count


def kept_bytes(tensor: Tensor, width_bytes: int = 2) -> int:
    """Bytes of a tensor that stays unquantized; frequencies that only GGUF files carry count nothing."""
    return 0 if tensor.name in _NOT_IN_CHECKPOINT else tensor.element_count * width_bytes


def groups(rows_in: int, group_size: int | None) -> int:
    """Scale groups along the input dimension; -1 (or unknown) is one group per output."""
    return 1 if group_size is None or group_size <= 0 else -(-rows_in // group_size)


_FUSED = {
    "attn_q": "attn_qkv",
    "attn_k": "attn_qkv",
    "attn_v": "attn_qkv",
    "ffn_gate": "ffn_gate_up",
    "ffn_up": "ffn_gate_up",
}
"""Projections of one input that are multiplied as one matrix (vLLM's QKVParallelLinear, MergedColumnParallelLinear)."""
_OUTPUT_PROJECTIONS = ("attn_output", "ffn_down")
"""Tensor parallelism splits the inputs of these and the outputs of all others (Shoeybi et al. 2019, Megatron-LM)."""
_PARTS = re.compile(r"blk\.\d+\.(.+?)(_exps|_shexp)?\.weight")


@lru_cache(maxsize=256)
def products(model: ModelSpec, gpus: int = 1) -> tuple[Matrix, ...]:
    """The quantized matrix products of ``model``, one of each shape, fused as runtimes fuse them.

    Args:
        gpus: devices that each is split over; where they outnumber the KV heads, each holds a whole copy of one.
    """
    copies = max(1, gpus // (model.n_head_kv or gpus))
    found: dict[tuple[int | None, str], Matrix] = {}
    for tensor in filter(is_linear, model.tensors):
        match = _PARTS.fullmatch(tensor.name)
        part, suffix = (match[1], match[2] or "") if match else (tensor.name, "")
        name = _FUSED.get(part, part) + suffix
        rows_in, columns_out, _ = matrices(tensor)
        outputs = columns_out * (copies if part in {"attn_k", "attn_v"} else 1)
        before = found.get((tensor.layer, name))
        split = "inputs" if part in _OUTPUT_PROJECTIONS else "outputs"
        found[tensor.layer, name] = Matrix(name, rows_in, outputs + (before.outputs if before else 0), split)
    return tuple({(m.inputs, m.outputs, m.split): m for m in reversed(found.values())}.values())[::-1]


def kernel(
    model: ModelSpec, variant: Variant, hardware: HardwareProfile, tensor_parallel: int = 1
) -> KernelUse | Rejection:
    """The kernel that the variant's matrix products get on this machine, or the row that forbids it."""
    refusal = kernels.split_refusal(variant, model.n_head, tensor_parallel)
    products_ = products(model, tensor_parallel)
    return refusal or kernels.validate(variant, products_, hardware, tensor_parallel=tensor_parallel)


def kernel_at(
    model: ModelSpec, variant: Variant, placement: Placement, hardware: HardwareProfile
) -> KernelUse | Rejection:
    """The kernel that its runtime takes at the placement's tensor parallelism, or the row that forbids it."""
    return kernel(model, variant, hardware, placement.tensor_parallel)


def kernel_blockers(model: ModelSpec, variant: Variant, hardware: HardwareProfile) -> tuple[Rejection, ...]:
    """The row of the kernel table that forbids the variant on this machine, empty if none does."""
    found = kernel(model, variant, hardware)
    return (found,) if isinstance(found, Rejection) else ()


def safetensors_size(model: ModelSpec, tensor_bytes: tuple[int, ...], tensors_per_linear: int) -> SizeEstimate:
    """Size of an artifact in safetensors files from its tensors' bytes and its header's length."""
    total = sum(tensor_bytes)
    entries = 0
    for tensor in model.tensors:
        count = matrices(tensor)[2] if is_linear(tensor) else 1
        entries += count * (tensors_per_linear if is_linear(tensor) else 1)
    metadata = 8 + entries * _HEADER_BYTES_PER_TENSOR
    return SizeEstimate(
        tensor_bytes=total,
        metadata_bytes=metadata,
        file_bytes=total + metadata,
        bits_per_weight=8 * total / _checkpoint_parameters(model),
    )


@lru_cache(maxsize=512)
def _checkpoint_parameters(model: ModelSpec) -> int:
    return sum(t.element_count for t in model.tensors if t.name not in _NOT_IN_CHECKPOINT)


def steps(model: ModelSpec, variant: Variant, made_bytes: int) -> tuple[Step, ...]:
    """Make the artifact of the checkpoint, then verify; without the program that makes it, verify only what is there.

    What no program makes is still estimated: its step has no output and no settings, and no plan is made of it.
    """
    way = quantizers.way_of(variant)
    quantize = Step(
        name="quantize",
        kind="quantize",
        method=variant.method,
        type=variant.type,
        group_size=variant.group_size,
        output=serving.artifact_name(model, variant) if way else None,
        settings=quantizers.settings(variant) if way else None,
        predicted_bytes=made_bytes,
    )
    return (quantize, Step(name="verify", kind="verify", method=variant.method, source="quantize"))


def unknown_type(method: str, asked: str, known: tuple[str, ...]) -> UsageError:
    """The error for a type that a method does not have."""
    return UsageError(f"{method} has no type {asked!r}", hint=f"one of {', '.join(known)}", code="unknown-type")


def unknown_group_size(method: str, asked: int, known: tuple[int, ...]) -> UsageError:
    """The error for a group size that no kernel of a method has."""
    sizes = ", ".join(map(str, known))
    return UsageError(f"{method} has no group size {asked}", hint=f"one of {sizes} (-1: a whole row)", code="bad-case")
