"""Checkpoints of real shapes with random weights: the cost of quantizing depends on the shapes alone."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from planner.convert.config import make_config
from planner.convert.families import find_family
from planner.convert.rules import MODEL_RULES, dimensions, expert_count
from planner.core.data import data_path
from planner.models import catalog

TOKENIZER = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
SHARD_BYTES = 2 << 30
_DRAW = 1 << 22
"""Weights drawn at a time."""


def random_checkpoint(shape: str, folder: Path, *, layers: int | None = None) -> Path:
    """The checkpoint of the catalog's ``shape`` in ``folder``, with ``layers`` if given; made unless it is there."""
    config = catalog.config(shape)
    assert config is not None, shape
    if layers is not None:
        config["num_hidden_layers"] = layers
    checkpoint = folder / (shape if layers is None else f"{shape}-{layers}-layers")
    if not (checkpoint / "config.json").exists():
        print(f"{checkpoint.name}: {write_checkpoint(checkpoint, config) / 1e9:.2f} GB of random weights", flush=True)
    return checkpoint


def write_checkpoint(
    directory: Path, config: Mapping[str, Any], *, dtype: str = "BF16", seed: int = 0, shard_bytes: int = SHARD_BYTES
) -> int:
    """Write a checkpoint of the shape ``config`` with normally distributed weights; its weight bytes.

    The tokenizer is the demo model's, padded to the vocabulary of the shape; shards are of ``shard_bytes``.
    """
    directory.mkdir(parents=True, exist_ok=True)
    architecture = "".join(part.capitalize() for part in config["model_type"].removesuffix("_text").split("_"))
    stated = {"architectures": [f"{architecture}ForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, **config}
    for name in TOKENIZER:
        shutil.copy(data_path("demo/model") / name, directory / name)
    width = {"BF16": 2, "F16": 2, "F32": 4}[dtype]
    shards: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    size = 0
    for name, shape in tensor_shapes(config):
        count = int(np.prod(shape)) * width
        if shards[-1] and size + count > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append((name, shape))
        size += count
    places: dict[str, str] = {}
    draw, total = np.random.default_rng(seed), 0
    for number, tensors in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        total += _write_shard(directory / name, tensors, dtype, width, draw)
        places.update((tensor, name) for tensor, _ in tensors)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "config.json").write_text(json.dumps(stated))
    return total


def tensor_shapes(config: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a checkpoint's tensors, in the order Hugging Face writes them: by name."""
    family = find_family(config["model_type"])
    assert family is not None
    made = make_config(str(config["model_type"]), config, family.defaults)
    sizes = dimensions(made)
    found = {}
    for rule in MODEL_RULES:
        if rule.required or not made.get("tie_word_embeddings"):
            prefix = "" if rule.source.startswith("lm_head") else "model."
            found[prefix + rule.source] = tuple(sizes[dim] for dim in rule.dims)
    rules = {rule.target: rule for rule in reversed(family.layer_rules) if rule.required}
    for layer in range(made.integer("num_hidden_layers")):
        for rule in rules.values():
            for expert in range(expert_count(made) if "*" in rule.source else 1):
                source = rule.source.replace("*", str(expert))
                found[f"model.layers.{layer}.{source}"] = tuple(sizes[dim] for dim in rule.dims)
    return iter(sorted(found.items()))


def _write_shard(
    path: Path, tensors: list[tuple[str, tuple[int, ...]]], dtype: str, width: int, draw: np.random.Generator
) -> int:
    header, offset = {}, 0
    for name, shape in tensors:
        size = int(np.prod(shape)) * width
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, shape in tensors:
            count = int(np.prod(shape))
            for start in range(0, count, _DRAW):
                values = draw.standard_normal(min(_DRAW, count - start), dtype=np.float32) * np.float32(0.02)
                if name.endswith("norm.weight"):
                    values += 1
                file.write(_stored(values, dtype))
    return offset


def _stored(values: np.ndarray[Any, Any], dtype: str) -> bytes:
    if dtype == "BF16":
        return (values.view("<u4") >> 16).astype("<u2").tobytes()
    return values.astype("<f2" if dtype == "F16" else "<f4").tobytes()
