"""A machine that obeys the formulas exactly: what its slices would take, and what whole models would."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

from planner.core.model import ModelSpec
from planner.core.rates import Observation
from planner.estimate import slices
from planner.estimate.slices import CPU_KIT, FEW, MANY
from planner.estimate.typed_work import attention, split, sums

DEPTH = 1024
CHUNK = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Law:
    """Costs of one thread; ``n`` threads divide all but the fixed ones."""

    bytes_per_second: dict[str, float]
    flops: dict[str, float]
    attention_flops: float = 9e9
    cache_bytes_per_second: float = 4e9
    scores_per_second: float = 2e9
    prompt_attention_flops: float = 5e10
    prompt_scores_per_second: float = 1e9
    layer: float = 2e-5
    token: float = 1e-4
    row: float = 1e-5
    pass_: float = 1e-4
    mask: float = 2e-8
    """Seconds per cached token, and per token of a prompt and cached token, on one thread however many there are."""

    def decode(self, model: ModelSpec, types: Sequence[str], threads: int, depth: int, kv_type: str = "f16") -> float:
        """Seconds of a token."""
        host, _ = split(sums(model, types), model.n_layer, model.n_layer, False, 0)
        weights = sum(size / self.bytes_per_second[type_] for type_, size in host.token_bytes.items())
        one = attention(model, (0, model.n_layer), float(depth), kv_type)
        seen = one.operations / self.attention_flops + one.cache_bytes / self.cache_bytes_per_second
        seen += one.scores / self.scores_per_second
        return (weights + seen) / threads + model.n_layer * self.layer + self.token + self.mask * depth

    def prefill(self, model: ModelSpec, types: Sequence[str], threads: int, tokens: int, depth: int = 0) -> float:
        """Seconds of a prompt after ``depth`` tokens, in one micro-batch."""
        host, _ = split(sums(model, types), model.n_layer, model.n_layer, False, 0)
        products = sum(2 * tokens * weights / self.flops[type_] for type_, weights in host.prompt_weights.items())
        once = sum(size / self.bytes_per_second[type_] for type_, size in host.row_bytes.items())
        one = attention(model, (0, model.n_layer), depth + tokens / 2, "f16")
        seen = one.operations / self.prompt_attention_flops + one.scores / self.prompt_scores_per_second
        rows = self.row * tokens * model.n_layer * model.n_embd / 1000
        mask = self.mask * tokens * (depth + tokens / 2)
        return (products + once + tokens * seen) / threads + rows + mask + self.pass_


def observed(shape: str, layers: int, type_: str, threads: int, seconds: float, **more: int) -> Observation:
    """A clean observation."""
    base = Observation(
        shape=shape,
        layers=layers,
        type=type_,
        threads=threads,
        seconds=seconds,
        low=seconds,
        high=seconds,
        clean_count=5,
    )
    return replace(base, **more)  # type: ignore[arg-type]


def slices_of(law: Law, types: Sequence[str], threads: Sequence[int]) -> list[Observation]:
    """What ``qplan calibrate`` would time on a machine that obeys ``law``."""
    kit, found = CPU_KIT, []
    pairs = [(kit.wide, type_) for type_ in types] + [(shape, types[0]) for shape in (kit.thin, kit.narrow)]
    for count in threads:
        for shape, type_ in pairs:
            for layers in (FEW, MANY):
                spec = slices.plain(shape, layers)
                pure = slices.pure_types(spec, type_)
                decode = law.decode(spec, pure, count, 0)
                read = law.prefill(spec, pure, count, kit.tokens)
                found.append(observed(shape.name, layers, type_, count, decode))
                found.append(observed(shape.name, layers, type_, count, read, tokens=kit.tokens))
        for shape, layers in product(kit.attention, (FEW, MANY)):
            spec = slices.plain(shape, layers)
            found += _deep_and_not(law, spec, slices.pure_types(spec, types[0]), shape.name, types[0], count)
    return found


def model_slices(law: Law, model: ModelSpec, type_: str, types: Sequence[str], threads: int) -> list[Observation]:
    """What slices of a very model would take."""
    found = []
    for layers in (FEW, MANY):
        spec, cut = slices.cut(model, types, layers)
        found.append(observed("model", layers, type_, threads, law.decode(spec, cut, threads, 0)))
        read = law.prefill(spec, cut, threads, 128)
        found.append(observed("model", layers, type_, threads, read, tokens=128))
    for layers in (FEW, MANY):
        spec, cut = slices.cut(model, types, layers)
        found += _deep_and_not(law, spec, cut, "model", type_, threads)
    return found


def _deep_and_not(
    law: Law, spec: ModelSpec, types: Sequence[str], shape: str, type_: str, threads: int
) -> list[Observation]:
    found = []
    for depth in (DEPTH, 0):
        decode = law.decode(spec, types, threads, depth)
        read = law.prefill(spec, types, threads, CHUNK, depth)
        found.append(observed(shape, spec.n_layer, type_, threads, decode, depth=depth))
        found.append(observed(shape, spec.n_layer, type_, threads, read, depth=depth, tokens=CHUNK))
    return found
