"""Recipes: a ggml type for each tensor, chosen so that a file of a given size loses least.

How much a tensor's error costs is its *sensitivity*: KL divergence per relative squared error of its output. The
divergence is proportional to that error over types of 2 to 4 bits, and tensors add up (``benchmarks/budget.py`` prints
both). Sensitivities are measured on the model (``verify/sensitivity.py``); before there is a checkpoint to measure,
those of ``data/tensor_sensitivity.csv`` stand in.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

from planner.core.data import read_table
from planner.core.errors import DoesNotFit, InputError
from planner.core.hardware import STRICT
from planner.core.model import ModelSpec, Tensor
from planner.core.units import format_bytes, pad
from planner.formats.ggml import tensor_bytes, type_traits
from planner.methods import gguf_mix
from planner.methods.allocation import MOST_STATES, Allocation, Option, allocate

ALIGNMENT_BYTES = 32
"""``GGUF_DEFAULT_ALIGNMENT``."""
WHOLE_ROW_TYPES = (
    "Q8_0", "Q6_K", "Q5_K", "Q4_K", "IQ4_XS", "Q3_K", "IQ3_S", "IQ3_XXS", "Q2_K", "IQ2_S", "IQ2_XS", "IQ2_XXS",
    "IQ1_M", "IQ1_S",
)  # fmt: skip
"""Types for rows of whole 256-weight blocks. Legacy ones of 4 to 5.5 bits lose more than the K type of that size. The
divergence is proportional to the error down to IQ1_S: all of the demo model's ffn_down, ffn_gate or ffn_up quantized
alone cost 0.28, 0.28 and 0.19 nats per error in Q3_K, and 0.33, 0.28 and 0.20 in IQ1_S (2026-11-26)."""
SHORT_ROW_TYPES = ("Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0", "IQ4_NL")
"""Types for rows of whole 32-weight blocks only."""
DEMANDING_TYPES = frozenset({"IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ1_S", "IQ1_M"})
"""llama.cpp refuses these without an importance matrix, the embedding and the output aside."""
_NAMES = re.compile(r"[A-Za-z0-9_.]{1,63}")
"""Tensor names that a recipe may hold: they become patterns for llama.cpp."""
_PLANNING_STATES = 200
"""A plan's recipe rests on other models' sensitivities, which are wrong by more than the last search gains."""
_FILE_TYPES = {
    "Q8_0": "Q8_0", "Q6_K": "Q6_K", "Q5_K": "Q5_K_M", "Q4_K": "Q4_K_M", "IQ4_XS": "IQ4_XS", "Q3_K": "Q3_K_M",
    "IQ3_S": "IQ3_M", "IQ3_XXS": "IQ3_XXS", "Q2_K": "Q2_K", "IQ2_S": "IQ2_M", "IQ2_XS": "IQ2_XS",
    "IQ2_XXS": "IQ2_XXS", "IQ1_M": "IQ1_M", "IQ1_S": "IQ1_S",
    "Q5_1": "Q5_1", "Q5_0": "Q5_0", "Q4_1": "Q4_1", "Q4_0": "Q4_0", "IQ4_NL": "IQ4_NL",
}  # fmt: skip
"""File type whose number a file carries when most of its weights have the ggml type."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sensitivity:
    """Of one tensor."""

    __pydantic_config__: ClassVar[dict[str, str]] = STRICT

    tensor: str
    divergence_per_error: float
    """KL divergence in nats per relative squared error."""
    errors: dict[str, float]
    """ggml type → relative squared error, weighted by the importance matrix."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SensitivityTable:
    """What a ``sensitivity`` step leaves: everything but the target, so that another size needs no new measurement."""

    __pydantic_config__: ClassVar[dict[str, str]] = STRICT

    format_version: str
    model_shape_sha256: str
    tensors: tuple[Sensitivity, ...]
    probes: tuple[dict[str, str | float], ...]
    """Each part that was quantized: its first tensor, their number, type, error and KL divergence with its error."""
    additivity: float | None
    """Measured divergence with everything at the probes' type, over the sum that the probes tell."""
    tokens: int
    """Tokens that a probe ran, and the seed that drew them and the rows."""
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """A chosen mixture."""

    types: tuple[tuple[str, str], ...]
    """Tensor and type, of the tensors that are quantized, in the model's order."""
    file_type: str
    """llama.cpp's file type that the file will carry."""
    loss: float
    """Predicted KL divergence, nats (only as good as the sensitivities)."""
    gap: float
    """No choice of these types loses less than ``loss - gap``."""


