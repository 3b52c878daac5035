"""AWQ: activation-aware 4-bit weights (Lin et al. 2023), in the GEMM layout that vLLM and transformers read."""

from __future__ import annotations

from functools import lru_cache

from planner.core.candidate import Candidate, KernelUse, Placement, Rejection, Variant
from planner.core.estimates import SizeEstimate
from planner.core.hardware import HardwareProfile
from planner.core.model import ModelSpec, Tensor
from planner.core.plan import Step
from planner.methods import common, serving

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
    return Variant(method="awq", format="awq-gemm", runtime="vllm", type=type_, group_size=group_size)


@lru_cache(maxsize=512)
def tensor_bytes(model: ModelSpec, variant: Variant) -> tuple[int, ...]:
    """Per linear layer of ``K`` inputs and ``N`` outputs in ``G`` groups: packed weights ``K·N/2``,
    packed zeros ``G·N/2``, fp16 scales ``2·G·N`` bytes (the packed parts at 4 bits); the rest stays 16-bit.

    Source: layout of AutoAWQ's WQLinear_GEMM, https://github.com/casper-hansen/AutoAWQ.
    """
    bits = int(variant.type.removesuffix("bit"))
    return tuple(_bytes(tensor, variant.group_size, bits) for tensor in model.tensors)


def _bytes(tensor: Tensor, group_size: int | None, bits: int) -> int:
    if not common.is_linear(tensor):
        return common.kept_bytes(tensor)
    rows_in, columns_out, count = common.matrices(tensor)
    groups = common.groups(rows_in, group_size)
    return count * (bits * (rows_in * columns_out + groups * columns_out) // 8 + 2 * groups * columns_out)


@lru_cache(maxsize=512)
def size(model: ModelSpec, variant: Variant) -> SizeEstimate:
    """Bytes on disk: three tensors per linear layer."""
    return common.safetensors_size(model, tensor_bytes(model, variant), tensors_per_linear=3)


def blockers(model: ModelSpec, variant: Variant, hardware: HardwareProfile) -> tuple[Rejection, ...]:
    """No kernel of vLLM for it here: the GPU, the group size, or a matrix that no group divides."""
    return common.kernel_blockers(model, variant, hardware)


def kernel(
    model: ModelSpec, variant: Variant, placement: Placement, hardware: HardwareProfile
) -> KernelUse | Rejection:
    """The kernel that its runtime takes at the placement's tensor parallelism, or the row that forbids it."""
    return common.kernel(model, variant, hardware, placement.tensor_parallel)


def steps(model: ModelSpec, variant: Variant) -> tuple[Step, ...]:
    """Quantize with calibration text, then verify."""
    return (Step(name="quantize", kind="quantize", method="awq", type=variant.type, group_size=variant.group_size),)


def commands(model: ModelSpec, candidate: Candidate) -> dict[str, str]:
    """GPTQModel's AWQ to quantize (AutoAWQ is deprecated upstream), vLLM and transformers to run."""
    quantize = serving.gptqmodel_script(model, candidate.variant, 'quant_method="awq", format="gemm"')
    return {"quantize": quantize, **serving.vllm(model, candidate)}
