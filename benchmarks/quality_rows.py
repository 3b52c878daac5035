"""The published losses of data/published_quality.csv as arrays for fitting."""

from __future__ import annotations

import dataclasses
import itertools
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from planner.core.candidate import Variant
from planner.core.data import read_table
from planner.core.model import ModelSpec
from planner.estimate import quality_noise
from planner.estimate.quality_model import DIVERGENCE_FLOOR, LOSSLESS
from planner.models import catalog

CLEAR_LOG_RATIO = 0.01  # a perplexity is published to 0.01
CLEAR_LOSS = 0.03  # of the mean accuracy over ten tasks, three times its noise
Key = tuple[str, str, str, str, str, bool, str]


def usable(row: dict[str, str]) -> bool:
    """Whether the row has a loss of a quantized model that may be fitted on."""
    lossless = row["type"].upper() in LOSSLESS
    known = row["method"] in ("gguf", "awq", "gptq", "bitsandbytes") and not row["algorithm"]
    return known and row["status"] == "used" and bool(row["ln_ratio"]) and not lossless and bool(row["params"])


def variant_of(row: dict[str, str]) -> Variant:
    """What the row was measured with."""
    return Variant(
        method=row["method"],
        format="",
        runtime="",
        type=row["type"],
        group_size=int(row["group_size"]) if row["group_size"] else None,
        imatrix=bool(row["imatrix"]),
        act_order=row["act_order"] == "1",
    )


def model_of(row: dict[str, str]) -> ModelSpec:
    """The catalog's model; its shape decides llama.cpp's mix."""
    found = catalog.lookup(row["model"])
    if found is None:
        raise KeyError(f"{row['model']} is not in data/models.toml")
    return found


def key_of(row: dict[str, str]) -> Key:
    """What tells one loss from another; rows that share it are repetitions and are averaged."""
    fields = (row[name] for name in ("model", "method", "type", "group_size", "act_order"))
    return (*fields, bool(row["imatrix"]), row["dataset"])  # type: ignore[return-value]


class Rows:
    """Published losses as arrays, one row a (model, variant, text); several matrices' or authors' runs are averaged."""

    def __init__(self) -> None:
        groups: dict[Key, list[dict[str, str]]] = {}
        for row in read_table("published_quality.csv"):
            if usable(row):
                groups.setdefault(key_of(row), []).append(row)
        groups |= {key: [row] for key, row in divergences_only().items() if key not in groups}
        first = [rows[0] for rows in groups.values()]
        self.loss = np.array([np.mean([float(r["ln_ratio"]) for r in rows]) for rows in groups.values()])
        self.models = np.array([r["model"] for r in first])
        self.methods = np.array([r["method"] for r in first])
        self.variants = [variant_of(r) for r in first]
        self.specs = [model_of(r) for r in first]
        self.families = [spec.family for spec in self.specs]
        self.params = np.array([float(r["params"]) for r in first])
        self.labels = np.array([dataclasses.replace(v, imatrix=quality_noise.guided(v)).label() for v in self.variants])
        self.bits = np.array([row_bits(s, v) for s, v in zip(self.specs, self.variants, strict=True)])
        self.pairs = accuracy_pairs()
        self._entries()

    def __len__(self) -> int:
        return len(self.loss)

    def _entries(self) -> None:
        """One entry a (row, role, kind): which share of the role has which error, and the factors that correct it."""
        row, role, error, fraction, self.corrections = [], [], [], [], []
        for i, (spec, variant) in enumerate(zip(self.specs, self.variants, strict=True)):
            for share in quality_noise.shares(spec, variant) or ():
                found = quality_noise.error_of(variant, share.kind)
                assert found is not None, (variant, share.kind)
                row.append(i)
                role.append(quality_noise.ROLES.index(share.role))
                error.append(found)
                fraction.append(share.fraction)
                self.corrections.append(quality_noise.corrections(variant, share.kind))
        self.entry_row, self.entry_role = np.array(row), np.array(role)
        self.entry_error, self.entry_fraction = np.array(error), np.array(fraction)
        self.rounded = np.array([quality_noise.rounds_activations(v) for v in self.variants])


def divergences_only() -> dict[Key, dict[str, str]]:
    """Rows with a KL divergence but no perplexity: ln(ratio) is the divergence above its floor, to a few percent."""
    found = {}
    for row in read_table("published_quality.csv"):
        if row["metric"] == "kld_mean" and row["status"] == "used" and float(row["value"]) > 10 * DIVERGENCE_FLOOR:
            found[key_of(row)] = {**row, "ln_ratio": str(float(row["value"]) - DIVERGENCE_FLOOR)}
    return found


def accuracy_pairs() -> list[tuple[ModelSpec, ModelSpec, float]]:
    """(model, other model, ln of the ratio of their losses of accuracy) for one type by one author on the same tasks.

    Only where the loss is clear of the noise of a mean over ten tasks (0.01): the two-bit rows.
    """
    lost: dict[tuple[str, str], list[tuple[ModelSpec, float]]] = {}
    for row in read_table("published_quality.csv"):
        if row["metric"] == "avg_10tasks" and row["algorithm"] == "opt-rtn" and row["value_16bit"]:
            spec = catalog.lookup(row["model"].removesuffix("-instruct"))
            loss = float(row["value_16bit"]) - float(row["value"])
            if spec is not None and loss > CLEAR_LOSS:
                lost.setdefault((row["source"], row["type"]), []).append((spec, loss))
    groups = [group for group in lost.values() if len(group) > 1]
    return [(s, group[0][0], float(np.log(loss / group[0][1]))) for group in groups for s, loss in group[1:]]


def repetitions(method: str | None = None) -> np.ndarray:
    """|ln(loss / other loss)| of the variants that two sources, or two texts, give a loss of, clear of rounding."""
    groups: dict[object, list[tuple[str, float]]] = {}
    for row in read_table("published_quality.csv"):
        if usable(row) and float(row["ln_ratio"]) > CLEAR_LOG_RATIO and method in (None, row["method"]):
            origin = row["source"] + row["dataset"]
            groups.setdefault(key_of(row)[:-1], []).append((origin, float(row["ln_ratio"])))
    pairs = (pair for losses in groups.values() for pair in itertools.combinations(losses, 2))
    return np.array([abs(np.log(a / b)) for (here, a), (there, b) in pairs if here != there])


def row_bits(spec: ModelSpec, variant: Variant) -> float:
    """Bits per weight of a block type's file; the nominal bits of other methods, as their users count."""
    if variant.method == "gguf":
        return quality_noise.stored_bits(spec, variant) or float("nan")
    return float(variant.type[0]) if variant.type.endswith("bit") else {"int8": 8.0}.get(variant.type, 4.0)
