"""Llama and those built like it: Mistral, Mixtral, Granite, SmolLM 3, InternLM, Exaone, OLMo, Llama 4."""

from __future__ import annotations

from planner.models.architectures.common import (
    is_tied,
    llama3_rope_count,
    periodic,
    read_dims,
    windows_from_types,
)
from planner.models.architectures.fields import Fields
from planner.models.architectures.layout import Experts, Layout

LLAMA4_CHUNK = 8192
"""llama.cpp uses this chunk for every Llama 4, as ``attention_chunk_size`` says (src/models/llama4.cpp)."""


def _llama(fields: Fields, architecture: str, *, own_head_dim: bool = True) -> Layout:
    dims = read_dims(fields, head_dim=own_head_dim)
    bias = fields.flag("attention_bias") or fields.flag("bias")
    return Layout(
        architecture=architecture,
        dims=dims,
        tied=is_tied(fields),
        qkv_bias=bias,
        output_bias=bias,
        ffn_bias=fields.flag("mlp_bias"),
        rope_freqs=llama3_rope_count(fields, dims.head_dim),
        experts=_experts(fields, dims.n_ff),
    )


def _experts(fields: Fields, width: int, *, shared_width: int = 0) -> Experts | None:
    count = fields.optional_count("num_local_experts", "num_experts")
    if count is None:
        return None
    used = fields.count("num_experts_per_tok", "num_experts_per_token")
    return Experts(count=count, used=used, width=width, shared_width=shared_width)


def llama(fields: Fields) -> Layout:
    """LLaMA 1 and 2, Llama 3.x, Mistral, Mixtral, Yi, TinyLlama, SmolLM 2, Falcon 3 …: ``llama``."""
    return _llama(fields, "llama")


def mistral3(fields: Fields) -> Layout:
    """Mistral Small 3.1 and later, Ministral 3: ``mistral3``, the same tensors as ``llama``."""
    return _llama(fields, "mistral3")


def smollm3(fields: Fields) -> Layout:
    """SmolLM 3: ``smollm3``; some blocks without rotary embedding, which changes no tensor."""
    return _llama(fields, "smollm3")


def granite(fields: Fields) -> Layout:
    """Granite 3.x dense: ``granite``; the converter ignores ``head_dim``."""
    return _llama(fields, "granite", own_head_dim=False)


def granite_moe(fields: Fields) -> Layout:
    """Granite 3.x mixtures: ``granitemoe``."""
    dims = read_dims(fields, head_dim=False)
    shared = fields.optional_count("shared_intermediate_size") or 0
    experts = _experts(fields, dims.n_ff, shared_width=shared)
    return Layout(architecture="granitemoe", dims=dims, tied=is_tied(fields), experts=experts)


def seed_oss(fields: Fields) -> Layout:
    """Seed-OSS: ``seed_oss``; the norm before the feed-forward is stored as a post-attention norm."""
    return Layout(
        architecture="seed_oss",
        dims=read_dims(fields),
        tied=is_tied(fields),
        qkv_bias=fields.flag("attention_bias"),
        ffn_norm=False,
        post_attention_norm=True,
    )


def internlm2(fields: Fields) -> Layout:
    """InternLM 2 and 2.5: ``internlm2``; the converter splits the fused qkv."""
    return Layout(architecture="internlm2", dims=read_dims(fields, head_dim=False), tied=is_tied(fields))


def exaone(fields: Fields) -> Layout:
    """EXAONE 3 and 3.5: ``exaone``."""
    dims = read_dims(fields)
    return Layout(
        architecture="exaone",
        dims=dims,
        tied=is_tied(fields),
        rope_freqs=llama3_rope_count(fields, dims.head_dim),
    )


def exaone4(fields: Fields) -> Layout:
    """EXAONE 4: ``exaone4``; norms only after attention and feed-forward, full attention every 4th block (32B)."""
    dims = read_dims(fields)
    window = fields.optional_count("sliding_window")
    # llama.cpp turns the window on for the 64-block model alone (src/models/exaone4.cpp).
    slides = window is not None and dims.n_layer == 64
    return Layout(
        architecture="exaone4",
        dims=dims,
        tied=is_tied(fields),
        attn_norm=False,
        ffn_norm=False,
        post_attention_norm=True,
        post_ffn_norm=True,
        qk_norm="head",
        rope_freqs=llama3_rope_count(fields, dims.head_dim),
        windows=windows_from_types(fields, dims.n_layer, window, period=4) if slides and window else (),
    )


def olmo2(fields: Fields) -> Layout:
    """OLMo 2 and 3: ``olmo2``; norms after attention and feed-forward, query and key normed over all heads."""
    dims = read_dims(fields, head_dim=False)
    window = fields.optional_count("sliding_window")
    return Layout(
        architecture="olmo2",
        dims=dims,
        tied=is_tied(fields),
        attn_norm=False,
        ffn_norm=False,
        post_attention_norm=True,
        post_ffn_norm=True,
        qk_norm="full",
        windows=windows_from_types(fields, dims.n_layer, window, period=4) if window else (),
    )


def olmoe(fields: Fields) -> Layout:
    """OLMoE: ``olmoe``."""
    dims = read_dims(fields, head_dim=False)
    experts = _experts(fields, dims.n_ff)
    return Layout(architecture="olmoe", dims=dims, tied=is_tied(fields), qk_norm="full", experts=experts)


def llama4(fields: Fields) -> Layout:
    """Llama 4 Scout and Maverick: ``llama4``; three chunked blocks, then a full one; one shared expert."""
    width = fields.count("intermediate_size")
    dims = read_dims(Fields({**fields.values, "intermediate_size": fields.count("intermediate_size_mlp")}, "llama4"))
    return Layout(
        architecture="llama4",
        dims=dims,
        tied=is_tied(fields),
        rope_freqs=llama3_rope_count(fields, dims.head_dim),
        windows=periodic(LLAMA4_CHUNK, 4, dims.n_layer),
        experts=Experts(
            count=fields.count("num_local_experts"),
            used=fields.count("num_experts_per_tok", default=1),
            width=width,
            shared_width=width,
            every=fields.count("interleave_moe_layer_step", default=1),
        ),
        notes=("the vision tower is a separate file and not counted",),
    )
