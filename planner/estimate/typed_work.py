"""What one token and one prompt make each tensor type do, split between GPU and host: sums over a model's tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

from planner.core.candidate import Placement, Variant
from planner.core.model import ModelSpec, shape_twin
from planner.estimate.weights import expert_layers, is_expert
from planner.formats import ggml
from planner.methods import gguf

_CACHE = 512
_LOOKED_UP = ("token_embd.weight", "per_layer_token_embd.weight")

ByType = dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """The work of one device."""

    token_bytes: ByType
    """Weights that one token reads."""
    prompt_weights: ByType
    """Weights that every token of a prompt is multiplied with: not the output, nor the last layer's feed-forward."""
    row_bytes: ByType
    """Weights that only rows with logits are multiplied with."""
    layers: tuple[int, int]
    """First layer and the one behind the last."""

    @property
    def layer_count(self) -> int:
        """Layers of this device."""
        return self.layers[1] - self.layers[0]


@dataclass(frozen=True, slots=True)
class _Sums:
    """Running sums over layers, by type: entry i is over the first i layers."""

    token_bytes: dict[str, tuple[float, ...]]
    weights: dict[str, tuple[float, ...]]
    expert_bytes: dict[str, tuple[float, ...]]
    expert_weights: dict[str, tuple[float, ...]]
    last_bytes: ByType
    """The last layer's feed-forward."""
    last_weights: ByType
    output_bytes: ByType


def sums(model: ModelSpec, types: Sequence[str]) -> _Sums:
    """Sums for ``model`` with a ggml type for each of its tensors; vectors are left out, as their cost is a layer's."""
    count = model.n_layer
    tables: list[dict[str, list[float]]] = [{}, {}, {}, {}]
    last_bytes: ByType = {}
    last_weights: ByType = {}
    output: ByType = {}
    has_output = not model.tied_embeddings
    for tensor, type_ in zip(model.tensors, types, strict=True):
        if len(tensor.shape) < 2:
            continue
        share = model.routed_fraction(tensor)
        size, weights, layer = (
            ggml.tensor_bytes(type_, tensor.shape) * share,
            tensor.element_count * share,
            tensor.layer,
        )
        if layer is None:
            if tensor.name not in _LOOKED_UP or (tensor.name == _LOOKED_UP[0] and not has_output):
                output[type_] = output.get(type_, 0.0) + size
            continue
        if layer >= count:
            continue  # only predicts further tokens
        expert = is_expert(tensor.name)
        amounts = (size, weights, size if expert else 0.0, weights if expert else 0.0)
        for table, amount in zip(tables, amounts, strict=True):
            table.setdefault(type_, [0.0] * count)[layer] += amount
        if layer == count - 1 and ".ffn_" in tensor.name:
            last_bytes[type_] = last_bytes.get(type_, 0.0) + size
            last_weights[type_] = last_weights.get(type_, 0.0) + weights
    running = [{t: tuple(accumulate(row, initial=0.0)) for t, row in table.items()} for table in tables]
    token_bytes, all_weights, expert_bytes, expert_weights = running
    return _Sums(token_bytes, all_weights, expert_bytes, expert_weights, last_bytes, last_weights, output)


@lru_cache(maxsize=_CACHE)
def _sums_of(model: ModelSpec, variant: Variant) -> _Sums:
    return sums(model, gguf.tensor_types(model, variant))


def _between(table: dict[str, tuple[float, ...]], first: int, end: int) -> ByType:
    return {type_: row[end] - row[first] for type_, row in table.items() if row[end] > row[first]}


def _added(a: ByType, b: ByType, sign: float = 1.0) -> ByType:
    return {type_: a.get(type_, 0.0) + sign * b.get(type_, 0.0) for type_ in {**a, **b}}


def split(found: _Sums, count: int, host_layers: int, output_on_gpu: bool, expert_end: int) -> tuple[Part, Part]:
    """The parts of the host and of the GPUs.

    Args:
        found: the model's sums.
        count: its layers.
        host_layers: the first so many are on the host.
        output_on_gpu: where the output matrix is.
        expert_end: routed experts of layers before this one are on the host too.
    """
    moved = (host_layers, max(host_layers, expert_end))
    host_bytes = _added(_between(found.token_bytes, 0, host_layers), _between(found.expert_bytes, *moved))
    host_weights = _added(_between(found.weights, 0, host_layers), _between(found.expert_weights, *moved))
    gpu_bytes = _added(_between(found.token_bytes, host_layers, count), _between(found.expert_bytes, *moved), -1)
    gpu_weights = _added(_between(found.weights, host_layers, count), _between(found.expert_weights, *moved), -1)
    last_on_host = host_layers >= count
    if last_on_host:
        host_weights = _added(host_weights, found.last_weights, -1)
    else:
        gpu_weights = _added(gpu_weights, found.last_weights, -1)
    nothing: ByType = {}
    return (
        Part(
            token_bytes=_added(host_bytes, nothing if output_on_gpu else found.output_bytes),
            prompt_weights=host_weights,
            row_bytes=_added(
                found.last_bytes if last_on_host else nothing, nothing if output_on_gpu else found.output_bytes
            ),
            layers=(0, host_layers),
        ),
        Part(
            token_bytes=_added(gpu_bytes, found.output_bytes if output_on_gpu else nothing),
            prompt_weights=gpu_weights,
            row_bytes=_added(
                nothing if last_on_host else found.last_bytes, found.output_bytes if output_on_gpu else nothing
            ),
            layers=(host_layers, count),
        ),
    )


@lru_cache(maxsize=4096)
def parts(model: ModelSpec, variant: Variant, placement: Placement) -> tuple[Part, Part]:
    """The work of the host and of the GPUs as ``placement`` divides it."""
    model = shape_twin(model)
    host_layers = min(max(model.offloadable_count - placement.gpu_layers, 0), model.n_layer)
    return split(
        _sums_of(model, variant), model.n_layer, host_layers, placement.gpu_layers > 0, expert_layers(model, placement)
    )


@dataclass(frozen=True, slots=True)
class Attention:
    """What one token makes of the cache."""

    operations: float
    """A multiply-add counted as two: queries with keys, weights with values."""
    cache_bytes: float
    scores: float
    """Heads × cached tokens."""
    cached: float
    """Layers × cached tokens."""


@lru_cache(maxsize=4096)
def attention(model: ModelSpec, layers: tuple[int, int], depth: float, kv_type: str) -> Attention:
    """Attention of one token at ``depth`` in the layers from the first of ``layers`` to before the second."""
    traits = ggml.type_traits(kv_type.upper())
    operations = values = scores = seen_total = 0.0
    for layer in model.attention[layers[0] : layers[1]]:
        if layer.kind not in ("full", "sliding"):
            continue
        seen = min(depth, layer.window) if layer.window and layer.kind == "sliding" else depth
        operations += 2.0 * seen * layer.head_count * (layer.k_dim + (layer.v_dim or layer.k_dim))
        values += seen * layer.head_count_kv * (layer.k_dim + layer.v_dim)
        scores += seen * layer.head_count
        seen_total += seen
    return Attention(operations, values * traits.block_bytes / traits.block_weights, scores, seen_total)
