"""Loss of quantization as a fitted formula: ln(perplexity ratio) of a variant of a model of some family and size.

    ln(ratio) = most * (1 - exp(-loss / most)), most = ln(vocabulary)
    loss = sensitivity * (noise / 0.005)**power * exp(bend * (noise / 0.1)**2)
    sensitivity = scale * (training tokens / 15e12)**tokens * (parameters / 8e9)**-size * family * model

``noise`` is the weights' relative squared error (``quality_noise``). That the loss is proportional to it is measured
over three decades (a power of 1: Malinovskii et al. 2024, arXiv:2411.17525); that it grows with training tokens and
falls with size is the form of Ouyang et al. 2024 (arXiv:2411.17691) and Kumar et al. 2024 (arXiv:2411.04330). A loss
never exceeds that of guessing evenly, whose perplexity is the vocabulary's size, and nears it by degrees. All factors
are fitted by ``benchmarks/fit_quality.py``.
"""

from __future__ import annotations

from functools import cache, lru_cache
from math import exp, expm1, inf, log, prod
from typing import Any

from planner.core.candidate import Variant
from planner.core.data import data_path, number, read_table
from planner.core.model import ModelSpec, shape_twin
from planner.estimate import quality_noise
from planner.estimate.coefficients import read_coefficients
from planner.methods import gguf, gguf_mix

REFERENCE_PARAMS = 8e9
REFERENCE_TOKENS = 15.0
"""In units of 10**12: what Llama 3 was trained on."""
UNKNOWN_TOKENS = 8.0
"""Where a family's figure is not disclosed: the median of data/training_tokens.csv."""
SMALLEST_PUBLISHED = 1e8
"""Weights: of the catalog the smallest is SmolLM2-135M."""
REFERENCE_NOISE = 0.005
"""About that of Q4_K."""
FAR_NOISE = 0.1
"""About that of IQ2_XXS with an importance matrix."""
BEND_POWER = 2
"""The bend is of second order: up to the noise of 3-bit types the loss is proportional."""
BENDS = (-0.14, 0.6)
"""Bounds of the bend, within which a loss grows with the noise up to ``FARTHEST_NOISE``: the slope of its logarithm,
``power + 2 * bend * (noise / FAR_NOISE)**2``, stays positive."""
FARTHEST_NOISE = 0.18
"""Beyond the largest noise with a published row (0.16), the loss grows in proportion again."""
DIVERGENCE_FLOOR = 0.00055
"""Mean KL divergence [nats] of the 16-bit GGUF of Llama-3-8B from itself through a stored file of logits: what two runs
differ by (llama.cpp tools/perplexity/README.md, 2024-05)."""
LOSSLESS = frozenset({"F32", "F16", "BF16"})

Terms = tuple[tuple[str, float, str], ...]


@cache
def document() -> dict[str, Any]:
    """The parsed coefficient file."""
    return read_coefficients(data_path("quality_model.toml"))


@cache
def families() -> dict[str, dict[str, str]]:
    """Rows of ``data/training_tokens.csv`` by family, and by model where one differs from its family."""
    return {row["name"]: row for row in read_table("training_tokens.csv")}


def training_tokens(model: ModelSpec) -> float:
    """Tokens the model, or else its family, was trained on, in 10**12; the median family's where unknown.

    A model smaller than any that is published is somebody's experiment, trained on the less the smaller it is.
    """
    row = families().get(model.name) or families().get(model.family)
    disclosed = number(row["training_tokens_trillion"]) if row else None
    return disclosed or UNKNOWN_TOKENS * min(1.0, _params(model) / SMALLEST_PUBLISHED)


def family_of(model: ModelSpec) -> str:
    """The model's family, or the one that shares all of its deviation."""
    row = families().get(model.family)
    return row["kin"] if row and row["kin_share"] == "1" else model.family


def acquaintance(model: ModelSpec) -> str:
    """Whose published perplexities the fit knows: of this ``known-model``, of its family, or of neither."""
    if model.name in document()["models"]:
        return "known-model"
    return "new-model" if family_of(model) in document()["family_rows"] else "new-family"


def family_factor(family: str) -> float:
    """What a family deviates from its size and training; kin of a measured family share a part of its deviation."""
    known = document()["family"]
    if family in known:
        return float(known[family])
    row = families().get(family)
    if row is None or row["kin"] not in known:
        return 1.0
    share: float = float(known[row["kin"]]) ** float(row["kin_share"])
    return share


def noise(model: ModelSpec, variant: Variant) -> float | None:
    """Relative squared error of the weights, by role and corrected by type; ``None`` for a type without figures.

    A GGUF type never has more than a smaller one of its kind: where llama.cpp demands an importance matrix of the
    smaller type only, the formula would say so, and the published rows do not.
    """
    return _noise(shape_twin(model), variant)


@lru_cache(maxsize=4096)
def _noise(model: ModelSpec, variant: Variant) -> float | None:
    own = _own_noise(model, variant)
    if own is None or variant.method != "gguf" or gguf.is_own_mix(model, variant):
        return own
    return _ladder(model, quality_noise.type_class(variant.type), variant.imatrix).get(variant.type, own)


