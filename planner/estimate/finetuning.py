"""Memory of training LoRA matrices beside frozen weights, term by term, and the number of weights trained.

What autograd keeps was counted with torch's own hook on saved tensors (torch 2.13, transformers 5.23, peft 0.21); the
sum is checked against peaks in ``tests/data/finetune_memory.csv``.
"""

from __future__ import annotations

from functools import lru_cache

from planner.core.estimates import FORMULA, Prediction
from planner.core.finetuning import NF4, FinetuneEstimate, FinetuneSettings, MemoryTerm
from planner.core.hardware import HardwareProfile
from planner.core.model import ModelSpec, Tensor
from planner.core.units import MIB
from planner.estimate import finetuning_activations as activations
from planner.estimate.finetuning_time import seconds_per_step
from planner.estimate.served_memory import CUDA_CONTEXT_BYTES, TORCH_BYTES
from planner.methods import bitsandbytes, common

FIRST_USE_BYTES = 34 * MIB
"""Resident memory that the first step takes whatever its size: libraries and kernels loaded late. Measured: 28 to
34 MiB of a step of 32 tokens of the demo model (torch 2.13 CPU, Linux x86-64, 2026-11-26)."""
PROCESS_BYTES = 415 * MIB
"""Resident set of Python with torch (CPU), transformers, its Trainer, peft and bitsandbytes: a step on the demo
model peaked at 597 MiB, 183 MiB of them for loading and training (as above)."""
SMALLEST_8BIT = 4096
"""bitsandbytes keeps 32-bit states of smaller matrices (``min_8bit_size``)."""
_8BIT_STATE_BYTES = 2 * (1 + 4 / 256)
"""Two states of a byte, and a 32-bit scale for 256 of each: Dettmers et al. 2021, https://arxiv.org/abs/2110.02861."""
LOGITS_BYTES = 12
"""Per token and vocabulary entry when backward starts: log-probabilities, their gradient and that of the logits, all
in 32 bits (``ForCausalLMLoss`` of transformers calls ``logits.float()``)."""
LOW, HIGH = 0.93, 1.08
"""Of the sum: of 13 peaks in ``tests/data/finetune_memory.csv`` eleven are 0.99 to 1.03 of it; checkpointing with many
short tensors took 1.10, Gemma 2, whose scores are not fused, 1.09. Others may differ more, so the range is wider."""
SPREAD_ON_GPU = 1.2
"""The caching allocator's fragments and kernels that want more working memory; no GPU was measured for this."""

_QLORA = "Dettmers et al. 2023, section 3, https://arxiv.org/abs/2305.14314"
_PEFT = "LoRA matrices in 32 bits (peft's autocast_adapter_dtype), Hu et al. 2021, https://arxiv.org/abs/2106.09685"
_COUNTED = "what autograd keeps, counted with torch.autograd.graph.saved_tensors_hooks (torch 2.13, transformers 5.23)"
_GRADIENTS = "one per weight, in its type; kept while the next micro-batch runs, where a step has several"
_SOURCE = "sum of the terms; peaks of small models on a CPU lie within 80 % of it (tests/data/finetune_memory.csv)"


def trained(model: ModelSpec) -> tuple[Tensor, ...]:
    """The linear layers that ``all-linear`` adapts: those inside the blocks but experts, which are no ``nn.Linear``."""
    return tuple(t for t in model.tensors if common.is_linear(t) and "_exps." not in t.name)


def trainable_parameter_count(model: ModelSpec, rank: int) -> int:
    """LoRA weights: ``rank * (inputs + outputs)`` of each adapted layer."""
    return sum(rank * (t.shape[0] + t.shape[1]) for t in trained(model))


def adapter_bytes(model: ModelSpec, rank: int) -> int:
    """Tensor bytes of the adapter that peft saves: 32-bit floats."""
    return 4 * trainable_parameter_count(model, rank)


@lru_cache(maxsize=256)
def weights_bytes(model: ModelSpec, base: str, width: int) -> int:
    """The frozen weights: linear layers in NF4 or as they are, everything else in the compute type."""
    plain = sum(common.kept_bytes(t, width) for t in model.tensors)
    if base != NF4:
        return plain
    quantized = bitsandbytes.tensor_bytes(model, bitsandbytes.variant("nf4"))
    total = 0
    for tensor, size in zip(model.tensors, quantized, strict=True):
        kept = common.kept_bytes(tensor, width)
        total += size if size < common.kept_bytes(tensor) else kept
    return total


