"""Families on their own: Phi, GLM 4, ChatGLM, Falcon 7B/40B, StarCoder 2, Cohere, StableLM, Granite 4 hybrids."""

from __future__ import annotations

from dataclasses import replace

from planner.models.architectures.common import HEADS, WIDTH, is_tied, read_dims, windows_from_types
from planner.models.architectures.fields import Fields
from planner.models.architectures.layout import Dims, Experts, Layout, NamedShape, Recurrent


def phi2(fields: Fields) -> Layout:
    """Phi-1.5 and Phi-2: ``phi2``; one norm for both halves, biases everywhere."""
    return Layout(
        architecture="phi2",
        dims=read_dims(fields, head_dim=False),
        tied=is_tied(fields),
        qkv_bias=True,
        output_bias=True,
        ffn_norm=False,
        norm_bias=True,
        ffn="plain",
        ffn_bias=True,
        head_bias=True,
    )


def _longrope_count(fields: Fields) -> int:
    if not fields.rope.get("long_factor"):
        return 0
    rotated = fields.rope.get("partial_rotary_factor") or fields.fraction("partial_rotary_factor", default=1.0)
    return int(float(rotated) * fields.count(*WIDTH)) // fields.count(*HEADS) // 2


def phi3(fields: Fields) -> Layout:
    """Phi-3, 3.5, 4 and 4-mini: ``phi3``; fused qkv, fused gate and up; llama.cpp ignores the sliding window."""
    return Layout(
        architecture="phi3",
        dims=read_dims(fields, head_dim=False),
        tied=is_tied(fields),
        fused_qkv=True,
        ffn="fused",
        rope_factors=_longrope_count(fields),
    )


def phimoe(fields: Fields) -> Layout:
    """Phi-3.5-MoE: ``phimoe``; layer norms with bias, biases in attention and the output."""
    dims = read_dims(fields, head_dim=False)
    return Layout(
        architecture="phimoe",
        dims=dims,
        tied=is_tied(fields),
        qkv_bias=True,
        output_bias=True,
        norm_bias=True,
        head_bias=True,
        rope_factors=_longrope_count(fields),
        experts=Experts(
            count=fields.count("num_local_experts"), used=fields.count("num_experts_per_tok"), width=dims.n_ff
        ),
    )


def glm4(fields: Fields) -> Layout:
    """GLM-4-0414: ``glm4``; norms before and after both halves, fused gate and up."""
    return Layout(
        architecture="glm4",
        dims=read_dims(fields),
        tied=is_tied(fields),
        qkv_bias=fields.flag("attention_bias"),
        post_attention_norm=True,
        post_ffn_norm=True,
        ffn="fused",
    )


def chatglm(fields: Fields) -> Layout:
    """ChatGLM 3 and GLM-4-9B of 2024: ``chatglm``; fused qkv with bias, fused gate and up."""
    dims = read_dims(fields, head_dim=False)
    shared_kv = fields.optional_count("multi_query_group_num") if fields.flag("multi_query_attention") else None
    vocabulary = fields.count("padded_vocab_size", "vocab_size")
    return Layout(
        architecture="chatglm",
        dims=replace(dims, n_head_kv=shared_kv or dims.n_head_kv, n_vocab=vocabulary),
        tied=is_tied(fields),
        fused_qkv=True,
        qkv_bias=fields.flag("add_qkv_bias") or fields.flag("add_bias_linear"),
        ffn="fused",
    )


def glm(fields: Fields) -> Layout:
    """GLM-4-9B in transformers' own layout: ``chatglm`` with separate query, key and value."""
    return Layout(
        architecture="chatglm",
        dims=read_dims(fields),
        tied=is_tied(fields),
        qkv_bias=fields.flag("attention_bias"),
        ffn="fused",
    )


def falcon(fields: Fields) -> Layout:
    """Falcon 7B, 40B and 180B of 2023: ``falcon``; attention and feed-forward side by side, no biases but norms'."""
    dims = read_dims(fields, head_dim=False)
    heads_kv = fields.optional_count("num_kv_heads", "n_head_kv") if fields.flag("new_decoder_architecture") else None
    two_norms: tuple[NamedShape, ...] = (
        ("attn_norm_2.weight", (dims.n_embd,)),
        ("attn_norm_2.bias", (dims.n_embd,)),
    )
    return Layout(
        architecture="falcon",
        dims=replace(dims, n_ff=4 * dims.n_embd, n_head_kv=heads_kv or 1, n_ctx_train=2048),
        tied=is_tied(fields, default=True),
        fused_qkv=True,
        ffn_norm=False,
        norm_bias=True,
        ffn="plain",
        per_layer_extra=two_norms if fields.flag("new_decoder_architecture") else (),
    )


