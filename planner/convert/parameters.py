"""Key-values and rotary factors of each architecture, as llama.cpp's converter writes them.

They follow conversion/*.py of the llama.cpp inside llama-cpp-python 0.3.36, order included.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from planner.convert.config import Config, bad_value, checked_number
from planner.convert.keyvalue import KeyValue, f32, string, u32
from planner.convert.rules import expert_count

FILE_TYPE = u32("general.file_type", 0)
"""Marks where llama.cpp's converter writes it; ``metadata.key_values`` puts the value."""


def _shape_keys(arch: str, config: Config) -> list[KeyValue]:
    return [
        u32(f"{arch}.block_count", config.integer("num_hidden_layers")),
        u32(f"{arch}.context_length", config.integer("max_position_embeddings")),
        u32(f"{arch}.embedding_length", config.integer("hidden_size")),
        u32(f"{arch}.feed_forward_length", config.integer("intermediate_size")),
        u32(f"{arch}.attention.head_count", config.integer("num_attention_heads")),
        u32(f"{arch}.attention.head_count_kv", config.integer("num_key_value_heads")),
    ]


def _yarn_keys(arch: str, config: Config) -> list[KeyValue]:
    entries = [
        string(f"{arch}.rope.scaling.type", "yarn"),
        f32(f"{arch}.rope.scaling.factor", config.rope_number("factor")),
        u32(
            f"{arch}.rope.scaling.original_context_length", int(config.rope_number("original_max_position_embeddings"))
        ),
    ]
    attention = config.rope.get("attention_factor", config.rope.get("attn_factor"))
    for name, value in (
        ("yarn_ext_factor", config.rope.get("extrapolation_factor")),
        ("yarn_attn_factor", attention),
        ("yarn_beta_fast", config.rope.get("beta_fast")),
        ("yarn_beta_slow", config.rope.get("beta_slow")),
    ):
        if value is not None:
            entries.append(f32(f"{arch}.rope.scaling.{name}", checked_number(name, value)))
    return entries


def _rope_keys(arch: str, config: Config) -> list[KeyValue]:
    kind, entries = config.rope.get("rope_type"), []
    if kind == "linear" and config.rope.get("factor") is not None:
        entries = [
            string(f"{arch}.rope.scaling.type", "linear"),
            f32(f"{arch}.rope.scaling.factor", config.rope_number("factor")),
        ]
    elif kind == "yarn" and config.rope.get("factor") is not None:
        entries = _yarn_keys(arch, config)
    elif kind in ("su", "longrope"):
        entries = [string(f"{arch}.rope.scaling.type", "longrope")]
    if config.rope.get("rope_theta") is not None:
        entries.append(f32(f"{arch}.rope.freq_base", config.rope_number("rope_theta")))
    if config.rope_theta_sliding is not None:
        entries.append(f32(f"{arch}.rope.freq_base_swa", config.rope_theta_sliding))
    return entries


def common_parameters(arch: str, config: Config, *, head_dim: int | None) -> list[KeyValue]:
    """What ``TextModel.set_gguf_parameters`` of conversion/base.py writes for these families, in its order."""
    entries = [*_shape_keys(arch, config), *_rope_keys(arch, config)]
    entries.append(f32(f"{arch}.attention.layer_norm_rms_epsilon", config.number("rms_norm_eps")))
    if experts := expert_count(config):
        entries.append(u32(f"{arch}.expert_count", experts))
        entries.append(u32(f"{arch}.expert_used_count", config.integer("num_experts_per_tok")))
    if head_dim is not None:
        entries.append(u32(f"{arch}.attention.key_length", head_dim))
        entries.append(u32(f"{arch}.attention.value_length", head_dim))
    return [*entries, FILE_TYPE]


def _stated_head_dim(config: Config) -> int | None:
    return config.integer("head_dim") if config.get("head_dim") is not None else None


def llama_parameters(config: Config) -> list[KeyValue]:
    """``LlamaModel.set_gguf_parameters`` (conversion/llama.py); Mistral and Mixtral are llamas there."""
    # transformers fills in head_dim for llama and mistral, but not for mixtral
    stated = _stated_head_dim(config) if config.model_type == "mixtral" else config.head_dim
    return [
        *common_parameters("llama", config, head_dim=stated),
        u32("llama.vocab_size", config.integer("vocab_size")),
        u32("llama.rope.dimension_count", config.head_dim),
    ]


def granite_parameters(config: Config) -> list[KeyValue]:
    """``GraniteModel.set_gguf_parameters`` (conversion/granite.py): a llama with four multipliers and no head_dim."""
    entries = common_parameters("granite", config, head_dim=None)
    entries.append(u32("granite.vocab_size", config.integer("vocab_size")))
    entries.append(u32("granite.rope.dimension_count", config.head_dim))
    for name, key in (
        ("attention_multiplier", "attention.scale"),
        ("embedding_multiplier", "embedding_scale"),
        ("residual_multiplier", "residual_scale"),
        ("logits_scaling", "logit_scale"),
    ):
        if config.get(name):
            entries.append(f32(f"granite.{key}", config.number(name)))
    return entries


def qwen_parameters(arch: str) -> Callable[[Config], list[KeyValue]]:
    """``Qwen2Model`` to ``Qwen3MoeModel`` (conversion/qwen.py), for the architecture ``arch``."""

    def parameters(config: Config) -> list[KeyValue]:
        entries = common_parameters(arch, config, head_dim=_stated_head_dim(config))
        if expert_count(config):
            for name, key in (
                ("moe_intermediate_size", "expert_feed_forward_length"),
                ("shared_expert_intermediate_size", "expert_shared_feed_forward_length"),
            ):
                if config.get(name) is not None:
                    entries.append(u32(f"{arch}.{key}", config.integer(name)))
        return entries

    return parameters


