"""Large mixtures with their own attention: DeepSeek, Kimi, gpt-oss, GLM 4.5, MiniMax."""

from __future__ import annotations

from dataclasses import replace

from planner.models.architectures.common import NEXTN_NOTE, is_tied, periodic, read_dims
from planner.models.architectures.fields import Fields
from planner.models.architectures.layout import Experts, LatentAttention, Layout

_ALWAYS_BIASED = ("deepseek_v3", "kimi_k2", "glm4_moe", "glm4_moe_lite")


def deepseek2(fields: Fields) -> Layout:
    """DeepSeek V2, V2-Lite, V3, R1 and Kimi K2: ``deepseek2``; latent attention, converted to one KV head."""
    latent = LatentAttention(
        q_rank=fields.optional_count("q_lora_rank") or 0,
        kv_rank=fields.count("kv_lora_rank", default=512),
        nope_dim=fields.count("qk_nope_head_dim"),
        rope_dim=fields.count("qk_rope_head_dim"),
        v_dim=fields.count("v_head_dim"),
    )
    head_dim = latent.kv_rank + latent.rope_dim
    dims = read_dims(Fields({**fields.values, "head_dim": head_dim, "num_key_value_heads": 1}, fields.model_type))
    return Layout(
        architecture="deepseek2",
        dims=dims,
        tied=is_tied(fields),
        latent=latent,
        experts=_deepseek_experts(fields, dims.n_layer),
    )


def glm4_moe_lite(fields: Fields) -> Layout:
    """GLM 4.7 Flash: ``deepseek2`` with a block for multi-token prediction that the converter keeps."""
    nextn = fields.optional_count("num_nextn_predict_layers") or 0
    return replace(
        deepseek2(fields),
        nextn_layers=nextn,
        nextn_embeddings=True,
        notes=(NEXTN_NOTE,) if nextn else (),
    )


def _deepseek_experts(fields: Fields, layer_count: int) -> Experts | None:
    count = fields.optional_count("n_routed_experts")
    if count is None:
        return None
    width, shared = fields.count("moe_intermediate_size"), fields.optional_count("n_shared_experts") or 0
    return Experts(
        count=count,
        used=fields.count("num_experts_per_tok"),
        width=width,
        shared_width=width * shared,
        shared_count=shared,
        leading_dense=_leading_dense(fields, layer_count),
        # only the checkpoints of this gating method hold e_score_correction_bias; newer configs leave it unsaid
        selection_bias=fields.get("topk_method") == "noaux_tc" or fields.model_type in _ALWAYS_BIASED,
    )


def _leading_dense(fields: Fields, layer_count: int) -> int:
    """Dense blocks before the first mixture: ``first_k_dense_replace``, or counted in ``mlp_layer_types``."""
    kinds = fields.get("mlp_layer_types")
    if isinstance(kinds, list) and "sparse" in kinds and fields.get("first_k_dense_replace") is None:
        return min(kinds.index("sparse"), layer_count)
    return min(fields.optional_count("first_k_dense_replace") or 0, layer_count)


def deepseek(fields: Fields) -> Layout:
    """DeepSeek-MoE 16B: ``deepseek``; ordinary attention."""
    dims = read_dims(fields, head_dim=False)
    experts = _deepseek_experts(fields, dims.n_layer)
    return Layout(architecture="deepseek", dims=dims, tied=is_tied(fields), experts=experts)


def gpt_oss(fields: Fields) -> Layout:
    """gpt-oss: ``gpt-oss``; biases everywhere, attention sinks, every second block full."""
    dims = read_dims(fields)
    experts = Experts(
        count=fields.count("num_local_experts", "num_experts"),
        used=fields.count("num_experts_per_tok", "experts_per_token"),
        width=dims.n_ff,
        bias=True,
    )
    return Layout(
        architecture="gpt-oss",
        dims=dims,
        tied=is_tied(fields),
        qkv_bias=True,
        output_bias=True,
        sinks=True,
        ffn_norm=False,
        post_attention_norm=True,
        windows=periodic(fields.count("sliding_window", default=128), 2, dims.n_layer),
        experts=experts,
    )


def glm4_moe(fields: Fields) -> Layout:
    """GLM 4.5 and 4.6: ``glm4moe``; the norm before the feed-forward is stored as a post-attention norm."""
    dims = read_dims(fields)
    nextn = fields.optional_count("num_nextn_predict_layers") or 0
    return Layout(
        architecture="glm4moe",
        dims=dims,
        tied=is_tied(fields),
        qkv_bias=fields.flag("attention_bias"),
        qk_norm="head" if fields.flag("use_qk_norm") else "",
        ffn_norm=False,
        post_attention_norm=True,
        experts=_deepseek_experts(fields, dims.n_layer),
        nextn_layers=nextn,
        nextn_embeddings=True,
        notes=(NEXTN_NOTE,) if nextn else (),
    )


def minimax_m2(fields: Fields) -> Layout:
    """MiniMax M2: ``minimax-m2``; query and key normed over all heads."""
    dims = read_dims(fields)
    experts = Experts(
        count=fields.count("num_local_experts"),
        used=fields.count("num_experts_per_tok"),
        width=dims.n_ff,
        selection_bias=True,
    )
    return Layout(architecture="minimax-m2", dims=dims, tied=is_tied(fields), qk_norm="full", experts=experts)
