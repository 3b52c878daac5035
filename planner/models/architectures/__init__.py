"""From a published ``config.json`` to every tensor of the GGUF file: one rule per model type."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from planner.convert.support import can_convert
from planner.core.errors import UnsupportedArchitecture
from planner.core.model import ModelSource, ModelSpec
from planner.models.architectures import gemma, llama, mixtures, others, qwen
from planner.models.architectures.fields import Fields, flatten
from planner.models.architectures.layout import Layout, build_attention, build_mixture, build_tensors

_RULES: dict[str, Callable[[Fields], Layout]] = {
    "llama": llama.llama,
    "mistral": llama.llama,
    "mixtral": llama.llama,
    "internlm3": llama.llama,
    "mistral3": llama.mistral3,
    "ministral3": llama.mistral3,
    "smollm3": llama.smollm3,
    "granite": llama.granite,
    "granitemoe": llama.granite_moe,
    "granitemoeshared": llama.granite_moe,
    "granitemoehybrid": others.granite_hybrid,
    "seed_oss": llama.seed_oss,
    "internlm2": llama.internlm2,
    "exaone": llama.exaone,
    "exaone4": llama.exaone4,
    "olmo2": llama.olmo2,
    "olmo3": llama.olmo2,
    "olmoe": llama.olmoe,
    "llama4": llama.llama4,
    "llama4_text": llama.llama4,
    "qwen2": qwen.qwen2,
    "qwen2_moe": qwen.qwen2_moe,
    "qwen3": qwen.qwen3,
    "qwen3_moe": qwen.qwen3_moe,
    "qwen3_next": qwen.qwen3_next,
    "qwen3_5": qwen.qwen3_5,
    "qwen3_5_text": qwen.qwen3_5,
    "qwen3_5_moe": qwen.qwen3_5_moe,
    "qwen3_5_moe_text": qwen.qwen3_5_moe,
    "gemma": gemma.gemma,
    "gemma2": gemma.gemma2,
    "gemma3": gemma.gemma3,
    "gemma3_text": gemma.gemma3,
    "gemma3n": gemma.gemma3n,
    "gemma3n_text": gemma.gemma3n,
    "phi": others.phi2,
    "phi3": others.phi3,
    "phimoe": others.phimoe,
    "deepseek": mixtures.deepseek,
    "deepseek_v2": mixtures.deepseek2,
    "deepseek_v3": mixtures.deepseek2,
    "kimi_k2": mixtures.deepseek2,
    "gpt_oss": mixtures.gpt_oss,
    "glm4_moe": mixtures.glm4_moe,
    "glm4_moe_lite": mixtures.glm4_moe_lite,
    "minimax_m2": mixtures.minimax_m2,
    "glm": others.glm,
    "glm4": others.glm4,
    "chatglm": others.chatglm,
    "falcon": others.falcon,
    "starcoder2": others.starcoder2,
    "cohere": others.cohere,
    "cohere2": others.cohere2,
    "stablelm": others.stablelm,
}

# Families whose converter drops a stored copy of a tied output matrix (conversion/gemma.py, deepseek.py).
_NEVER_STORES_TIED = ("gemma", "gemma2", "gemma3", "gemma3n", "deepseek2", "command-r", "cohere2")


def known_model_types() -> tuple[str, ...]:
    """Values of ``model_type`` that have a rule, sorted."""
    return tuple(sorted(_RULES))


def spec_from_config(
    config: Mapping[str, Any],
    *,
    name: str,
    family: str | None,
    source: ModelSource,
    dtype: str | None = None,
    tokenizer: str | None = None,
    stored_output: bool | None = None,
) -> ModelSpec:
    """Every tensor, attention layer and routing figure that follows from ``config``.

    Args:
        config: the published ``config.json``, multimodal nesting included.
        name: what to call the model.
        family: what quality is looked up by; the architecture's name when ``None``.
        source: where the config came from.
        dtype: type of the published weights; read from the config when ``None``.
        tokenizer: ``spm``, ``bpe`` or ``wpm``, if known.
        stored_output: whether the checkpoint holds ``lm_head.weight``. llama.cpp's converter writes it then even
            if the config ties it to the embedding, and cannot where it is absent; ``None`` trusts the config.

    Raises:
        UnsupportedArchitecture: no rule for this ``model_type``.
        InputError: a needed field is missing or impossible (``bad-config``).
    """
    fields = _fields(config)
    layout = _RULES[fields.model_type](fields)
    if stored_output is not None and layout.architecture not in _NEVER_STORES_TIED:
        layout = replace(layout, tied=not stored_output)
    notes = layout.notes
    if fields.packed_by:
        notes += (f"the checkpoint is already quantized by {fields.packed_by}",)
    dims = layout.dims
    return ModelSpec(
        name=name,
        architecture=layout.architecture,
        family=family or layout.architecture,
        source=source,
        n_layer=dims.n_layer,
        n_embd=dims.n_embd,
        n_vocab=dims.n_vocab,
        n_ctx_train=dims.n_ctx_train,
        n_ff=dims.n_ff,
        tensors=build_tensors(layout),
        attention=build_attention(layout),
        mixture=build_mixture(layout),
        mla=layout.latent is not None,
        n_head=dims.n_head,
        n_head_kv=dims.n_head_kv,
        dtype=dtype or fields.dtype,
        tokenizer=tokenizer,
        convertible=can_convert(config) is None,
        notes=notes,
    )


def _fields(config: Mapping[str, Any]) -> Fields:
    """The flat fields under the outer model type if it has a rule, else under the language model's."""
    flat = flatten(config)
    for model_type in (config.get("model_type"), flat.get("model_type")):
        if isinstance(model_type, str) and model_type in _RULES:
            return Fields(flat, model_type)
    found = config.get("model_type")
    raise UnsupportedArchitecture(
        f"no shape rules for model type {found!r}" if found else "config.json names no model_type",
        numbers=f"known: {', '.join(known_model_types())}",
        hint="convert it with llama.cpp's convert_hf_to_gguf.py and give qplan the GGUF file",
    )
