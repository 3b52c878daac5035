"""What a calibration text of another domain costs: the sentence and the table behind it."""

from __future__ import annotations

import math

import pytest

from planner.core.data import read_table
from planner.execute import domains


def test_every_cost_is_measured_for_every_type_and_domain() -> None:
    rows = read_table(domains.TABLE)
    measured = {row["measured_on"] for row in rows}
    for type_ in {row["type"] for row in rows}:
        seen = {(row["calibrated_with"], row["measured_on"]) for row in rows if row["type"] == type_}
        assert {(c, m) for c in measured | {domains.GENERAL} for m in measured} <= seen
    assert all(float(row["kl_nats"]) > 0 and row["date"] and row["source"] for row in rows)


def test_costs_are_the_mean_ratio_of_the_table() -> None:
    rows = {(r["type"], r["calibrated_with"], r["measured_on"]): float(r["kl_nats"]) for r in read_table(domains.TABLE)}
    types = {type_ for type_, _, _ in rows}
    for domain, cost in domains.costs("code").items():
        ratios = [rows[t, "code", domain] / rows[t, domain, domain] for t in types]
        assert cost == pytest.approx(math.prod(ratios) ** (1 / len(ratios)))
    assert domains.costs("code")["code"] == pytest.approx(1.0)
    for domain, worst in domains.costs().items():
        others = {row[1] for row in rows} - {domain, domains.GENERAL, domains.NOTHING}
        assert worst == pytest.approx(max(domains.costs(other)[domain] for other in others))


@pytest.mark.parametrize("general", [True, False])
def test_the_warning_names_numbers_model_and_date(general: bool) -> None:
    text = domains.warning(general=general)
    for domain, cost in domains.costs(domains.GENERAL if general else None).items():
        assert f"{domain} {cost:.2f}" in text
    assert all(part in text for part in ("Q2_K", "demo", read_table(domains.TABLE)[0]["date"]))
