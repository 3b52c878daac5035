"""Memory under vLLM and transformers: weights, KV blocks, activations, and CUDA's own part."""

from __future__ import annotations

from functools import lru_cache

from planner.core.candidate import Placement, Variant
from planner.core.estimates import DeviceMemory, MemoryEstimate, Prediction
from planner.core.hardware import Gpu, HardwareProfile
from planner.core.model import ModelSpec
from planner.core.units import MIB, pad
from planner.estimate import torch_cpu, weights

BLOCK_TOKENS = 16
"""Tokens of one KV block, https://docs.vllm.ai/en/latest/configuration/engine_args.html (``--block-size``)."""
CUDA_CONTEXT_BYTES = 450 * MIB
"""https://github.com/ggml-org/llama.cpp/pull/15860 (RTX 4090)."""
TORCH_BYTES = 250 * MIB
"""PyTorch's cuBLAS and cuDNN handles and its allocator's slack. Fitted: with it Falcon 7B and Vicuna 7B as AWQ are
within 3 % of the VRAM in https://github.com/casper-hansen/AutoAWQ (README, RTX 3090 and 4090, 2024-01)."""
HOST_BYTES = 243 * MIB
"""Resident set of Python with torch 2.13 (CPU) and transformers 5.23 imported, Linux x86-64 (2026-11-23); a CUDA
build of torch takes more."""
_PREFILL_TOKENS = 2048
"""vLLM's ``max_num_batched_tokens``: one chunk of the prompt,
https://docs.vllm.ai/en/latest/configuration/optimization.html#chunked-prefill."""


def memory(
    model: ModelSpec, variant: Variant, placement: Placement, hardware: HardwareProfile, gpus: tuple[Gpu, ...]
) -> MemoryEstimate:
    """Memory per GPU; ``tensor_parallel`` divides weights and KV cache. Without a GPU, everything is on the host."""
    total = _weights(model, variant)
    cache, work = cache_bytes(model, placement), activation_bytes(model, placement)
    if not gpus:
        extra = torch_cpu.extra_bytes(model, variant, hardware).value if variant.runtime == "transformers" else 0.0
        host = DeviceMemory(
            name="host",
            weights_bytes=round(total * torch_cpu.width_factor(variant, hardware)),
            kv_cache_bytes=cache,
            compute_bytes=work,
            overhead_bytes=HOST_BYTES + round(extra),
            capacity_bytes=hardware.memory.usable_bytes(),
        )
        return MemoryEstimate(devices=(), host=host)
    ways = max(1, min(placement.tensor_parallel, len(gpus)))
    devices = tuple(
        DeviceMemory(
            name=gpu.name,
            weights_bytes=-(-total // ways),
            kv_cache_bytes=-(-cache // min(ways, max(model.n_head_kv, 1))),
            compute_bytes=work,
            overhead_bytes=CUDA_CONTEXT_BYTES + TORCH_BYTES,
            capacity_bytes=gpu.usable_bytes(),
        )
        for gpu in gpus[:ways]
    )
    host = DeviceMemory(name="host", overhead_bytes=HOST_BYTES, capacity_bytes=hardware.memory.usable_bytes())
    return MemoryEstimate(devices=devices, host=host)


def cpu_peak_memory_bytes(
    model: ModelSpec, variant: Variant, placement: Placement, hardware: HardwareProfile
) -> Prediction:
    """Peak resident set that a run on the CPU adds to a process which has torch and the quantizer imported."""
    host = memory(model, variant, placement, hardware, ()).host
    return torch_cpu.peak_memory(host, HOST_BYTES, torch_cpu.extra_bytes(model, variant, hardware))


@lru_cache(maxsize=512)
def _weights(model: ModelSpec, variant: Variant) -> int:
    return sum(weights.tensor_bytes(model, variant))


def cache_bytes(model: ModelSpec, placement: Placement) -> int:
    """KV blocks of all sequences in F16: 2 · heads · dim · 2 bytes per layer and token, tokens padded to a block."""
    tokens = pad(placement.context, BLOCK_TOKENS) * placement.sequences
    per_token = 0
    for layer in model.attention:
        if layer.kind in ("full", "sliding") and layer.owns_kv_cache:
            per_token += 2 * layer.head_count_kv * (layer.k_dim + layer.v_dim)
    state = sum(layer.state_bytes for layer in model.attention) * placement.sequences
    return per_token * tokens + state


def activation_bytes(model: ModelSpec, placement: Placement) -> int:
    """Peak of the activations of one chunk of the prompt, in 16 bits, and the logits in 32.

    Gate, up and their product beside two hidden states per token, or the logits of every sequence, whichever is more.
    """
    tokens = min(max(placement.context, 1), _PREFILL_TOKENS)
    wide = model.n_ff
    if model.mixture is not None:
        wide = max(wide, model.mixture.expert_feed_forward * model.mixture.expert_used_count)
    inner = 2 * tokens * (3 * wide + 2 * model.n_embd)
    return max(inner, 6 * model.n_vocab * placement.sequences)
