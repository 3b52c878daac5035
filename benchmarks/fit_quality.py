"""Fit data/quality_model.toml on data/published_quality.csv and print leave-one-model-out errors.

Needs numpy and scipy.

    python benchmarks/fit_quality.py            fit, print, write the TOML
    python benchmarks/fit_quality.py --check    fit and print only
"""

from __future__ import annotations

import argparse
import datetime
import sys
from pathlib import Path

import numpy as np
from scipy.optimize import least_squares
from scipy.stats import spearmanr

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from planner.core.data import data_path, read_table
from planner.estimate.quality_model import REFERENCE_PARAMS, bit_range, roles, type_class

# Bits per weight of a Llama-2-7B file of each type (llama.cpp tools/quantize/README.md and data/gguf_ftypes.csv).
BITS = {
    "Q8_0": 8.5, "Q6_K": 6.56, "Q5_1": 6.0, "Q5_K_M": 5.68, "Q5_K_S": 5.52, "Q5_0": 5.5, "Q4_1": 5.0, "Q4_K_M": 4.84,
    "Q4_K_S": 4.57, "IQ4_NL": 4.55, "Q4_0": 4.5, "MXFP4_MOE": 4.3, "IQ4_XS": 4.3, "Q3_K_L": 4.22, "Q3_K_M": 3.89,
    "IQ3_M": 3.7, "Q3_K_S": 3.49, "IQ3_S": 3.5, "IQ3_XS": 3.32, "IQ3_XXS": 3.11, "Q2_K": 3.0, "Q2_K_S": 2.75,
    "IQ2_M": 2.74, "IQ2_S": 2.55, "IQ2_XS": 2.36, "IQ2_XXS": 2.11, "IQ1_M": 1.8, "IQ1_S": 1.61,
}  # fmt: skip
OTHER_TYPES = ("awq.4bit", "awq.3bit", "gptq.2bit", "gptq.3bit", "gptq.4bit", "gptq.8bit")
FAMILIES = (
    "llama-1", "llama-2", "llama-3", "llama-3.1", "llama-3.2", "llama-3.3", "mistral", "gemma-2", "gemma-3", "qwen2",
    "qwen2.5", "qwen3", "phi-3", "phi-4", "other",
)  # fmt: skip
RELATIVE, ABSOLUTE = 0.15, 0.0008  # noise of one published ln(ratio)


def prior(name: str) -> tuple[float, float]:
    """Mean and sigma of the logarithm of a factor."""
    fixed = {
        "scale": (np.log(10.0), 1.0),
        "class.K": (0.0, 0.2),
        "class.I": (-0.4, 0.3),
        "class.legacy": (0.5, 0.3),
        "class.micro": (0.9, 0.3),
        "class.awq": (0.0, 0.4),
        "class.gptq": (0.2, 0.4),
        "class.bitsandbytes.nf4": (-0.6, 0.4),
        "class.bitsandbytes.fp4": (-0.2, 0.4),
        "class.bitsandbytes.int8": (3.0, 0.5),  # row-wise INT8 with outlier columns: about 0.001 (LLM.int8, 2022)
        "imatrix.K": (-0.25, 0.1),
        "imatrix.legacy": (-0.6, 0.2),
        "imatrix.micro": (0.0, 0.1),
        "no_imatrix.I": (0.3, 0.2),
        "group.none": (0.7, 0.3),
        "group.halved": (-0.12, 0.05),
        "act_order": (-0.15, 0.2),
        "size": (0.1, 0.05),
    }
    if name in fixed:
        return fixed[name]
    if name.startswith("family."):
        # heavily trained families lose more: Llama 3 twice what Llama 2 does (arXiv:2411.04330 on tokens per weight)
        calm = name[7:] in ("llama-1", "llama-2", "mistral")
        return (0.0, 0.15) if calm else (0.55, 0.3)
    if name.startswith("type."):
        return (0.0, 0.35)
    if name.startswith("model."):
        return (0.0, 0.25)
    raise KeyError(name)


class Rows:
    """Published losses as arrays."""

    def __init__(self) -> None:
        chosen = [r for r in read_table("published_quality.csv") if usable(r)]
        self.models = np.array([r["model"] for r in chosen])
        self.labels = [
            f"{r['method']} {r['type']} g{r['group_size']}{' imatrix' if r['imatrix'] else ''}" for r in chosen
        ]
        self.methods = np.array([r["method"] for r in chosen])
        self.types = np.array([r["type"] for r in chosen])
        self.bits = np.array([row_bits(r) for r in chosen])
        self.loss = np.array([float(r["ln_ratio"]) for r in chosen])
        self.params = np.array([float(r["params"]) for r in chosen])
        self.families = [r["family"] for r in chosen]
        self.names = [
            roles(
                r["method"],
                r["type"],
                imatrix=bool(r["imatrix"]),
                group_size=int(r["group_size"]) if r["group_size"] else None,
                act_order=r["act_order"] == "1",
                family=r["family"],
            )
            for r in chosen
        ]

    def __len__(self) -> int:
        return len(self.loss)


