"""What a calibration text of another domain costs: a sentence with the numbers of ``data/calibration_domains.csv``."""

from __future__ import annotations

from functools import cache
from math import exp, log, sqrt

from planner.core.data import read_table

TABLE = "calibration_domains.csv"
GENERAL, NOTHING = "general", "nothing"


@cache
def costs(calibrated: str | None = None) -> dict[str, float]:
    """Domain → KL divergence with another matrix over that with the domain's own, a mean over the types.

    Args:
        calibrated: what the other matrix is made of; ``None``: of each of the other domains, the worst of them.
    """
    rows = read_table(TABLE)
    measured = {(r["type"], r["calibrated_with"], r["measured_on"]): float(r["kl_nats"]) for r in rows}
    domains = {row["measured_on"] for row in rows}
    found = {}
    for domain in sorted(domains):
        others = (calibrated,) if calibrated else tuple(domains - {domain})
        types = {type_ for type_, with_, on in measured if on == domain and with_ == others[0]}
        ratios = {
            other: exp(sum(log(measured[t, other, domain] / measured[t, domain, domain]) for t in types) / len(types))
            for other in others
        }
        found[domain] = max(ratios.values())
    return found


def error() -> float:
    """Standard error of such a ratio, by its two divergences taken as independent: more than it is, on one text."""
    rows = read_table(TABLE)
    relative = [(float(row["kl_error_nats"]) / float(row["kl_nats"])) ** 2 for row in rows]
    types = len({row["type"] for row in rows})
    return sqrt(2 * sum(relative) / len(relative) / types)


def warning(*, general: bool) -> str:
    """What to tell of a matrix of qplan's general text, or of a text whose domain is the user's to know."""
    rows = read_table(TABLE)
    types, model, date = sorted({row["type"] for row in rows}), rows[0]["model"], rows[0]["date"]
    seen = costs(GENERAL if general else None)
    said = ", ".join(f"{domain} {factor:.2f}" for domain, factor in seen.items())
    where = f"(each ± {error():.2f}; KL divergence, {' and '.join(types)} of {model}, {date})"
    if general:
        return (
            "calibrated with qplan's general text; against a text of the domain itself the loss was, times as large: "
            f"{said} {where}; --calibration takes a text of your own"
        )
    return (
        "calibrated with a text of your own: it should be like what the model is used for; with the least fitting text "
        f"of other domains the loss was, times as large: {said} {where}"
    )
