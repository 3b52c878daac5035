"""A GGUF file of a spec with all tensor shapes and no weights, so that llama.cpp itself checks names and shapes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from planner.core.model import ModelSpec

ALIGNMENT = 32


def write_stub(spec: ModelSpec, path: Path) -> None:
    """Header, metadata and tensor table of ``spec`` with every tensor in F32; the data is a hole in a sparse file."""
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(str(path), spec.architecture)
    writer.add_string("tokenizer.ggml.model", "no_vocab")
    for key, value in hyperparameters(spec).items():
        add_value(writer, f"{spec.architecture}.{key}", value)
    data_bytes = 0
    for tensor in spec.tensors:
        nbytes = 4 * tensor.element_count
        shape = tuple(reversed(tensor.shape))
        writer.add_tensor_info(tensor.name, shape, np.dtype(np.float32), nbytes)
        data_bytes += -(-nbytes // ALIGNMENT) * ALIGNMENT
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    header_bytes = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(-(-header_bytes // ALIGNMENT) * ALIGNMENT + data_bytes)


def add_value(writer: Any, key: str, value: object) -> None:
    """Add a metadata value by its Python type."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_array(key, value)


def hyperparameters(spec: ModelSpec) -> dict[str, Any]:
    """Metadata that llama.cpp needs beside the tensors, read back from the tensor shapes where it can be."""
    shapes = {tensor.name: tensor.shape for tensor in spec.tensors}
    layer = spec.attention[-1]
    blocks = 1 + max(tensor.layer for tensor in spec.tensors if tensor.layer is not None)
    values: dict[str, Any] = {
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
    }
    if blocks > spec.n_layer:
        values["nextn_predict_layers"] = blocks - spec.n_layer
    if not spec.mla and layer.k_dim:
        values |= {"attention.key_length": layer.k_dim, "attention.value_length": layer.v_dim}
    windows = {a.window for a in spec.attention if a.window}
    values["attention.sliding_window"] = windows.pop() if windows else 0
    if spec.mixture is not None:
        values |= _mixture_values(spec, shapes)
    special = _SPECIAL.get(spec.architecture)
    return values | special(spec, shapes) if special else values


def _mixture_values(spec: ModelSpec, shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    assert spec.mixture is not None
    shared = next((shape[1] for name, shape in shapes.items() if name.endswith("ffn_gate_shexp.weight")), 0)
    return {
        "expert_count": spec.mixture.expert_count,
        "expert_used_count": spec.mixture.expert_used_count,
        "expert_feed_forward_length": spec.mixture.expert_feed_forward,
        "expert_shared_count": spec.mixture.shared_expert_count,
        "expert_shared_feed_forward_length": shared,
        "leading_dense_block_count": spec.mixture.leading_dense_layer_count,
    }


Shapes = dict[str, tuple[int, ...]]


def _deepseek2(spec: ModelSpec, shapes: Shapes) -> dict[str, Any]:
    nope, kv_rank, _ = shapes["blk.0.attn_k_b.weight"]
    rope = shapes["blk.0.attn_kv_a_mqa.weight"][1] - kv_rank
    values = {
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


def _rotated(spec: ModelSpec, shapes: Shapes) -> dict[str, Any]:
    factors = shapes.get("rope_factors_long.weight")
    return {"rope.dimension_count": 2 * factors[0], "rope.scaling.original_context_length": 4096} if factors else {}


def _llama4(spec: ModelSpec, shapes: Shapes) -> dict[str, Any]:
    dense = [name for name in shapes if name.endswith("ffn_gate.weight")]
    return {"interleave_moe_layer_step": 2 if dense else 1, "attention.sliding_window": 8192}


def _gemma3n(spec: ModelSpec, shapes: Shapes) -> dict[str, Any]:
    return {
        "altup.active_idx": 0,
        "altup.num_inputs": 4,
        "embedding_length_per_layer_input": shapes["per_layer_proj_norm.weight"][0],
        "attention.shared_kv_layers": sum(not a.owns_kv_cache for a in spec.attention),
        "activation_sparsity_scale": [0.0] * spec.n_layer,
    }


def _recurrent(spec: ModelSpec, shapes: Shapes) -> dict[str, Any]:
    """Of Granite 4 and Qwen3-Next: sizes of the state-space part and which blocks have it."""
    conv = next(shape for name, shape in shapes.items() if name.endswith("ssm_conv1d.weight"))
    norm = next(shape for name, shape in shapes.items() if name.endswith("ssm_norm.weight"))
    out = next(shape for name, shape in shapes.items() if name.endswith("ssm_out.weight"))
    heads = next(shape for name, shape in shapes.items() if name.endswith("ssm_dt.bias"))[0]
    recurrent = [a.kind == "recurrent" for a in spec.attention]
    if spec.architecture == "granitehybrid":
        groups = norm[1]
        state = (conv[1] - out[0]) // (2 * groups)
        heads_kv = [0 if r else spec.n_head_kv for r in recurrent]
        extra: dict[str, Any] = {"attention.head_count_kv": heads_kv}
    else:
        state = norm[0]
        groups = (conv[1] - out[0]) // (2 * state)
        extra = {"full_attention_interval": 1 + recurrent.index(False), "rope.dimension_count": 64}
        extra["rope.dimension_sections"] = [11, 11, 10, 0]
    return extra | {
        "ssm.conv_kernel": conv[0],
        "ssm.inner_size": out[0],
        "ssm.state_size": state,
        "ssm.time_step_rank": heads,
        "ssm.group_count": groups,
    }


_SPECIAL: dict[str, Callable[[ModelSpec, Shapes], dict[str, Any]]] = {
    "deepseek2": _deepseek2,
    "phi3": _rotated,
    "phimoe": _rotated,
    "llama4": _llama4,
    "gemma3n": _gemma3n,
    "granitehybrid": _recurrent,
    "qwen3next": _recurrent,
    "qwen35": _recurrent,
    "qwen35moe": _recurrent,
    "chatglm": lambda *_: {"rope.dimension_count": 64},
    "glm4": lambda *_: {"rope.dimension_count": 64},
    "glm4moe": lambda *_: {"rope.dimension_count": 64},
    "minimax-m2": lambda *_: {"rope.dimension_count": 64, "expert_gating_func": 2},
}


def load_errors(path: Path) -> list[str]:
    """What llama.cpp says against the file; empty when it loads. Nothing is allocated."""
    import llama_cpp

    messages: list[str] = []

    @llama_cpp.llama_log_callback
    def collect(level: int, text: bytes, _: object) -> None:
        messages.append(text.decode(errors="replace"))

    llama_cpp.llama_backend_init()
    llama_cpp.llama_log_set(collect, None)
    params = llama_cpp.llama_model_default_params()
    params.no_alloc = True
    params.load_mode = 0
    params.n_gpu_layers = 0
    params.load_mtp = True
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
    if model:
        llama_cpp.llama_model_free(model)
        return []
    return [line for line in messages if "error" in line or "fail" in line] or messages[-3:]
