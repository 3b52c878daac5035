"""Quality against published perplexities: whole models held out, by range of bits, method and model.

    python benchmarks/quality.py        (needs numpy and scipy; half a minute)

Three things are judged as users meet them: a model nobody published anything of, another type of a model of which some
are published, and the order of a model's types. An interval's coverage is that of intervals made without the model.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.stats import spearmanr

sys.path.insert(0, str(Path(__file__).resolve().parent))

from quality_fit import (
    Array,
    Fit,
    fit,
    leave_one_family_out,
    leave_one_model_out,
    leave_one_type_out,
    noise_of,
)
from quality_rows import Rows

from planner.core.data import read_table
from planner.estimate.quality import NOISE
from planner.estimate.quality_model import DIVERGENCE_FLOOR, noise_range

ENOUGH = 8  # rows for a range of noise to have an interval of its own
COVERAGE = 0.8


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Predictions of every row without it, and the ranges of noise that the rows are in."""

    rows: Rows
    by_model: Array
    by_family: Array
    by_type: Array
    ranges: Array


def held_out(rows: Rows, found: Fit) -> HeldOut:
    """Leave out models, families, then types of models."""
    ranges = np.array([noise_range(n) for n in noise_of(rows, found)])
    return HeldOut(rows, leave_one_model_out(rows), leave_one_family_out(rows), leave_one_type_out(rows), ranges)


def widths(rows: Rows, predicted: Array, ranges: Array, mask: Array) -> dict[str, float]:
    """Half-width of the 80 % interval of ln(loss) by range of noise: what an error stays within four times in five.

    An error within the repeatability of a published loss is none.
    """
    error = np.abs(rows.loss - predicted)
    ratio = np.where(error < NOISE, 0.0, np.abs(np.log(np.maximum(rows.loss, NOISE / 2) / predicted)))
    table = {"all": float(np.quantile(ratio[mask], COVERAGE))}
    for label in sorted(set(ranges)):
        chosen = mask & (ranges == label)
        if chosen.sum() >= ENOUGH:
            table[label] = float(np.quantile(ratio[chosen], COVERAGE))
    return table


def inside(rows: Rows, predicted: Array, width: Array) -> Array:
    """Which rows lie in their interval, widened by the repeatability as the product does."""
    low, high = predicted * np.exp(-width) - NOISE, predicted * np.exp(width) + NOISE
    return (rows.loss >= low) & (rows.loss <= high)


def covered(held: HeldOut, predicted: Array, factor: Mapping[str, float]) -> Array:
    """Which rows lie in an interval that comes from the other models' errors, ``factor`` times as wide, by range."""
    stretched = np.array([factor[str(label)] for label in held.ranges])
    rows, out = held.rows, np.zeros(len(held.rows), bool)
    for model in sorted(set(rows.models)):
        mine = rows.models == model
        table = widths(rows, predicted, held.ranges, ~mine)
        width = np.array([table.get(label, table["all"]) for label in held.ranges])
        out[mine] = inside(rows, predicted, width * stretched)[mine]
    return out


def stretch(held: HeldOut, predicted: Array) -> dict[str, float]:
    """Factor on the widths of each range of noise with which left-out models are covered there four times in five.

    A range with few rows has the factor of all.
    """
    labels = sorted({str(label) for label in held.ranges})
    tried = [dict.fromkeys((*labels, "all"), float(f)) for f in np.arange(0.8, 3.0, 0.02)]
    hits = [covered(held, predicted, factor) for factor in tried]

    def least(mine: Array) -> float:
        return next((f["all"] for f, hit in zip(tried, hits, strict=True) if hit[mine].mean() >= COVERAGE), 3.0)

    everywhere = least(np.ones(len(held.rows), bool))
    by_range = {label: held.ranges == label for label in labels}
    return {"all": everywhere} | {
        label: least(mine) if mine.sum() >= ENOUGH else everywhere for label, mine in by_range.items()
    }


def rank_correlation(rows: Rows, predicted: Array) -> float:
    """Spearman's of the GGUF types within a model, averaged over the models with five or more."""
    found, counts = [], []
    for model in sorted(set(rows.models)):
        mine = (rows.models == model) & (rows.methods == "gguf")
        if mine.sum() >= 5:
            found.append(spearmanr(rows.loss[mine], predicted[mine]).statistic)
            counts.append(int(mine.sum()))
    return float(np.average(found, weights=counts))