def row_bits(row: dict[str, str]) -> float:
    """Bits per weight that stand for the row's type."""
    if row["method"] == "gguf":
        return BITS[row["type"]]
    return float(row["type"][0]) if row["type"].endswith("bit") else {"int8": 8.0}.get(row["type"], 4.0)


def usable(row: dict[str, str]) -> bool:
    """Whether the row has a loss of a quantized model that may be fitted on."""
    lossless = row["type"].lower() in ("f16", "bf16") or row["method"] == "none"
    return (
        row["status"] == "used"
        and bool(row["ln_ratio"])
        and not lossless
        and bool(row["params"])
        and not row["algorithm"]
    )


def fit(rows: Rows, mask: np.ndarray, with_models: bool) -> dict[str, float]:
    """Factors (logarithms) from the rows of ``mask``."""
    index = np.flatnonzero(mask)
    names = sorted({n for i in index for n in rows.names[i]} | {"size"})
    if with_models:
        names += [f"model.{m}" for m in sorted(set(rows.models[index]))]
    at = {n: j for j, n in enumerate(names)}
    design = np.zeros((len(index), len(names)))
    for k, i in enumerate(index):
        for name, power in rows.names[i].items():
            design[k, at[name]] = power
        design[k, at["size"]] = -np.log(rows.params[i] / REFERENCE_PARAMS)
        if with_models:
            design[k, at[f"model.{rows.models[i]}"]] = 1
    mean, sigma = np.array([prior(n) for n in names]).T
    target = np.log(np.maximum(rows.loss[index], 2e-4))
    base = -rows.bits[index] * np.log(4)
    noise = np.sqrt(RELATIVE**2 + (ABSOLUTE / np.maximum(rows.loss[index], 2e-4)) ** 2)

    def residuals(theta: np.ndarray) -> np.ndarray:
        z = (base + design @ theta - target) / noise
        return np.concatenate([np.sign(z) * np.sqrt(2 * (np.sqrt(1 + z * z) - 1)), (theta - mean) / sigma])

    theta = least_squares(residuals, mean, bounds=(np.where([n == "size" for n in names], 0.0, -np.inf), np.inf)).x
    return dict(zip(names, theta, strict=True))


def predict(rows: Rows, factors: dict[str, float], i: int) -> float:
    """ln(ratio) of row ``i``."""
    total = -rows.bits[i] * np.log(4) - factors["size"] * np.log(rows.params[i] / REFERENCE_PARAMS)
    for name, power in rows.names[i].items():
        total += power * factors.get(name, prior(name)[0])
    return float(np.exp(total + factors.get(f"model.{rows.models[i]}", 0.0)))


def leave_one_model_out(rows: Rows) -> np.ndarray:
    """Prediction of each row by a fit without any row of its model."""
    out = np.full(len(rows), np.nan)
    for model in sorted(set(rows.models)):
        mine = rows.models == model
        factors = fit(rows, ~mine, with_models=True)
        for i in np.flatnonzero(mine):
            out[i] = predict(rows, factors, i)
    return out


def leave_one_type_out(rows: Rows) -> np.ndarray:
    """Each (model, type) held out, the model's other types known."""
    out = np.full(len(rows), np.nan)
    for model in sorted(set(rows.models)):
        for label in sorted({rows.labels[i] for i in np.flatnonzero(rows.models == model)}):
            mine = (rows.models == model) & np.array([x == label for x in rows.labels])
            factors = fit(rows, ~mine, with_models=True)
            for i in np.flatnonzero(mine):
                out[i] = predict(rows, factors, i)
    return out


