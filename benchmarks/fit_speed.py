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
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from scipy.optimize import least_squares
from scipy.stats import t as student

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from speed_fits import FITS, Fit
from speed_rows import Rows, load_rows

from planner.core.data import data_path
from planner.core.estimates import Z80
from planner.estimate.speed import LEAST_SPREAD
from planner.estimate.speed_model import generation, labels

FOLDS, SEED = 10, 0
LEAST_ROWS = 20
FEW_DEVICES, PRIOR_DEVICES, PRIOR_SPREAD = 5, 3, 0.5
"""Fewer devices than the first hardly tell how far off the next one is; 0.5 is twice what prompts in served runtimes
reach on two cards, as neither vLLM nor 16-bit weights are among their rows."""
Tables = dict[str, dict[str, float | int]]
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


def held_sets(names: Iterable[str], folds: int = FOLDS, seed: int = SEED) -> list[set[str]]:
    """The names in ``folds`` shuffled parts, each to be held out once."""
    groups = np.array(sorted(set(names)))
    np.random.default_rng(seed).shuffle(groups)
    return [set(groups[fold::folds].tolist()) for fold in range(min(folds, len(groups)))]


def held_out_fits(
    fit: Fit, rows: Rows, by: str, sets: list[set[str]]
) -> tuple[np.ndarray, list[tuple[Model, np.ndarray]]]:
    """Residuals of every row with its group held out, and the fit without each set.

    Residuals are log(measured / predicted) of the tokens per second. ``by`` is ``devices``, ``models`` or ``sources``.
    """
    keys = np.array(getattr(rows, by))
    out, fits = np.full(len(rows), np.nan), []
    for held in sets:
        test = np.isin(keys, sorted(held))
        train = Model(fit, rows.take(~test))
        theta = train.solve()
        fits.append((train, theta))
        if test.any():
            probe = Model(fit, rows.take(test))
            merged = [theta[train.names[n]] if n in train.names else probe.mean[i] for n, i in probe.names.items()]
            out[test] = probe.log_seconds(np.array(merged), False) - probe.target
    return out, fits


def cross_validate(fit: Fit, rows: Rows, *, by: str = "devices", seed: int = SEED) -> np.ndarray:
    """Residuals of :func:`held_out_fits`, ten parts of the devices (or models, or sources) held out in turn."""
    return held_out_fits(fit, rows, by, held_sets(getattr(rows, by), seed=seed))[0]


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


def device_squares(r: np.ndarray, devices: list[str]) -> list[float]:
    """Mean square residual of each device."""
    names = np.array(devices)
    return [float(np.mean(r[names == name] ** 2)) for name in sorted(set(devices))]


def next_device(r: np.ndarray, devices: list[str], spread: float = PRIOR_SPREAD) -> tuple[float, float]:
    """10 % and 90 % quantiles of ``r`` widened for what so few ``devices`` tell of the next one.

    The quantiles grow about their centre as a normal's do by Student's t. Below ``FEW_DEVICES`` they hold instead the
    predictive t of a device's root mean square, with a prior worth ``PRIOR_DEVICES`` devices of ``spread``.
    """
    low, high = quantiles(r)
    count = len(set(devices))
    enlarged = 1 + 1 / count
    if count < FEW_DEVICES:
        known = PRIOR_DEVICES + count
        scale = ((PRIOR_DEVICES * spread**2 + sum(device_squares(r, devices))) / known * enlarged) ** 0.5
        reach = float(student.ppf(0.9, known)) * scale
        return min(low, -reach), max(high, reach)
    centre, half = (low + high) / 2, (high - low) / 2
    half *= float(student.ppf(0.9, count - 1)) * enlarged**0.5 / Z80
    return centre - half, centre + half


def judged(rows: Rows) -> np.ndarray:
    """The rows that tell a device's offset: the core ones (llama-bench and alike), all where there are few."""
    return rows.core if rows.core.sum() > 40 else np.ones(len(rows), bool)


def siblings(rows: Rows) -> dict[str, set[str]]:
    """The devices of each generation and back end."""
    found: dict[str, set[str]] = {}
    for case, device in zip(rows.cases, rows.devices, strict=True):
        found.setdefault(generation(case), set()).add(device)
    return found


