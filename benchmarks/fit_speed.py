"""Fit data/speed_model.toml on data/published_speed.csv and print the cross-validated errors.

Needs numpy and scipy. Whole devices are held out; the loss is pseudo-Huber on log time; every factor has a Gaussian
prior in log space around its parent, so a generation with few rows stays near its back end.

    python benchmarks/fit_speed.py            fit, print, write the TOML
    python benchmarks/fit_speed.py --check    fit and print only
"""

from __future__ import annotations

import argparse
import datetime
import sys
from pathlib import Path

import numpy as np
from scipy.optimize import least_squares

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from speed_fits import FITS, Fit
from speed_rows import Rows, load_rows

from planner.core.data import data_path

FOLDS, SEED = 10, 0
_STEP = 1e-5
LAUNCH = "nuisance.launch."
"""Conditions of a build that cost time per kernel launch, not in proportion to the whole token."""


def design(names: dict[str, int], role_names: list[tuple[str, ...]]) -> np.ndarray:
    """0/1 matrix: which factors multiply into the coefficient of each row; unknown names are left out (factor 1)."""
    matrix = np.zeros((len(role_names), len(names)))
    for i, row in enumerate(role_names):
        for name in row:
            if name in names:
                matrix[i, names[name]] += 1
    return matrix


class Model:
    """One fit: the factors, their priors and the design matrices of the rows."""

    def __init__(self, fit: Fit, rows: Rows, names: list[str] | None = None) -> None:
        self.fit, self.rows = fit, rows
        roles = [fit.roles(case) for case in rows.cases]
        wanted = sorted({name for role in roles for part in role.values() for name in part} | set(fit.always()))
        wanted += sorted({name for row in rows.nuisances for name in row})
        self.names = {name: i for i, name in enumerate(names if names is not None else wanted)}
        self.designs = {role: design(self.names, [r[role] for r in roles]) for role in roles[0]}
        launch = [tuple(n for n in row if n.startswith(LAUNCH)) for row in rows.nuisances]
        self.launch = design(self.names, launch)
        self.nuisance = design(self.names, rows.nuisances) - self.launch
        self.mean = np.array([fit.prior(name)[0] for name in self.names])
        self.sigma = np.array([fit.prior(name)[1] for name in self.names])
        self.target = np.log(rows.seconds)

    def log_seconds(self, theta: np.ndarray, nuisance: bool) -> np.ndarray:
        """Logarithm of the predicted seconds of every row."""
        log_time = self._formula(self._coefficients(theta, nuisance))
        return log_time + self.nuisance @ theta if nuisance else log_time

    def _coefficients(self, theta: np.ndarray, nuisance: bool) -> dict[str, np.ndarray]:
        logs = {role: matrix @ theta for role, matrix in self.designs.items()}
        if nuisance and self.fit.launch:
            logs["layer_seconds"] = logs["layer_seconds"] + self.launch @ theta
        return logs

    def _formula(self, logs: dict[str, np.ndarray]) -> np.ndarray:
        return np.log(self.fit.seconds(self.rows, {role: np.exp(v) for role, v in logs.items()}))

    def jacobian(self, theta: np.ndarray) -> np.ndarray:
        """d log(seconds) / d theta, with nuisances: one finite difference per coefficient, then the chain rule."""
        logs = self._coefficients(theta, True)
        base = self._formula(logs)
        matrix = self.nuisance.copy()
        for role, design_matrix in self.designs.items():
            slope = (self._formula(logs | {role: logs[role] + _STEP}) - base) / _STEP
            full = design_matrix + self.launch if role == "layer_seconds" and self.fit.launch else design_matrix
            matrix += slope[:, None] * full
        return matrix

    def solve(self) -> np.ndarray:
        """Logarithms of the factors that minimise the loss."""
        scale, noise, weight = self.fit.huber, self.fit.noise, self.rows.weights

        def residuals(theta: np.ndarray) -> np.ndarray:
            z = (self.log_seconds(theta, True) - self.target) / scale
            robust = np.sign(z) * np.sqrt(2 * (np.sqrt(1 + z * z) - 1)) * scale
            return np.concatenate([weight * robust / noise, (theta - self.mean) / self.sigma])

        def slopes(theta: np.ndarray) -> np.ndarray:
            z = (self.log_seconds(theta, True) - self.target) / scale
            root = np.sqrt(1 + z * z)
            # d robust / d z = |z| / (root * sqrt(2 (root - 1))), which is sqrt((1 + root) / 2) / root
            gain = np.sqrt((1 + root) / 2) / root
            return np.vstack([(weight * gain / noise)[:, None] * self.jacobian(theta), np.diag(1 / self.sigma)])

        return least_squares(residuals, self.mean, jac=slopes, method="lm", max_nfev=60).x


