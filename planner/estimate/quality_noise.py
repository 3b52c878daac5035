"""How much noise a quantized model's weights carry: the axis on which all types of all methods are compared.

The loss of perplexity grows in proportion to the relative squared error of the weights, whatever the quantizer
(Malinovskii et al. 2024, arXiv:2411.17525: a layer's error times the layer's sensitivity, added up). So

    noise = (sum over roles of sensitivity * mean error of the role's tensors) / (sum of sensitivities) + activations

with errors on normally distributed weights from ``data/type_noise.csv`` (``benchmarks/type_noise.py``), each corrected
by a fitted factor. The type of each tensor is llama.cpp's own choice for a file type, a recipe's, or what a file holds.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from dataclasses import dataclass
from functools import cache, lru_cache

from planner.core.candidate import Variant
from planner.core.data import number, read_table
from planner.core.errors import InputError, UsageError
from planner.core.model import ModelSpec
from planner.formats.ggml import type_traits
from planner.methods import common, gguf, gguf_mix

EXACT = "16bit"
"""Stands for every type that keeps a weight as it is, to rounding."""
ROLES = (
    gguf_mix.ATTENTION_Q,
    gguf_mix.ATTENTION_K,
    gguf_mix.ATTENTION_V,
    gguf_mix.ATTENTION_QKV,
    gguf_mix.ATTENTION_OUTPUT,
    gguf_mix.FFN_GATE,
    gguf_mix.FFN_UP,
    gguf_mix.FFN_DOWN,
    gguf_mix.OUTPUT,
    gguf_mix.TOKEN_EMBEDDING,
    gguf_mix.OTHER,
)
GRIDS = ("awq", "gptq")
"""Methods that start from a uniform grid over groups of weights."""


@dataclass(frozen=True, slots=True)
class Share:
    """The part of a role's weights that one type holds."""

    role: str
    kind: str
    """A ggml type, :data:`EXACT`, or ``method.type``."""
    fraction: float


@lru_cache(maxsize=4096)
def shares(model: ModelSpec, variant: Variant) -> tuple[Share, ...] | None:
    """Which types hold which part of each role's weights; ``None`` where llama.cpp has no such mix for the model."""
    held = _held(model, variant)
    if held is None:
        return None
    counts: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for (role, type_), count in held.items():
        if role is not None:
            counts[role][_kind(variant, type_)] += count
    if model.tied_embeddings and gguf_mix.TOKEN_EMBEDDING in counts:
        counts[gguf_mix.OUTPUT] = counts[gguf_mix.TOKEN_EMBEDDING]
    return tuple(
        Share(role, kind, count / sum(of_role.values()))
        for role, of_role in counts.items()
        for kind, count in of_role.items()
    )


@lru_cache(maxsize=4096)
def _held(model: ModelSpec, variant: Variant) -> dict[tuple[str | None, str], int] | None:
    """Weights by role (``None`` for vectors) and type."""
    types = _types(model, variant)
    if types is None:
        return None
    held: dict[tuple[str | None, str], int] = defaultdict(int)
    for (role, count), type_ in zip(_roles(model), types, strict=True):
        held[role, type_] += count
    return held


@lru_cache(maxsize=512)
def _roles(model: ModelSpec) -> tuple[tuple[str | None, int], ...]:
    """Role, ``None`` for a vector, and number of weights of each tensor."""
    return tuple((gguf_mix.category(t.name) if len(t.shape) >= 2 else None, t.element_count) for t in model.tensors)


def _kind(variant: Variant, type_: str) -> str:
    if variant.method != "gguf":
        return type_
    return EXACT if type_traits(type_).block_weights == 1 else type_


def _types(model: ModelSpec, variant: Variant) -> tuple[str, ...] | None:
    """The ggml type of each tensor, or for other methods whether they quantize it."""
    if variant.method != "gguf":
        label = f"{variant.method}.{variant.type}"
        return tuple(label if common.is_linear(tensor) else EXACT for tensor in model.tensors)
    try:
        return gguf.tensor_types(model, dataclasses.replace(variant, imatrix=guided(variant)))
    except (InputError, UsageError):
        return None


def stored_bits(model: ModelSpec, variant: Variant) -> float | None:
    """Bits per weight of a GGUF variant's tensors; ``None`` where llama.cpp has no such mix for the model."""
    held = _held(model, variant)
    if held is None:
        return None
    return sum(count * type_traits(type_).bits_per_weight for (_, type_), count in held.items()) / sum(held.values())


def guided(variant: Variant) -> bool:
    """Whether an importance matrix guides the quantizer: asked for, or demanded by the type."""
    known = gguf_mix.file_types().get(variant.type) if variant.method == "gguf" else None
    return variant.imatrix or (known is not None and known.requires_imatrix)


@cache
def _errors() -> dict[tuple[str, str, str], tuple[float, float]]:
    """Relative squared error without and with an importance matrix, by method, type and group size."""
    return {
        (row["method"], row["type"], row["group_size"]): (
            float(row["relative_error"]),
            number(row["relative_error_imatrix"]) or float(row["relative_error"]),
        )
        for row in read_table("type_noise.csv")
    }


def error_of(variant: Variant, kind: str) -> float | None:
    """Relative squared error of a kind on normally distributed weights; ``None`` for one that was never computed."""
    if kind == EXACT:
        return 0.0
    if variant.method == "gguf":
        found = _errors().get(("gguf", kind, ""))
        return None if found is None else found[guided(variant)]
    if variant.method in GRIDS:
        size = variant.group_size
        found = _errors().get(("uniform", variant.type, "-1" if size is None or size <= 0 else str(size)))
    else:
        found = _errors().get((variant.method, variant.type, ""))
    return None if found is None else found[0]


def type_class(kind: str) -> str:
    """``K``, ``I``, ``legacy`` or ``micro`` for ggml's types and file types; other methods' kinds are their method."""
    if "." in kind:
        return kind.partition(".")[0]
    if kind.startswith(("IQ", "TQ")):
        return "I"
    if "_K" in kind:
        return "K"
    return "micro" if "FP4" in kind else "legacy"


def corrections(variant: Variant, kind: str) -> dict[str, float]:
    """The fitted factors, with their exponents, that correct the error of a kind."""
    if kind == EXACT:
        return {}
    group = type_class(kind)
    powers = {f"class.{group}": 1.0, f"type.{kind}": 1.0}
    if variant.method == "gguf":
        powers[f"imatrix.{group}"] = 1.0 if guided(variant) else 0.0
    if variant.method in GRIDS:
        whole_row = variant.group_size is None or variant.group_size <= 0
        powers["group.none"] = 1.0 if whole_row else 0.0
        powers["act_order"] = 1.0 if variant.act_order and variant.method == "gptq" else 0.0
    return {name: power for name, power in powers.items() if power}


def rounds_activations(variant: Variant) -> bool:
    """Whether the runtime rounds activations too: llama.cpp multiplies quantized weights with 8-bit activations."""
    return variant.method == "gguf"
