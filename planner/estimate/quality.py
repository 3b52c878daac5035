"""Loss of quality: measured here > published for this model and variant > fitted model."""

from __future__ import annotations

import csv
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from math import exp, hypot, log

from planner.core.candidate import Variant
from planner.core.data import data_path
from planner.core.estimates import FORMULA, MEASURED, PUBLISHED, Z80, Prediction, QualityEstimate
from planner.core.measurement import KL_DIVERGENCE, PERPLEXITY_RATIO, Calibration
from planner.core.model import ModelSpec, shape_sha256
from planner.estimate import quality_mixture, quality_model, quality_noise
from planner.estimate.speed_measured import same_variant
from planner.methods import gguf

NOISE = 0.001
"""Repeatability of ln(perplexity ratio) between two tools on one text: the 16-bit GGUF of Llama-3-8B has a KL
divergence of 0.00055 from the original (llama.cpp tools/perplexity/README.md, 2024-05)."""
_CLEAR = 10
"""A published loss of so many times ``NOISE`` tells the KL divergence better than the formula does."""
_OTHER_TEXTS = 0.25
"""Half-width of the 80 % interval of ln(KL divergence / what ln(ratio) tells) beyond the fit's: an assumption, as all
rows but one of the relation are of one model and one text."""
_DATASETS = ("wikitext-2 test ctx512", "wiki.test", "wikitext-2 test ctx2048")
"""In the order of trust for GGUF types; a ratio is formed within one of them, never across."""


@dataclass(frozen=True, slots=True)
class Row:
    """One published loss."""

    log_ratio: float | None
    kl_divergence: float | None
    source: str


def quality(model: ModelSpec, variant: Variant, calibration: Calibration | None = None) -> QualityEstimate:
    """Perplexity over the 16-bit model's, and mean KL divergence in nats per token, with 80 % intervals.

    ``None`` with a note for a type without figures.
    """
    ratio, divergence = quality_mixture.predict(model, variant, _base) if variant.recipe else _base(model, variant)
    if calibration is not None:
        ratio = _measured(model, variant, calibration, PERPLEXITY_RATIO) or ratio
        divergence = _measured(model, variant, calibration, KL_DIVERGENCE) or divergence
    notes = () if ratio else (f"no quality figures for {variant.label()}",)
    return QualityEstimate(perplexity_ratio=ratio, kl_divergence_nats=divergence, notes=notes)


@lru_cache(4096)
def _base(model: ModelSpec, variant: Variant) -> tuple[Prediction | None, Prediction | None]:
    unquantized = variant.method == "none" and variant.type != "fp8"
    if unquantized or (variant.method == "gguf" and variant.type in quality_model.LOSSLESS):
        return _lossless()
    variant = _effective(model, variant)
    fitted = _fitted(model, variant, known=True)
    row = None if gguf.is_own_mix(model, variant) else _published(model.name, variant)
    if row is None:
        return (None, None) if fitted is None else (_as_ratio(fitted), _divergence(fitted, None))
    if row.log_ratio is None:
        return (_as_ratio(fitted) if fitted else None), _divergence(fitted, row)
    published = _published_loss(row, variant)
    # of a loss near the repeatability of its publication, the formula knows more
    sure = published if fitted is None or published.value >= _CLEAR * NOISE else fitted
    return _as_ratio(published), _divergence(sure, row)


def _effective(model: ModelSpec, variant: Variant) -> Variant:
    """MXFP4_MOE stores experts that were trained in MXFP4 as they are, and has none in a dense model: both are Q8_0.

    llama.cpp src/llama-quant.cpp: with this type everything but the experts becomes Q8_0.
    """
    lossless_experts = model.mixture is None or model.dtype == "mxfp4"
    if variant.method == "gguf" and variant.type == "MXFP4_MOE" and lossless_experts:
        return replace(variant, type="Q8_0")
    return variant


@dataclass(frozen=True, slots=True)
class _Loss:
    """ln(ratio) with its interval."""

    value: float
    low: float
    high: float
    basis: str
    source: str
    terms: tuple[tuple[str, float, str], ...]


def _lossless() -> tuple[Prediction, Prediction]:
    source = "16-bit weights: equal to rounding (llama.cpp tools/perplexity/README.md, 2024-05)"
    one = Prediction(value=1.0, low=1 - NOISE / 2, high=1 + NOISE / 2, basis=FORMULA, source=source)
    return one, Prediction(value=0.0, low=0.0, high=0.0006, basis=FORMULA, source=source)


def _measured(model: ModelSpec, variant: Variant, calibration: Calibration, quantity: str) -> Prediction | None:
    shape = shape_sha256(model)
    for m in reversed(calibration.of(quantity)):
        same = same_variant(m, variant) and m.imatrix == variant.imatrix
        if same and m.model_sha256 == shape and m.model == model.name:
            low, high = min(m.low, m.value), max(m.high, m.value)
            source = f"measured here with {m.tool_version or m.runtime} at {m.measured_at or 'an unknown time'}"
            return Prediction(value=m.value, low=low, high=high, basis=MEASURED, source=source)
    return None


