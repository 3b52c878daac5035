"""The shape rules: what single config fields change, defaults of published configs, and refusal of broken ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.core.errors import InputError, QplanError, UnsupportedArchitecture
from planner.core.model import ModelSource, ModelSpec
from planner.models import catalog
from planner.models.architectures import known_model_types, spec_from_config

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 1000,
    "max_position_embeddings": 2048,
}


def build(config: Mapping[str, Any], **options: Any) -> ModelSpec:
    return spec_from_config(config, name="x", family=None, source=ModelSource(kind="catalog", location="x"), **options)


def shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    return {tensor.name: tensor.shape for tensor in spec.tensors}


def known(name: str) -> ModelSpec:
    spec = catalog.lookup(name)
    assert spec is not None
    return spec


def test_a_llama_block() -> None:
    got = shapes(build(LLAMA))
    assert got["blk.3.attn_q.weight"] == (512, 512)
    assert got["blk.3.attn_k.weight"] == (512, 128)
    assert got["blk.3.ffn_down.weight"] == (1024, 512)
    assert got["output.weight"] == (512, 1000)
    assert len(got) == 4 * 9 + 3


def test_grouped_heads_default_to_all_heads() -> None:
    config = {key: value for key, value in LLAMA.items() if key != "num_key_value_heads"}
    assert build(config).n_head_kv == 8


def test_tied_embeddings_have_no_output_matrix() -> None:
    assert build(LLAMA | {"tie_word_embeddings": True}).tied_embeddings
    assert not build(LLAMA | {"tie_word_embeddings": True}, stored_output=True).tied_embeddings
    assert build(LLAMA, stored_output=False).tied_embeddings


def test_gemma_never_gets_an_output_matrix() -> None:
    config = catalog.config("gemma-2-2b")
    assert config is not None
    assert build(config, stored_output=True).tied_embeddings


def test_own_head_dim_wins_over_the_quotient() -> None:
    spec = build(LLAMA | {"head_dim": 96})
    assert shapes(spec)["blk.0.attn_output.weight"] == (768, 512)
    assert spec.attention[0].k_dim == 96


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_llama3_frequency_scaling_adds_a_table(key: str) -> None:
    assert shapes(build(LLAMA | {key: {"rope_type": "llama3", "factor": 8.0}}))["rope_freqs.weight"] == (32,)
    assert "rope_freqs.weight" not in shapes(build(LLAMA | {key: {"rope_type": "yarn", "factor": 8.0}}))


def test_attention_bias() -> None:
    got = shapes(build(LLAMA | {"attention_bias": True}))
    assert got["blk.0.attn_k.bias"] == (128,)
    assert got["blk.0.attn_output.bias"] == (512,)


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("gemma-2-9b", [4096, None]),
        ("gemma-3-12b", [1024] * 5 + [None]),
        ("gemma-3-1b", [512] * 5 + [None]),
        ("gpt-oss-20b", [128, None]),
        ("llama-4-scout", [8192] * 3 + [None]),
        ("command-r7b", [4096] * 3 + [None]),
        ("mistral-7b-v0.1", [None]),
        ("phi-3-mini", [None]),
    ],
)
def test_sliding_windows(name: str, pattern: list[int | None]) -> None:
    spec = known(name)
    expected = [pattern[layer % len(pattern)] for layer in range(spec.n_layer)]
    assert [layer.window for layer in spec.attention] == expected
    assert {layer.kind for layer in spec.attention} <= {"full", "sliding"}


@pytest.mark.parametrize(("name", "query"), [("deepseek-v2-lite", "attn_q"), ("deepseek-v3", "attn_q_b")])
def test_latent_attention_keeps_one_wide_head(name: str, query: str) -> None:
    spec = known(name)
    layer = spec.attention[0]
    assert spec.mla
    assert (layer.head_count_kv, layer.k_dim, layer.v_dim) == (1, 576, 0)
    got = shapes(spec)
    assert got["blk.0.attn_k_b.weight"] == (128, 512, spec.n_head)
    assert got["blk.0.attn_v_b.weight"] == (512, 128, spec.n_head)
    assert f"blk.0.{query}.weight" in got
    assert ("blk.5.exp_probs_b.bias" in got) == (name == "deepseek-v3")


def test_gpt_oss_has_biases_and_sinks() -> None:
    got = shapes(known("gpt-oss-20b"))
    assert got["blk.0.attn_sinks.weight"] == (64,)
    assert got["blk.0.ffn_down_exps.bias"] == (2880, 32)
    assert got["blk.0.ffn_gate_inp.bias"] == (32,)


def test_phi3_fuses_and_keeps_long_context_tables() -> None:
    got = shapes(known("phi-3.5-mini"))
    assert got["blk.0.attn_qkv.weight"] == (3072, 9216)
    assert got["blk.0.ffn_up.weight"] == (3072, 16384)
    assert got["rope_factors_long.weight"] == (48,)
    assert "rope_factors_long.weight" not in shapes(known("phi-3-mini"))


def test_hybrid_blocks_keep_a_state_instead_of_a_cache() -> None:
    spec = known("granite-4.0-h-tiny")
    kinds = [layer.kind for layer in spec.attention]
    assert kinds.count("full") == 4
    state = next(layer for layer in spec.attention if layer.kind == "recurrent")
    assert state.state_bytes == 4 * (3 * (3072 + 2 * 128) + 128 * 3072)
    assert not state.owns_kv_cache


def test_gemma3n_shares_the_last_caches() -> None:
    assert sum(layer.owns_kv_cache for layer in known("gemma-3n-e4b").attention) == 20


def test_multi_token_blocks_are_in_the_file_but_not_counted_as_layers() -> None:
    spec = known("glm-4.5-air")
    assert spec.n_layer == len(spec.attention) == 46
    assert max(tensor.layer or 0 for tensor in spec.tensors) == 46
    assert "multi-token" in " ".join(spec.notes)


def test_nested_text_config_and_its_published_silence() -> None:
    """gemma-3-4b's config.json leaves heads and vocabulary to defaults."""
    inner = {"model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34}
    config = {"model_type": "gemma3", "text_config": inner | {"sliding_window": 1024}, "vision_config": {}}
    spec = build(config)
    assert spec.tensors == known("gemma-3-4b").tensors
    assert spec.attention == known("gemma-3-4b").attention
    assert "vision" in spec.notes[0]


@pytest.mark.parametrize(
    ("extra", "dtype"),
    [
        ({"torch_dtype": "float16"}, "f16"),
        ({"dtype": "float32"}, "f32"),
        ({"torch_dtype": "torch.bfloat16"}, "bf16"),
        ({}, "bf16"),
        ({"torch_dtype": "bfloat16", "quantization_config": {"quant_method": "fp8"}}, "fp8"),
        ({"quantization_config": {"quant_method": "mxfp4"}}, "mxfp4"),
    ],
)
def test_dtype(extra: dict[str, Any], dtype: str) -> None:
    assert build(LLAMA | extra).dtype == dtype
    assert build(LLAMA | extra, dtype="f16").dtype == "f16"


def test_a_packed_checkpoint_is_noted() -> None:
    assert "awq" in build(LLAMA | {"quantization_config": {"quant_method": "awq"}}).notes[0]


@pytest.mark.parametrize("model_type", ["rwkv", None, 7, ["llama"]])
def test_unknown_model_type_names_the_known_ones(model_type: object) -> None:
    with pytest.raises(UnsupportedArchitecture) as caught:
        build({"model_type": model_type})
    assert "llama" in caught.value.numbers


@pytest.mark.parametrize(
    "broken",
    [
        {"hidden_size": None},
        {"hidden_size": "512"},
        {"hidden_size": -512},
        {"hidden_size": 2**63},
        {"num_hidden_layers": 10**9},
        {"num_attention_heads": 7},
        {"vocab_size": 0},
        {"num_key_value_heads": True},
        {"intermediate_size": 1.5},
        {"num_local_experts": 8},
    ],
)
def test_broken_fields_are_refused(broken: dict[str, Any]) -> None:
    with pytest.raises(InputError) as caught:
        build(LLAMA | broken)
    assert caught.value.code == "bad-config"


VALUES = st.one_of(st.none(), st.booleans(), st.integers(-2, 300), st.floats(), st.text(max_size=4), st.just([]))


@settings(max_examples=150, deadline=None)
@given(model_type=st.sampled_from(known_model_types()), changes=st.data())
def test_nothing_but_a_clear_error_comes_of_a_random_config(model_type: str, changes: st.DataObject) -> None:
    names = {key for name in catalog.names() for key in catalog.config(name) or {}} - {"model_type"}
    config = changes.draw(st.dictionaries(st.sampled_from(sorted(names)), VALUES, max_size=12))
    try:
        spec = build({**LLAMA, **config, "model_type": model_type})
    except QplanError:
        return
    assert len(spec.attention) == spec.n_layer
    assert spec.parameter_count > 0


@settings(max_examples=100, deadline=None)
@given(
    heads=st.integers(1, 64),
    head_dim=st.sampled_from([32, 64, 128]),
    layers=st.integers(1, 12),
    width=st.integers(1, 8192),
)
def test_llama_parameter_count_formula(heads: int, head_dim: int, layers: int, width: int) -> None:
    n_embd = heads * head_dim
    sizes = {"hidden_size": n_embd, "num_attention_heads": heads, "num_key_value_heads": 1}
    spec = build(LLAMA | sizes | {"num_hidden_layers": layers, "intermediate_size": width})
    block = 2 * n_embd**2 + 2 * n_embd * head_dim + 3 * n_embd * width + 2 * n_embd
    assert spec.parameter_count == layers * block + 2 * 1000 * n_embd + n_embd