def starcoder2(fields: Fields) -> Layout:
    """StarCoder 2: ``starcoder2``; layer norms and biases throughout; llama.cpp ignores the sliding window."""
    bias = fields.flag("use_bias", default=True)
    return Layout(
        architecture="starcoder2",
        dims=read_dims(fields, head_dim=False),
        tied=is_tied(fields, default=True),
        qkv_bias=bias,
        output_bias=bias,
        norm_bias=True,
        ffn="plain",
        ffn_bias=bias,
    )


def cohere(fields: Fields) -> Layout:
    """Command R and R+: ``command-r``; one norm for both halves; the 64-block model norms query and key."""
    dims = read_dims(fields, head_dim=False)
    context = fields.count("model_max_length", "max_position_embeddings")
    return Layout(
        architecture="command-r",
        dims=replace(dims, n_ctx_train=context),
        tied=True,
        ffn_norm=False,
        qk_norm="stacked" if fields.flag("use_qk_norm") else "",
    )


def cohere2(fields: Fields) -> Layout:
    """Command R7B and Command A: ``cohere2``; every fourth block full."""
    dims = read_dims(fields, head_dim=False)
    window = fields.count("sliding_window", default=4096)
    return Layout(
        architecture="cohere2",
        dims=dims,
        tied=True,
        ffn_norm=False,
        windows=windows_from_types(fields, dims.n_layer, window, period=4),
    )


def stablelm(fields: Fields) -> Layout:
    """StableLM 3B, 2-1.6B and 2-12B: ``stablelm``; the 12B runs both halves side by side."""
    stacked = fields.flag("qk_layernorm")
    return Layout(
        architecture="stablelm",
        dims=read_dims(fields, head_dim=False),
        tied=is_tied(fields),
        qkv_bias=fields.flag("use_qkv_bias"),
        norm_bias=True,
        ffn_norm=not fields.flag("use_parallel_residual"),
        qk_norm="stacked" if stacked else "",
        notes=("the norms of query and key are stored stacked, a row per head",) if stacked else (),
    )


def granite_hybrid(fields: Fields) -> Layout:
    """Granite 4: ``granitehybrid``, Mamba-2 blocks with a few of attention; ``granite`` where all are attention."""
    dims = read_dims(fields, head_dim=False)
    kinds = fields.layer_types(dims.n_layer) or ("attention",) * dims.n_layer
    mamba = tuple(layer for layer, kind in enumerate(kinds) if kind == "mamba")
    routed, shared = fields.optional_count("num_local_experts"), fields.optional_count("shared_intermediate_size") or 0
    experts = None
    if routed:
        used = fields.count("num_experts_per_tok")
        experts = Experts(count=routed, used=used, width=dims.n_ff, shared_width=shared)
    plain = "granitemoe" if routed else "granite"
    return Layout(
        architecture="granitehybrid" if mamba else plain,
        dims=dims if routed or not shared else replace(dims, n_ff=shared),
        tied=is_tied(fields),
        experts=experts,
        recurrent=_mamba2(fields, dims, mamba) if mamba else None,
    )


def _mamba2(fields: Fields, dims: Dims, layers: tuple[int, ...]) -> Recurrent:
    """Tensors and F32 state of a Mamba-2 block (llama-hparams.cpp, n_embd_r and n_embd_s)."""
    kernel, heads = fields.count("mamba_d_conv", default=4), fields.count("mamba_n_heads")
    groups, state = fields.count("mamba_n_groups", default=1), fields.count("mamba_d_state")
    inner = fields.count("mamba_expand", default=2) * dims.n_embd
    conv = inner + 2 * groups * state
    tensors: tuple[NamedShape, ...] = (
        ("ssm_in.weight", (dims.n_embd, 2 * inner + 2 * groups * state + heads)),
        ("ssm_conv1d.weight", (kernel, conv)),
        ("ssm_conv1d.bias", (conv,)),
        ("ssm_dt.bias", (heads,)),
        ("ssm_a", (1, heads)),
        ("ssm_d", (1, heads)),
        ("ssm_norm.weight", (inner // groups, groups)),
        ("ssm_out.weight", (inner, dims.n_embd)),
    )
    return Recurrent(layers=layers, tensors=tensors, state_bytes=4 * ((kernel - 1) * conv + state * inner))