def cross_validate(fit: Fit, rows: Rows) -> np.ndarray:
    """log(measured / predicted) of the tokens per second, each row predicted with its device held out."""
    devices = np.array(sorted(set(rows.devices)))
    np.random.default_rng(SEED).shuffle(devices)
    out = np.full(len(rows), np.nan)
    for fold in range(min(FOLDS, len(devices))):
        test = np.isin(rows.devices, devices[fold::FOLDS])
        train = Model(fit, rows.take(~test))
        theta = train.solve()
        probe = Model(fit, rows.take(test))
        merged = np.array(
            [theta[train.names[n]] if n in train.names else probe.mean[i] for n, i in probe.names.items()]
        )
        out[test] = probe.log_seconds(merged, False) - probe.target
    return out


def errors(r: np.ndarray) -> dict[str, float]:
    """Error of the predicted rate: |predicted / measured - 1|."""
    e = np.abs(np.exp(-r) - 1)
    return {
        "rows": len(r),
        "median": float(np.median(e)),
        "mape": float(e.mean()),
        "within_20": float((e <= 0.2).mean()),
    }


def quantiles(r: np.ndarray) -> tuple[float, float]:
    """10 % and 90 % quantiles."""
    return float(np.quantile(r, 0.1)), float(np.quantile(r, 0.9))


def judged(rows: Rows) -> np.ndarray:
    """The rows that decide intervals and offsets: the core ones (llama-bench and alike), all where there are few."""
    return rows.core if rows.core.sum() > 40 else np.ones(len(rows), bool)


def device_offsets(rows: Rows, r: np.ndarray, shrink: float = 3.0) -> tuple[dict[str, float], np.ndarray]:
    """Shrunken mean residual per device and back end, and each row's residual after the offset of its other models."""
    keys = np.array([f"{d}|{c.backend}" for d, c in zip(rows.devices, rows.cases, strict=True)])
    offsets, after = {}, np.full(len(r), np.nan)
    trusted = judged(rows)
    for key in sorted(set(keys[trusted])):
        mine = np.flatnonzero((keys == key) & trusted)
        models = np.array([rows.models[i] for i in mine])
        groups = {m: float(np.mean(np.clip(r[mine[models == m]], -0.6, 0.6))) for m in sorted(set(models))}
        offsets[key] = sum(groups.values()) / (len(groups) + shrink)
        for m in groups:
            rest = [v for n, v in groups.items() if n != m]
            if rest:
                after[mine[models == m]] = r[mine[models == m]] - sum(rest) / (len(rest) + shrink)
    return offsets, after


def published_spread(rows: Rows, r: np.ndarray) -> np.ndarray:
    """Residual of each core row against the others of the same device, back end, model and type."""
    groups: dict[tuple[str, ...], list[int]] = {}
    for i in np.flatnonzero(rows.core):
        groups.setdefault((rows.devices[i], rows.cases[i].backend, rows.models[i], rows.types[i]), []).append(i)
    out = []
    for members in groups.values():
        sources = {rows.sources[i] for i in members}
        if len(sources) > 1:  # one submission repeats itself; two submissions tell the real spread
            for i in members:
                rest = [r[j] for j in members if rows.sources[j] != rows.sources[i]]
                out.append(r[i] - float(np.mean(rest)))
    return np.array(out)


def strata(fit: Fit, rows: Rows, r: np.ndarray) -> dict[str, tuple[float, float, int]]:
    """10 % and 90 % quantiles of the residual per stratum of at least 20 rows, and over all."""
    use = judged(rows)
    labels = np.array(rows.strata)
    table = {"all": (*quantiles(r[use]), int(use.sum()))}
    for label in sorted(set(labels)):
        mine = use & (labels == label)
        if mine.sum() >= 20:
            table[label] = (*quantiles(r[mine]), int(mine.sum()))
    return table


def inflated(rows: Rows, r: np.ndarray) -> float:
    """Factor on the interval's width with which held-out devices are covered four times in five."""
    return next((f for f in np.arange(1.0, 2.0, 0.05) if held_out_coverage(rows, r, float(f)) >= 0.8), 2.0)


def held_out_coverage(rows: Rows, r: np.ndarray, factor: float) -> float:
    """Coverage when each device's quantiles come from the other devices' residuals."""
    use = judged(rows)
    inside = []
    for device in sorted(set(np.array(rows.devices)[use])):
        mine = use & (np.array(rows.devices) == device)
        rest = ~(np.array(rows.devices) == device)
        table = strata(None, rows.take(rest), r[rest])
        for i in np.flatnonzero(mine):
            low, high, _ = table.get(rows.strata[i], table["all"])
            inside.append(low * factor <= r[i] <= high * factor)
    return float(np.mean(inside))


