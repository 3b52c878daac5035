"""What one token and one prompt make a machine do: bytes to read, weights to multiply, layers to launch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from planner.core.candidate import Placement, Variant
from planner.core.model import ModelSpec, shape_twin
from planner.estimate import weights
from planner.estimate.weights import bytes_read_per_token
from planner.formats.ggml import type_traits
from planner.methods import get

_CACHE = 4096
LAYER_CUBE = 196_608
"""Parameters of a Llama-shaped model with n layers are about 12 * (128 * n)**2 * n: its hidden size is 128 per layer
(Llama 7B: 32 layers, 4096 wide; 70B: 80 layers, 8192 wide)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """The load of one sequence, split between GPU and host."""

    gpu_bytes: float
    """Bytes of weights read per token from the GPUs' memory."""
    host_bytes: float
    params: float
    """Weights multiplied per token."""
    layers: int
    gpu_layers: int
    kv_bytes: float
    """Bytes of the KV cache read per token at the depth, all layers."""
    prompt: int
    passes: int
    """Micro-batches of the prompt."""
    streamed_bytes: float
    """Bytes of weights that one micro-batch touches: all experts it routes to."""
    host_streamed_bytes: float = 0.0
    """The part of these that lies on the host."""
    crossings: int = 0
    """Times that a token is handed from a GPU to the CPU and back: once for layers on the host, and once for each
    layer on a GPU whose experts are on the host."""
    attention_operations: float
    """Operations of attention over the prompt, all layers, a multiply-add counted as two."""
    row_elements: float = 0.0
    """Values of the hidden state that one token passes through, all layers."""
    attention_scores: float = 0.0
    """Products of a query with a key over the prompt, all heads and layers; without flash attention they go through
    memory."""
    moe: bool
    hybrid: bool
    gemma: bool
    output_params: float = 0.0
    """The part of ``params`` in the output matrix: a prompt uses it for its last token only."""
    expert_params: float = 0.0
    """The part of ``params`` in routed experts."""
    query_group: float = 1.0
    """Query heads that share one head of the cache."""
    flash: bool = True
    """Flash attention is on."""
    expert_rows: float = 0.0
    """Tokens of one micro-batch that each expert gets if they spread evenly; 0 without experts."""

    @property
    def weight_bytes(self) -> float:
        """All bytes of weights read per token."""
        return self.gpu_bytes + self.host_bytes

    @property
    def gpu_share(self) -> float:
        """Share of the weights that the GPUs read."""
        return self.gpu_bytes / self.weight_bytes if self.weight_bytes else 0.0


@dataclass(frozen=True, slots=True)
class _Shape:
    """What of a model's shape the load needs, counted once."""

    params: float
    output_params: float
    expert_params: float
    expert_share: float
    """Used over all experts; 0 without."""
    hybrid: bool
    gemma: bool
    query_group: float


@lru_cache(_CACHE)
def _shape(model: ModelSpec) -> _Shape:
    experts = sum(t.element_count * model.routed_fraction(t) for t in model.tensors if "_exps" in t.name)
    mixture = model.mixture
    return _Shape(
        params=float(model.active_parameter_count),
        output_params=float(model.n_embd * model.n_vocab),
        expert_params=float(experts) if mixture else 0.0,
        expert_share=mixture.expert_used_count / mixture.expert_count if mixture else 0.0,
        hybrid=any(layer.kind == "recurrent" for layer in model.attention),
        gemma=model.architecture.startswith("gemma"),
        query_group=_query_group(model),
    )


def _query_group(model: ModelSpec) -> float:
    layers = [layer for layer in model.attention if layer.kind in ("full", "sliding") and layer.head_count_kv]
    return sum(layer.head_count / layer.head_count_kv for layer in layers) / len(layers) if layers else 1.0


