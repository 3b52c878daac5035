"""The families qplan converts itself, as a table: adding one touches this file, and the two it reads for new shapes.

Defaults are those of transformers 5.23's configuration classes, for a config.json that leaves values out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from planner.convert import parameters as keys
from planner.convert.config import Config
from planner.convert.keyvalue import KeyValue
from planner.convert.rules import (
    ATTENTION,
    BIASES,
    EXPERTS,
    GEMMA_NORMS,
    LLAMA_LAYER,
    MIXTRAL_EXPERTS,
    MLP,
    NORMS,
    PHI3_LAYER,
    QK_NORMS,
    SHARED_EXPERT,
    Rule,
)


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
        layer_rules=LLAMA_LAYER,
        parameters=keys.llama_parameters,
        factors=keys.llama_factors,
        defaults={**_BASE, "vocab_size": 32000, "max_position_embeddings": 2048},
        interleaved_rope=True,
        writes_space_prefix=True,
        refuse=_refuse_draft,
    ),
    Family(
        model_types=("mistral",),
        architecture="llama",
        layer_rules=LLAMA_LAYER,
        parameters=keys.llama_parameters,
        factors=keys.llama_factors,
        defaults=_MISTRAL,
        interleaved_rope=True,
        writes_space_prefix=True,
    ),
    Family(
        model_types=("mixtral",),
        architecture="llama",
        layer_rules=(*NORMS, *ATTENTION, *MIXTRAL_EXPERTS),
        parameters=keys.llama_parameters,
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
        layer_rules=LLAMA_LAYER,
        parameters=keys.granite_parameters,
        factors=keys.llama_factors,
        defaults={**_BASE, "vocab_size": 32000, "max_position_embeddings": 2048},
        interleaved_rope=True,
        writes_space_prefix=True,
    ),
    Family(
        model_types=("qwen2",),
        architecture="qwen2",
        layer_rules=(*NORMS, *ATTENTION, *BIASES[:3], *MLP),
        parameters=keys.qwen_parameters("qwen2"),
        defaults=_QWEN,
    ),
    Family(
        model_types=("qwen2_moe",),
        architecture="qwen2moe",
        layer_rules=(*NORMS, *ATTENTION, *BIASES[:3], *EXPERTS, *SHARED_EXPERT),
        parameters=keys.qwen_parameters("qwen2moe"),
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
        layer_rules=(*NORMS, *ATTENTION, *QK_NORMS, *MLP),
        parameters=keys.qwen_parameters("qwen3"),
        defaults={**_QWEN, "head_dim": 128},
    ),
    Family(
        model_types=("qwen3_moe",),
        architecture="qwen3moe",
        layer_rules=(*NORMS, *ATTENTION, *QK_NORMS, *EXPERTS),
        parameters=keys.qwen_parameters("qwen3moe"),
        defaults={**_QWEN, "num_experts_per_tok": 8, "moe_intermediate_size": 768},
        refuse=_refuse_dense_layers,
    ),
    Family(
        model_types=("gemma2",),
        architecture="gemma2",
        layer_rules=(*GEMMA_NORMS, *ATTENTION, *MLP),
        parameters=keys.gemma2_parameters,
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
        layer_rules=(*GEMMA_NORMS, *ATTENTION, *QK_NORMS, *MLP),
        parameters=keys.gemma3_parameters,
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
        layer_rules=PHI3_LAYER,
        parameters=keys.phi3_parameters,
        factors=keys.phi3_factors,
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
