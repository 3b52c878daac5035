"""Slices: models of real width with few layers, from whose times those of whole models follow.

A token costs ``a + n·b`` with ``n`` layers. Two slices of different depth give both; the slope carries all that a layer
costs, the intercept the output matrix and what a token costs beside. Reading a prompt follows the same line, with a
negative intercept: the last layer's feed-forward runs only for rows whose logits are wanted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from planner.core.model import AttentionLayer, ModelSource, ModelSpec, Tensor

FEW, MANY = 2, 8
"""Layers of the two slices. One layer misleads: its feed-forward is skipped when a prompt is read."""
_VOCABULARY = 2048
"""Small, so that the output matrix is no large part of a slice."""
_LONGEST_CONTEXT = 1 << 15


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Widths of a Llama-shaped layer."""

    name: str
    n_embd: int
    n_ff: int
    head_count: int
    head_count_kv: int
    head_dim: int = 128


WIDE = Shape(name="wide", n_embd=2048, n_ff=5632, head_count=16, head_count_kv=4)
"""For a CPU: 8 layers in 4 bits are 200 MB, more than the caches, and a prompt of 128 tokens is read in a second."""
NARROW = Shape(name="narrow", n_embd=1024, n_ff=2816, head_count=8, head_count_kv=2)
"""A quarter of the weights with half the hidden state: what a layer costs beside its weights."""
THIN = Shape(name="thin", n_embd=256, n_ff=256, head_count=2, head_count_kv=2)
"""Hardly any weights: barriers and launches are all of its time."""
ALL_KV_HEADS = Shape(name="all-kv-heads", n_embd=2048, n_ff=5632, head_count=16, head_count_kv=16)
"""The arithmetic of WIDE's attention over four times the KV cache: tells operations from bytes."""
SHORT_HEADS = Shape(name="short-heads", n_embd=2048, n_ff=5632, head_count=32, head_count_kv=8, head_dim=64)
"""The arithmetic and the cache of WIDE in twice as many heads."""
WIDE_GPU = Shape(name="wide-gpu", n_embd=4096, n_ff=14336, head_count=32, head_count_kv=8)
"""For a GPU, whose kernels reach their speed on wide matrices only: the layers of Llama 3 8B."""
NARROW_GPU = Shape(name="narrow-gpu", n_embd=2048, n_ff=7168, head_count=16, head_count_kv=4)
ALL_KV_HEADS_GPU = Shape(name="all-kv-heads-gpu", n_embd=4096, n_ff=14336, head_count=32, head_count_kv=32)
SHORT_HEADS_GPU = Shape(name="short-heads-gpu", n_embd=4096, n_ff=14336, head_count=64, head_count_kv=16, head_dim=64)


@dataclass(frozen=True, slots=True, kw_only=True)
class Kit:
    """The shapes that serve one kind of device."""

    wide: Shape
    narrow: Shape
    thin: Shape
    all_kv_heads: Shape
    short_heads: Shape
    tokens: int
    """Of the prompt that is read: on a GPU llama.cpp's default micro-batch."""

    @property
    def attention(self) -> tuple[Shape, Shape, Shape]:
        """Shapes whose attention differs in arithmetic, bytes and heads."""
        return self.wide, self.all_kv_heads, self.short_heads


CPU_KIT = Kit(wide=WIDE, narrow=NARROW, thin=THIN, all_kv_heads=ALL_KV_HEADS, short_heads=SHORT_HEADS, tokens=128)
GPU_KIT = Kit(
    wide=WIDE_GPU,
    narrow=NARROW_GPU,
    thin=THIN,
    all_kv_heads=ALL_KV_HEADS_GPU,
    short_heads=SHORT_HEADS_GPU,
    tokens=512,
)


