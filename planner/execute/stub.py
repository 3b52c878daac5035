"""A GGUF file of a spec with all tensor shapes and no weights, so that llama.cpp itself answers for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from planner.core.model import ModelSpec
from planner.formats.gguf_skeleton import StoredTensor, Value, write_skeleton

Values = dict[str, Value]
Shapes = Mapping[str, tuple[int, ...]]


def write_stub(spec: ModelSpec, path: Path, types: Sequence[str] | None = None) -> None:
    """Header, metadata and tensor table of ``spec`` as the sparse file ``path``.

    Args:
        types: ggml type of each of ``spec.tensors``; all are F32 without it.

    Raises:
        InputError: a row is no whole number of its type's blocks, or the disk knows no sparse files.
    """
    write_skeleton(path, metadata(spec), stored_tensors(spec, types))


def stored_tensors(spec: ModelSpec, types: Sequence[str] | None = None) -> list[StoredTensor]:
    """The tensor table that :func:`write_stub` writes."""
    chosen = types if types is not None else ["F32"] * len(spec.tensors)
    return [(tensor.name, tensor.shape, type_) for tensor, type_ in zip(spec.tensors, chosen, strict=True)]


def metadata(spec: ModelSpec) -> Values:
    """All metadata: the architecture, its hyper-parameters, and that there is no vocabulary."""
    own = {f"{spec.architecture}.{key}": value for key, value in hyperparameters(spec).items()}
    return {"general.architecture": spec.architecture, "tokenizer.ggml.model": "no_vocab", **own}


def hyperparameters(spec: ModelSpec) -> Values:
    """Metadata that llama.cpp needs beside the tensors, read back from the tensor shapes where it can be.

    Keys without the architecture before them. Values that change no shape and no buffer (epsilons, scales) are made up.
    Source: ``load_arch_hparams`` in src/models/*.cpp of llama.cpp as in llama-cpp-python 0.3.36.
    """
    shapes = {tensor.name: tensor.shape for tensor in spec.tensors}
    layer = spec.attention[-1]
    blocks = 1 + max((tensor.layer for tensor in spec.tensors if tensor.layer is not None), default=-1)
    values: Values = {
        "vocab_size": spec.n_vocab,
        "context_length": spec.n_ctx_train,
        "embedding_length": spec.n_embd,
        "block_count": blocks,
        "feed_forward_length": spec.n_ff,
        "attention.head_count": spec.n_head,
        "attention.head_count_kv": spec.n_head_kv,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "attention.layer_norm_epsilon": 1e-5,
        "logit_scale": 1.0,
        "attention.sliding_window": max((a.window for a in spec.attention if a.window), default=0),
    }
    if blocks > spec.n_layer:
        values["nextn_predict_layers"] = blocks - spec.n_layer
    if not spec.mla and layer.k_dim:
        values |= {"attention.key_length": layer.k_dim, "attention.value_length": layer.v_dim}
    values |= _mixture(spec, shapes)
    special = _SPECIAL.get(spec.architecture)
    return values | special(spec, shapes) if special else values


def _mixture(spec: ModelSpec, shapes: Shapes) -> Values:
    if spec.mixture is None:
        return {}
    shared = next((shape[1] for name, shape in shapes.items() if name.endswith("ffn_gate_shexp.weight")), 0)
    return {
        "expert_count": spec.mixture.expert_count,
        "expert_used_count": spec.mixture.expert_used_count,
        "expert_feed_forward_length": spec.mixture.expert_feed_forward,
        "expert_shared_count": spec.mixture.shared_expert_count,
        "expert_shared_feed_forward_length": shared,
        "leading_dense_block_count": spec.mixture.leading_dense_layer_count,
    }


def _deepseek2(spec: ModelSpec, shapes: Shapes) -> Values:
    nope, kv_rank, _ = shapes["blk.0.attn_k_b.weight"]
    rope = shapes["blk.0.attn_kv_a_mqa.weight"][1] - kv_rank
    values: Values = {
        "attention.kv_lora_rank": kv_rank,
        "attention.key_length": kv_rank + rope,
        "attention.value_length": kv_rank,
        "attention.key_length_mla": nope + rope,
        "attention.value_length_mla": shapes["blk.0.attn_v_b.weight"][1],
        "rope.dimension_count": rope,
    }
    if "blk.0.attn_q_a.weight" in shapes:
        values["attention.q_lora_rank"] = shapes["blk.0.attn_q_a.weight"][1]
    return values


def _rotated(spec: ModelSpec, shapes: Shapes) -> Values:
    factors = shapes.get("rope_factors_long.weight")
    return {"rope.dimension_count": 2 * factors[0], "rope.scaling.original_context_length": 4096} if factors else {}


def _half_rotated(spec: ModelSpec, shapes: Shapes) -> Values:
    return {"rope.dimension_count": 64}


def _llama4(spec: ModelSpec, shapes: Shapes) -> Values:
    dense = any(name.endswith("ffn_gate.weight") for name in shapes)
    return {"interleave_moe_layer_step": 2 if dense else 1, "attention.sliding_window": 8192}


def _gemma3n(spec: ModelSpec, shapes: Shapes) -> Values:
    return {
        "altup.active_idx": 0,
        "altup.num_inputs": 4,
        "embedding_length_per_layer_input": shapes["per_layer_proj_norm.weight"][0],
        "attention.shared_kv_layers": sum(not a.owns_kv_cache for a in spec.attention),
        "activation_sparsity_scale": [0.0] * spec.n_layer,
    }


def _first(shapes: Shapes, ending: str) -> tuple[int, ...]:
    return next(shape for name, shape in shapes.items() if name.endswith(ending))


def _state_space(spec: ModelSpec, shapes: Shapes, state: int, groups: int) -> Values:
    return {
        "ssm.conv_kernel": _first(shapes, "ssm_conv1d.weight")[0],
        "ssm.inner_size": _first(shapes, "ssm_out.weight")[0],
        "ssm.state_size": state,
        "ssm.time_step_rank": _first(shapes, "ssm_dt.bias")[0],
        "ssm.group_count": groups,
    }


def _granite_hybrid(spec: ModelSpec, shapes: Shapes) -> Values:
    groups = _first(shapes, "ssm_norm.weight")[1]
    state = (_first(shapes, "ssm_conv1d.weight")[1] - _first(shapes, "ssm_out.weight")[0]) // (2 * groups)
    heads = [0 if a.kind == "recurrent" else spec.n_head_kv for a in spec.attention]
    # these models rotate nothing: the converter writes so (``position_embedding_type`` is "nope")
    unrotated: Values = {"rope.scaling.finetuned": False, "attention.head_count_kv": heads}
    return unrotated | _state_space(spec, shapes, state, groups)


def _qwen_hybrid(spec: ModelSpec, shapes: Shapes) -> Values:
    state = _first(shapes, "ssm_norm.weight")[0]
    groups = (_first(shapes, "ssm_conv1d.weight")[1] - _first(shapes, "ssm_out.weight")[0]) // (2 * state)
    return {
        "full_attention_interval": 1 + [a.kind == "recurrent" for a in spec.attention].index(False),
        "rope.dimension_count": 64,
        "rope.dimension_sections": [11, 11, 10, 0],
        **_state_space(spec, shapes, state, groups),
    }


_SPECIAL: dict[str, Callable[[ModelSpec, Shapes], Values]] = {
    "deepseek2": _deepseek2,
    "phi3": _rotated,
    "phimoe": _rotated,
    "llama4": _llama4,
    "gemma3n": _gemma3n,
    "granitehybrid": _granite_hybrid,
    "qwen3next": _qwen_hybrid,
    "qwen35": _qwen_hybrid,
    "qwen35moe": _qwen_hybrid,
    "chatglm": _half_rotated,
    "glm4": _half_rotated,
    "glm4moe": _half_rotated,
    "minimax-m2": lambda *_: {"rope.dimension_count": 64, "expert_gating_func": 2},
}
