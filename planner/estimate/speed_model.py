"""Coefficients of the speed model, read from ``data/speed_model.toml`` on first use."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from math import prod
from typing import Any

from planner.core.data import data_path
from planner.estimate import speed_terms
from planner.estimate.coefficients import read_coefficients
from planner.estimate.speed_terms import Case, Roles

_ROLES: dict[str, Callable[[Case], Roles]] = {
    "gpu_decode": speed_terms.gpu_decode_roles,
    "gpu_prefill": speed_terms.gpu_prefill_roles,
    "cpu_decode": speed_terms.cpu_roles,
    "cpu_prefill": speed_terms.cpu_roles,
    "serving_decode": speed_terms.serving_roles,
    "serving_prefill": speed_terms.serving_roles,
}


@cache
def document() -> dict[str, Any]:
    """The parsed coefficient file."""
    return read_coefficients(data_path("speed_model.toml"))


@cache
def coefficients(fit: str, case: Case) -> dict[str, float]:
    """Coefficients by role of ``fit`` for ``case``; a factor that was never fitted counts as 1."""
    factors = document()[fit]["factors"]
    return {role: prod(factors.get(name, 1.0) for name in names) for role, names in _ROLES[fit](case).items()}


def stratum(case: Case) -> str:
    """The group of cases whose errors are alike; names the interval that is used."""
    group = case.backend if case.backend != "cuda" or case.chip != "spark" else "unified"
    if case.chip in ("rdna3.5", "xe-lp"):
        group = "unified"
    if group in ("rocm", "vulkan", "sycl"):
        group = "amd-intel"
    return f"{group}-moe" if case.moe else group


FEW = 3
"""Devices of its generation that must have been measured for a generation to have an interval of its own."""


def generation(case: Case) -> str:
    """What devices share whose measurements tell most about one another: the chip and the back end."""
    return f"{case.chip}|{case.backend}"


def labels(case: Case, siblings: int) -> tuple[str, ...]:
    """Names of the intervals that suit ``case``, most special first; ``siblings`` devices of its generation are known.

    Where there are few, the generation's own factors are hardly known, and the next device lies farther off. Mixtures
    of all back ends tell of mixtures where their own has too few.
    """
    group = stratum(case)
    mixtures = ("moe",) if case.moe else ()
    return (f"{group}-few", *mixtures, "few", group) if siblings < FEW else (group, *mixtures)


def unmeasured_labels(fit: str, case: Case) -> tuple[str, ...]:
    """:func:`labels` of a device that nobody measured."""
    return labels(case, int(document()[fit].get("generations", {}).get(generation(case), 0)))


def interval(fit: str, *labels: str) -> tuple[float, float]:
    """10 % and 90 % quantiles of log(measured / predicted): of the first label that has them, else of all rows."""
    table = document()[fit]["interval"]
    for label in (*labels, "all"):
        if row := table.get(label):
            return row["low"], row["high"]
    raise KeyError(fit)


def device_factor(fit: str, device: str | None, backend: str) -> float | None:
    """How much faster than the formula this device was where it was measured; ``None`` if it never was."""
    factor = document()[fit].get("devices", {}).get(f"{device}|{backend}")
    return None if factor is None else float(factor)