def plain(shape: Shape, layers: int) -> ModelSpec:
    """A Llama of ``layers`` layers of ``shape``."""
    embd, ff, query, kv = (
        shape.n_embd,
        shape.n_ff,
        *(shape.head_dim * count for count in (shape.head_count, shape.head_count_kv)),
    )
    matrices = {
        "attn_q": (embd, query), "attn_k": (embd, kv), "attn_v": (embd, kv), "attn_output": (query, embd),
        "ffn_gate": (embd, ff), "ffn_up": (embd, ff), "ffn_down": (ff, embd),
    }  # fmt: skip
    tensors = [Tensor("token_embd.weight", (embd, _VOCABULARY))]
    for layer in range(layers):
        tensors += [Tensor(f"blk.{layer}.{name}.weight", (embd,)) for name in ("attn_norm", "ffn_norm")]
        tensors += [Tensor(f"blk.{layer}.{name}.weight", size) for name, size in matrices.items()]
    tensors += [Tensor("output_norm.weight", (embd,)), Tensor("output.weight", (embd, _VOCABULARY))]
    heads = AttentionLayer(
        kind="full",
        head_count=shape.head_count,
        head_count_kv=shape.head_count_kv,
        k_dim=shape.head_dim,
        v_dim=shape.head_dim,
    )
    return ModelSpec(
        name=f"slice-{shape.name}-{layers}",
        architecture="llama",
        family="llama",
        source=ModelSource(kind="size", location="slice"),
        n_layer=layers,
        n_embd=embd,
        n_vocab=_VOCABULARY,
        n_ctx_train=_LONGEST_CONTEXT,
        n_ff=ff,
        tensors=tuple(tensors),
        attention=(heads,) * layers,
        n_head=shape.head_count,
        n_head_kv=shape.head_count_kv,
    )


def pure_types(model: ModelSpec, type_: str) -> tuple[str, ...]:
    """Every matrix as ``type_``, vectors in F32."""
    return tuple("F32" if len(tensor.shape) == 1 else type_ for tensor in model.tensors)


def cut(model: ModelSpec, types: Sequence[str], layers: int) -> tuple[ModelSpec, tuple[str, ...]]:
    """The first ``layers`` layers of ``model`` with all that lies outside of them, in the whole model's mix of types.

    A mix like Q4_K_M gives half of the layers finer types; the slice takes the types of layers that stand for the whole
    by their share. A second tail of layers that only predict further tokens is left out.
    """
    chosen = _representatives(model, types, layers)
    by_name = {tensor.name: type_ for tensor, type_ in zip(model.tensors, types, strict=True)}
    kept: list[Tensor] = []
    kept_types: list[str] = []
    for tensor in model.tensors:
        if tensor.layer is None:
            kept_types.append(by_name[tensor.name])
        elif tensor.layer < layers:
            rest = tensor.name.split(".", 2)[2]
            twin = f"blk.{chosen[tensor.layer]}.{rest}"
            kept_types.append(by_name.get(twin, by_name[tensor.name]))
        else:
            continue
        kept.append(tensor)
    sliced = replace(model, n_layer=layers, tensors=tuple(kept), attention=model.attention[:layers])
    return sliced, tuple(kept_types)


def _representatives(model: ModelSpec, types: Sequence[str], layers: int) -> list[int]:
    """For each layer of a slice, the layer of the model whose types it takes: each mix by its share."""
    signatures: dict[int, list[str]] = {}
    for tensor, type_ in zip(model.tensors, types, strict=True):
        if tensor.layer is not None and tensor.layer < model.n_layer:
            signatures.setdefault(tensor.layer, []).append(type_)
    groups: dict[tuple[str, ...], list[int]] = {}
    for layer, signature in signatures.items():
        groups.setdefault(tuple(signature), []).append(layer)
    taken = dict.fromkeys(groups, 0)
    chosen = []
    for count in range(1, layers + 1):  # the group that is furthest behind its share gets the next layer
        behind = max(groups, key=lambda g: (len(groups[g]) * count / model.n_layer - taken[g], len(groups[g])))
        taken[behind] += 1
        chosen.append(groups[behind][0])
    return chosen


def scaled(kit: Kit, factor: float) -> Kit:
    """The kit with narrower shapes, whole multiples of 256 so that every type fits their rows."""

    def narrower(shape: Shape) -> Shape:
        width = max(256, round(shape.n_embd * factor / 256) * 256)
        heads = max(2, width // shape.head_dim)
        kv_heads = max(1, heads * shape.head_count_kv // shape.head_count)
        ff = max(256, round(shape.n_ff * factor / 256) * 256)
        return replace(shape, n_embd=width, n_ff=ff, head_count=heads, head_count_kv=kv_heads)

    return Kit(
        wide=narrower(kit.wide),
        narrow=narrower(kit.narrow),
        thin=kit.thin,
        all_kv_heads=narrower(kit.all_kv_heads),
        short_heads=narrower(kit.short_heads),
        tokens=max(32, round(kit.tokens * factor)),
    )
