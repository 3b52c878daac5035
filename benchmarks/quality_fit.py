"""Fit the coefficients of planner/estimate/quality_model.py: a robust maximum a posteriori with derivatives.

Every factor has a prior, so that a family, a type or a method with few rows stays near what is usual; how far from the
usual is :class:`Spreads`, which ``quality_priors.py`` weighs by evidence. A published loss has a relative and an
absolute noise, and a row that disagrees by many times that counts in proportion, not squared.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.optimize import least_squares
from scipy.sparse import csr_matrix

sys.path.insert(0, str(Path(__file__).resolve().parent))

from quality_rows import Rows

from planner.core.model import ModelSpec
from planner.estimate import quality_noise
from planner.estimate.quality_model import (
    BEND_POWER,
    BENDS,
    FAR_NOISE,
    REFERENCE_NOISE,
    REFERENCE_PARAMS,
    REFERENCE_TOKENS,
    family_of,
    training_tokens,
)
from planner.methods import gguf_mix

LEAST = 2e-4  # losses below are noise
LEAST_VALUES = {"size": 0.005, "size.small": 0.02, "bend.size": 0.0}
"""A larger model of a family never loses more. The published ones of over 8e9 weights lose no less than their smaller
kin, so that the exponent of size ends at its bound."""

Array = np.ndarray


@dataclass(frozen=True, slots=True)
class Spreads:
    """Standard deviations before any row is seen, of logarithms where not said otherwise.

    Each is within one nat of the greatest evidence (``quality_priors.py``).
    """

    type: float = 0.05
    """Of a type from its class: what ggml's own kernels do to normally distributed weights tells nearly all."""
    role: float = 1.0
    model: float = 0.2
    family: float = 0.1
    maker: float = 0.4
    tokens: float = 0.05
    """Of the exponent of training tokens."""
    kin: float = 0.15
    """Of two models' sensitivities told by their losses of accuracy."""
    relative: float = 0.1
    """Of one published ln(ratio)."""
    absolute: float = 0.0006
    """Of one published ln(ratio), in ln(ratio)."""


SPREADS = Spreads()

# Mean and sigma of the logarithm of each factor before any row is seen.
PRIORS = {
    "scale": (np.log(0.045), 1.0),
    "power": (1.0, 0.02),  # proportional: arXiv:2411.17525
    "size": (0.1, 0.1),  # arXiv:2411.17691 has 0.23, of models below 12e9 weights
    "size.small": (0.23, 0.08),  # below the reference size, where no row is
    "bend": (0.1, 0.1),  # how much faster than in proportion the loss grows at the noise of 1- and 2-bit types
    "bend.size": (0.1, 0.1),
    "activations": (np.log(6e-5), 0.6),  # twice the error of Q8_0, which is what activations are rounded to
    "class.K": (0.0, 0.15),
    "class.I": (0.0, 0.15),
    "class.legacy": (0.2, 0.2),
    "class.micro": (0.0, 0.2),
    "class.gptq": (-0.2, 0.3),
    "class.awq": (-0.4, 0.3),
    "class.bitsandbytes": (0.0, 0.3),
    "class.none": (0.0, 0.3),
    "type.bitsandbytes.int8": (2.5, 0.7),  # activations are INT8 too: a loss of about 0.001 (arXiv:2208.07339)
    "imatrix.K": (0.0, 0.15),
    "imatrix.I": (0.0, 0.15),
    "imatrix.legacy": (0.0, 0.2),
    "imatrix.micro": (0.0, 0.1),
    "group.none": (0.2, 0.2),  # rows of real weights have outliers that the normal distribution lacks
    "act_order": (-0.1, 0.1),
}
TOKENS = 0.5
"""Mean of the exponent of training tokens: arXiv:2411.17691 has 0.53."""
ROLE_PRIORS = {
    f"role.{gguf_mix.TOKEN_EMBEDDING}": (-1.5, 0.5),
    f"role.{gguf_mix.ATTENTION_QKV}": (0.9, 0.3),
}  # three in one

MAKERS = {"llama-": "meta", "qwen": "alibaba"}
"""By the start of a family's name; every other family stands alone."""


def prior(name: str, spreads: Spreads = SPREADS) -> tuple[float, float]:
    """Mean and sigma of a parameter."""
    if name == "tokens":
        return TOKENS, spreads.tokens
    return PRIORS.get(name) or ROLE_PRIORS.get(name) or (0.0, getattr(spreads, name.partition(".")[0]))


def maker_of(family: str) -> str:
    """Who made a family: families of one maker share data and habits of training, and so a part of their deviation."""
    return next((maker for start, maker in MAKERS.items() if family.startswith(start)), family)


def _kinship(spec: ModelSpec) -> tuple[str, str]:
    family = family_of(spec)
    return f"family.{family}", f"maker.{maker_of(family)}"