def optimizer_bytes(model: ModelSpec, rank: int, optimizer: str) -> int:
    """Two states of Adam per trained weight, of 32 bits or of 8 with scales."""
    if "8bit" not in optimizer:
        return 8 * trainable_parameter_count(model, rank)
    total = 0.0
    for tensor in trained(model):
        for side in tensor.shape[:2]:
            count = rank * side
            total += count * (_8BIT_STATE_BYTES if count >= SMALLEST_8BIT else 8)
    return round(total)


def terms(model: ModelSpec, settings: FinetuneSettings) -> tuple[MemoryTerm, ...]:
    """Every part of the peak. Of the loss and of one layer's backward pass, only the larger is there at a time."""
    width = activations.width_bytes(settings)
    count = trainable_parameter_count(model, settings.rank)
    tokens = settings.micro_batch * settings.sequence_length
    kept, one_layer = activations.kept_bytes(model, settings), activations.backward_bytes(model, settings)
    logits = LOGITS_BYTES * tokens * model.n_vocab
    weights = weights_bytes(model, settings.base, width)
    found = [
        MemoryTerm(name=f"weights, {settings.base}", bytes=weights, source=_QLORA if settings.base == NF4 else "dtype"),
        MemoryTerm(name="LoRA matrices", bytes=4 * count, source=_PEFT),
        MemoryTerm(name="their gradients", bytes=4 * count * (settings.accumulation > 1), source=_GRADIENTS),
        MemoryTerm(
            name=f"optimizer, {settings.optimizer}",
            bytes=optimizer_bytes(model, settings.rank, settings.optimizer),
            source="two states of Adam; of 8 bits: Dettmers et al. 2021, https://arxiv.org/abs/2110.02861",
        ),
        MemoryTerm(name=f"activations, {_kept_how(settings)}", bytes=kept, source=_COUNTED),
    ]
    if width < 4:
        found.append(MemoryTerm(name="LoRA matrices in 16 bits", bytes=width * count, source="autocast's copies"))
    if logits >= one_layer:
        found.append(MemoryTerm(name="logits and loss, 32 bits", bytes=logits, source="transformers, ForCausalLMLoss"))
    else:
        found.append(MemoryTerm(name="backward through one layer", bytes=one_layer, source=_COUNTED))
    if settings.device == "cpu":
        found.append(MemoryTerm(name="libraries at first use", bytes=FIRST_USE_BYTES, source="measured, 2026-11-26"))
    return tuple(found)


def _kept_how(settings: FinetuneSettings) -> str:
    return "checkpointed" if settings.gradient_checkpointing else "all kept"


def peak_memory(found: tuple[MemoryTerm, ...], settings: FinetuneSettings) -> Prediction:
    """The sum of the terms with its range; a paged optimizer may leave the GPU."""
    value = float(sum(term.bytes for term in found))
    paged = sum(term.bytes for term in found if term.name.startswith("optimizer, paged"))
    on_gpu = settings.device == "cuda"
    return Prediction(
        value=value,
        low=(LOW / SPREAD_ON_GPU if on_gpu else LOW) * (value - paged),
        high=(HIGH * SPREAD_ON_GPU if on_gpu else HIGH) * value,
        basis=FORMULA,
        source=_SOURCE,
        terms=tuple((term.name, float(term.bytes), "B") for term in found),
    )


def estimate(model: ModelSpec, settings: FinetuneSettings, hardware: HardwareProfile) -> FinetuneEstimate:
    """What ``settings`` take on the first GPU of ``hardware``, or on its processor."""
    found = terms(model, settings)
    gpu = hardware.gpus[0] if settings.device == "cuda" and hardware.gpus else None
    seconds = seconds_per_step(model, settings, gpu)
    return FinetuneEstimate(
        device=gpu.name if gpu else "host",
        terms=found,
        peak_memory=peak_memory(found, settings),
        overhead_bytes=CUDA_CONTEXT_BYTES + TORCH_BYTES if settings.device == "cuda" else PROCESS_BYTES,
        capacity_bytes=gpu.usable_bytes() if gpu else hardware.memory.usable_bytes(),
        trainable_parameter_count=trainable_parameter_count(model, settings.rank),
        adapter_bytes=adapter_bytes(model, settings.rank),
        seconds_per_step=seconds,
        notes=_notes(model, settings, seconds is None),
    )


def _notes(model: ModelSpec, settings: FinetuneSettings, no_time: bool) -> tuple[str, ...]:
    notes = []
    if no_time:
        notes.append("time per step is not known: no rate of training is known for this device")
    if model.mixture is not None:
        notes.append("experts are neither adapted nor quantized: transformers holds them in no linear layer")
    if model.mla or any(layer.kind in ("recurrent", "none") for layer in model.attention):
        notes.append("layers that are not plain attention are counted roughly")
    if settings.compute_dtype == "float16":
        notes.append("float16 needs loss scaling, which the script does, and may still lose small gradients")
    return tuple(notes)
