"""The families qplan converts itself, as tables: adding one touches this file only.

A rule says which Hugging Face tensor becomes which GGUF tensor and what shape it must have. Names, order and
key-values follow llama.cpp's converter (conversion/*.py of the release inside llama-cpp-python 0.3.36); the defaults
are those of transformers 5.23's configuration classes, for a config.json that leaves them out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from planner.convert.config import Config, bad_value
from planner.convert.keyvalue import KeyValue, f32, string, u32


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """How the checkpoints of some ``model_type`` values become a GGUF file."""

    model_types: tuple[str, ...]
    architecture: str
    layer_rules: tuple[Rule, ...]
    parameters: Callable[[Config], list[KeyValue]]
    """Key-values of the architecture, ``{arch}.`` already in the keys, and ``FILE_TYPE`` at its place."""
    defaults: Mapping[str, Any]
    factors: Callable[[Config], dict[str, tuple[float, ...]]] = field(default=lambda config: {})
    """Tensors that are computed from the configuration: rotary factors."""
    norm_shift: float = 0.0
    interleaved_rope: bool = False
    """Rotary halves are interleaved in the GGUF file (``permute`` in conversion/llama.py)."""
    keeps_output: bool = True
    """False: a stored ``lm_head`` is left out, the model is always tied."""
    space_prefix: bool | None = None
    """Forced ``add_space_prefix`` of a SentencePiece vocabulary; ``None``: from the tokenizer's own settings."""
    writes_space_prefix: bool = False
    """``add_prefix_space`` of tokenizer_config.json goes into the file, whatever the vocabulary."""
    refuse: Callable[[Config], str | None] = field(default=lambda config: None)
    """Why a checkpoint of this family cannot be converted here."""


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
    if config.get("intermediate_size") is not None:
        sizes["ff"] = config.integer("intermediate_size")
        sizes["ff2"] = 2 * sizes["ff"]
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
_NORMS = (
    _rule("input_layernorm.weight", "attn_norm.weight", "embd"),
    _rule("post_attention_layernorm.weight", "ffn_norm.weight", "embd"),
)
_ATTENTION = (
    _rule("self_attn.q_proj.weight", "attn_q.weight", "q embd", rotary=True),
    _rule("self_attn.k_proj.weight", "attn_k.weight", "kv embd", rotary=True),
    _rule("self_attn.v_proj.weight", "attn_v.weight", "kv embd"),
    _rule("self_attn.o_proj.weight", "attn_output.weight", "embd q"),
)
_BIASES = (
    _rule("self_attn.q_proj.bias", "attn_q.bias", "q", rotary=True, required=False),
    _rule("self_attn.k_proj.bias", "attn_k.bias", "kv", rotary=True, required=False),
    _rule("self_attn.v_proj.bias", "attn_v.bias", "kv", required=False),
    _rule("self_attn.o_proj.bias", "attn_output.bias", "embd", required=False),
)
_QK_NORMS = (
    _rule("self_attn.q_norm.weight", "attn_q_norm.weight", "head"),
    _rule("self_attn.k_norm.weight", "attn_k_norm.weight", "head"),
)
_MLP = (
    _rule("mlp.gate_proj.weight", "ffn_gate.weight", "ff embd"),
    _rule("mlp.up_proj.weight", "ffn_up.weight", "ff embd"),
    _rule("mlp.down_proj.weight", "ffn_down.weight", "embd ff"),
)
_MLP_BIASES = (
    _rule("mlp.gate_proj.bias", "ffn_gate.bias", "ff", required=False),
    _rule("mlp.up_proj.bias", "ffn_up.bias", "ff", required=False),
    _rule("mlp.down_proj.bias", "ffn_down.bias", "embd", required=False),
)
_FUSED_EXPERTS = (
    _rule("mlp.experts.gate_up_proj", "ffn_gate_exps.weight", "experts ff_exp2 embd", part=(0, 2)),
    _rule("mlp.experts.gate_up_proj", "ffn_up_exps.weight", "experts ff_exp2 embd", part=(1, 2)),
    _rule("mlp.experts.down_proj", "ffn_down_exps.weight", "experts embd ff_exp"),
)
"""As transformers 5 keeps experts in memory; it writes the older one-matrix-per-expert form."""
_EXPERTS = (
    _rule("mlp.gate.weight", "ffn_gate_inp.weight", "experts embd"),
    _rule("mlp.experts.*.down_proj.weight", "ffn_down_exps.weight", "embd ff_exp"),
    _rule("mlp.experts.*.gate_proj.weight", "ffn_gate_exps.weight", "ff_exp embd"),
    _rule("mlp.experts.*.up_proj.weight", "ffn_up_exps.weight", "ff_exp embd"),
    *_FUSED_EXPERTS,
)
_MIXTRAL_EXPERTS = (
    _rule("block_sparse_moe.gate.weight", "ffn_gate_inp.weight", "experts embd"),
    _rule("block_sparse_moe.experts.*.w1.weight", "ffn_gate_exps.weight", "ff_exp embd"),
    _rule("block_sparse_moe.experts.*.w2.weight", "ffn_down_exps.weight", "embd ff_exp"),
    _rule("block_sparse_moe.experts.*.w3.weight", "ffn_up_exps.weight", "ff_exp embd"),
    _rule("mlp.gate.weight", "ffn_gate_inp.weight", "experts embd"),
    *_FUSED_EXPERTS,
)
_SHARED_EXPERT = (
    _rule("mlp.shared_expert_gate.weight", "ffn_gate_inp_shexp.weight", "one embd"),
    _rule("mlp.shared_expert.gate_proj.weight", "ffn_gate_shexp.weight", "ff_shexp embd"),
    _rule("mlp.shared_expert.up_proj.weight", "ffn_up_shexp.weight", "ff_shexp embd"),
    _rule("mlp.shared_expert.down_proj.weight", "ffn_down_shexp.weight", "embd ff_shexp"),
)
_GEMMA_NORMS = (
    _rule("input_layernorm.weight", "attn_norm.weight", "embd"),
    _rule("post_attention_layernorm.weight", "post_attention_norm.weight", "embd"),
    _rule("pre_feedforward_layernorm.weight", "ffn_norm.weight", "embd"),
    _rule("post_feedforward_layernorm.weight", "post_ffw_norm.weight", "embd"),
)
_PHI3_LAYER = (
    *_NORMS,
    _rule("self_attn.qkv_proj.weight", "attn_qkv.weight", "qkv embd"),
    _rule("self_attn.o_proj.weight", "attn_output.weight", "embd q"),
    _rule("mlp.gate_up_proj.weight", "ffn_up.weight", "ff2 embd"),
    _rule("mlp.down_proj.weight", "ffn_down.weight", "embd ff"),
)


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
        f32(f"{arch}.rope.scaling.factor", rope_number(config, "factor")),
        u32(
            f"{arch}.rope.scaling.original_context_length", int(rope_number(config, "original_max_position_embeddings"))
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
            entries.append(f32(f"{arch}.rope.scaling.{name}", value))
    return entries


def _rope_keys(arch: str, config: Config) -> list[KeyValue]:
    kind, entries = config.rope.get("rope_type"), []
    if kind == "linear" and config.rope.get("factor") is not None:
        entries = [
            string(f"{arch}.rope.scaling.type", "linear"),
            f32(f"{arch}.rope.scaling.factor", rope_number(config, "factor")),
        ]
    elif kind == "yarn" and config.rope.get("factor") is not None:
        entries = _yarn_keys(arch, config)
    elif kind in ("su", "longrope"):
        entries = [string(f"{arch}.rope.scaling.type", "longrope")]
    if config.rope.get("rope_theta") is not None:
        entries.append(f32(f"{arch}.rope.freq_base", rope_number(config, "rope_theta")))
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


def _llama_parameters(config: Config) -> list[KeyValue]:
    # transformers fills in head_dim for llama and mistral, but not for mixtral
    stated = _stated_head_dim(config) if config.model_type == "mixtral" else config.head_dim
    return [
        *common_parameters("llama", config, head_dim=stated),
        u32("llama.vocab_size", config.integer("vocab_size")),
        u32("llama.rope.dimension_count", config.head_dim),
    ]


def _granite_parameters(config: Config) -> list[KeyValue]:
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


def _qwen_parameters(arch: str) -> Callable[[Config], list[KeyValue]]:
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


def _gemma2_parameters(config: Config) -> list[KeyValue]:
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


def _gemma3_parameters(config: Config) -> list[KeyValue]:
    entries = common_parameters("gemma3", config, head_dim=config.head_dim)
    if config.get("final_logit_softcapping"):
        entries.append(f32("gemma3.final_logit_softcapping", config.number("final_logit_softcapping")))
    if config.get("sliding_window_pattern") != 1:
        entries.append(u32("gemma3.attention.sliding_window", config.integer("sliding_window")))
    return entries


def _phi3_rotary(config: Config) -> tuple[int, float]:
    """Rotary dimensions and the trained context of a Phi-3."""
    share = config.rope.get("partial_rotary_factor", 1.0)
    dims = int(share * config.integer("hidden_size")) // config.integer("num_attention_heads")
    return dims, rope_number(config, "original_max_position_embeddings")


def _phi3_parameters(config: Config) -> list[KeyValue]:
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
        f32("phi3.rope.freq_base", rope_number(config, "rope_theta")),
        FILE_TYPE,
        # 0 tells llama.cpp that there is no window (Phi-4)
        u32("phi3.attention.sliding_window", config.get("sliding_window") or 0),
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


def _phi3_factors(config: Config) -> dict[str, tuple[float, ...]]:
    dims, _ = _phi3_rotary(config)
    found = {}
    for name in ("long_factor", "short_factor"):
        factors = config.rope.get(name)
        if config.rope.get("long_factor") and (not isinstance(factors, list) or len(factors) != dims // 2):
            raise bad_value(f"rope_scaling.{name}", factors, f"a list of {dims // 2} numbers")
        if factors:
            found[f"rope_factors_{name.removesuffix('_factor')}.weight"] = tuple(float(value) for value in factors)
    return found


def _llama_factors(config: Config) -> dict[str, tuple[float, ...]]:
    """``rope_freqs``: by how much Llama 3.1 slows each rotary pair down.

    ``LlamaModel.generate_extra_tensors`` in conversion/llama.py; the same as transformers'
    ``_compute_llama3_parameters``. It computes frequencies and wave lengths in float32, and so does this.
    """
    if str(config.rope.get("rope_type", "")).lower() != "llama3":
        return {}
    import numpy as np

    dim, base = config.head_dim, rope_number(config, "rope_theta")
    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    wavelengths = (2 * math.pi / (np.float32(1.0) / np.float32(base) ** exponents)).astype(np.float32)
    factor, trained = float(config.rope.get("factor", 8.0)), config.rope.get("original_max_position_embeddings", 8192)
    low, high = float(config.rope.get("low_freq_factor", 1.0)), float(config.rope.get("high_freq_factor", 4.0))
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


def rope_number(config: Config, name: str) -> float:
    """The rotary setting ``name``.

    Raises:
        InputError: absent or no number (``bad-config``).
    """
    value = config.rope.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise bad_value(f"rope_parameters.{name}", value, "a number")
    return float(value)


def _refuse_dense_layers(config: Config) -> str | None:
    if config.get("mlp_only_layers") or config.get("decoder_sparse_step") not in (None, 1):
        return "it mixes dense and expert layers, which llama.cpp has no tensors for in this architecture"
    return None


def _refuse_gemma3(config: Config) -> str | None:
    if config.get("attn_logit_softcapping") is not None:
        return "it caps attention logits, which llama.cpp's gemma3 does not"
    if config.get("use_bidirectional_attention"):
        return "it attends in both directions (an embedding model)"
    return None


def _refuse_draft(config: Config) -> str | None:
    return "it is a draft head for speculative decoding" if config.get("draft_vocab_size") else None


_LLAMA_LAYER = (*_NORMS, *_ATTENTION, *_BIASES, *_MLP, *_MLP_BIASES)
_BASE: dict[str, Any] = {"rms_norm_eps": 1e-6, "rope_theta": 10000.0, "hidden_act": "silu"}
_QWEN: dict[str, Any] = {**_BASE, "vocab_size": 151936, "max_position_embeddings": 32768}
_GEMMA: dict[str, Any] = {
    "rms_norm_eps": 1e-6,
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "sliding_window": 4096,
}
_MISTRAL: dict[str, Any] = {
    **_BASE,
    "vocab_size": 32000,
    "max_position_embeddings": 131072,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
}

FAMILIES: tuple[Family, ...] = (
    Family(
        model_types=("llama",),
        architecture="llama",
        layer_rules=_LLAMA_LAYER,
        parameters=_llama_parameters,
        factors=_llama_factors,
        defaults={**_BASE, "vocab_size": 32000, "max_position_embeddings": 2048},
        interleaved_rope=True,
        writes_space_prefix=True,
        refuse=_refuse_draft,
    ),
    Family(
        model_types=("mistral",),
        architecture="llama",
        layer_rules=_LLAMA_LAYER,
        parameters=_llama_parameters,
        factors=_llama_factors,
        defaults=_MISTRAL,
        interleaved_rope=True,
        writes_space_prefix=True,
    ),
    Family(
        model_types=("mixtral",),
        architecture="llama",
        layer_rules=(*_NORMS, *_ATTENTION, *_MIXTRAL_EXPERTS),
        parameters=_llama_parameters,
        defaults={
            **_MISTRAL,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e6,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
        },
        interleaved_rope=True,
        writes_space_prefix=True,
    ),
    Family(
        model_types=("granite",),
        architecture="granite",
        layer_rules=_LLAMA_LAYER,
        parameters=_granite_parameters,
        factors=_llama_factors,
        defaults={**_BASE, "vocab_size": 32000, "max_position_embeddings": 2048},
        interleaved_rope=True,
        writes_space_prefix=True,
    ),
    Family(
        model_types=("qwen2",),
        architecture="qwen2",
        layer_rules=(*_NORMS, *_ATTENTION, *_BIASES[:3], *_MLP),
        parameters=_qwen_parameters("qwen2"),
        defaults=_QWEN,
    ),
    Family(
        model_types=("qwen2_moe",),
        architecture="qwen2moe",
        layer_rules=(*_NORMS, *_ATTENTION, *_BIASES[:3], *_EXPERTS, *_SHARED_EXPERT),
        parameters=_qwen_parameters("qwen2moe"),
        defaults={
            **_QWEN,
            "num_experts": 60,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 1408,
            "shared_expert_intermediate_size": 5632,
        },
        refuse=_refuse_dense_layers,
    ),
    Family(
        model_types=("qwen3",),
        architecture="qwen3",
        layer_rules=(*_NORMS, *_ATTENTION, *_QK_NORMS, *_MLP),
        parameters=_qwen_parameters("qwen3"),
        defaults={**_QWEN, "head_dim": 128},
    ),
    Family(
        model_types=("qwen3_moe",),
        architecture="qwen3moe",
        layer_rules=(*_NORMS, *_ATTENTION, *_QK_NORMS, *_EXPERTS),
        parameters=_qwen_parameters("qwen3moe"),
        defaults={**_QWEN, "num_experts_per_tok": 8, "moe_intermediate_size": 768},
        refuse=_refuse_dense_layers,
    ),
    Family(
        model_types=("gemma2",),
        architecture="gemma2",
        layer_rules=(*_GEMMA_NORMS, *_ATTENTION, *_MLP),
        parameters=_gemma2_parameters,
        defaults={
            **_GEMMA,
            "vocab_size": 256000,
            "max_position_embeddings": 8192,
            "rope_theta": 10000.0,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
        norm_shift=1.0,
        keeps_output=False,
        space_prefix=False,
    ),
    Family(
        model_types=("gemma3_text", "gemma3"),
        architecture="gemma3",
        layer_rules=(*_GEMMA_NORMS, *_ATTENTION, *_QK_NORMS, *_MLP),
        parameters=_gemma3_parameters,
        defaults={
            **_GEMMA,
            "vocab_size": 262208,
            "max_position_embeddings": 131072,
            "rope_theta": 1e6,
            "rope_local_base_freq": 10000.0,
        },
        norm_shift=1.0,
        space_prefix=False,
        refuse=_refuse_gemma3,
    ),
    Family(
        model_types=("phi3",),
        architecture="phi3",
        layer_rules=_PHI3_LAYER,
        parameters=_phi3_parameters,
        factors=_phi3_factors,
        defaults={
            **_BASE,
            "rms_norm_eps": 1e-5,
            "vocab_size": 32064,
            "max_position_embeddings": 4096,
            "original_max_position_embeddings": 4096,
        },
    ),
)


def find_family(model_type: object) -> Family | None:
    """The family of ``model_type`` of a config.json; ``None`` where qplan has none."""
    return next((family for family in FAMILIES if model_type in family.model_types), None)
