"""What autograd keeps of a forward pass through a decoder with LoRA matrices, in bytes.

Counted with ``torch.autograd.graph.saved_tensors_hooks`` on Llama, Qwen 3 and Gemma 2 of small size (torch 2.13,
transformers 5.23, peft 0.21, bitsandbytes 0.50.2; ``tests/finetune_counts.py`` repeats it). Frozen weights need no
input of theirs to be kept; a LoRA matrix needs its own.
"""

from __future__ import annotations

import re
from functools import lru_cache

from planner.core.finetuning import NF4, FinetuneSettings
from planner.core.model import AttentionLayer, ModelSpec, Tensor
from planner.methods import common

_WIDTH_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
_SHARED = {"attn_q": "attn", "attn_k": "attn", "attn_v": "attn", "attn_qkv": "attn", "ffn_gate": "ffn", "ffn_up": "ffn"}
"""Layers that read the same tensor."""
_PART = re.compile(r"blk\.\d+\.(.+?)\.weight")
_NO_SDPA = ("gemma2",)
"""transformers has no fused attention that caps scores: every score is kept."""


def width_bytes(settings: FinetuneSettings) -> int:
    """Bytes of a value in the compute type."""
    return _WIDTH_BYTES[settings.compute_dtype]


def kept_bytes(model: ModelSpec, settings: FinetuneSettings) -> int:
    """All that is kept until the loss is there: every layer's tensors, or with checkpointing its input alone."""
    width, tokens = width_bytes(settings), settings.micro_batch * settings.sequence_length
    if settings.gradient_checkpointing:
        return tokens * width * model.n_embd * (model.n_layer + 1)
    layers = range(model.n_layer)
    per_token = sum(_layer_bytes(model, layer, settings.rank, width, settings.base) for layer in layers)
    return tokens * (per_token + 4 * model.n_embd + _scores(model, settings, model.n_layer))


def backward_bytes(model: ModelSpec, settings: FinetuneSettings) -> int:
    """What going back through the widest layer takes for a moment.

    The gradients of its feed-forward tensors and its largest matrix in the compute type; with checkpointing, all that
    its forward pass keeps as well.
    """
    width, tokens = width_bytes(settings), settings.micro_batch * settings.sequence_length
    linears = [t for t in model.tensors if common.is_linear(t)]
    largest = max((common.matrices(t)[0] * common.matrices(t)[1] for t in linears), default=0)
    moment = 3 * tokens * width * model.n_ff + width * largest
    if not settings.gradient_checkpointing:
        return moment
    layers = range(model.n_layer)
    again = max(_layer_bytes(model, layer, settings.rank, width, settings.base) for layer in layers)
    return moment + tokens * (again + _scores(model, settings, 1))


def _scores(model: ModelSpec, settings: FinetuneSettings, layers: int) -> int:
    """Per token, two tensors of scores per head where attention is not fused."""
    if model.architecture not in _NO_SDPA:
        return 0
    heads = max(layer.head_count for layer in model.attention)
    return layers * heads * settings.sequence_length * (4 + width_bytes(settings))


@lru_cache(maxsize=4096)
def _layer_bytes(model: ModelSpec, layer: int, rank: int, width: int, base: str) -> int:
    """Per token: inputs of LoRA matrices and what is between them, queries to values, norms, gate and up."""
    tensors = _by_layer(model)[layer]
    attention = model.attention[layer]
    linears = [(_part(t), t) for t in tensors if common.is_linear(t) and "_exps." not in t.name]
    shared = {_SHARED.get(part, part): t.shape[0] for part, t in linears}
    # peft casts the input of a 16-bit layer to 32 bits, so that autocast makes a copy for each layer
    own = width < 4 and base != NF4
    inputs = sum(t.shape[0] for _, t in linears) if own else sum(shared.values())
    heads = attention.head_count
    total = width * (inputs + rank * len(linears))
    total += width * (heads * attention.k_dim + attention.head_count_kv * (attention.k_dim + attention.v_dim))
    total += width * heads * attention.v_dim if own else 0
    total += 4 * heads + sum(_norm_bytes(t, attention) for t in tensors if "norm" in t.name)
    return total + width * _feed_forward(model, dict(linears), tensors)


def _norm_bytes(tensor: Tensor, attention: AttentionLayer) -> int:
    """A norm keeps its input in 32 bits; one of queries or keys, of all heads. A norm after a block keeps it too."""
    if tensor.name.endswith(".bias"):
        return 0
    heads = {"attn_q_norm": attention.head_count, "attn_k_norm": attention.head_count_kv}.get(_part(tensor), 0)
    return 4 * (max(tensor.shape[0], heads * attention.k_dim) + 1)


def _feed_forward(model: ModelSpec, linears: dict[str, Tensor], tensors: tuple[Tensor, ...]) -> int:
    """Values per token: gate, its activation and up; without a gate, up. Of experts, those that a token takes."""
    total = 0
    if "ffn_down" in linears:
        wide = linears["ffn_down"].shape[0]
        gated = "ffn_gate" in linears or ("ffn_up" in linears and linears["ffn_up"].shape[1] == 2 * wide)
        total += (3 if gated else 1) * wide
    if model.mixture is not None and any("_exps." in t.name for t in tensors):
        total += model.mixture.expert_used_count * (model.n_embd + 4 * model.mixture.expert_feed_forward)
    return total


@lru_cache(maxsize=64)
def _by_layer(model: ModelSpec) -> tuple[tuple[Tensor, ...], ...]:
    found: list[list[Tensor]] = [[] for _ in range(model.n_layer)]
    for tensor in model.tensors:
        if tensor.layer is not None and tensor.layer < model.n_layer:
            found[tensor.layer].append(tensor)
    return tuple(map(tuple, found))


def _part(tensor: Tensor) -> str:
    match = _PART.fullmatch(tensor.name)
    return match[1] if match else tensor.name