def print_table(fit: Fit, rows: Rows, r: np.ndarray, out_of_device: float) -> None:
    """Errors by stratum and kind of source."""
    print(f"\n{fit.name}: leave-devices-out, {len(set(rows.devices))} devices")
    groups = {"all rows": np.ones(len(rows), bool), "core rows": rows.core}
    groups |= {s: np.array(rows.strata) == s for s in sorted(set(rows.strata))}
    groups |= {f"  {k}": np.array(rows.kinds) == k for k in sorted(set(rows.kinds))}
    for label, mask in groups.items():
        if mask.any():
            e = errors(r[mask])
            print(
                f"  {label:28s} n={e['rows']:4d}  median {e['median']:6.1%}  MAPE {e['mape']:6.1%}"
                f"  within 20 %: {e['within_20']:6.1%}  bias {np.median(r[mask]):+.3f}"
            )
    print(f"  80 % interval covers {out_of_device:.1%} of the core rows of held-out devices")


def toml_table(name: str, values: dict[str, float | int | str]) -> list[str]:
    """One TOML table as lines."""
    lines = [f"[{name}]"]
    for key, value in values.items():
        text = f'"{value}"' if isinstance(value, str) else str(value) if isinstance(value, int) else f"{value:.6g}"
        lines.append(f'"{key}" = {text}')
    return [*lines, ""]


def run(fit: Fit, all_rows: Rows) -> list[str]:
    """Cross-validate, print, fit on everything and return the lines of the TOML."""
    rows = fit.select(all_rows)
    r = cross_validate(fit, rows)
    rows_j, r_j = rows.take(rows.eligible), r[rows.eligible]
    factor = inflated(rows_j, r_j)
    outside = held_out_coverage(rows_j, r_j, factor)
    print_table(fit, rows_j, r_j, outside)
    model = Model(fit, rows)
    theta = model.solve()
    factors = {name: float(np.exp(theta[i])) for name, i in model.names.items() if not name.startswith("nuisance.")}
    lines = toml_table(f"{fit.name}.factors", factors)
    table = strata(fit, rows_j, r_j)
    for label, (low, high, count) in table.items():
        lines += toml_table(f"{fit.name}.interval.{label}", {"low": low * factor, "high": high * factor, "rows": count})
    if fit.split:
        low, high, count = fit.split
        lines += toml_table(f"{fit.name}.interval.split", {"low": low, "high": high, "rows": count})
    if fit.offsets:
        fitted = model.target - model.log_seconds(theta, True)  # an old build is no property of the device
        offsets, _ = device_offsets(rows, -fitted)
        _, known = device_offsets(rows_j, r_j)
        known = known[~np.isnan(known)]
        if len(known) >= 20:
            low, high = quantiles(known)
            e = errors(known)
            print(
                f"  device known, model new: n={len(known)} median {e['median']:.1%} within 20 %: {e['within_20']:.1%}"
            )
            lines += toml_table(f"{fit.name}.interval.known-device", {"low": low, "high": high, "rows": len(known)})
        lines += toml_table(f"{fit.name}.devices", {k: float(np.exp(v)) for k, v in offsets.items()})
        spread = published_spread(rows_j, r_j)
        if len(spread) >= 10:
            low, high = quantiles(spread)
            e = errors(spread)
            print(f"  same device, model and type, another source: n={len(spread)} median {e['median']:.1%}")
            lines += toml_table(f"{fit.name}.interval.published", {"low": low, "high": high, "rows": len(spread)})
    e = errors(r_j)
    core = errors(r_j[rows_j.core]) if rows_j.core.any() else e
    cv = {f"all_{k}": v for k, v in e.items()} | {f"core_{k}": v for k, v in core.items()}
    lines += toml_table(f"{fit.name}.cross_validation", {**cv, "interval_coverage": outside})
    return lines


def main(argv: list[str] | None = None) -> None:
    """Fit everything; see the module's text."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args(argv)
    all_rows = load_rows()
    header = [
        "# Written by benchmarks/fit_speed.py; do not edit. Factors multiply into the coefficients of",
        "# planner/estimate/speed_terms.py; intervals are the 10 % and 90 % quantiles of log(measured/predicted)",
        "# over rows whose whole device was held out.",
        f'source = "fitted on {len(all_rows)} published measurements (data/published_speed.csv)"',
        f'date = "{datetime.date.today().isoformat()}"',
        "",
    ]
    lines = [line for fit in FITS for line in run(fit, all_rows)]
    if not arguments.check:
        data_path("speed_model.toml").write_text("\n".join(header + lines), encoding="utf-8")
        print("\nwrote data/speed_model.toml")


if __name__ == "__main__":
    main()
