"""What a decoder is made of, as flags; and the GGUF tensors and attention layers that follow from them.

Names and shapes are those that llama.cpp's converter writes and its loader asks for (``src/llama-arch.cpp`` and
``src/models/*.cpp`` of llama.cpp, at the version in llama-cpp-python 0.3.36).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from planner.core.model import AttentionLayer, MixtureOfExperts, Tensor

NamedShape = tuple[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Dims:
    """Sizes every decoder has."""

    n_layer: int
    n_embd: int
    n_vocab: int
    n_ctx_train: int
    n_ff: int
    n_head: int
    n_head_kv: int
    head_dim: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    """A routed feed-forward part; ``width`` is one expert's hidden size."""

    count: int
    used: int
    width: int
    shared_width: int = 0
    shared_count: int = 0
    leading_dense: int = 0
    every: int = 1
    """A mixture in every n-th block, the last of each n (Llama 4 Maverick: 2)."""
    shared_gate: bool = False
    """The shared expert has its own gate vector (Qwen 2 MoE)."""
    bias: bool = False
    """Router and experts have biases (gpt-oss)."""
    selection_bias: bool = False
    """``exp_probs_b``: added to the scores only to choose the experts (DeepSeek V3)."""

    def routes(self, layer: int) -> bool:
        """Whether block ``layer`` is a mixture."""
        return layer >= self.leading_dense and (layer + 1) % self.every == 0


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentAttention:
    """DeepSeek's multi-head latent attention; ``q_rank`` 0 where the query is not compressed."""

    q_rank: int
    kv_rank: int
    nope_dim: int
    rope_dim: int
    v_dim: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Recurrent:
    """Blocks that keep a fixed state instead of a KV cache, and their tensors."""

    layers: tuple[int, ...]
    tensors: tuple[NamedShape, ...]
    state_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """A decoder-only transformer, described by what its blocks contain."""

    architecture: str
    dims: Dims
    tied: bool
    fused_qkv: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    gated_query: bool = False
    """The query projection also yields an output gate, twice as wide (Qwen3-Next)."""
    qk_norm: str = ""
    """``head`` (one head wide), ``full`` (all heads) or ``stacked`` (a row per head)."""
    attn_norm: bool = True
    ffn_norm: bool = True
    norm_bias: bool = False
    post_attention_norm: bool = False
    post_ffn_norm: bool = False
    ffn: str = "gated"
    """``gated``, ``fused`` (gate and up in one matrix) or ``plain`` (no gate)."""
    ffn_bias: bool = False
    sinks: bool = False
    head_bias: bool = False
    """The output matrix has a bias."""
    rope_freqs: int = 0
    rope_factors: int = 0
    windows: tuple[int | None, ...] = ()
    """Tokens each block sees; ``None`` or an empty tuple: all."""
    shared_kv_layers: int = 0
    """Last blocks that reuse an earlier block's KV cache (Gemma 3n)."""
    experts: Experts | None = None
    latent: LatentAttention | None = None
    recurrent: Recurrent | None = None
    nextn_layers: int = 0
    """Blocks after the last that predict further tokens; in the file, not loaded by default."""
    nextn_embeddings: bool = False
    """Those blocks hold copies of the embedding and the output matrix (GLM 4.5)."""
    extra: tuple[NamedShape, ...] = ()
    per_layer_extra: tuple[NamedShape, ...] = ()
    notes: tuple[str, ...] = ()


def build_tensors(layout: Layout) -> tuple[Tensor, ...]:
    """All tensors of the GGUF file, embedding first, then block by block."""
    shapes = list(_global_tensors(layout))
    for layer in range(layout.dims.n_layer + layout.nextn_layers):
        shapes += [(f"blk.{layer}.{name}", shape) for name, shape in _block(layout, layer)]
    return tuple(Tensor(name, shape) for name, shape in shapes)


def build_attention(layout: Layout) -> tuple[AttentionLayer, ...]:
    """What each of the ``n_layer`` blocks keeps between tokens."""
    return tuple(_attention_layer(layout, layer) for layer in range(layout.dims.n_layer))


