"""Weigh the spreads of the quality fit's priors by evidence, and leave models out with spreads chosen without them.

    python benchmarks/quality_priors.py      (needs numpy and scipy; OMP_NUM_THREADS=1: two minutes)

First, for each spread of quality_fit.py, ln(probability of all rows) [nats] at other values against that at the shipped
one: where it is flat, the rows cannot tell. Then a nested cross-validation: for each model, or family, left out the
spreads are those of the greatest evidence among the other rows, so that its error has no part in any choice of theirs.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))

from quality import summary
from quality_fit import SPREADS, Array, Problem, Spreads, fit, predict
from quality_rows import Rows

from planner.estimate.quality_model import family_of

FACTORS = (0.3, 0.5, 1.0, 2.0, 3.0)
ROUNDS = 2


def evidence_at(rows: Rows, mask: Array, start: Spreads, name: str) -> dict[float, float]:
    """Evidence by value of one spread around that of ``start``, the others as they are."""
    values = [getattr(start, name) * factor for factor in FACTORS]
    return {v: Problem(rows, mask, dataclasses.replace(start, **{name: v})).evidence() for v in values}


def likeliest(rows: Rows, mask: Array) -> Spreads:
    """The spreads of the greatest evidence among the rows of ``mask``, one spread after another."""
    tried = {f.name: [getattr(SPREADS, f.name) * factor for factor in FACTORS] for f in dataclasses.fields(Spreads)}
    found = SPREADS
    for _ in range(ROUNDS):
        for name, values in tried.items():
            options = [dataclasses.replace(found, **{name: value}) for value in values]
            found = max(options, key=lambda spreads: Problem(rows, mask, spreads).evidence())
    return found


def nested(rows: Rows, groups: Array) -> Array:
    """Each group of rows predicted by a fit whose spreads, too, know nothing of it."""
    out = np.full(len(rows), np.nan)
    for group in sorted(set(groups)):
        mine = groups == group
        found = fit(rows, ~mine, likeliest(rows, ~mine))
        out[mine] = predict(rows, found, mine)
    return out


def main() -> None:
    """Print both."""
    rows = Rows()
    everything = np.ones(len(rows), bool)
    shipped = Problem(rows, everything).evidence()
    print("Evidence against that of the shipped spreads [nats]")
    for field in dataclasses.fields(Spreads):
        found = evidence_at(rows, everything, SPREADS, field.name)
        print(f"  {field.name:9s} " + "  ".join(f"{v:.3g}: {e - shipped:+.1f}" for v, e in found.items()))
    print("Spreads chosen without what is left out: mean absolute error of ln(perplexity ratio)")
    families = np.array([family_of(spec) for spec in rows.specs])
    for title, groups in (("models", rows.models), ("families", families)):
        figures = summary(rows, nested(rows, groups))
        high, low = figures["mae_4_bits_up"], figures["mae_below_4_bits"]
        print(f"  {title} left out: 4 bits and more {high:.4f}, below {low:.4f}")


if __name__ == "__main__":
    main()
