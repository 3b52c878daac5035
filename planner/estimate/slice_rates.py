"""From the times of slices to rates: slopes over the layers, and what is left when the weights' part is taken away."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import exp, log
from statistics import median
from typing import Protocol

from planner.core import rates as kinds
from planner.core.model import ModelSpec
from planner.core.rates import Rate
from planner.estimate import slices
from planner.estimate.slices import Kit
from planner.estimate.typed_work import attention, split, sums

_TINY = 1e-12
_MOST_OVERHEAD = 0.6
"""Share of a wide layer that may be its overhead: more is noise, even where launches bound a fast GPU."""
_LEAST_COST = 1e-18
"""Seconds per operation or byte below which a cost is none."""


class Seen(Protocol):
    """One timed case of a slice, as the measuring child reports it."""

    shape: str
    layers: int
    type: str
    threads: int
    kv_type: str
    depth: int
    tokens: int
    gpu_layers: int | None
    seconds: float
    low: float
    high: float
    clean_count: int


@dataclass(frozen=True, slots=True)
class _Line:
    """A time over layers: ``rest + layers * slope``, with the relative spread of its samples."""

    slope: float
    rest: float
    spread: float


@dataclass(slots=True)
class _Table:
    """Observations by what they are of."""

    rows: Sequence[Seen]
    kit: Kit

    def line(self, shape: str, type_: str, threads: int, tokens: int) -> _Line | None:
        """Through the two slices of one shape; ``None`` where one is missing or disturbed, or it does not rise."""
        found = [o for o in self._of(shape, type_, threads) if o.tokens == tokens and o.depth == 0]
        by_layers = {o.layers: o for o in found if o.gpu_layers is None}
        if len(by_layers) < 2:
            return None
        few, many = by_layers[min(by_layers)], by_layers[max(by_layers)]
        slope = (many.seconds - few.seconds) / (many.layers - few.layers)
        if slope <= 0 or not few.clean_count or not many.clean_count:
            return None
        return _Line(slope, many.seconds - many.layers * slope, log(many.high / many.low))

    def _of(self, shape: str, type_: str, threads: int) -> Iterable[Seen]:
        return (o for o in self.rows if (o.shape, o.type, o.threads) == (shape, type_, threads))

    def deep(self, shape: str, kv_type: str, threads: int, chunk: bool) -> tuple[Seen, Seen] | None:
        """The same slice at depth and with an empty cache."""
        found = [o for o in self.rows if (o.shape, o.threads, o.kv_type) == (shape, threads, kv_type)]
        below = [o for o in found if o.depth and (o.tokens > 1) == chunk]
        if not below:
            return None
        start = [o for o in found if not o.depth and (o.tokens, o.layers) == (below[-1].tokens, below[-1].layers)]
        return (below[-1], start[-1]) if start else None

    def threads(self) -> list[int]:
        """Thread counts that were measured."""
        return sorted({o.threads for o in self.rows if o.gpu_layers is None})

    def types(self, shape: str) -> list[str]:
        """Tensor types measured on a shape, in that order."""
        return list(dict.fromkeys(o.type for o in self.rows if o.shape == shape))


def _rate(work: str, value: float, spread: float = 0.0, **of: object) -> Rate:
    half = exp(spread / 2)
    low, high = sorted((value / half, value * half))
    return Rate(work=work, value=value, low=low, high=high, **of)  # type: ignore[arg-type]


def rates_of(observations: Sequence[Seen], kit: Kit, device: str = kinds.CPU) -> tuple[Rate, ...]:
    """Rates that serve any model, from slices of ``kit``'s shapes."""
    table = _Table([o for o in observations if o.shape != "model"], kit)
    found: list[Rate] = []
    for threads in table.threads():
        found += _of_threads(table, threads, device)
    return tuple(found)


