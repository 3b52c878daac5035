"""Which Hugging Face tensor becomes which GGUF tensor, and what shape it must have.

Names follow ``MODEL_TENSOR`` and ``TensorNameMap`` of the ``gguf`` package (gguf-py/gguf/tensor_mapping.py in the
llama.cpp of llama-cpp-python 0.3.36).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from planner.convert.config import Config


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One tensor of a layer (or of the model): ``source`` → ``target``.

    ``dims`` names the source's dimensions in Hugging Face's order (``dimensions`` gives their values). ``*`` in
    ``source`` is the expert's number; such tensors are stacked. ``part`` ``(i, n)`` takes the ``i``-th of ``n`` equal
    row ranges of each matrix.
    """

    source: str
    target: str
    dims: tuple[str, ...]
    required: bool = True
    rotary: bool = False
    part: tuple[int, int] = (0, 1)


def _rule(source: str, target: str, dims: str, **more: Any) -> Rule:
    return Rule(source=source, target=target, dims=tuple(dims.split()), **more)


def dimensions(config: Config) -> dict[str, int]:
    """Values of the names in ``Rule.dims``."""
    head, heads, heads_kv = (
        config.head_dim,
        config.integer("num_attention_heads"),
        config.integer("num_key_value_heads"),
    )
    sizes = {"embd": config.integer("hidden_size"), "vocab": config.integer("vocab_size"), "head": head, "one": 1}
    sizes |= {"q": heads * head, "kv": heads_kv * head, "qkv": (heads + 2 * heads_kv) * head}
    sizes |= {"ff": config.integer("intermediate_size"), "ff2": 2 * config.integer("intermediate_size")}
    if experts := expert_count(config):
        name = "moe_intermediate_size" if config.get("moe_intermediate_size") is not None else "intermediate_size"
        sizes |= {"experts": experts, "ff_exp": config.integer(name), "ff_exp2": 2 * config.integer(name)}
    if config.get("shared_expert_intermediate_size"):
        sizes["ff_shexp"] = config.integer("shared_expert_intermediate_size")
    return sizes


def expert_count(config: Config) -> int:
    """Experts per layer, 0 for a dense model."""
    name = next((name for name in ("num_local_experts", "num_experts") if config.get(name) is not None), None)
    return config.integer(name) if name else 0


MODEL_RULES = (
    _rule("embed_tokens.weight", "token_embd.weight", "vocab embd"),
    _rule("norm.weight", "output_norm.weight", "embd"),
    _rule("lm_head.weight", "output.weight", "vocab embd", required=False),
)
NORMS = (
    _rule("input_layernorm.weight", "attn_norm.weight", "embd"),
    _rule("post_attention_layernorm.weight", "ffn_norm.weight", "embd"),
)
ATTENTION = (
    _rule("self_attn.q_proj.weight", "attn_q.weight", "q embd", rotary=True),
    _rule("self_attn.k_proj.weight", "attn_k.weight", "kv embd", rotary=True),
    _rule("self_attn.v_proj.weight", "attn_v.weight", "kv embd"),
    _rule("self_attn.o_proj.weight", "attn_output.weight", "embd q"),
)
BIASES = (
    _rule("self_attn.q_proj.bias", "attn_q.bias", "q", rotary=True, required=False),
    _rule("self_attn.k_proj.bias", "attn_k.bias", "kv", rotary=True, required=False),
    _rule("self_attn.v_proj.bias", "attn_v.bias", "kv", required=False),
    _rule("self_attn.o_proj.bias", "attn_output.bias", "embd", required=False),
)
QK_NORMS = (
    _rule("self_attn.q_norm.weight", "attn_q_norm.weight", "head"),
    _rule("self_attn.k_norm.weight", "attn_k_norm.weight", "head"),
)
MLP = (
    _rule("mlp.gate_proj.weight", "ffn_gate.weight", "ff embd"),
    _rule("mlp.up_proj.weight", "ffn_up.weight", "ff embd"),
    _rule("mlp.down_proj.weight", "ffn_down.weight", "embd ff"),
)
MLP_BIASES = (
    _rule("mlp.gate_proj.bias", "ffn_gate.bias", "ff", required=False),
    _rule("mlp.up_proj.bias", "ffn_up.bias", "ff", required=False),
    _rule("mlp.down_proj.bias", "ffn_down.bias", "embd", required=False),
)
FUSED_EXPERTS = (
    _rule("mlp.experts.gate_up_proj", "ffn_gate_exps.weight", "experts ff_exp2 embd", part=(0, 2)),
    _rule("mlp.experts.gate_up_proj", "ffn_up_exps.weight", "experts ff_exp2 embd", part=(1, 2)),
    _rule("mlp.experts.down_proj", "ffn_down_exps.weight", "experts embd ff_exp"),
)
"""As transformers 5 keeps experts in memory; it writes the older one-matrix-per-expert form."""
EXPERTS = (
    _rule("mlp.gate.weight", "ffn_gate_inp.weight", "experts embd"),
    _rule("mlp.experts.*.down_proj.weight", "ffn_down_exps.weight", "embd ff_exp"),
    _rule("mlp.experts.*.gate_proj.weight", "ffn_gate_exps.weight", "ff_exp embd"),
    _rule("mlp.experts.*.up_proj.weight", "ffn_up_exps.weight", "ff_exp embd"),
    *FUSED_EXPERTS,
)
MIXTRAL_EXPERTS = (
    _rule("block_sparse_moe.gate.weight", "ffn_gate_inp.weight", "experts embd"),
    _rule("block_sparse_moe.experts.*.w1.weight", "ffn_gate_exps.weight", "ff_exp embd"),
    _rule("block_sparse_moe.experts.*.w2.weight", "ffn_down_exps.weight", "embd ff_exp"),
    _rule("block_sparse_moe.experts.*.w3.weight", "ffn_up_exps.weight", "ff_exp embd"),
    _rule("mlp.gate.weight", "ffn_gate_inp.weight", "experts embd"),
    *FUSED_EXPERTS,
)
SHARED_EXPERT = (
    _rule("mlp.shared_expert_gate.weight", "ffn_gate_inp_shexp.weight", "one embd"),
    _rule("mlp.shared_expert.gate_proj.weight", "ffn_gate_shexp.weight", "ff_shexp embd"),
    _rule("mlp.shared_expert.up_proj.weight", "ffn_up_shexp.weight", "ff_shexp embd"),
    _rule("mlp.shared_expert.down_proj.weight", "ffn_down_shexp.weight", "embd ff_shexp"),
)
GEMMA_NORMS = (
    _rule("input_layernorm.weight", "attn_norm.weight", "embd"),
    _rule("post_attention_layernorm.weight", "post_attention_norm.weight", "embd"),
    _rule("pre_feedforward_layernorm.weight", "ffn_norm.weight", "embd"),
    _rule("post_feedforward_layernorm.weight", "post_ffw_norm.weight", "embd"),
)
PHI3_LAYER = (
    *NORMS,
    _rule("self_attn.qkv_proj.weight", "attn_qkv.weight", "qkv embd"),
    _rule("self_attn.o_proj.weight", "attn_output.weight", "embd q"),
    _rule("mlp.gate_up_proj.weight", "ffn_up.weight", "ff2 embd"),
    _rule("mlp.down_proj.weight", "ffn_down.weight", "embd ff"),
)

LLAMA_LAYER = (*NORMS, *ATTENTION, *BIASES, *MLP, *MLP_BIASES)
