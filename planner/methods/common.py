"""What the GPU methods share: which tensors are linear layers, and how a safetensors artifact adds up."""

from __future__ import annotations

from functools import cache, lru_cache

from planner.core.candidate import Rejection, Variant
from planner.core.errors import UsageError
from planner.core.estimates import SizeEstimate
from planner.core.hardware import Gpu, HardwareProfile
from planner.core.model import ModelSpec, Tensor
from planner.methods import constraints

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


def group_blockers(model: ModelSpec, variant: Variant) -> tuple[Rejection, ...]:
    """The first linear layer whose input dimension is no multiple of the group size."""
    size = variant.group_size
    if size is None or size <= 0:
        return ()
    odd = next((t for t in model.tensors if is_linear(t) and t.shape[0] % size), None)
    if odd is None:
        return ()
    reason = f"{odd.name} has {odd.shape[0]} inputs, no multiple of group size {size}"
    return (_rejected(variant, reason, rule="group-divides-input"),)


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


def capability(text: str) -> tuple[int, int]:
    """A compute capability as numbers that compare: ``8.9`` → (8, 9)."""
    major, _, minor = text.partition(".")
    return int(major), int(minor or 0)


def gpu_blockers(variant: Variant, hardware: HardwareProfile) -> tuple[Rejection, ...]:
    """Rows of the constraint table that this machine breaks, and the lack of any GPU."""
    if not hardware.gpus:
        return (_rejected(variant, "its kernels run on a GPU and this machine has none", rule="no-gpu"),)
    broken = []
    for row in constraints(variant.method):
        if row.types and variant.type not in row.types:
            continue
        bad = next((gpu for gpu in hardware.gpus if not _satisfies(gpu, row.vendor, row.min_compute_capability)), None)
        if bad is not None:
            has = f"compute capability {bad.compute_capability}" if bad.compute_capability else f"vendor {bad.vendor}"
            broken.append(_rejected(variant, f"{row.text}; {bad.name} has {has}", rule=row.id))
    return tuple(broken)


def _satisfies(gpu: Gpu, vendor: str, minimum: str) -> bool:
    if gpu.vendor != vendor:
        return False
    return gpu.compute_capability is None or capability(gpu.compute_capability) >= capability(minimum)


def _rejected(variant: Variant, reason: str, rule: str) -> Rejection:
    return Rejection(method=variant.method, type=variant.type, reason=reason, rule=rule)


def unknown_type(method: str, asked: str, known: tuple[str, ...]) -> UsageError:
    """The error for a type that a method does not have."""
    return UsageError(f"{method} has no type {asked!r}", hint=f"one of {', '.join(known)}", code="unknown-type")


def unknown_group_size(method: str, asked: int, known: tuple[int, ...]) -> UsageError:
    """The error for a group size that no kernel of a method has."""
    sizes = ", ".join(map(str, known))
    return UsageError(f"{method} has no group size {asked}", hint=f"one of {sizes} (-1: a whole row)", code="bad-case")