def build_mixture(layout: Layout) -> MixtureOfExperts | None:
    """Routing; ``None`` for a dense model."""
    experts = layout.experts
    if experts is None:
        return None
    return MixtureOfExperts(
        expert_count=experts.count,
        expert_used_count=experts.used,
        expert_feed_forward=experts.width,
        shared_expert_count=experts.shared_count or int(experts.shared_width > 0),
        leading_dense_layer_count=experts.leading_dense,
    )


def _global_tensors(layout: Layout) -> Iterator[NamedShape]:
    dims = layout.dims
    yield "token_embd.weight", (dims.n_embd, dims.n_vocab)
    yield from _norm("output_norm", dims.n_embd, layout.norm_bias)
    if not layout.tied:
        yield "output.weight", (dims.n_embd, dims.n_vocab)
    if layout.head_bias:
        yield "output.bias", (dims.n_vocab,)
    if layout.rope_freqs:
        yield "rope_freqs.weight", (layout.rope_freqs,)
    if layout.rope_factors:
        yield "rope_factors_long.weight", (layout.rope_factors,)
        yield "rope_factors_short.weight", (layout.rope_factors,)
    yield from layout.extra


def _block(layout: Layout, layer: int) -> Iterator[NamedShape]:
    dims = layout.dims
    if layout.attn_norm:
        yield from _norm("attn_norm", dims.n_embd, layout.norm_bias)
    if layout.recurrent is not None and layer in layout.recurrent.layers:
        yield from layout.recurrent.tensors
    elif layout.latent is not None:
        yield from _latent_attention(dims, layout.latent)
    else:
        yield from _attention(layout)
    if layout.post_attention_norm:
        yield "post_attention_norm.weight", (dims.n_embd,)
    if layout.ffn_norm:
        yield from _norm("ffn_norm", dims.n_embd, layout.norm_bias)
    if layout.experts is not None and layout.experts.routes(layer):
        yield from _mixture(dims.n_embd, layout.experts)
    else:
        yield from _feed_forward(layout)
    if layout.post_ffn_norm:
        yield "post_ffw_norm.weight", (dims.n_embd,)
    yield from layout.per_layer_extra
    if layer >= dims.n_layer:
        yield from _nextn(layout)


def _norm(name: str, width: int, bias: bool) -> Iterator[NamedShape]:
    yield f"{name}.weight", (width,)
    if bias:
        yield f"{name}.bias", (width,)


def _linear(name: str, inputs: int, outputs: int, bias: bool) -> Iterator[NamedShape]:
    yield f"{name}.weight", (inputs, outputs)
    if bias:
        yield f"{name}.bias", (outputs,)


def _attention(layout: Layout) -> Iterator[NamedShape]:
    dims = layout.dims
    q, kv = dims.n_head * dims.head_dim, dims.n_head_kv * dims.head_dim
    if layout.fused_qkv:
        yield from _linear("attn_qkv", dims.n_embd, q + 2 * kv, layout.qkv_bias)
    else:
        yield from _linear("attn_q", dims.n_embd, q * (1 + layout.gated_query), layout.qkv_bias)
        yield from _linear("attn_k", dims.n_embd, kv, layout.qkv_bias)
        yield from _linear("attn_v", dims.n_embd, kv, layout.qkv_bias)
    yield from _linear("attn_output", q, dims.n_embd, layout.output_bias)
    yield from _qk_norms(layout, q, kv)
    if layout.sinks:
        yield "attn_sinks.weight", (dims.n_head,)


def _qk_norms(layout: Layout, q: int, kv: int) -> Iterator[NamedShape]:
    dims = layout.dims
    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
        "head": ((dims.head_dim,), (dims.head_dim,)),
        "full": ((q,), (kv,)),
        "stacked": ((dims.head_dim, dims.n_head), (dims.head_dim, dims.n_head_kv)),
    }
    if layout.qk_norm:
        q_shape, k_shape = shapes[layout.qk_norm]
        yield "attn_q_norm.weight", q_shape
        yield "attn_k_norm.weight", k_shape