def _fitted(model: ModelSpec, variant: Variant, *, known: bool) -> _Loss | None:
    found, noise = quality_model.log_ratio(model, variant, known=known), quality_model.noise(model, variant)
    if found is None or noise is None:
        return None
    value, terms = found
    label = quality_model.acquaintance(model)
    width = quality_model.width(label if known or label == "new-family" else "new-model", noise)
    source = str(quality_model.document()["source"])
    return _Loss(value, value * exp(-width) - NOISE, value * exp(width) + NOISE, FORMULA, source, terms)


def _published_loss(row: Row, variant: Variant) -> _Loss:
    """The published value, with the range in which another publication of the same variant lies."""
    assert row.log_ratio is not None
    value, table = row.log_ratio, quality_model.document()["interval"]["published"]
    width = float(table["gguf" if variant.method == "gguf" else "all"])
    return _Loss(value, value * exp(-width) - NOISE, value * exp(width) + NOISE, PUBLISHED, row.source, ())


def _as_ratio(loss: _Loss) -> Prediction:
    return Prediction(
        value=exp(loss.value),
        low=exp(loss.low),
        high=exp(loss.high),
        basis=loss.basis,
        source=loss.source,
        terms=(*loss.terms, ("ln(perplexity ratio)", loss.value, "")),
    )


def _divergence(loss: _Loss | None, row: Row | None) -> Prediction | None:
    """Published, else from ln(ratio) by the fitted power law between the two, above what two runs differ by."""
    document, floor = quality_model.document(), quality_model.DIVERGENCE_FLOOR
    if row is not None and row.kl_divergence is not None:
        value, width = row.kl_divergence, float(document["interval"]["published"]["gguf"])
        return Prediction(
            value=value, low=value * exp(-width), high=value * exp(width), basis=PUBLISHED, source=row.source
        )
    if loss is None:
        return None
    relation = document["divergence"]
    scale, power = float(relation["scale"]), float(relation["power"])

    def of(log_ratio: float) -> float:
        return float(scale * max(log_ratio, 1e-6) ** power)

    value = of(loss.value)
    up, down = log(max(of(loss.high) / value, 1.0)), log(max(value / of(loss.low), 1.0))
    spread = hypot(Z80 * float(relation["sigma"]), _OTHER_TEXTS)
    return Prediction(
        value=floor + value,
        low=value * exp(-hypot(down, spread)),
        high=2 * floor + value * exp(hypot(up, spread)),
        basis=FORMULA,
        source=str(document["source"]),
        terms=(*loss.terms, ("ln(perplexity ratio)", loss.value, ""), ("what two runs differ by", floor, "nats")),
    )


_Key = tuple[str, str, str, int | None, bool, bool]


@cache
def _index() -> dict[_Key, Row]:
    """Published losses by model, method, type, group size, act order and imatrix; the best dataset of each."""
    losses: dict[_Key, dict[str, list[float]]] = {}
    divergences: dict[_Key, list[float]] = {}
    sources: dict[_Key, str] = {}
    with data_path("published_quality.csv").open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if row["status"] != "used" or row["algorithm"]:
                continue
            key = _key(row)
            sources.setdefault(key, f"{row['source']} ({row['date']}, {row['dataset']})")
            if row["metric"] == "kld_mean":
                divergences.setdefault(key, []).append(float(row["value"]))
            elif row["ln_ratio"]:
                losses.setdefault(key, {}).setdefault(row["dataset"], []).append(float(row["ln_ratio"]))
    return {
        key: Row(_mean(_best(losses.get(key, {}))), _mean(divergences.get(key, [])), source)
        for key, source in sources.items()
    }


def _key(row: dict[str, str]) -> _Key:
    group = int(row["group_size"]) if row["group_size"] else None
    variant = Variant(method=row["method"], format="", runtime="", type=row["type"], imatrix=bool(row["imatrix"]))
    return row["model"], row["method"], row["type"], group, row["act_order"] == "1", quality_noise.guided(variant)


def _best(by_dataset: dict[str, list[float]]) -> list[float]:
    for name in (*_DATASETS, *by_dataset):
        if name in by_dataset:
            return by_dataset[name]
    return []


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _published(model: str, variant: Variant) -> Row | None:
    """The row of this model and variant; of GPTQ, where there is none, that with the other order of columns."""
    group = variant.group_size if variant.method in quality_noise.GRIDS else None
    name = "mistral-7b-v0.1" if model == "mistral-7b" else model
    asked = variant.act_order
    for order in (asked, not asked) if variant.method == "gptq" else (asked,):
        row = _index().get((name, variant.method, variant.type, group, order, quality_noise.guided(variant)))
        if row is not None:
            how = "" if order == asked else f", {'with' if order else 'without'} activation order"
            return replace(row, source=row.source + how)
    return None


def formula_only(model: ModelSpec, variant: Variant) -> Prediction | None:
    """The fitted formula without any published row of this very model, for comparison and tests."""
    found = _fitted(model, variant, known=False)
    return _as_ratio(found) if found else None
