"""Write data/quality_model.toml from data/published_quality.csv, and print how well held-out rows are met.

    python benchmarks/fit_quality.py      (needs numpy and scipy; half a minute)

The formula is in planner/estimate/quality_model.py, the fit in quality_fit.py, the errors in quality.py.
"""

from __future__ import annotations

import datetime
import itertools
import sys
from collections import Counter
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))

from quality import divergence_relation, held_out, print_divergence, print_errors, widths
from quality_fit import Fit, fit, maker_of
from quality_rows import Rows, repetitions

from planner.core.candidate import Variant
from planner.core.data import data_path, read_table
from planner.estimate import quality_noise
from planner.estimate.quality_model import family_of
from planner.formats.ggml import type_traits

CLASSES = ("K", "I", "legacy")
PLAIN = ("power", "tokens", "size", "size.small", "bend", "bend.size")
"""Parameters that are no factors: stored as they are, the others as exp."""


def monotone(found: Fit) -> Fit:
    """Corrections with which more bits never err more within a class, with and without an importance matrix.

    Where the fit, or a type without rows, breaks the order, the type with more bits is brought down to its neighbour.
    """
    values = dict(found.values)
    known = [row["type"] for row in read_table("type_noise.csv") if row["method"] == "gguf"]
    for group in CLASSES:
        members = [t for t in known if quality_noise.type_class(t) == group]
        members.sort(key=lambda t: type_traits(t).bits_per_weight)
        for less, more in itertools.pairwise(members):
            gaps = [np.log(_error(more, guided) / _error(less, guided)) for guided in (False, True)]
            excess = max(gaps) + values.get(f"type.{more}", 0.0) - values.get(f"type.{less}", 0.0)
            if excess > 0:
                values[f"type.{more}"] = values.get(f"type.{more}", 0.0) - excess
    return Fit(values)


def _error(kind: str, guided: bool) -> float:
    variant = Variant(method="gguf", format="gguf", runtime="llama.cpp", type=kind, imatrix=guided)
    error = quality_noise.error_of(variant, kind)
    assert error
    return error


def toml(name: str, values: dict[str, float | int | str]) -> list[str]:
    """One TOML table as lines."""
    lines = [f"[{name}]"] if name else []
    for key, value in values.items():
        text = f'"{value}"' if isinstance(value, str) else str(value) if isinstance(value, int) else f"{value:.6g}"
        lines.append(f'"{key}" = {text}')
    return [*lines, ""]


def parts(found: Fit, start: str) -> dict[str, float | int | str]:
    """Factors whose names start so, by the rest of the name."""
    names = sorted(n for n in found.values if n.startswith(start))
    return {n.removeprefix(start): float(np.exp(found.values[n])) for n in names}


def families(found: Fit) -> dict[str, float | int | str]:
    """Factors of families: their own deviation and their maker's."""
    names = sorted(n.removeprefix("family.") for n in found.values if n.startswith("family."))
    return {n: float(np.exp(found.values[f"family.{n}"] + found.values[f"maker.{maker_of(n)}"])) for n in names}


def family_rows(rows: Rows) -> dict[str, float | int | str]:
    """Published losses by family."""
    return dict(sorted(Counter(family_of(spec) for spec in rows.specs).items()))


def coefficients(found: Fit) -> list[str]:
    """The tables that the formula reads."""
    named = ("family.", "maker.", "model.", "role.")
    factors = {n: v for n, v in sorted(found.values.items()) if not n.startswith(named)}
    return [
        *toml("factors", {n: v if n in PLAIN else float(np.exp(v)) for n, v in factors.items()}),
        *toml("roles", parts(found, "role.")),
        *toml("family", families(found)),
        *toml("models", parts(found, "model.")),
    ]


def main() -> None:
    """Fit, print, write."""
    rows = Rows()
    everything = np.ones(len(rows), bool)
    found = monotone(fit(rows, everything))
    held = held_out(rows, found)
    figures = print_errors(held, held.by_model, "Whole models held out")
    strangers = print_errors(held, held.by_family, "Whole families held out")
    known = print_errors(held, held.by_type, "One type of a model held out, its other types known")
    relation = divergence_relation()
    print_divergence(relation)
    again = {"gguf": repetitions("gguf"), "all": repetitions()}
    for method, pairs in again.items():
        agree = np.quantile(pairs, 0.8)
        print(f"{len(pairs)} pairs of published losses of one variant ({method}): 80 % within {agree:.0%}")
    lines = [
        "# Written by benchmarks/fit_quality.py; do not edit. See planner/estimate/quality_model.py for the formula.",
        f'source = "fitted on {len(rows)} published perplexities (data/published_quality.csv)"',
        f'date = "{datetime.date.today().isoformat()}"',
        "",
        *coefficients(found),
        *toml("family_rows", family_rows(rows)),
        *toml("divergence", relation),  # type: ignore[arg-type]
    ]
    for label, predicted, stretched in (
        ("new-family", held.by_family, strangers),
        ("new-model", held.by_model, figures),
        ("known-model", held.by_type, known),
    ):
        table = widths(rows, predicted, held.ranges, everything)
        usual = stretched["interval_stretch"]
        lines += toml(
            f"interval.{label}", {k: v * stretched.get(f"interval_stretch_{k}", usual) for k, v in table.items()}
        )
    # a published row of this very variant tells no less than those of the model's other types
    most = widths(rows, held.by_type, held.ranges, everything)["all"] * known["interval_stretch"]
    spread = {name: min(float(np.quantile(pairs, 0.8)), most) for name, pairs in again.items()}
    lines += toml("interval.published", spread)  # type: ignore[arg-type]
    for name, errors in (("", figures), ("_new_family", strangers), ("_known_model", known)):
        lines += toml(f"cross_validation{name}", errors)  # type: ignore[arg-type]
    data_path("quality_model.toml").write_text("\n".join(lines), encoding="utf-8")
    print("wrote data/quality_model.toml")


if __name__ == "__main__":
    main()