def candidate_types(tensor: Tensor, *, covered: bool) -> tuple[str, ...]:
    """ggml types that ``tensor`` can take, from the largest on; F16 where its rows are no whole blocks at all.

    ``covered``: an importance matrix tells of it.
    """
    row = tensor.shape[0]
    fitting = tuple(t for t in WHOLE_ROW_TYPES if row % type_traits(t).block_weights == 0)
    if len(fitting) <= 1:
        fitting = tuple(t for t in SHORT_ROW_TYPES if row % type_traits(t).block_weights == 0)
    return tuple(t for t in fitting if covered or t not in DEMANDING_TYPES) or ("F16",)


def as_planned(types: tuple[tuple[str, str], ...]) -> Recipe:
    """A recipe that was chosen when the plan was made."""
    counts = Counter(type_ for _, type_ in types if type_ in _FILE_TYPES)
    most = max(counts, key=lambda t: (counts[t], t), default="Q8_0")
    return Recipe(types=types, file_type=_FILE_TYPES[most], loss=0.0, gap=0.0)


Loss = Callable[[Tensor, str], float]


def choose(
    tensors: Sequence[Tensor],
    beside_bytes: int,
    target_bytes: int,
    loss: Loss,
    *,
    covered: Collection[str],
    model_name: str,
    most_states: int = MOST_STATES,
) -> Recipe:
    """The recipe of least loss whose file has at most ``target_bytes``.

    Args:
        tensors: those that are quantized.
        beside_bytes: the rest of the file: metadata, and tensors that keep their type, padded.
        loss: predicted KL divergence of a tensor in a type.
        covered: tensors that an importance matrix tells of.
        model_name: for the error.
        most_states: how thoroughly the last bytes are filled, see :data:`planner.methods.allocation.MOST_STATES`.

    Raises:
        DoesNotFit: even the smallest types take more (``target-too-small``).
    """
    types = [candidate_types(tensor, covered=tensor.name in covered) for tensor in tensors]
    options = [
        [Option(pad(tensor_bytes(t, tensor.shape), ALIGNMENT_BYTES), loss(tensor, t)) for t in its]
        for tensor, its in zip(tensors, types, strict=True)
    ]
    found = allocate(options, target_bytes - beside_bytes, most_states)
    if found is None:
        least = beside_bytes + sum(min(o.size_bytes for o in each) for each in options)
        bits = 8 * least / sum(tensor.element_count for tensor in tensors)
        raise _too_small(model_name, target_bytes, least, bits, bool(covered))
    return _recipe(tensors, types, found)


def _recipe(tensors: Sequence[Tensor], types: list[tuple[str, ...]], found: Allocation) -> Recipe:
    chosen = [its[i] for its, i in zip(types, found.chosen, strict=True)]
    weights: dict[str, int] = {}
    for tensor, type_ in zip(tensors, chosen, strict=True):
        weights[type_] = weights.get(type_, 0) + tensor.element_count
    most = max((t for t in weights if t in _FILE_TYPES), key=lambda t: (weights[t], t), default="Q8_0")
    return Recipe(
        types=tuple((tensor.name, type_) for tensor, type_ in zip(tensors, chosen, strict=True)),
        file_type=_FILE_TYPES[most],
        loss=found.loss,
        gap=found.gap,
    )


def _too_small(model_name: str, target: int, least: int, bits: float, imatrix: bool) -> DoesNotFit:
    return DoesNotFit(
        f"no mixture of types makes {model_name} that small",
        numbers=f"{format_bytes(target, 2)} ({target} bytes) asked for, the smallest takes {format_bytes(least, 2)} "
        f"({least} bytes, {bits:.2f} bits per weight)",
        hint="ask for more" if imatrix else "ask for more, or let it have an importance matrix (`--imatrix on`)",
        code="target-too-small",
    )


