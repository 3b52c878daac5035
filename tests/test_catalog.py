"""The model catalog: every entry builds, counts match what is published, sizes match llama.cpp's own files."""

from __future__ import annotations

import csv
import time
import tomllib
from collections import Counter
from pathlib import Path

import pytest

from planner.core.data import data_path
from planner.core.model import ModelSpec, Tensor
from planner.models import catalog
from planner.models.architectures import known_model_types

REQUIRED_NAMES = """
llama-7b llama-13b llama-30b llama-65b llama-2-7b llama-2-13b llama-2-70b llama-3-8b llama-3-70b llama-3.1-8b
llama-3.1-70b llama-3.1-405b llama-3.2-1b llama-3.2-3b llama-3.3-70b llama-4-scout mistral-7b-v0.1 mistral-7b-v0.3
mixtral-8x7b mixtral-8x22b mistral-nemo-12b mistral-small-24b tinyllama-1.1b qwen2.5-0.5b qwen2.5-1.5b qwen2.5-3b
qwen2.5-7b qwen2.5-14b qwen2.5-32b qwen2.5-72b qwen2.5-coder-7b qwen2.5-coder-32b qwen3-0.6b qwen3-1.7b qwen3-4b
qwen3-8b qwen3-14b qwen3-32b qwen3-30b-a3b qwen3-235b-a22b gemma-2-2b gemma-2-9b gemma-2-27b gemma-3-1b gemma-3-4b
gemma-3-12b gemma-3-27b phi-3-mini phi-3-medium phi-3.5-mini phi-4 phi-4-mini deepseek-v2-lite deepseek-v3
deepseek-r1 deepseek-r1-distill-qwen-7b deepseek-r1-distill-llama-8b gpt-oss-20b gpt-oss-120b smollm2-135m
smollm2-360m smollm2-1.7b granite-3.3-2b granite-3.3-8b falcon3-1b falcon3-3b falcon3-7b falcon3-10b yi-6b yi-9b
yi-34b glm-4-9b glm-4.5-air command-r olmo-2 codellama-7b vicuna-7b
"""

# Bytes of all tensors padded to 32 and count of F16 tensors in llama.cpp's F32 and F16 files
# (llama_model_quantize of llama-cpp-python 0.3.36).
LLAMACPP_SIZES = {
    "llama-2-7b": (26953662464, 13477363712, 226, 65),
    "llama-3.1-8b": (32121045248, 16061055232, 226, 66),
    "mixtral-8x7b": (186811170816, 93408215040, 226, 97),
    "qwen2.5-7b": (30462466048, 15231899648, 198, 141),
    "qwen3-30b-a3b": (122128490496, 61089832960, 338, 241),
    "gemma-3-12b": (47063153664, 23533108224, 337, 289),
}


def spec_of(name: str) -> ModelSpec:
    spec = catalog.lookup(name)
    assert spec is not None, name
    return spec


def stays_f32(tensor: Tensor) -> bool:
    """Rule of llama-quant.cpp for the tensors of these families."""
    kept = "_norm.weight" in tensor.name or "ffn_gate_inp" in tensor.name
    return len(tensor.shape) < 2 or kept or not tensor.name.endswith("weight")