def monotone(factors: dict[str, float]) -> dict[str, float]:
    """Type factors such that within a class more bits never lose more (pool adjacent violators)."""
    result = dict(factors)
    for kind in ("K", "I", "legacy"):
        members = sorted((t for t in BITS if type_class("gguf", t) == kind), key=lambda t: BITS[t])
        blocks: list[tuple[float, list[str]]] = []
        for t in members:
            blocks.append((result[f"type.{t}"] - BITS[t] * np.log(4), [t]))
            while len(blocks) > 1 and blocks[-2][0] < blocks[-1][0] + 1e-6:
                (a, x), (b, y) = blocks[-2], blocks[-1]
                blocks[-2:] = [((a * len(x) + b * len(y)) / (len(x) + len(y)), x + y)]
        for level, block in blocks:
            for t in block:
                result[f"type.{t}"] = level + BITS[t] * np.log(4)
    return result


def divergence_relation() -> tuple[float, float, float, int]:
    """ln(KL) = a + b ln(ln ratio) over rows that have both: (scale, power, sigma, rows)."""
    table = [
        r
        for r in read_table("published_quality.csv")
        if r["status"] == "used" and not r["type"].upper().endswith("F16")
    ]
    key = lambda r: (r["model"], r["method"], r["type"], r["imatrix"])  # noqa: E731
    loss = {key(r): float(r["ln_ratio"]) for r in table if r["ln_ratio"] and r["metric"] == "ppl"}
    pairs = [(loss[key(r)], float(r["value"])) for r in table if r["metric"] == "kld_mean" and key(r) in loss]
    x, y = np.log(np.array(pairs)).T
    power, intercept = np.polyfit(x, y, 1)
    sigma = float(np.std(y - power * x - intercept, ddof=2))
    return float(np.exp(intercept)), float(power), sigma, len(pairs)


def log_errors(rows: Rows, predicted: np.ndarray) -> np.ndarray:
    """log(measured / predicted) of the loss; a loss within the noise counts as the noise."""
    return np.log(np.maximum(rows.loss, 3e-4) / predicted)


