"""Loss of quality of a mixture that is made to a size: between the standard types of next smaller and larger size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import exp, log

from planner.core.candidate import Variant
from planner.core.errors import InputError
from planner.core.estimates import FORMULA, Prediction
from planner.core.model import ModelSpec
from planner.methods import gguf, gguf_mix

Base = Callable[[ModelSpec, Variant], tuple[Prediction | None, Prediction | None]]
_LEAST = 1e-6
"""Of a loss, so that it has a logarithm."""
_BETTER = 0.43
"""A mixture that was chosen by measured sensitivities has lost 0.43 to 1.03 of the KL divergence of the standard type
of its size, with the same importance matrix (``benchmarks/budget.py``, three trained models of 6 to 8 million weights,
2026-11-26)."""


@dataclass(frozen=True, slots=True)
class _Point:
    type: str
    bits: float
    ratio: Prediction
    divergence: Prediction


def predict(model: ModelSpec, variant: Variant, base: Base) -> tuple[Prediction | None, Prediction | None]:
    """Perplexity ratio and KL divergence of ``variant``, from what ``base`` predicts for standard types.

    ln(ratio) and the divergence are interpolated on a logarithmic scale over bits per weight, between the types that
    no smaller one beats. The range reaches from what the larger neighbour loses at the least, less what a mixture
    gains, to what the smaller one loses at the most.
    """
    points = _front(model, variant.imatrix, base)
    bits = gguf.size(model, variant).bits_per_weight
    if not points:
        return None, None
    below = [point for point in points if point.bits <= bits] or points[:1]
    above = [point for point in points if point.bits >= bits] or points[-1:]
    one, other = below[-1], above[0]
    share = (bits - one.bits) / (other.bits - one.bits) if other.bits > one.bits else 0.0
    share = min(max(share, 0.0), 1.0)
    source = f"between {one.type} ({one.bits:.2f} bits) and {other.type} ({other.bits:.2f} bits): {one.ratio.source}"

    def between(a: Prediction, b: Prediction, offset: float) -> Prediction:
        loss = [_loss(p.value, offset) for p in (a, b)]
        value = exp((1 - share) * log(loss[0]) + share * log(loss[1]))
        low = min(_loss(b.low, offset) * _BETTER, value)
        high = max(_loss(a.high, offset), value)
        shown = (value, low, high) if not offset else (exp(value), exp(low), exp(high))
        return Prediction(
            value=shown[0],
            low=shown[1],
            high=shown[2],
            basis=FORMULA,
            source=source,
            terms=(("bits per weight", bits, ""), (f"share of {other.type}", share, "")),
        )

    return between(one.ratio, other.ratio, 1.0), between(one.divergence, other.divergence, 0.0)


def _loss(value: float, offset: float) -> float:
    """What is interpolated: ln of a ratio (``offset`` 1), or a divergence as it is."""
    return max(log(value) if offset else value, _LEAST)


def _front(model: ModelSpec, imatrix: bool, base: Base) -> list[_Point]:
    """Standard types by bits, those left out that a smaller one beats or that have no figures."""
    found = []
    for file_type in gguf_mix.file_types().values():
        if (
            not file_type.usable
            or file_type.name in ("F32", "MXFP4_MOE")
            or (file_type.requires_imatrix and not imatrix)
        ):
            continue
        variant = gguf.variant(file_type.name, imatrix=imatrix and file_type.name not in gguf.FULL_PRECISION)
        try:
            bits = gguf.size(model, variant).bits_per_weight
        except InputError:
            continue
        ratio, divergence = base(model, variant)
        if ratio is not None and divergence is not None:
            found.append(_Point(file_type.name, bits, ratio, divergence))
    kept: list[_Point] = []
    for point in sorted(found, key=lambda p: (p.bits, p.ratio.value)):
        if not kept or point.ratio.value < kept[-1].ratio.value:
            kept.append(point)
    return kept
