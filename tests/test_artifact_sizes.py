"""Safetensors artifacts: sizes measured of what the tools wrote, against the estimate.

The models are of random weights in the shapes of the table (and the demo model); all weights in bfloat16. A
quantizer that is told to load in fp32 keeps the unquantized tensors in fp32, so the table's were not.
"""

from __future__ import annotations

import csv
from functools import cache
from pathlib import Path

import pytest

from planner.core.candidate import Variant
from planner.core.model import ModelSource, ModelSpec
from planner.methods import common, get
from planner.models.architectures import spec_from_config

TABLE = Path(__file__).parent / "data" / "artifact_sizes.csv"
TOLERANCE = 0.005


@cache
def rows() -> tuple[dict[str, str], ...]:
    with TABLE.open(newline="", encoding="utf-8") as file:
        return tuple(csv.DictReader(file))


def spec(row: dict[str, str]) -> ModelSpec:
    config = {
        "model_type": row["architecture"],
        "hidden_size": int(row["hidden_size"]),
        "intermediate_size": int(row["intermediate_size"]),
        "num_hidden_layers": int(row["layers"]),
        "num_attention_heads": int(row["heads"]),
        "num_key_value_heads": int(row["kv_heads"]),
        "vocab_size": int(row["vocab_size"]),
        "max_position_embeddings": 512,
        "tie_word_embeddings": row["tied"] == "1",
        "torch_dtype": "bfloat16",
    }
    if row["experts"]:
        config |= {"num_local_experts": int(row["experts"]), "num_experts_per_tok": 2}
    source = ModelSource(kind="catalog", location="random")
    return spec_from_config(config, name=row["model"], family=None, source=source)


def variant(row: dict[str, str]) -> Variant:
    group = (int(row["group_size"]),) if row["group_size"] else ()
    made: Variant = get(row["method"]).variant(row["type"], *group)  # type: ignore[attr-defined]
    return made


def label(row: dict[str, str]) -> str:
    return "-".join((row["method"], row["type"], row["group_size"], row["model"]))


@pytest.mark.parametrize("row", rows(), ids=label)
def test_file_and_tensor_bytes(row: dict[str, str]) -> None:
    made = get(row["method"]).size(spec(row), variant(row))
    file_bytes, header_bytes = int(row["file_bytes"]), int(row["header_bytes"])
    assert made.file_bytes == pytest.approx(file_bytes, rel=TOLERANCE)
    # the state of a 4-bit bitsandbytes layer is JSON text whose length depends on a float's digits
    exact = 2e-5 if row["method"] == "bitsandbytes" else 0.0
    assert made.tensor_bytes == pytest.approx(file_bytes - header_bytes, rel=exact, abs=0)


@pytest.mark.parametrize("row", rows(), ids=label)
def test_what_stays_unquantized(row: dict[str, str]) -> None:
    if row["method"] == "none":
        return
    model = spec(row)
    sizes = get(row["method"]).tensor_bytes(model, variant(row))
    kept = sum(
        size for size, t in zip(sizes, model.tensors, strict=True) if size == common.kept_bytes(t) and t.element_count
    )
    assert kept == int(row["kept_bytes"])


def test_fp8_is_half_of_bf16_and_its_scales() -> None:
    model = spec(next(row for row in rows() if row["model"] == "llama-untied"))
    none = get("none")
    full, half = none.size(model, variant_of("bf16")), none.size(model, variant_of("fp8"))
    linear = [t for t in model.tensors if common.is_linear(t)]
    saved = sum(t.element_count - 2 * t.shape[1] for t in linear)
    assert full.tensor_bytes - half.tensor_bytes == saved


def variant_of(type_: str) -> Variant:
    made: Variant = get("none").variant(type_)  # type: ignore[attr-defined]
    return made
