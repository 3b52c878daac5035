"""Loss of quantization as a fitted formula: ln(perplexity ratio) of a variant of a model of some family and size.

    ln(ratio) = C * 4**-bits * class * type * imatrix * group * act_order * family * (parameters / 8e9)**-size * model

Rounding noise falls by four per bit (its variance is that of a uniform error); what a format gains or loses against
that line is its class and type factor. Factors are fitted by ``benchmarks/fit_quality.py``.
"""

from __future__ import annotations

import re
from functools import cache
from math import prod
from typing import Any

from planner.core.candidate import Variant
from planner.core.data import data_path
from planner.estimate.coefficients import read_coefficients

REFERENCE_PARAMS = 8e9
LOSSLESS = frozenset({"F32", "F16", "BF16"})
_GROUP = 128


@cache
def document() -> dict[str, Any]:
    """The parsed coefficient file."""
    return read_coefficients(data_path("quality_model.toml"))


def type_class(method: str, type_: str) -> str:
    """``K``, ``I``, ``legacy`` or ``micro`` for GGUF types; the method's name for the others."""
    if method != "gguf":
        return f"{method}.{type_}" if method == "bitsandbytes" else method
    if type_.startswith(("IQ", "TQ")):
        return "I"
    if "_K" in type_:
        return "K"
    return "micro" if "FP4" in type_ else "legacy"


def bits_of(variant: Variant) -> float | None:
    """Bits per weight that stand for ``variant`` in the formula; ``None`` for a type nobody described."""
    if variant.method == "gguf":
        known = document()["bits"].get(variant.type)
        return None if known is None else float(known)
    if match := re.fullmatch(r"(\d+(?:\.\d+)?)bit", variant.type):
        return float(match[1])
    return {"nf4": 4.0, "nf4-dq": 4.0, "fp4": 4.0, "int8": 8.0}.get(variant.type)


def roles(
    method: str, type_: str, *, imatrix: bool, group_size: int | None, act_order: bool, family: str
) -> dict[str, float]:
    """Factor names with their exponents for one variant of a family."""
    kind = type_class(method, type_)
    names = {"scale": 1.0, f"class.{kind}": 1.0, f"type.{type_}" if method == "gguf" else f"type.{method}.{type_}": 1.0}
    names[f"family.{family}"] = 1.0
    if method == "gguf":
        if kind == "I":
            names["no_imatrix.I"] = 0.0 if imatrix else 1.0
        else:
            names[f"imatrix.{kind}"] = 1.0 if imatrix else 0.0
    if method in ("awq", "gptq"):
        if group_size is None or group_size <= 0:
            names["group.none"] = 1.0
        else:
            names["group.halved"] = _log2(_GROUP / group_size)
        names["act_order"] = 1.0 if act_order and method == "gptq" else 0.0
    return {name: power for name, power in names.items() if power}


def _log2(x: float) -> float:
    from math import log2

    return log2(x)


@cache
def log_ratio(
    variant: Variant, family: str, params: float, model: str | None
) -> tuple[float, tuple[tuple[str, float, str], ...]] | None:
    """ln(perplexity / 16-bit perplexity) and its terms; ``None`` for a type without figures.

    Args:
        variant: what is written.
        family: ``llama-3`` …; an unknown one takes the mean of the modern ones.
        params: weights of the model.
        model: catalog name, for the correction where this model's other types were measured; ``None``: without.
    """
    bits = bits_of(variant)
    if bits is None:
        return None
    factors = document()["factors"]
    known_family = family if f"family.{family}" in factors else "other"
    named = roles(
        variant.method,
        variant.type,
        imatrix=variant.imatrix,
        group_size=variant.group_size,
        act_order=variant.act_order,
        family=known_family,
    )
    noise = 4.0**-bits
    size = (params / REFERENCE_PARAMS) ** -float(factors["size"])
    fitted = prod(factors.get(name, 1.0) ** power for name, power in named.items())
    own = float(document()["models"].get(model, 1.0)) if model else 1.0
    terms = (
        ("bits per weight", bits, ""),
        ("rounding noise 4**-bits", noise, ""),
        ("type, class and family", fitted, "x"),
        ("size of the model", size, "x"),
        ("this model's published types", own, "x"),
    )
    return noise * fitted * size * own, terms


def interval(*labels: str) -> tuple[float, float]:
    """10 % and 90 % quantiles of log(measured / predicted) of ln(ratio): of the first label that has them."""
    table = document()["interval"]
    row = next(table[label] for label in (*labels, "all") if label in table)
    return float(row["low"]), float(row["high"])


def bit_range(bits: float) -> str:
    """The range of bits whose errors are alike."""
    if bits >= 6:
        return "6-bits-up"
    if bits >= 4:
        return "4-to-6-bits"
    return "3-to-4-bits" if bits >= 3 else "below-3-bits"