def _of_threads(table: _Table, threads: int, device: str) -> list[Rate]:
    cached = _attention_rates(table, threads, device)
    layer = _layer_seconds(table, threads)
    flops = next((r.value for r in cached if r.work == kinds.PREFILL_ATTENTION and r.type == "f16"), None)
    row = _row_seconds(table, threads, flops)
    found = [*cached]
    rests: list[float] = []
    passes: list[float] = []
    for type_ in table.types(table.kit.wide.name):
        made = _decode_weights(table, type_, threads, layer, device)
        if made is None:
            continue
        rate, rest = made
        found.append(rate)
        rests.append(rest)
        for prompt in _prefill_weights(table, type_, threads, row, flops, rate.value, device):
            found.append(prompt[0])
            passes.append(prompt[1])
    if rests:
        found.append(_rate(kinds.LAYER_SECONDS, layer, device=device, threads=threads))
        found.append(_rate(kinds.TOKEN_SECONDS, max(0.0, median(rests)), device=device, threads=threads))
        found.append(_rate(kinds.ROW_SECONDS, row, device=device, threads=threads))
    if passes:
        found.append(_rate(kinds.PASS_SECONDS, max(0.0, median(passes)), device=device, threads=threads))
    return found


def _one(table: _Table, shape: slices.Shape, type_: str) -> tuple[float, float, ModelSpec]:
    """Bytes and weights of one layer's matrices, and a one-layer model."""
    model = slices.plain(shape, 1)
    found = sums(model, slices.pure_types(model, type_))
    return (sum(row[1] for row in found.token_bytes.values()), sum(row[1] for row in found.weights.values()), model)


def _layer_seconds(table: _Table, threads: int) -> float:
    """What a layer costs beside its weights: two widths of one type give both unknowns."""
    for type_ in table.types(table.kit.thin.name):
        wide, thin = (table.line(shape.name, type_, threads, 1) for shape in (table.kit.wide, table.kit.thin))
        if wide and thin:
            large, small = (_one(table, shape, type_)[0] for shape in (table.kit.wide, table.kit.thin))
            per_byte = (wide.slope - thin.slope) / (large - small)
            return min(max(0.0, thin.slope - small * max(per_byte, 0.0)), _MOST_OVERHEAD * wide.slope)
    return 0.0


def _row_seconds(table: _Table, threads: int, attention_flops: float | None) -> float:
    """What a layer costs beside its weights per token and 1000 values of the hidden state."""
    tokens = table.kit.tokens
    for type_ in table.types(table.kit.narrow.name):
        lines = [table.line(shape.name, type_, threads, tokens) for shape in (table.kit.wide, table.kit.narrow)]
        if all(line is not None for line in lines):
            (_, w_large, large), (_, w_small, small) = (
                _one(table, shape, type_) for shape in (table.kit.wide, table.kit.narrow)
            )
            wide, narrow = (
                line.slope / tokens - _seen_seconds(model, tokens, attention_flops)
                for line, model in zip(lines, (large, small), strict=True)
                if line is not None
            )
            ratio = w_small / w_large
            rest = narrow - ratio * wide  # = row * (E_small - ratio * E_large) / 1000
            width = (small.n_embd - ratio * large.n_embd) / 1000
            return min(max(0.0, rest / width), 0.15 * wide / (large.n_embd / 1000)) if width > 0 else 0.0
    return 0.0


def _seen_seconds(model: ModelSpec, tokens: int, flops: float | None) -> float:
    """Attention of one layer per token of a prompt of ``tokens``, from an empty cache."""
    return attention(model, (0, 1), tokens / 2, "f16")[0] / flops if flops else 0.0


def _decode_weights(table: _Table, type_: str, threads: int, layer: float, device: str) -> tuple[Rate, float] | None:
    line = table.line(table.kit.wide.name, type_, threads, 1)
    if line is None:
        return None
    size, _, model = _one(table, table.kit.wide, type_)
    rate = size / max(line.slope - layer, _TINY)
    output = sum(sums(model, slices.pure_types(model, type_)).output_bytes.values())
    made = _rate(kinds.DECODE_WEIGHTS, rate, line.spread, device=device, type=type_, threads=threads)
    return made, line.rest - output / rate