def inside(rows: Rows, predicted: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Which rows lie in their interval, widened by the noise as the product does."""
    from planner.estimate.quality import NOISE

    return (rows.loss >= predicted * np.exp(low) - NOISE / 2) & (rows.loss <= predicted * np.exp(high) + NOISE / 2)


def intervals(rows: Rows, predicted: np.ndarray, mask: np.ndarray) -> dict[str, tuple[float, float, int]]:
    """10 % and 90 % quantiles of the logarithm of the loss by range of bits."""
    r = log_errors(rows, predicted)
    ranges = np.array([bit_range(b) for b in rows.bits])
    table = {"all": (*np.quantile(r[mask], (0.1, 0.9)), int(mask.sum()))}
    for label in sorted(set(ranges)):
        chosen = mask & (ranges == label)
        if chosen.sum() >= 12:
            table[label] = (*np.quantile(r[chosen], (0.1, 0.9)), int(chosen.sum()))
    return table


def inflated(rows: Rows, predicted: np.ndarray) -> float:
    """Factor on the width with which held-out models are covered four times in five."""
    return next((f for f in np.arange(1.0, 3.0, 0.05) if coverage(rows, predicted, float(f)) >= 0.8), 3.0)


def coverage(rows: Rows, predicted: np.ndarray, factor: float) -> float:
    """Share inside the interval when the interval comes from the other models."""
    hits = []
    ranges = [bit_range(b) for b in rows.bits]
    for model in sorted(set(rows.models)):
        mine = rows.models == model
        table = intervals(rows, predicted, ~mine)
        bounds = np.array([table.get(ranges[i], table["all"])[:2] for i in range(len(rows))])
        low, high = np.minimum(bounds[:, 0], 0), np.maximum(bounds[:, 1], 0)
        hits.extend(inside(rows, predicted, low * factor, high * factor)[mine])
    return float(np.mean(hits))


def summary(rows: Rows, predicted: np.ndarray) -> dict[str, float]:
    """The figures of the cross-validation table."""
    error = np.abs(predicted - rows.loss)
    high, low = rows.bits >= 4, rows.bits < 4
    usable_low = low & (rows.bits >= 2.5)
    ranks, counts = [], []
    for model in sorted(set(rows.models)):
        mine = (rows.models == model) & (rows.methods == "gguf")
        if mine.sum() >= 5:
            ranks.append(spearmanr(rows.loss[mine], predicted[mine]).statistic)
            counts.append(int(mine.sum()))
    return {
        "rows": len(rows),
        "mae_4_bits_up": float(error[high].mean()),
        "mae_below_4_bits": float(error[low].mean()),
        "mae_2.5_to_4_bits": float(error[usable_low].mean()),
        "median_4_bits_up": float(np.median(error[high])),
        "median_below_4_bits": float(np.median(error[low])),
        "rank_correlation": float(np.average(ranks, weights=counts)),
    }


def print_tables(rows: Rows, predicted: np.ndarray, title: str) -> dict[str, float]:
    """Errors by bits, method and model."""
    figures = summary(rows, predicted)
    print(f"\n{title}")
    print("  " + "  ".join(f"{k} {v:.4f}" if isinstance(v, float) else f"{k} {v}" for k, v in figures.items()))
    for name, values in (
        ("bits", np.array([bit_range(b) for b in rows.bits])),
        ("method", rows.methods),
        ("model", rows.models),
    ):
        for value in sorted(set(values)):
            mine = values == value
            error = np.abs(predicted - rows.loss)[mine]
            print(
                f"  {name} {value:16s} n={mine.sum():3d}  MAE of ln(ratio) {error.mean():.4f}"
                f"  median {np.median(error):.4f}  log bias {np.median(log_errors(rows, predicted)[mine]):+.2f}"
            )
    return figures


def toml(name: str, values: dict[str, float | int | str]) -> list[str]:
    """One TOML table as lines."""
    lines = [f"[{name}]"] if name else []
    for key, value in values.items():
        text = f'"{value}"' if isinstance(value, str) else str(value) if isinstance(value, int) else f"{value:.6g}"
        lines.append(f'"{key}" = {text}')
    return [*lines, ""]


def main(argv: list[str] | None = None) -> None:
    """Fit everything; see the module's text."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args(argv)
    rows = Rows()
    outside = leave_one_model_out(rows)
    known = leave_one_type_out(rows)
    figures = print_tables(rows, outside, "leave one model out")
    factor = inflated(rows, outside)
    figures["interval_coverage"] = coverage(rows, outside, factor)
    print(f"  80 % interval covers {figures['interval_coverage']:.1%} of held-out models")
    known_figures = print_tables(rows, known, "leave one type of a model out (the model's other types known)")
    everything = np.ones(len(rows), bool)
    factors = fit(rows, everything, with_models=True)
    for t in BITS:
        factors.setdefault(f"type.{t}", 0.0)
    for kind in ("micro", "bitsandbytes.int8", "bitsandbytes.nf4", "bitsandbytes.fp4", "awq", "gptq"):
        factors.setdefault(f"class.{kind}", prior(f"class.{kind}")[0])
    for name in ("imatrix.K", "imatrix.legacy", "no_imatrix.I", "group.none", "group.halved", "act_order"):
        factors.setdefault(name, prior(name)[0])
    for family in FAMILIES:
        factors.setdefault(f"family.{family}", prior(f"family.{family}")[0])
    for kin in ("llama-3.1", "llama-3.2", "llama-3.3"):
        factors[f"family.{kin}"] = factors["family.llama-3"]
    factors = monotone(factors)
    scale, power, sigma, pairs = divergence_relation()
    print(f"\nKL divergence = {scale:.3f} * ln(ratio)**{power:.3f}, sigma of the logarithm {sigma:.3f}, {pairs} rows")
    table = intervals(rows, outside, everything)
    near = np.quantile(log_errors(rows, known), (0.1, 0.9))
    lines = [
        "# Written by benchmarks/fit_quality.py; do not edit. See planner/estimate/quality_model.py for the formula.",
        f'source = "fitted on {len(rows)} published perplexities (data/published_quality.csv)"',
        f'date = "{datetime.date.today().isoformat()}"',
        "",
        *toml("bits", BITS),
        *toml(
            "factors",
            {n: v if n == "size" else float(np.exp(v)) for n, v in factors.items() if not n.startswith("model.")},
        ),
        *toml("models", {n[6:]: float(np.exp(v)) for n, v in factors.items() if n.startswith("model.")}),
        *toml("divergence", {"scale": scale, "power": power, "sigma": sigma, "rows": pairs}),
        *(
            line
            for k, (a, b, n) in table.items()
            for line in toml(f"interval.{k}", {"low": a * factor, "high": b * factor, "rows": n})
        ),
        *toml("interval.known-model", {"low": near[0], "high": near[1], "rows": len(rows)}),
        # two runs of one type of one model (LLaMA-7B Q4_0 of spring and summer 2023): 0.0363 and 0.0415
        *toml("interval.published", {"low": -0.12, "high": 0.12, "rows": 5}),
        *toml("cross_validation", figures),
        *toml("cross_validation_known_model", known_figures),
    ]
    if not arguments.check:
        data_path("quality_model.toml").write_text("\n".join(lines), encoding="utf-8")
        print("wrote data/quality_model.toml")


if __name__ == "__main__":
    main()