def device_offsets(rows: Rows, r: np.ndarray, shrink: float = 3.0) -> tuple[dict[str, float], np.ndarray]:
    """Shrunken median residual per device and back end (of its models), and each row's after that of its other models.

    Both are better with the median than with the mean, and with it than without any offset, when models are held out.
    """
    keys = np.array([f"{d}|{c.backend}" for d, c in zip(rows.devices, rows.cases, strict=True)])
    models, trusted = np.array(rows.models), judged(rows)
    offsets, after = {}, np.full(len(r), np.nan)
    for key in sorted(set(keys[trusted])):
        here = keys == key
        groups = {
            m: float(np.mean(np.clip(r[here & trusted & (models == m)], -0.6, 0.6)))
            for m in sorted(set(models[here & trusted]))
        }
        offsets[key] = shrunk(list(groups.values()), shrink)
        for m in sorted(set(models[here])):
            rest = [v for n, v in groups.items() if n != m]
            if rest:
                after[here & (models == m)] = r[here & (models == m)] - shrunk(rest, shrink)
    return offsets, after


def shrunk(values: list[float], shrink: float) -> float:
    """Median of ``values``, as if ``shrink`` more of them had been 0."""
    return float(np.median(values)) * len(values) / (len(values) + shrink)


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


def row_labels(rows: Rows) -> list[tuple[str, ...]]:
    """The intervals that would be asked for each row if nobody had measured its device, most special first."""
    known = siblings(rows)
    return [
        labels(case, len(known[generation(case)] - {device}))
        for case, device in zip(rows.cases, rows.devices, strict=True)
    ]


def strata(names: list[tuple[str, ...]], r: np.ndarray, devices: list[str]) -> dict[str, tuple[float, float, int]]:
    """:func:`next_device` of the residual per label of at least 20 rows, and over all.

    A label of few devices is expected to spread like all devices of the fit, where these are enough to tell.
    """
    table = {"all": (*next_device(r, devices), len(r))}
    squares = device_squares(r, devices)
    spread = float(np.median(squares)) ** 0.5 if len(squares) >= FEW_DEVICES else PRIOR_SPREAD
    for label in sorted({label for row in names for label in row}):
        mine = np.array([label in row for row in names])
        if mine.sum() >= LEAST_ROWS:
            here = [device for device, chosen in zip(devices, mine, strict=True) if chosen]
            table[label] = (*next_device(r[mine], here, spread), int(mine.sum()))
    for label in [name for name in table if name.endswith("few")]:  # never narrower than where more is known
        low, high, count = table[label]
        others = table.get(label.removesuffix("few").removesuffix("-"), table["all"])
        table[label] = (min(low, others[0]), max(high, others[1]), count)
    return table


def held_out_intervals(rows: Rows, r: np.ndarray) -> np.ndarray:
    """(low, high) for each row, from the residuals of the other devices."""
    names, devices = row_labels(rows), np.array(rows.devices)
    out = np.empty((len(rows), 2))
    for device in sorted(set(devices)):
        mine = devices == device
        if mine.all():  # one device tells nothing of others
            return np.tile(next_device(r, rows.devices), (len(rows), 1))
        others = rows.take(~mine)
        table = strata([row for row, away in zip(names, mine, strict=True) if not away], r[~mine], others.devices)
        for i in np.flatnonzero(mine):
            out[i] = next((table[label] for label in names[i] if label in table), table["all"])[:2]
    return out


def coverage(r: np.ndarray, bounds: np.ndarray, factor: float) -> float:
    """Share of the residuals within ``factor`` times their bounds."""
    low, high = np.minimum(bounds[:, 0] * factor, -LEAST_SPREAD), np.maximum(bounds[:, 1] * factor, LEAST_SPREAD)
    return float(np.mean((low <= r) & (r <= high)))


def inflated(r: np.ndarray, bounds: np.ndarray) -> float:
    """Factor on the interval's width with which held-out devices are covered four times in five."""
    return next((f for f in np.arange(1.0, 2.0, 0.05) if coverage(r, bounds, float(f)) >= 0.8), 2.0)


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
    print(f"  80 % interval covers {out_of_device:.1%} of the rows of held-out devices")


def fitted(fit: Fit, all_rows: list[dict[str, object]], *, show: bool) -> Tables:
    """Cross-validate and fit: the tables of one fit, by name."""
    rows = fit.select(all_rows)
    model = Model(fit, rows)
    return tables_of(model, model.solve(), cross_validate(fit, rows), show=show)