def _prefill_weights(
    table: _Table, type_: str, threads: int, row: float, flops: float | None, decode_rate: float, device: str
) -> list[tuple[Rate, float]]:
    """Rate for each prompt length measured, with what a pass costs beside: the intercept of the line."""
    _, weights, model = _one(table, table.kit.wide, type_)
    _, whole = split(sums(model, slices.pure_types(model, type_)), 1, 0, True, 0)
    lengths = sorted({o.tokens for o in table.rows if o.tokens > 1 and o.shape == table.kit.wide.name and not o.depth})
    found = []
    for tokens in lengths:
        line = table.line(table.kit.wide.name, type_, threads, tokens)
        if line is None:
            continue
        rest = row * model.n_embd / 1000 + _seen_seconds(model, tokens, flops)
        rate = 2 * weights / max(line.slope / tokens - rest, _TINY)
        skipped = weights - sum(whole.prompt_weights.values())
        once = sum(whole.row_bytes.values()) / decode_rate
        beside = line.rest + 2 * skipped * tokens / rate - once
        made = _rate(
            kinds.PREFILL_WEIGHTS,
            rate,
            line.spread,
            device=device,
            type=type_,
            threads=threads,
            tokens=tokens,
        )
        found.append((made, beside))
    return found


def _attention_rates(table: _Table, threads: int, device: str) -> list[Rate]:
    found: list[Rate] = []
    for kv_type in dict.fromkeys(o.kv_type for o in table.rows if o.depth):
        found += _decode_attention(table, kv_type, threads, device)
        rate = _prefill_attention(table, kv_type, threads, device)
        found += [rate] if rate else []
    return found


def _decode_attention(table: _Table, kv_type: str, threads: int, device: str) -> list[Rate]:
    """Operations and bytes from two shapes with equal arithmetic and unequal caches."""
    per_op = []
    for shape in (table.kit.wide, table.kit.all_kv_heads):
        pair = table.deep(shape.name, kv_type, threads, chunk=False)
        if pair is None or not pair[0].clean_count or not pair[1].clean_count:
            continue
        added = (pair[0].seconds - pair[1].seconds) / pair[0].layers
        operations, size, _ = attention(slices.plain(shape, 1), (0, 1), pair[0].depth, kv_type)
        spread = log(pair[0].high / pair[0].low)
        if added > 0:
            per_op.append((added, operations, size, spread, pair[0].depth))
    if not per_op:
        return []
    per_operation, per_byte = _two_costs(per_op)
    spread, depth = max(row[3] for row in per_op), per_op[0][4]
    made = [(kinds.DECODE_ATTENTION, per_operation), (kinds.DECODE_CACHE, per_byte)]
    return [
        _rate(work, 1 / cost, spread, device=device, type=kv_type, threads=threads, depth=depth)
        for work, cost in made
        if cost > _LEAST_COST
    ]


def _two_costs(rows: Sequence[tuple[float, float, float, float, int]]) -> tuple[float, float]:
    """Seconds per operation and per byte, neither negative, that give the times of one or two rows."""
    (t1, o1, b1, *_), *others = rows
    if others:
        t2, o2, b2, *_ = others[0]
        determinant = o1 * b2 - o2 * b1
        if determinant:
            per_operation, per_byte = (t1 * b2 - t2 * b1) / determinant, (o1 * t2 - o2 * t1) / determinant
            if per_operation >= 0 and per_byte >= 0:
                return per_operation, per_byte
            if per_operation < 0:
                return 0.0, (t1 + t2) / (b1 + b2)
            return (t1 + t2) / (o1 + o2), 0.0
    return t1 / o1, 0.0


def _prefill_attention(table: _Table, kv_type: str, threads: int, device: str) -> Rate | None:
    done = spent = spread = 0.0
    for shape in (table.kit.wide, table.kit.all_kv_heads):
        pair = table.deep(shape.name, kv_type, threads, chunk=True)
        if pair and pair[0].clean_count and pair[1].clean_count and pair[0].seconds > pair[1].seconds:
            done += (
                pair[0].tokens * pair[0].layers * attention(slices.plain(shape, 1), (0, 1), pair[0].depth, kv_type)[0]
            )
            spent += pair[0].seconds - pair[1].seconds
            spread = max(spread, log(pair[0].high / pair[0].low))
    if not spent:
        return None
    return _rate(kinds.PREFILL_ATTENTION, done / spent, spread, device=device, type=kv_type, threads=threads)


