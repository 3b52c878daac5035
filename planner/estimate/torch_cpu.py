"""A checkpoint under transformers on a CPU: the kernel that multiplies its weights, its coefficients, its memory."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, lru_cache

from planner.core.candidate import KernelUse, Variant
from planner.core.data import read_document
from planner.core.estimates import FORMULA, DeviceMemory, Prediction
from planner.core.hardware import HardwareProfile
from planner.core.model import ModelSpec
from planner.methods import common
from planner.runtimes import kernels

TABLE = "torch_cpu.toml"
_FLOAT32 = "float32"
_KEPT_WEIGHTS = 100_000_000
"""Largest model of which all working memory was seen to stay (91 million weights, AWQ, 2026-11-26)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """What one kernel costs."""

    seconds_per_weight: float
    flops_per_core: float
    working_bytes_per_weight: float
    working_high_bytes_per_weight: float
    mapped_high_bytes_per_weight: float = 0.0
    """Pages of the file that may stay in memory beside a copy of the weights."""


@cache
def kernel_row(name: str) -> Kernel | None:
    """The coefficients of a kernel by its id in ``data/kernels.toml``; ``None`` where there are none."""
    row = read_document(TABLE)["kernel"].get(name)
    return None if row is None else Kernel(**row)


def common_coefficients() -> dict[str, float]:
    """Coefficients that hold for every kernel."""
    found: dict[str, float] = read_document(TABLE)["common"]
    return found


def source() -> str:
    """Where the coefficients come from."""
    return str(read_document(TABLE)["source"])


@lru_cache(maxsize=1024)
def kernel_here(variant: Variant, hardware: HardwareProfile) -> KernelUse | None:
    """The kernel that a variant gets on the CPU of ``hardware``; ``None``: none has an estimate."""
    found = kernels.validate(variant, (), hardware, gpus_used=False)
    return found if isinstance(found, KernelUse) and kernel_row(found.id) is not None else None


def width_factor(variant: Variant, hardware: HardwareProfile) -> float:
    """Bytes in memory over bytes in the file: 2 where 16-bit weights are computed in 32."""
    found = kernel_here(variant, hardware)
    widened = found is not None and dict(found.arguments).get("dtype") == _FLOAT32
    return 2.0 if widened and variant.method == "none" and variant.type != "f32" else 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Extra:
    """Memory beside weights, cache and activations: value and 80 % interval in bytes."""

    value: float
    low: float
    high: float


def extra_bytes(model: ModelSpec, variant: Variant, hardware: HardwareProfile) -> Extra:
    """What torch's libraries and the kernel's rearranging of weights take."""
    common_, found = common_coefficients(), kernel_here(variant, hardware)
    row = kernel_row(found.id) if found else None
    at_once, all_ = _linear_weights(model)
    if row is None:
        return Extra(
            value=common_["library_bytes"], low=common_["library_low_bytes"], high=common_["library_high_bytes"]
        )
    mapped = row.mapped_high_bytes_per_weight * all_
    return Extra(
        value=common_["library_bytes"] + row.working_bytes_per_weight * at_once,
        low=common_["library_low_bytes"],
        high=common_["library_high_bytes"] + row.working_high_bytes_per_weight * at_once + mapped,
    )


@lru_cache(maxsize=256)
def _linear_weights(model: ModelSpec) -> tuple[int, int]:
    """Weights of linear layers whose working memory is held at once, and all of them.

    The C library keeps freed blocks below 32 MiB (glibc's largest M_MMAP_THRESHOLD), so of a small model all of it
    adds up; larger blocks go back to the system, and what is left is that of a few matrices.
    """
    counts = [tensor.element_count for tensor in model.tensors if common.is_linear(tensor)]
    return min(sum(counts), max(_KEPT_WEIGHTS, 3 * max(counts, default=0))), sum(counts)


def peak_memory(host: DeviceMemory, process_bytes: int, extra: Extra) -> Prediction:
    """Peak resident set that a run adds to a process that has everything imported.

    Args:
        host: weights, cache and activations, with the process and ``extra.value`` as its overhead.
        process_bytes: the process's part of that overhead.
    """
    held = host.weights_bytes + host.kv_cache_bytes + host.compute_bytes
    total = host.total_bytes - process_bytes
    # pages of weights that no token touched, and a cache and activations that a short run does not fill
    low = 0.6 * host.weights_bytes + extra.low
    return Prediction(
        value=float(total),
        low=min(low, 0.9 * total),
        high=1.1 * held + extra.high,
        basis=FORMULA,
        source=source(),
        terms=(
            ("weights", float(host.weights_bytes), "B"),
            ("KV cache", float(host.kv_cache_bytes), "B"),
            ("activations", float(host.compute_bytes), "B"),
            ("libraries and working memory", extra.value, "B"),
        ),
    )