def measured_loss(table: SensitivityTable, tensors: Sequence[Tensor]) -> Loss:
    """Losses by what was measured.

    Raises:
        InputError: a tensor was not: the table is of another model (``other-sensitivities``).
    """
    known = {entry.tensor: entry for entry in table.tensors}
    missing = [tensor.name for tensor in tensors if tensor.name not in known]
    if missing:
        raise InputError(
            "the sensitivities are of another model", numbers=f"{missing[0]} is not in them", code="other-sensitivities"
        )

    def loss(tensor: Tensor, type_: str) -> float:
        entry = known[tensor.name]
        # a table of an earlier version lacks types: as bad as nothing at all, so that others are taken
        return entry.divergence_per_error * entry.errors.get(type_, 1.0)

    return loss


@cache
def _prior() -> Mapping[tuple[str, str], float]:
    """(role, part of the depth) → KL divergence per relative squared error, of a model's whole role in that part."""
    return {(row["role"], row["part"]): float(row["value"]) for row in read_table("tensor_sensitivity.csv")}


@cache
def _errors() -> Mapping[str, float]:
    """ggml type → relative squared error of normally distributed weights, with an importance matrix; 16 bits: none."""
    rows = (row for row in read_table("type_noise.csv") if row["method"] == "gguf")
    return {"F16": 0.0, **{row["type"]: float(row["relative_error_imatrix"] or row["relative_error"]) for row in rows}}


PARTS = ("first", "middle", "last")


def part_of_depth(layer: int | None, layer_count: int) -> str:
    """The third of the blocks that ``layer`` is in."""
    return PARTS[min(2, 3 * (layer or 0) // max(layer_count, 1))]


def prior_loss(tensor: Tensor, type_: str, *, layer_count: int, tied: bool) -> float:
    """A loss before anything was measured: mean sensitivities of trained models by role and depth.

    They are of whole thirds of a model, so a block's share falls with the number of blocks. A tied embedding is the
    output too.
    """
    role = gguf_mix.category(tensor.name)
    role = gguf_mix.OUTPUT if tied and role == gguf_mix.TOKEN_EMBEDDING else role
    part = part_of_depth(tensor.layer, layer_count) if tensor.layer is not None else "all"
    table = _prior()
    whole = table.get((role, part)) or table[gguf_mix.OTHER, part if part != "all" else "middle"]
    share = 3 / max(3, layer_count) if tensor.layer is not None else 1.0
    return whole * share * _errors()[type_]


def plan_recipe(
    model: ModelSpec, metadata_bytes: int, target_bytes: int, *, imatrix: bool, most_states: int | None = None
) -> Recipe:
    """:func:`choose` by :func:`prior_loss`: what a plan is made with before the model was measured.

    Args:
        model: its quantized tensors get types.
        metadata_bytes: of the file, before the tensors.
        target_bytes: that the file has at most.
        imatrix: there will be an importance matrix.
        most_states: as for :func:`choose`; ``None`` is as thorough as such sensitivities are worth.

    Raises:
        DoesNotFit: even the smallest types take more (``target-too-small``).
    """
    quantized = [tensor for tensor in model.tensors if gguf_mix.is_quantized(tensor)]
    kept = (tensor for tensor in model.tensors if not gguf_mix.is_quantized(tensor))
    beside = sum(pad(tensor_bytes(gguf_mix.source_type(model, t), t.shape), ALIGNMENT_BYTES) for t in kept)

    def loss(tensor: Tensor, type_: str) -> float:
        return prior_loss(tensor, type_, layer_count=model.n_layer, tied=model.tied_embeddings)

    return choose(
        quantized,
        metadata_bytes + beside,
        target_bytes,
        loss,
        covered=coverable(model) if imatrix else (),
        model_name=model.name,
        most_states=_PLANNING_STATES if most_states is None else most_states,
    )


def coverable(model: ModelSpec) -> frozenset[str]:
    """Tensors that an importance matrix will tell of: those of the blocks."""
    return frozenset(t.name for t in model.tensors if t.layer is not None and gguf_mix.is_quantized(t))


def fault(types: tuple[tuple[str, str], ...]) -> str | None:
    """What is wrong with a recipe from a file; ``None``: nothing. Names become patterns, so they are plain."""
    known = {*WHOLE_ROW_TYPES, *SHORT_ROW_TYPES, "F16"}
    seen: set[str] = set()
    for name, type_ in types:
        if not _NAMES.fullmatch(name) or name in seen:
            return f"{name[:80]!r} is no tensor's name, or is there twice"
        if type_ not in known:
            return f"{type_[:20]!r} is no type of a mixture"
        seen.add(name)
    return None
