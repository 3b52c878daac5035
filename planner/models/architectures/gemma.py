"""Gemma 1, 2, 3 and 3n. The output matrix is always the embedding."""

from __future__ import annotations

from dataclasses import replace

from planner.models.architectures.common import periodic, read_dims, windows_from_types
from planner.models.architectures.fields import Fields
from planner.models.architectures.layout import Dims, Layout, NamedShape

# What transformers fills in where Gemma 3's published text_config is silent (Gemma3TextConfig).
GEMMA3_DEFAULTS = {
    "vocab_size": 262208,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131072,
    "sliding_window": 4096,
}
# The converter cuts the embedding to the tokenizer's tokens, so the 64 spare rows of 262208 are not in a GGUF file
# (conversion/gemma.py; llama.cpp's file of gemma-3-12b agrees to the byte).
GEMMA3_TOKENS = 262144
_VISION_NOTE = "the vision tower is a separate file and not counted"


def gemma(fields: Fields) -> Layout:
    """Gemma 1: ``gemma``."""
    return Layout(architecture="gemma", dims=read_dims(fields), tied=True)


def gemma2(fields: Fields) -> Layout:
    """Gemma 2: ``gemma2``; norms before and after both halves, every second block full."""
    dims = read_dims(fields)
    return Layout(
        architecture="gemma2",
        dims=dims,
        tied=True,
        post_attention_norm=True,
        post_ffn_norm=True,
        windows=periodic(fields.count("sliding_window", default=4096), 2, dims.n_layer),
    )


def gemma3(fields: Fields) -> Layout:
    """Gemma 3: ``gemma3``; as Gemma 2 with normed query and key, every sixth block full."""
    fields = Fields({**GEMMA3_DEFAULTS, **fields.values}, fields.model_type)
    dims = read_dims(fields)
    spare_rows = dims.n_vocab == GEMMA3_DEFAULTS["vocab_size"]
    return Layout(
        architecture="gemma3",
        dims=replace(dims, n_vocab=GEMMA3_TOKENS) if spare_rows else dims,
        tied=True,
        qk_norm="head",
        post_attention_norm=True,
        post_ffn_norm=True,
        windows=periodic(fields.count("sliding_window"), 6, dims.n_layer),
        notes=(_VISION_NOTE,) if "vision_config" in fields.values else (),
    )


def gemma3n(fields: Fields) -> Layout:
    """Gemma 3n: ``gemma3n``; per-layer embeddings, AltUp, Laurel; the last blocks share earlier KV caches."""
    widths = fields.values.get("intermediate_size")
    width = widths[0] if isinstance(widths, list) and widths else widths
    fields = Fields({**fields.values, "intermediate_size": width}, fields.model_type)
    dims = read_dims(fields)
    per_layer, altup = fields.count("hidden_size_per_layer_input"), fields.count("altup_num_inputs", default=4)
    return Layout(
        architecture="gemma3n",
        dims=dims,
        tied=True,
        qk_norm="head",
        post_attention_norm=True,
        post_ffn_norm=True,
        windows=windows_from_types(fields, dims.n_layer, fields.count("sliding_window", default=512), period=5),
        shared_kv_layers=fields.count("num_kv_shared_layers", default=15),
        extra=_gemma3n_globals(dims, per_layer, altup),
        per_layer_extra=_gemma3n_block(dims, per_layer, altup, fields.count("laurel_rank", default=64)),
        notes=("the vision and audio towers are a separate file and not counted",),
    )


def _gemma3n_globals(dims: Dims, per_layer: int, altup: int) -> tuple[NamedShape, ...]:
    return (
        ("altup_proj.weight", (dims.n_embd, dims.n_embd, altup - 1)),
        ("altup_unembd_proj.weight", (dims.n_embd, dims.n_embd, altup - 1)),
        ("per_layer_token_embd.weight", (per_layer * dims.n_layer, dims.n_vocab)),
        ("per_layer_model_proj.weight", (dims.n_embd, per_layer * dims.n_layer)),
        ("per_layer_proj_norm.weight", (per_layer,)),
    )


def _gemma3n_block(dims: Dims, per_layer: int, altup: int, laurel_rank: int) -> tuple[NamedShape, ...]:
    return (
        ("inp_gate.weight", (dims.n_embd, per_layer)),
        ("proj.weight", (per_layer, dims.n_embd)),
        ("post_norm.weight", (dims.n_embd,)),
        ("altup_correct_coef.weight", (altup, altup)),
        ("altup_correct_scale.weight", (dims.n_embd,)),
        ("altup_predict_coef.weight", (altup, altup * altup)),
        ("altup_router.weight", (dims.n_embd, altup)),
        ("altup_router_norm.weight", (dims.n_embd,)),
        ("laurel_l.weight", (dims.n_embd, laurel_rank)),
        ("laurel_r.weight", (laurel_rank, dims.n_embd)),
        ("laurel_post_norm.weight", (dims.n_embd,)),
    )