def gemma2_parameters(config: Config) -> list[KeyValue]:
    """``Gemma2Model.set_gguf_parameters`` (conversion/gemma.py)."""
    shape = {entry.key: entry for entry in _shape_keys("gemma2", config)}
    order = ("context_length", "embedding_length", "block_count", "feed_forward_length")
    return [
        *(shape.pop(f"gemma2.{name}") for name in order),
        *shape.values(),
        f32("gemma2.attention.layer_norm_rms_epsilon", config.number("rms_norm_eps")),
        u32("gemma2.attention.key_length", config.head_dim),
        u32("gemma2.attention.value_length", config.head_dim),
        FILE_TYPE,
        f32("gemma2.attn_logit_softcapping", config.number("attn_logit_softcapping")),
        f32("gemma2.final_logit_softcapping", config.number("final_logit_softcapping")),
        u32("gemma2.attention.sliding_window", config.integer("sliding_window")),
    ]


def gemma3_parameters(config: Config) -> list[KeyValue]:
    """``Gemma3Model.set_gguf_parameters`` (conversion/gemma.py)."""
    entries = common_parameters("gemma3", config, head_dim=config.head_dim)
    if config.get("final_logit_softcapping"):
        entries.append(f32("gemma3.final_logit_softcapping", config.number("final_logit_softcapping")))
    if config.get("sliding_window_pattern") != 1:
        entries.append(u32("gemma3.attention.sliding_window", config.integer("sliding_window")))
    return entries


def _phi3_rotary(config: Config) -> tuple[int, float]:
    """Rotary dimensions and the trained context of a Phi-3."""
    share = config.rope_number("partial_rotary_factor", 1.0)
    dims = int(share * config.integer("hidden_size")) // config.integer("num_attention_heads")
    return dims, config.rope_number("original_max_position_embeddings")


def phi3_parameters(config: Config) -> list[KeyValue]:
    """``Phi3MiniModel.set_gguf_parameters`` (conversion/phi.py)."""
    dims, trained_context = _phi3_rotary(config)
    shape = {entry.key: entry for entry in _shape_keys("phi3", config)}
    order = ("embedding_length", "feed_forward_length", "block_count")
    entries = [
        shape.pop("phi3.context_length"),
        u32("phi3.rope.scaling.original_context_length", int(trained_context)),
        *(shape.pop(f"phi3.{name}") for name in order),
        *shape.values(),
        f32("phi3.attention.layer_norm_rms_epsilon", config.number("rms_norm_eps")),
        u32("phi3.rope.dimension_count", dims),
        f32("phi3.rope.freq_base", config.rope_number("rope_theta")),
        FILE_TYPE,
        # 0 tells llama.cpp that there is no window (Phi-4)
        u32("phi3.attention.sliding_window", config.integer("sliding_window") if config.get("sliding_window") else 0),
    ]
    if config.rope.get("long_factor"):
        entries.insert(0, f32("phi3.rope.scaling.attn_factor", _phi3_attention_factor(config, trained_context)))
    return entries


def _phi3_attention_factor(config: Config, trained_context: float) -> float:
    """Scale of the attention scores beyond the trained context: ``Phi3MiniModel.generate_extra_tensors``."""
    scale = config.integer("max_position_embeddings") / trained_context
    if scale <= 1.0:
        return 1.0
    if config.rope.get("rope_type") == "yarn":
        return 0.1 * math.log(scale) + 1.0
    return math.sqrt(1 + math.log(scale) / math.log(trained_context))


def phi3_factors(config: Config) -> dict[str, tuple[float, ...]]:
    """Long and short rotary factors of a 128k Phi-3: ``Phi3MiniModel.generate_extra_tensors``."""
    dims, _ = _phi3_rotary(config)
    found = {}
    for name in ("long_factor", "short_factor"):
        factors = config.rope.get(name)
        if config.rope.get("long_factor") and (not isinstance(factors, list) or len(factors) != dims // 2):
            raise bad_value(f"rope_scaling.{name}", factors, f"a list of {dims // 2} numbers")
        if factors:
            found[f"rope_factors_{name.removesuffix('_factor')}.weight"] = tuple(
                checked_number(name, x) for x in factors
            )
    return found


def llama_factors(config: Config) -> dict[str, tuple[float, ...]]:
    """``rope_freqs``: by how much Llama 3.1 slows each rotary pair down.

    ``LlamaModel.generate_extra_tensors`` in conversion/llama.py; the same as transformers'
    ``_compute_llama3_parameters``. It computes frequencies and wave lengths in float32, and so does this.
    """
    if str(config.rope.get("rope_type", "")).lower() != "llama3":
        return {}
    import numpy as np

    dim, base = config.head_dim, config.rope_number("rope_theta")
    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    wavelengths = (2 * math.pi / (np.float32(1.0) / np.float32(base) ** exponents)).astype(np.float32)
    factor, trained = config.rope_number("factor", 8.0), config.rope_number("original_max_position_embeddings", 8192)
    low, high = config.rope_number("low_freq_factor", 1.0), config.rope_number("high_freq_factor", 4.0)
    if high == low:
        raise bad_value("rope_parameters.high_freq_factor", high, "another than low_freq_factor")
    factors = []
    for wavelength in wavelengths:
        if wavelength < trained / high:
            factors.append(1.0)
        elif wavelength > trained / low:
            factors.append(factor)
        else:
            smooth = (np.float32(trained) / wavelength - np.float32(low)) / np.float32(high - low)
            factors.append(float(1 / ((1 - smooth) / np.float32(factor) + smooth)))
    return {"rope_freqs.weight": tuple(factors)}