def padded_bytes(spec: ModelSpec, *, half: bool) -> int:
    sizes = (t.element_count * (2 if half and not stays_f32(t) else 4) for t in spec.tensors)
    return sum(-(-size // 32) * 32 for size in sizes)


@pytest.mark.parametrize("name", REQUIRED_NAMES.split())
def test_required_name_is_known(name: str) -> None:
    assert catalog.lookup(name) is not None


@pytest.mark.parametrize("name", LLAMACPP_SIZES)
def test_tensor_bytes_equal_llamacpp(name: str) -> None:
    spec = spec_of(name)
    kept = sum(map(stays_f32, spec.tensors))
    got = (padded_bytes(spec, half=False), padded_bytes(spec, half=True), len(spec.tensors) - kept, kept)
    assert got == LLAMACPP_SIZES[name]


def test_loaded_f16_weights_of_latent_attention_equal_llamacpp() -> None:
    """What llama.cpp reports as the model's host buffer with nothing offloaded."""
    assert padded_bytes(spec_of("deepseek-v2-lite"), half=True) == 31420037120


@pytest.mark.parametrize("name", catalog.names())
def test_entry_is_consistent(name: str) -> None:
    spec = spec_of(name)
    assert spec.name == name
    assert spec.source.kind == "catalog"
    assert spec.source.source
    assert spec.source.date
    assert spec.source.hub_id
    assert spec.tokenizer in ("spm", "bpe")
    assert len(spec.attention) == spec.n_layer
    assert max(Counter(t.name for t in spec.tensors).values()) == 1
    shapes = {t.name: t.shape for t in spec.tensors}
    assert shapes["token_embd.weight"] == (spec.n_embd, spec.n_vocab)
    assert all(extent > 0 for t in spec.tensors for extent in t.shape)
    assert spec.active_parameter_count <= spec.parameter_count


def published_counts() -> dict[str, int]:
    models = tomllib.loads(data_path("models.toml").read_text(encoding="utf-8"))["model"]
    return {model["name"]: model["parameter_count"] for model in models if "parameter_count" in model}


@pytest.mark.parametrize(("name", "count"), published_counts().items())
def test_parameter_count_is_the_published_one(name: str, count: int) -> None:
    weights = [t.element_count for t in spec_of(name).tensors if not t.name.startswith("rope_")]
    assert sum(weights) == count


def test_most_entries_have_a_published_count() -> None:
    assert len(published_counts()) >= 0.85 * len(catalog.names())


def test_names_and_aliases_are_unique_and_lower_case() -> None:
    owners: dict[str, str] = {}
    for entry in catalog.entries():
        assert entry.name == entry.name.lower()
        for key in {entry.name, *entry.aliases, *(hub_id.lower() for hub_id in entry.hub_ids)}:
            assert owners.setdefault(key, entry.name) == entry.name, key


@pytest.mark.parametrize(
    ("text", "name", "revision"),
    [
        ("LLAMA-2-13B", "llama-2-13b", None),
        ("meta-llama/Llama-2-13b-chat-hf", "llama-2-13b", None),
        ("qwen/qwen2.5-7b-instruct@abc123", "qwen2.5-7b", "abc123"),
        ("  mixtral ", "mixtral-8x7b", None),
        ("unsloth/gemma-3-27b-it", "gemma-3-27b", None),
    ],
)
def test_lookup_by_name_alias_and_hub_id(text: str, name: str, revision: str | None) -> None:
    spec = spec_of(text)
    assert (spec.name, spec.source.revision) == (name, revision)


@pytest.mark.parametrize("text", ["", "no-such-model", "meta-llama/", "@main", "llama-2-13b-awq"])
def test_unknown_is_none(text: str) -> None:
    assert catalog.lookup(text) is None


def test_the_hub_id_that_was_asked_for_is_kept() -> None:
    assert spec_of("NousResearch/Llama-2-7b-hf").source.hub_id == "NousResearch/Llama-2-7b-hf"
    assert spec_of("llama-2-7b").source.hub_id == "meta-llama/Llama-2-7b-hf"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("llama2-13b", "llama-2-13b"),
        ("Llama-2-13B-chat", "llama-2-13b"),
        ("lama-2-7b", "llama-2-7b"),
        ("qwen3 8b", "qwen3-8b"),
        ("gpt oss 20", "gpt-oss-20b"),
        ("someone/Mistral-Nemo-Instruct", "mistral-nemo-12b"),
        ("gemma3:12b-it", "gemma-3-12b"),
        ("phi4", "phi-4"),
    ],
)
def test_nearest_puts_the_meant_one_first(text: str, expected: str) -> None:
    assert catalog.nearest(text)[0] == expected


def test_nearest_is_short_and_can_be_empty() -> None:
    assert len(catalog.nearest("llama", count=3)) == 3
    assert catalog.nearest("zzzzzz") == ()


def test_config_is_a_copy() -> None:
    config = catalog.config("llama-2-7b")
    assert config is not None
    config.clear()
    assert catalog.config("llama-2-7b")
    assert catalog.config("no-such-model") is None


def test_one_lookup_parses_one_block(monkeypatch: pytest.MonkeyPatch) -> None:
    parsed: list[int] = []
    real = tomllib.loads

    def counting(text: str) -> dict[str, object]:
        parsed.append(len(text))
        return real(text)

    monkeypatch.setattr(tomllib, "loads", counting)
    for cached in (catalog._spec, catalog._parsed, catalog._index, catalog._blocks):
        cached.cache_clear()
    start = time.process_time()
    spec_of("llama-2-13b")
    print(f"lookup: {1000 * (time.process_time() - start):.1f} ms CPU")
    assert len(parsed) == 1
    assert parsed[0] < 5000


def test_every_rule_but_a_few_has_a_catalog_model() -> None:
    seen = {str((catalog.config(name) or {})["model_type"]) for name in catalog.names()}
    text_only = "llama4_text gemma3n_text qwen3_5_text qwen3_5_moe_text"
    without = "ministral3 internlm3 granitemoeshared olmo3 deepseek glm"
    assert set(known_model_types()) - seen <= {*text_only.split(), *without.split()}


def test_table_matches_the_measured_sizes_where_they_are_at_hand() -> None:
    path = Path(__file__).parent / "data" / "llamacpp_sizes.csv"
    with path.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["type"] in ("F32", "F16")]
    for row in rows:
        spec = spec_of(row["model"])
        assert padded_bytes(spec, half=row["type"] == "F16") == int(row["tensor_bytes"]), row["model"]