@dataclass(frozen=True, slots=True)
class Fit:
    """Fitted parameters by name; factors as logarithms."""

    values: dict[str, float]

    def of(self, name: str) -> float:
        """The parameter, or the mean of its prior where no row told."""
        return self.values[name] if name in self.values else prior(name)[0]


class Problem:
    """Residuals and their derivatives for the rows of a mask."""

    def __init__(self, rows: Rows, mask: Array, spreads: Spreads = SPREADS) -> None:
        self.spreads = spreads
        self.index = np.flatnonzero(mask)
        chosen = np.isin(rows.entry_row, self.index)
        self.rows, self.entries = rows, np.flatnonzero(chosen)
        self.names = sorted(self._names())
        self.at = {name: j for j, name in enumerate(self.names)}
        self._matrices()
        self.kin = np.array([self._level(a, a.name) - self._level(b, b.name) for a, b, _ in rows.pairs])
        self.kin_target = np.array([ratio for *_, ratio in rows.pairs])
        self.mean, self.sigma = np.array([prior(n, spreads) for n in self.names]).T
        loss = np.maximum(rows.loss[self.index], LEAST)
        self.most = np.log([rows.specs[i].n_vocab for i in self.index])
        self.target, self.noise = np.log(loss), np.hypot(spreads.relative, spreads.absolute / loss)

    def _names(self) -> set[str]:
        rows = self.rows
        names = {"scale", "power", "tokens", "size", "size.small", "bend", "bend.size", "activations"}
        names |= {*(f"role.{r}" for r in quality_noise.ROLES)}
        names |= {name for e in self.entries for name in rows.corrections[e]}
        names |= {f"model.{rows.models[i]}" for i in self.index}
        specs = [rows.specs[i] for i in self.index] + [spec for a, b, _ in rows.pairs for spec in (a, b)]
        return names | {name for spec in specs for name in _kinship(spec)}

    def _matrices(self) -> None:
        rows, width = self.rows, len(self.names)
        place = {i: k for k, i in enumerate(self.index)}
        owner, count = [place[i] for i in rows.entry_row[self.entries]], len(self.entries)
        self.owned = csr_matrix((np.ones(count), (owner, np.arange(count))), shape=(len(self.index), count))
        self.correct = np.zeros((len(self.entries), width))
        self.role = np.zeros((len(self.entries), width))
        for k, e in enumerate(self.entries):
            for name, power in rows.corrections[e].items():
                self.correct[k, self.at[name]] = power
            self.role[k, self.at[f"role.{quality_noise.ROLES[rows.entry_role[e]]}"]] = 1
        self.level = np.zeros((len(self.index), width))
        self.bend = np.zeros((len(self.index), width))
        for k, i in enumerate(self.index):
            self.level[k] = self._level(rows.specs[i], rows.models[i])
            size = np.log(rows.specs[i].parameter_count / REFERENCE_PARAMS)
            self.bend[k, self.at["bend"]], self.bend[k, self.at["bend.size"]] = 1, -size

    def _level(self, spec: ModelSpec, model: str) -> Array:
        """Which parameters add up to the logarithm of a model's sensitivity."""
        level = np.zeros(len(self.names))
        for name in ("scale", *_kinship(spec), f"model.{model}"):
            if name in self.at:
                level[self.at[name]] = 1
        level[self.at["tokens"]] = np.log(training_tokens(spec) / REFERENCE_TOKENS)
        size = np.log(spec.parameter_count / REFERENCE_PARAMS)
        level[self.at["size" if size > 0 else "size.small"]] = -size
        return level

    def sums(self, values: Array) -> Array:
        """Entries added up by row."""
        return np.asarray(self.owned @ values)

    def _parts(self, theta: Array) -> tuple[Array, ...]:
        """Weights of the entries and their errors, both summed by row too, and the activations' error by row."""
        rows, e = self.rows, self.entries
        weight = np.exp(self.role @ theta) * rows.entry_fraction[e]
        part = weight * rows.entry_error[e] * np.exp(self.correct @ theta)
        activations = np.exp(theta[self.at["activations"]]) * rows.rounded[self.index]
        return weight, part, self.sums(weight), self.sums(part), activations

    def noise_of(self, theta: Array) -> Array:
        """Noise of the weights by row."""
        _, _, weights, parts, activations = self._parts(theta)
        return parts / weights + activations

    def predict(self, theta: Array) -> tuple[Array, Array]:
        """ln of the predicted loss, ``[rows]``, and its derivatives, ``[rows, parameters]``."""
        weight, part, weights, parts, activations = self._parts(theta)
        noise = parts / weights + activations
        power = theta[self.at["power"]]
        log_noise = np.log(noise / REFERENCE_NOISE)
        d_parts = self.sums(part[:, None] * (self.role + self.correct)) / weights[:, None]
        d_weights = (parts / weights**2)[:, None] * self.sums(weight[:, None] * self.role)
        d_noise = d_parts - d_weights
        d_noise[:, self.at["activations"]] += activations
        bend, far = self.bend @ theta, (noise / FAR_NOISE) ** BEND_POWER
        free = (bend > BENDS[0]) & (bend < BENDS[1])
        bend = np.clip(bend, *BENDS)
        by_noise = (power + BEND_POWER * bend * far) / noise
        derivative = self.level + by_noise[:, None] * d_noise + (free * far)[:, None] * self.bend
        derivative[:, self.at["power"]] += log_noise
        return self._saturated(self.level @ theta + power * log_noise + bend * far, derivative)

    def _saturated(self, log_loss: Array, derivative: Array) -> tuple[Array, Array]:
        """ln of the loss that guessing evenly limits, and its derivatives (``quality_model.saturated``)."""
        part = np.exp(log_loss) / self.most
        felt = -np.expm1(-part)
        return np.log(self.most * felt), (part * np.exp(-part) / felt)[:, None] * derivative

    def residuals(self, theta: Array) -> Array:
        """Errors over their noise, large ones softened, then the distances from the priors."""
        z = (self.predict(theta)[0] - self.target) / self.noise
        soft = np.sign(z) * np.sqrt(2 * (np.sqrt(1 + z * z) - 1))
        kin = (self.kin @ theta - self.kin_target) / self.spreads.kin
        return np.concatenate([soft, kin, (theta - self.mean) / self.sigma])

    def jacobian(self, theta: Array) -> Array:
        """Derivatives of :meth:`residuals`."""
        value, derivative = self.predict(theta)
        z = (value - self.target) / self.noise
        soft = np.sqrt(2 * (np.sqrt(1 + z * z) - 1))
        by_z = np.where(np.abs(z) < 1e-6, 1.0, np.abs(z) / (np.sqrt(1 + z * z) * np.maximum(soft, 1e-12)))
        rows = (by_z / self.noise)[:, None] * derivative
        return np.vstack([rows, self.kin / self.spreads.kin, np.diag(1 / self.sigma)])

    def solve(self, *, bounded: bool = True) -> Array:
        """The most probable parameters, in the order of the names."""
        low = np.array([LEAST_VALUES.get(name, -np.inf) if bounded else -np.inf for name in self.names])
        return np.asarray(least_squares(self.residuals, self.mean, jac=self.jacobian, bounds=(low, np.inf)).x)

    def evidence(self) -> float:
        """ln(probability of the rows, whatever the parameters) [nats], to a constant: Laplace's approximation.

        That of the spreads which is greatest is empirical Bayes' choice (MacKay 1992, Bayesian interpolation). The
        bounds are left out: at one the approximation does not hold.
        """
        theta = self.solve(bounded=False)
        residuals, jacobian = self.residuals(theta), self.jacobian(theta)
        _, curvature = np.linalg.slogdet(jacobian.T @ jacobian)
        widths = np.log(self.sigma).sum() + np.log(self.noise).sum() + len(self.kin) * np.log(self.spreads.kin)
        return float(-residuals @ residuals / 2 - curvature / 2 - widths)