def link_rates_of(observations: Sequence[Seen], kit: Kit, device: str, host_rates: Sequence[Rate]) -> tuple[Rate, ...]:
    """What a slice with half of its layers on the CPU costs beside both halves: handing over, and copied weights."""
    table, found = _Table(observations, kit), []
    for seen in (o for o in observations if o.gpu_layers is not None):
        whole = _Table([o for o in table.rows if o.gpu_layers is None], kit).line(
            kit.wide.name, seen.type, 0, seen.tokens
        )
        if whole is None:
            continue
        host_layers = seen.layers + 1 - (seen.gpu_layers or 0)
        size = host_layers * _one(table, kit.wide, seen.type)[0]
        if seen.tokens > 1:
            beside = seen.seconds - (whole.rest + seen.layers * whole.slope)
            if beside > 0:
                found.append(_rate(kinds.LINK, size / beside, log(seen.high / seen.low), device=device))
            continue
        on_host = _host_seconds(host_rates, seen, size, host_layers)
        if on_host is not None:
            on_gpu = whole.rest + (seen.layers - host_layers) * whole.slope
            found.append(_rate(kinds.CROSSING_SECONDS, max(0.0, seen.seconds - on_gpu - on_host), device=device))
    return tuple(found)


def _host_seconds(host_rates: Sequence[Rate], seen: Seen, size: float, layers: int) -> float | None:
    """A token's time in the layers that the CPU has, with the threads of the slice."""
    known = {r.work: r for r in host_rates if r.threads == seen.threads and r.type in ("", seen.type)}
    if kinds.DECODE_WEIGHTS not in known:
        return None
    layer = known[kinds.LAYER_SECONDS].value if kinds.LAYER_SECONDS in known else 0.0
    return size / known[kinds.DECODE_WEIGHTS].value + layers * layer


def model_rates_of(
    observations: Sequence[Seen], kit: Kit, model: ModelSpec, fingerprint: str, device: str = kinds.CPU
) -> tuple[Rate, ...]:
    """Times of one model's layers, from slices of that very model: (layer and rest) by file type and thread count."""
    table = _Table([o for o in observations if o.shape == "model"], kit)
    found: list[Rate] = []
    for type_ in table.types("model"):
        one_type = _Table([o for o in table.rows if o.type == type_], kit)
        for threads in one_type.threads():
            of = {"device": device, "threads": threads, "model": model.name, "model_sha256": fingerprint}
            found += _model_times(one_type, type_, threads, of)
            found += _model_attention(one_type, type_, threads, of)
    return tuple(found)


def _model_times(table: _Table, type_: str, threads: int, of: dict[str, object]) -> list[Rate]:
    found: list[Rate] = []
    if line := table.line("model", type_, threads, 1):
        found.append(_rate(kinds.MODEL_DECODE_LAYER, line.slope, line.spread, type=type_, **of))
        found.append(_rate(kinds.MODEL_DECODE_REST, line.rest, type=type_, **of))
    for tokens in sorted({o.tokens for o in table.rows if o.tokens > 1 and not o.depth}):
        if line := table.line("model", type_, threads, tokens):
            made = {"type": type_, "tokens": tokens, **of}
            found.append(_rate(kinds.MODEL_PREFILL_LAYER, line.slope / tokens, line.spread, **made))  # type: ignore[arg-type]
            found.append(_rate(kinds.MODEL_PREFILL_REST, line.rest / tokens, **made))  # type: ignore[arg-type]
    return found


def _model_attention(table: _Table, type_: str, threads: int, of: dict[str, object]) -> list[Rate]:
    found = []
    for kv_type in dict.fromkeys(o.kv_type for o in table.rows if o.depth):
        for chunk, work in ((False, kinds.MODEL_DECODE_CACHED), (True, kinds.MODEL_PREFILL_CACHED)):
            pair = table.deep("model", kv_type, threads, chunk)
            if pair and pair[0].clean_count and pair[1].clean_count and pair[0].seconds > pair[1].seconds:
                deep, start = pair
                seconds = (deep.seconds - start.seconds) / (deep.layers * deep.depth * deep.tokens)
                spread = log(deep.high / deep.low)
                found.append(_rate(work, seconds, spread, type=kv_type, depth=deep.depth, **of))
    return found