@lru_cache(_CACHE)
def _kv_bytes(model: ModelSpec, depth: int, kv_type: str) -> float:
    traits = type_traits(kv_type.upper())
    values = 0
    for layer in model.attention:
        if layer.kind in ("full", "sliding"):
            seen = min(depth, layer.window) if layer.window and layer.kind == "sliding" else depth
            values += layer.head_count_kv * (layer.k_dim + layer.v_dim) * seen
    return values * traits.block_bytes / traits.block_weights


@lru_cache(_CACHE)
def attention_operations(model: ModelSpec, prompt: int, depth: float = 0.0) -> float:
    """2 operations x (queries x keys + weights x values) x the mean number of tokens seen, ``depth`` of them cached."""
    total, mean = 0.0, depth + prompt / 2
    for layer in model.attention:
        if layer.kind in ("full", "sliding"):
            seen = min(mean, layer.window) if layer.window and layer.kind == "sliding" else mean
            total += 2 * prompt * seen * layer.head_count * (layer.k_dim + (layer.v_dim or layer.k_dim))
    return total


@lru_cache(_CACHE)
def _attention_scores(model: ModelSpec, prompt: int) -> float:
    """Queries x the mean number of keys seen, all heads."""
    total = 0.0
    for layer in model.attention:
        if layer.kind in ("full", "sliding"):
            total += prompt * prompt / 2 * layer.head_count  # a window masks scores, it saves none without flash
    return total


@lru_cache(_CACHE)
def _total_bytes(model: ModelSpec, variant: Variant) -> int:
    return sum(get(variant.method).tensor_bytes(model, variant))


def _streamed_bytes(model: ModelSpec, variant: Variant, per_token: float, batch: int) -> float:
    """Bytes that ``batch`` tokens touch, if each picks its experts independently."""
    if model.mixture is None:
        return per_token
    missed = (1 - model.mixture.expert_used_count / model.mixture.expert_count) ** batch
    total = max(float(_total_bytes(model, variant)), per_token)
    return per_token + (total - per_token) * (1 - missed)


@lru_cache(_CACHE)
def work(model: ModelSpec, variant: Variant, placement: Placement) -> Work:
    """The load of ``variant`` of ``model`` as ``placement`` sets it."""
    model = shape_twin(model)
    gpu_bytes, host_bytes = bytes_read_per_token(model, variant, placement)
    host_layers = max(0, model.offloadable_count - placement.gpu_layers)
    expert_layers = max(0, weights.expert_layers(model, placement) - host_layers) if variant.format == "gguf" else 0
    shape = _shape(model)
    prompt = max(1, placement.prompt_tokens)
    ubatch = max(1, min(placement.ubatch, placement.batch))
    return Work(
        gpu_bytes=float(gpu_bytes),
        host_bytes=float(host_bytes),
        params=shape.params,
        layers=model.n_layer,
        gpu_layers=max(0, min(placement.gpu_layers, model.n_layer)),
        kv_bytes=_kv_bytes(model, placement.depth, placement.kv_type),
        prompt=prompt,
        passes=-(-prompt // ubatch),
        streamed_bytes=_streamed_bytes(model, variant, float(gpu_bytes + host_bytes), min(prompt, ubatch)),
        host_streamed_bytes=weights.host_streamed_bytes(model, variant, placement, min(prompt, ubatch)),
        crossings=expert_layers + (host_bytes > 0 and 0 < host_layers <= model.n_layer),
        attention_operations=attention_operations(model, prompt),
        row_elements=float(model.n_layer * model.n_embd),
        attention_scores=0.0 if placement.flash_attention else _attention_scores(model, prompt),
        moe=model.mixture is not None,
        hybrid=shape.hybrid,
        gemma=shape.gemma,
        output_params=shape.output_params,
        expert_params=shape.expert_params,
        query_group=shape.query_group,
        flash=placement.flash_attention,
        expert_rows=min(prompt, ubatch) * shape.expert_share,
    )


def typical_layers(params: float) -> float:
    """Layers of a Llama-shaped model of ``params`` weights, where only the size is known."""
    return float((params / LAYER_CUBE) ** (1 / 3))
