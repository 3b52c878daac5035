"""Sizes of GGUF files against llama.cpp's own dry run."""

from __future__ import annotations

import csv
import dataclasses
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.core.errors import InputError, UsageError
from planner.core.model import ModelSpec, Tensor
from planner.formats.ggml import type_traits
from planner.methods import gguf, gguf_mix
from planner.models import catalog

TRUTH = Path(__file__).parent / "data" / "llamacpp_sizes.csv"
MODELS = ("llama-2-7b", "llama-3.1-8b", "mixtral-8x7b", "qwen2.5-7b", "qwen3-30b-a3b", "gemma-3-12b")


@cache
def truth() -> tuple[dict[str, str], ...]:
    with TRUTH.open(newline="", encoding="utf-8") as file:
        return tuple(csv.DictReader(file))


def model(name: str) -> ModelSpec:
    found = catalog.lookup(name)
    assert found is not None
    return found


@pytest.mark.parametrize("name", MODELS)
def test_tensor_bytes_and_types_are_those_of_the_dry_run(name: str) -> None:
    rows = [row for row in truth() if row["model"] == name]
    assert len(rows) == 70
    for row in rows:
        variant = gguf.variant(row["type"], imatrix=row["imatrix"] == "1")
        counts = Counter(gguf.tensor_types(model(name), variant))
        told = {part.split(":")[0]: int(part.split(":")[1]) for part in row["tensor_types"].split()}
        assert dict(counts) == told, (name, row["type"], row["imatrix"])
        assert gguf.size(model(name), variant).tensor_bytes == int(row["tensor_bytes"]), (name, row["type"])


def test_types_are_aligned_with_the_tensors_in_whatever_order_they_come() -> None:
    spec = model("tinyllama-1.1b")
    turned = dataclasses.replace(spec, name="turned", tensors=spec.tensors[::-1])
    assert gguf_mix.tensor_types(turned, "Q4_K_M") == gguf_mix.tensor_types(spec, "Q4_K_M")[::-1]


def test_odd_rows_fall_back_to_smaller_blocks() -> None:
    spec = model("qwen2.5-0.5b")  # rows of 896: no multiple of 256
    types = dict(zip((t.name for t in spec.tensors), gguf_mix.tensor_types(spec, "Q4_K_M"), strict=True))
    assert types["blk.0.attn_q.weight"] == "Q5_0"
    assert types["token_embd.weight"] == "Q8_0"
    assert types["blk.0.ffn_down.weight"] == "Q6_K"  # 4864 is one


def test_the_importance_matrix_is_an_input_of_size() -> None:
    spec = model("llama-2-7b")
    plain, guided = (gguf.size(spec, gguf.variant("IQ4_XS", imatrix=known)) for known in (False, True))
    assert plain.tensor_bytes > guided.tensor_bytes


def test_70b_gets_more_bits_for_its_shared_values() -> None:
    spec = model("llama-2-70b")
    types = dict(zip((t.name for t in spec.tensors), gguf_mix.tensor_types(spec, "Q4_K_M"), strict=True))
    assert {types[f"blk.{i}.attn_v.weight"] for i in range(80)} == {"Q5_K", "Q6_K"}


def test_a_type_without_fallback_is_refused() -> None:
    spec = model("qwen2.5-0.5b")
    odd = tuple(Tensor(t.name, (t.shape[0] + 32, *t.shape[1:])) if "ffn_up" in t.name else t for t in spec.tensors)
    with pytest.raises(InputError) as caught:
        gguf.tensor_bytes(dataclasses.replace(spec, name="odd", tensors=odd), gguf.variant("Q1_0"))
    assert caught.value.code == "row-not-divisible"
    assert "928" in str(caught.value)


def test_an_unknown_type_names_the_known_ones() -> None:
    with pytest.raises(UsageError, match="Q4_K_X") as caught:
        gguf.variant("Q4_K_X")
    assert "Q4_K_M" in caught.value.hint


def test_a_mixture_type_is_offered_for_mixtures_only() -> None:
    assert "MXFP4_MOE" not in {v.type for v in gguf.variants(model("llama-2-7b"))}
    assert "MXFP4_MOE" in {v.type for v in gguf.variants(model("gpt-oss-20b"))}
    assert all(v.imatrix for v in gguf.variants(model("llama-2-7b")) if v.type.startswith("IQ2"))


@pytest.mark.parametrize("name", ["llama-2-7b", "qwen2.5-7b"])
def test_file_bytes_are_those_of_published_files(name: str) -> None:
    """Sizes on the hub: TheBloke/Llama-2-7B-GGUF, Qwen/Qwen2.5-7B-Instruct-GGUF (Q4_K_M), within 0.01 %."""
    published = {"llama-2-7b": 4081004224, "qwen2.5-7b": 4683073536}[name]
    assert gguf.size(model(name), gguf.variant("Q4_K_M")).file_bytes == pytest.approx(published, rel=1e-4)


@given(st.sampled_from(catalog.names()), st.sampled_from(sorted(gguf_mix.file_types())), st.booleans())
@settings(max_examples=60, deadline=None)
def test_every_catalog_model_has_a_size_or_a_refusal(name: str, type_: str, imatrix: bool) -> None:
    spec = model(name)
    try:
        size = gguf.size(spec, gguf.variant(type_, imatrix=imatrix))
    except InputError as error:
        assert error.code == "row-not-divisible"
        return
    least = type_traits(gguf_mix.file_type(type_).default_type).bits_per_weight
    assert size.bits_per_weight >= least * 0.8 or type_ == "MXFP4_MOE"
    assert 0 < size.metadata_bytes < 40_000_000
    assert size.file_bytes >= size.tensor_bytes + size.metadata_bytes


@given(st.sampled_from(MODELS))
@settings(max_examples=6, deadline=None)
def test_bytes_rise_with_bits(name: str) -> None:
    order = ["IQ1_S", "IQ2_XXS", "IQ2_M", "Q2_K", "Q3_K_S", "Q4_K_S", "Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0", "F16"]
    sizes = [gguf.size(model(name), gguf.variant(type_)).tensor_bytes for type_ in order]
    assert sizes == sorted(sizes)