def fit(rows: Rows, mask: Array, spreads: Spreads = SPREADS) -> Fit:
    """Parameters from the rows of ``mask``."""
    problem = Problem(rows, mask, spreads)
    return Fit(dict(zip(problem.names, (float(v) for v in problem.solve()), strict=True)))


def predict(rows: Rows, found: Fit, mask: Array) -> Array:
    """ln(ratio) of the rows of ``mask``."""
    problem = Problem(rows, mask)
    return np.exp(problem.predict(np.array([found.of(name) for name in problem.names]))[0])


def leave_out(rows: Rows, groups: Iterable[Array]) -> Array:
    """Prediction of each group of rows by a fit without it."""
    out = np.full(len(rows), np.nan)
    for mine in groups:
        out[mine] = predict(rows, fit(rows, ~mine), mine)
    return out


def leave_one_model_out(rows: Rows) -> Array:
    """Each row predicted without any row of its model."""
    return leave_out(rows, (rows.models == m for m in sorted(set(rows.models))))


def leave_one_family_out(rows: Rows) -> Array:
    """Each row predicted without any row of its family."""
    families_of = np.array([family_of(spec) for spec in rows.specs])
    return leave_out(rows, (families_of == f for f in sorted(set(families_of))))


def leave_one_type_out(rows: Rows) -> Array:
    """Each (model, variant) predicted with the model's other variants known."""
    pairs = sorted(set(zip(rows.models, rows.labels, strict=True)))
    return leave_out(rows, ((rows.models == m) & (rows.labels == label) for m, label in pairs))


def noise_of(rows: Rows, found: Fit) -> Array:
    """Noise of the weights of every row."""
    problem = Problem(rows, np.ones(len(rows), bool))
    theta = np.array([found.of(name) for name in problem.names])
    return problem.noise_of(theta)
