"""Qwen 2, 2.5, 3, their mixtures, Qwen3-Next, Qwen 3.5 and 3.6."""

from __future__ import annotations

from planner.models.architectures.common import NEXTN_NOTE, is_tied, read_dims
from planner.models.architectures.fields import Fields
from planner.models.architectures.layout import Dims, Experts, Layout, NamedShape, Recurrent


def qwen2(fields: Fields) -> Layout:
    """Qwen 1.5, 2 and 2.5: ``qwen2``; query, key and value have biases."""
    dims = read_dims(fields, head_dim=False)
    return Layout(architecture="qwen2", dims=dims, tied=is_tied(fields), qkv_bias=True)


def qwen2_moe(fields: Fields) -> Layout:
    """Qwen 1.5 and 2 mixtures: ``qwen2moe``; a shared expert behind its own gate."""
    experts = _experts(fields, shared_width=fields.count("shared_expert_intermediate_size"))
    dims = read_dims(fields, head_dim=False)
    return Layout(architecture="qwen2moe", dims=dims, tied=is_tied(fields), qkv_bias=True, experts=experts)


def qwen3(fields: Fields) -> Layout:
    """Qwen 3: ``qwen3``; no biases, query and key normed per head."""
    dims = read_dims(fields)
    bias = fields.flag("attention_bias")
    return Layout(architecture="qwen3", dims=dims, tied=is_tied(fields), qkv_bias=bias, qk_norm="head")


def qwen3_moe(fields: Fields) -> Layout:
    """Qwen 3 mixtures: ``qwen3moe``; every block routes, no shared expert."""
    dims = read_dims(fields)
    return Layout(
        architecture="qwen3moe",
        dims=dims,
        tied=is_tied(fields),
        qkv_bias=fields.flag("attention_bias"),
        qk_norm="head",
        experts=_experts(fields, shared_width=0),
    )


def _experts(fields: Fields, *, shared_width: int) -> Experts:
    return Experts(
        count=fields.count("num_experts", "num_local_experts"),
        used=fields.count("num_experts_per_tok"),
        width=fields.count("moe_intermediate_size"),
        shared_width=shared_width,
        shared_gate=shared_width > 0,
    )


def qwen3_next(fields: Fields) -> Layout:
    """Qwen3-Next: ``qwen3next``; three gated delta-net blocks, then a full-attention one."""
    # the published config does not mention the one block for multi-token prediction that the checkpoints hold
    return _hybrid(fields, "qwen3next", nextn_default=1)


def qwen3_5(fields: Fields) -> Layout:
    """Qwen 3.5 and 3.6 dense: ``qwen35``; blocks as in Qwen3-Next."""
    return _hybrid(fields, "qwen35")


def qwen3_5_moe(fields: Fields) -> Layout:
    """Qwen 3.5 and 3.6 mixtures: ``qwen35moe``."""
    return _hybrid(fields, "qwen35moe")


def _hybrid(fields: Fields, architecture: str, *, nextn_default: int = 0) -> Layout:
    dims = read_dims(fields)
    interval = fields.count("full_attention_interval", default=4)
    kinds = fields.layer_types(dims.n_layer)
    linear = tuple(
        layer
        for layer in range(dims.n_layer)
        if (kinds[layer] == "linear_attention" if kinds else (layer + 1) % interval != 0)
    )
    routed = architecture != "qwen35"
    nextn = fields.optional_count("mtp_num_hidden_layers") or nextn_default
    vision = ("the vision tower is a separate file and not counted",) if "vision_config" in fields.values else ()
    return Layout(
        architecture=architecture,
        dims=dims,
        tied=is_tied(fields),
        qk_norm="head",
        gated_query=True,
        ffn_norm=False,
        post_attention_norm=True,
        experts=_experts(fields, shared_width=fields.count("shared_expert_intermediate_size")) if routed else None,
        recurrent=_delta_net(fields, dims, linear, fused_gates=architecture == "qwen3next"),
        nextn_layers=nextn,
        notes=vision + ((NEXTN_NOTE,) if nextn else ()),
    )


def _delta_net(fields: Fields, dims: Dims, layers: tuple[int, ...], *, fused_gates: bool) -> Recurrent:
    """Tensors and state of a gated delta-net block; the state is kept in F32 (llama-hparams.cpp, n_embd_r/_s)."""
    head, k_heads = fields.count("linear_key_head_dim"), fields.count("linear_num_key_heads")
    v_heads, kernel = fields.count("linear_num_value_heads"), fields.count("linear_conv_kernel_dim")
    value = fields.count("linear_value_head_dim") * v_heads
    conv = 2 * head * k_heads + value
    separate = (("ssm_beta.weight", (dims.n_embd, v_heads)), ("ssm_alpha.weight", (dims.n_embd, v_heads)))
    tensors: tuple[NamedShape, ...] = (
        ("attn_qkv.weight", (dims.n_embd, conv)),
        ("attn_gate.weight", (dims.n_embd, value)),
        ("ssm_conv1d.weight", (kernel, conv)),
        ("ssm_dt.bias", (v_heads,)),
        ("ssm_a", (v_heads,)),
        *((("ssm_ba.weight", (dims.n_embd, 2 * v_heads)),) if fused_gates else separate),
        ("ssm_norm.weight", (head,)),
        ("ssm_out.weight", (value, dims.n_embd)),
    )
    return Recurrent(layers=layers, tensors=tensors, state_bytes=4 * ((kernel - 1) * conv + head * value))