def summary(rows: Rows, predicted: Array) -> dict[str, float]:
    """The figures of the cross-validation table."""
    error, high = np.abs(predicted - rows.loss), rows.bits >= 4
    return {
        "rows": len(rows),
        "mae_4_bits_up": float(error[high].mean()),
        "mae_below_4_bits": float(error[~high].mean()),
        "mae_2.5_to_4_bits": float(error[~high & (rows.bits >= 2.5)].mean()),
        "median_4_bits_up": float(np.median(error[high])),
        "median_below_4_bits": float(np.median(error[~high])),
        "rank_correlation": rank_correlation(rows, predicted),
    }


def print_errors(held: HeldOut, predicted: Array, title: str) -> dict[str, float]:
    """Errors of ln(perplexity ratio) by range of bits, method and model."""
    rows = held.rows
    figures, factor = summary(rows, predicted), stretch(held, predicted)
    hit = covered(held, predicted, factor)
    figures |= {"interval_coverage": float(hit.mean()), "interval_stretch": factor["all"]}
    figures |= {f"interval_stretch_{label}": f for label, f in factor.items() if label != "all"}
    for name, mine in (("4_bits_up", rows.bits >= 4), ("below_4_bits", rows.bits < 4)):
        figures[f"interval_coverage_{name}"] = float(hit[mine].mean())
    print(f"\n{title}: {len(rows)} rows, mean absolute error of ln(perplexity ratio)")
    print(f"  4 bits and more {figures['mae_4_bits_up']:.4f}, below 4 bits {figures['mae_below_4_bits']:.4f}")
    print(f"  rank correlation of the types within a model {figures['rank_correlation']:.3f}")
    bits = np.array(["4 bits up" if b >= 4 else "below 4" for b in rows.bits])
    error = np.abs(predicted - rows.loss)
    print(f"  {'':36s} {'rows':>4s} {'mean':>8s} {'median':>8s} {'bias of ln(loss)':>17s} {'in 80 % interval':>17s}")
    groups = [(b, bits == b) for b in sorted(set(bits))] + [(r, held.ranges == r) for r in sorted(set(held.ranges))]
    groups += [(f"{m}, {b}", (rows.methods == m) & (bits == b)) for m in sorted(set(rows.methods)) for b in set(bits)]
    groups += [(m, rows.models == m) for m in sorted(set(rows.models))]
    for name, mine in groups:
        if mine.any():
            bias = np.median(np.log(np.maximum(rows.loss[mine], NOISE / 2) / predicted[mine]))
            numbers = f"{error[mine].mean():8.4f} {np.median(error[mine]):8.4f} {bias:+17.2f} {hit[mine].mean():17.0%}"
            print(f"  {name:36s} {mine.sum():4d} {numbers}")
    return figures


def divergence_pairs() -> tuple[list[str], Array, Array]:
    """Models, ln(perplexity ratio) and mean KL divergence of the variants that have both, clear of the floor."""
    table = [r for r in read_table("published_quality.csv") if r["status"] == "used"]

    def key(row: dict[str, str]) -> tuple[str, ...]:
        return row["model"], row["method"], row["type"], row["imatrix"]

    loss = {key(r): float(r["ln_ratio"]) for r in table if r["ln_ratio"] and r["metric"] == "ppl"}
    both = [r for r in table if r["metric"] == "kld_mean" and loss.get(key(r), 0.0) > NOISE]
    return (
        [r["model"] for r in both],
        np.array([loss[key(r)] for r in both]),
        np.array([float(r["value"]) for r in both]),
    )


def divergence_relation() -> dict[str, float]:
    """KL = floor + scale * ln(ratio)**power, with the spread of its logarithm."""
    _, loss, kl = divergence_pairs()
    x, y = np.log(loss), np.log(kl - DIVERGENCE_FLOOR)
    power, intercept = np.polyfit(x, y, 1)
    sigma = float(np.std(y - power * x - intercept, ddof=2))
    return {"scale": float(np.exp(intercept)), "power": float(power), "sigma": sigma, "rows": len(x)}


def print_divergence(relation: dict[str, float]) -> None:
    """The fitted relation and its worst rows."""
    models, loss, kl = divergence_pairs()
    made = DIVERGENCE_FLOOR + relation["scale"] * loss ** relation["power"]
    error = np.abs(np.log(kl / made))
    print(f"\nKL divergence = {DIVERGENCE_FLOOR} + {relation['scale']:.3f} * ln(ratio)**{relation['power']:.3f}")
    print(f"  {len(loss)} rows of {len(set(models))} models: mean error {error.mean():.1%}, worst {error.max():.1%}")


def main() -> None:
    """Print everything."""
    rows = Rows()
    held = held_out(rows, fit(rows, np.ones(len(rows), bool)))
    print_errors(held, held.by_model, "Whole models held out")
    print_errors(held, held.by_family, "Whole families held out")
    print_errors(held, held.by_type, "One type of a model held out, its other types known")
    print_divergence(divergence_relation())


if __name__ == "__main__":
    main()