def _latent_attention(dims: Dims, latent: LatentAttention) -> Iterator[NamedShape]:
    """The key/value up-projection is split in two, the key's half transposed, so that decoding can absorb it."""
    head = latent.nope_dim + latent.rope_dim
    if latent.q_rank:
        yield "attn_q_a.weight", (dims.n_embd, latent.q_rank)
        yield "attn_q_a_norm.weight", (latent.q_rank,)
        yield "attn_q_b.weight", (latent.q_rank, dims.n_head * head)
    else:
        yield "attn_q.weight", (dims.n_embd, dims.n_head * head)
    yield "attn_kv_a_mqa.weight", (dims.n_embd, latent.kv_rank + latent.rope_dim)
    yield "attn_kv_a_norm.weight", (latent.kv_rank,)
    yield "attn_k_b.weight", (latent.nope_dim, latent.kv_rank, dims.n_head)
    yield "attn_v_b.weight", (latent.kv_rank, latent.v_dim, dims.n_head)
    yield "attn_output.weight", (dims.n_head * latent.v_dim, dims.n_embd)


def _feed_forward(layout: Layout) -> Iterator[NamedShape]:
    dims, bias = layout.dims, layout.ffn_bias
    if layout.ffn == "gated":
        yield from _linear("ffn_gate", dims.n_embd, dims.n_ff, bias)
    yield from _linear("ffn_up", dims.n_embd, dims.n_ff * (2 if layout.ffn == "fused" else 1), bias)
    yield from _linear("ffn_down", dims.n_ff, dims.n_embd, bias)


def _mixture(n_embd: int, experts: Experts) -> Iterator[NamedShape]:
    count, width = experts.count, experts.width
    yield from _linear("ffn_gate_inp", n_embd, count, experts.bias)
    for name, inputs, outputs in (("gate", n_embd, width), ("up", n_embd, width), ("down", width, n_embd)):
        yield f"ffn_{name}_exps.weight", (inputs, outputs, count)
        if experts.bias:
            yield f"ffn_{name}_exps.bias", (outputs, count)
    if experts.selection_bias:
        yield "exp_probs_b.bias", (count,)
    if experts.shared_width:
        if experts.shared_gate:
            yield "ffn_gate_inp_shexp.weight", (n_embd,)
        yield "ffn_gate_shexp.weight", (n_embd, experts.shared_width)
        yield "ffn_up_shexp.weight", (n_embd, experts.shared_width)
        yield "ffn_down_shexp.weight", (experts.shared_width, n_embd)


def _nextn(layout: Layout) -> Iterator[NamedShape]:
    dims = layout.dims
    yield "nextn.eh_proj.weight", (2 * dims.n_embd, dims.n_embd)
    for name in ("enorm", "hnorm", "shared_head_norm"):
        yield f"nextn.{name}.weight", (dims.n_embd,)
    if layout.nextn_embeddings:
        yield "nextn.embed_tokens.weight", (dims.n_embd, dims.n_vocab)
        yield "nextn.shared_head_head.weight", (dims.n_embd, dims.n_vocab)


def _attention_layer(layout: Layout, layer: int) -> AttentionLayer:
    dims = layout.dims
    if layout.recurrent is not None and layer in layout.recurrent.layers:
        return AttentionLayer(
            kind="recurrent",
            head_count=dims.n_head,
            head_count_kv=0,
            k_dim=0,
            v_dim=0,
            owns_kv_cache=False,
            state_bytes=layout.recurrent.state_bytes,
        )
    if layout.latent is not None:
        width = layout.latent.kv_rank + layout.latent.rope_dim
        return AttentionLayer(kind="full", head_count=dims.n_head, head_count_kv=1, k_dim=width, v_dim=0)
    window = layout.windows[layer] if layout.windows else None
    return AttentionLayer(
        kind="full" if window is None else "sliding",
        head_count=dims.n_head,
        head_count_kv=dims.n_head_kv,
        k_dim=dims.head_dim,
        v_dim=dims.head_dim,
        window=window,
        owns_kv_cache=layer < dims.n_layer - layout.shared_kv_layers,
    )