def tables_of(model: Model, theta: np.ndarray, r: np.ndarray, *, show: bool) -> Tables:
    """What the coefficient file holds of one fit, from its factors and its rows' held-out residuals ``r``."""
    fit, rows = model.fit, model.rows
    rows_j, r_j = rows.take(rows.eligible), r[rows.eligible]
    bounds = held_out_intervals(rows_j, r_j)
    factor = inflated(r_j, bounds)
    outside = coverage(r_j, bounds, factor)
    if show:
        print_table(fit, rows_j, r_j, outside)
    tables: Tables = {
        "factors": {n: float(np.exp(theta[i])) for n, i in model.names.items() if not n.startswith("nuisance.")},
        "generations": {name: len(devices) for name, devices in sorted(siblings(rows).items())},
    }
    for label, (low, high, count) in strata(row_labels(rows_j), r_j, rows_j.devices).items():
        tables[f"interval.{label}"] = {"low": low * factor, "high": high * factor, "rows": count}
    if fit.split:
        low, high, count = fit.split
        tables["interval.split"] = {"low": low, "high": high, "rows": count}
    if fit.offsets:
        residual = model.target - model.log_seconds(theta, True)  # an old build is no property of the device
        offsets, _ = device_offsets(rows, -residual)
        tables["devices"] = {k: float(np.exp(v)) for k, v in offsets.items()}
        tables |= known_intervals(rows_j, r_j, show)
    core = errors(r_j[rows_j.core]) if rows_j.core.any() else errors(r_j)
    found = {f"all_{k}": v for k, v in errors(r_j).items()} | {f"core_{k}": v for k, v in core.items()}
    tables["cross_validation"] = {**found, "interval_coverage": outside}
    return tables


def known_intervals(rows: Rows, r: np.ndarray, show: bool) -> Tables:
    """Intervals for devices in the table, with other models, and with the very model and type."""
    tables: Tables = {}
    _, known = device_offsets(rows, r)
    new_model = ~np.isnan(known)
    if new_model.sum() >= LEAST_ROWS:
        low, high = quantiles(known[new_model])
        tables["interval.known-device"] = {"low": low, "high": high, "rows": int(new_model.sum())}
        if show:
            for label, part in (("known, its correction", known), ("known, no correction", r)):
                e = errors(part[new_model])
                print(f"  device {label}, model new: n={e['rows']} median {e['median']:.1%} MAPE {e['mape']:.1%}")
    spread = published_spread(rows, r)
    if len(spread) >= 10:
        low, high = quantiles(spread)
        tables["interval.published"] = {"low": low, "high": high, "rows": len(spread)}
        if show:
            e = errors(spread)
            print(f"  same device, model and type, another source: n={len(spread)} median {e['median']:.1%}")
    return tables


def document(all_rows: list[dict[str, object]], *, show: bool = False) -> dict[str, Tables]:
    """The tables of every fit."""
    return {fit.name: fitted(fit, all_rows, show=show) for fit in FITS}


def held_out_documents(all_rows: list[dict[str, object]], by: str, sets: list[set[str]]) -> list[dict[str, Tables]]:
    """The tables of every fit without each of the ``sets``; intervals come from the residuals of what is left."""
    documents: list[dict[str, Tables]] = [{} for _ in sets]
    for fit in FITS:
        rows = fit.select(all_rows)
        r, fits = held_out_fits(fit, rows, by, sets)
        keys = np.array(getattr(rows, by))
        for held, (model, theta), tables in zip(sets, fits, documents, strict=True):
            tables[fit.name] = tables_of(model, theta, r[~np.isin(keys, sorted(held))], show=False)
    return documents


def nested(tables: Tables) -> dict[str, object]:
    """``interval.cuda`` as ``{"interval": {"cuda": …}}``, as the TOML file reads."""
    out: dict[str, object] = {}
    for name, values in tables.items():
        head, _, rest = name.partition(".")
        if rest:
            out.setdefault(head, {})[rest] = values  # type: ignore[index]
        else:
            out[head] = values
    return out


def toml_table(name: str, values: dict[str, float | int]) -> list[str]:
    """One TOML table as lines."""
    lines = [f"[{name}]"]
    for key, value in values.items():
        lines.append(f'"{key}" = {value if isinstance(value, int) else format(value, ".6g")}')
    return [*lines, ""]


def main(argv: list[str] | None = None) -> None:
    """Fit everything; see the module's text."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args(argv)
    all_rows = load_rows()
    header = [
        "# Written by benchmarks/fit_speed.py; do not edit. Factors multiply into the coefficients of",
        "# planner/estimate/speed_terms.py; intervals are the 10 % and 90 % quantiles of log(measured/predicted)",
        "# over rows whose whole device was held out; generations count the devices behind each.",
        f'source = "fitted on {len(all_rows)} published measurements (data/published_speed.csv)"',
        f'date = "{datetime.date.today().isoformat()}"',
        "",
    ]
    lines = [
        line
        for name, tables in document(all_rows, show=True).items()
        for table, values in tables.items()
        for line in toml_table(f"{name}.{table}", values)
    ]
    if not arguments.check:
        data_path("speed_model.toml").write_text("\n".join(header + lines), encoding="utf-8")
        print("\nwrote data/speed_model.toml")


if __name__ == "__main__":
    main()