@lru_cache(maxsize=2048)
def _ladder(model: ModelSpec, ladder: str, imatrix: bool) -> dict[str, float]:
    """Noise by file type, from the smallest file up never growing."""
    least, found = inf, {}
    members = (
        t.name for t in gguf_mix.file_types().values() if t.usable and quality_noise.type_class(t.name) == ladder
    )
    variants = [Variant(method="gguf", format="gguf", runtime="llama.cpp", type=t, imatrix=imatrix) for t in members]
    sized = ((quality_noise.stored_bits(model, v), v) for v in variants)
    for _, variant in sorted(((bits, v) for bits, v in sized if bits is not None), key=lambda pair: pair[0]):
        own = _own_noise(model, variant)
        least = min(least, inf if own is None else own)
        found[variant.type] = least
    return found


def _own_noise(model: ModelSpec, variant: Variant) -> float | None:
    held = quality_noise.shares(model, variant)
    if not held:
        return None
    factors, roles = document()["factors"], document()["roles"]
    total, weight = 0.0, 0.0
    for share in held:
        error = quality_noise.error_of(variant, share.kind)
        if error is None:
            return None
        powers = quality_noise.corrections(variant, share.kind)
        felt = float(roles[share.role]) * share.fraction
        total += felt * error * prod(float(factors.get(name, 1.0)) ** power for name, power in powers.items())
        weight += felt
    return total / weight + (float(factors["activations"]) if quality_noise.rounds_activations(variant) else 0.0)


def sensitivity(model: ModelSpec, *, known: bool = True) -> float:
    """ln(ratio) at the reference noise.

    Args:
        model: its family, size and training decide.
        known: with the correction where other types of this very model were measured.
    """
    factors = document()["factors"]
    trained: float = (training_tokens(model) / REFERENCE_TOKENS) ** float(factors["tokens"])
    params = _params(model) / REFERENCE_PARAMS
    size: float = params ** -float(factors["size" if params > 1 else "size.small"])
    own = float(document()["models"].get(model.name, 1.0)) if known else 1.0
    return float(factors["scale"]) * trained * size * family_factor(model.family) * own


@lru_cache(maxsize=512)
def _params(model: ModelSpec) -> float:
    return float(model.parameter_count)


def _bent(noise: float, params: float) -> float:
    """How much faster than in proportion the loss grows at large noise: small models collapse, large ones do not."""
    factors = document()["factors"]
    bend = float(factors["bend"]) - float(factors["bend.size"]) * log(params / REFERENCE_PARAMS)
    return exp(min(max(bend, BENDS[0]), BENDS[1]) * (min(noise, FARTHEST_NOISE) / FAR_NOISE) ** BEND_POWER)


@lru_cache(maxsize=4096)
def log_ratio(model: ModelSpec, variant: Variant, *, known: bool = True) -> tuple[float, Terms] | None:
    """ln(perplexity / 16-bit perplexity) and its terms; ``None`` for a type without figures.

    Args:
        model: of any name; shape, vocabulary, family, size and training decide.
        variant: what is written.
        known: use what was published of other types of this very model.
    """
    found = noise(model, variant)
    if found is None:
        return None
    felt = sensitivity(model, known=known)
    power = float(document()["factors"]["power"])
    terms = (
        ("relative squared error of the weights", found, ""),
        (f"loss at an error of {REFERENCE_NOISE}", felt, ""),
        ("  training tokens", training_tokens(model), "10^12"),
        ("  factor of the family", family_factor(model.family), "x"),
        ("  this model's published types", float(document()["models"].get(model.name, 1.0)) if known else 1.0, "x"),
        (f"(error / {REFERENCE_NOISE})", found / REFERENCE_NOISE, f"to the power {power:.3f}"),
        ("bend at large errors", _bent(found, _params(model)), "x"),
        ("no more than guessing evenly loses", log(model.n_vocab), ""),
    )
    return saturated(felt * shape_of_loss(found, _params(model), power), model.n_vocab), terms


def shape_of_loss(noise: float, params: float, power: float) -> float:
    """How the loss grows with the noise: 1 at the reference noise, but for the bend there."""
    return float((noise / REFERENCE_NOISE) ** power * _bent(noise, params))


def saturated(loss: float, n_vocab: int) -> float:
    """``loss`` of ln(perplexity) while it is small, and never more than guessing evenly over a vocabulary loses."""
    most = log(max(n_vocab, 2))
    return -most * expm1(-loss / most)


def width(label: str, noise: float) -> float:
    """Half-width of the 80 % interval of ln(loss) at a noise, by :func:`acquaintance` with the model."""
    table = document()["interval"][label]
    return float(table.get(noise_range(noise), table["all"]))


def noise_range(noise: float) -> str:
    """The range of noise whose errors are alike: of Q6_K and better, of 4- and 5-bit types, of 3-bit ones, of fewer."""
    if noise < 0.0008:
        return "like-6-bits"
    if noise < 0.009:
        return "like-4-bits"
    return "like-3-bits" if noise < 0.035 else "like-2-bits"
