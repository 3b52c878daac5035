"""From the times of slices to rates: slopes over the layers, and what is left when the weights' part is taken away."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import exp, log
from statistics import median
from typing import Any

from planner.core import rates as kinds
from planner.core.model import ModelSpec
from planner.core.rates import Observation, Rate
from planner.estimate import slices
from planner.estimate.nonnegative import nonnegative_costs
from planner.estimate.slices import Kit
from planner.estimate.typed_work import attention, split, sums

_TINY = 1e-12
_MOST_OVERHEAD = 0.6
"""Share of a wide layer that may be its overhead: more is noise, even where launches bound a fast GPU."""
_LEAST_SHARE = 0.05
"""Share of a time that attention over the cache is counted as at least, when its spread follows from that time's."""
_ONE_SAMPLE_SPREAD, _DISTURBED_SPREAD = 0.3, 0.6
"""80 % range of ln(time) of a single sample, and of the best of some in which other programs took cores. Samples of one
piece spread by 0.05 to 0.4 on a shared 2-core EPYC virtual machine (benchmarks/speed_local.py, 2026-11-26)."""
_OF_SAMPLES = 0.6
"""What a median is unsure by, as a share of what samples spread by: so that on two noisy machines four in five of 86
whole models lay in the range (benchmarks/speed_local.py, 2026-11-26)."""
_LEAST_COST = 1e-18
"""Seconds per operation or byte below which a cost is none."""


@dataclass(frozen=True, slots=True)
class _Line:
    """A time over layers: ``rest + layers * slope``, with the relative spread of its samples."""

    slope: float
    rest: float
    spread: float


@dataclass(frozen=True, slots=True)
class _Depth:
    """What a filled cache adds to a time, per token: ``once + layers * layer`` seconds."""

    layer: float
    once: float
    spread: float
    depth: int


def _depth_of(pairs: Sequence[tuple[Observation, Observation]]) -> _Depth | None:
    """From the same slices at depth and with an empty cache; ``None`` where depth costs nothing.

    One slice alone, or a slope that leaves less than nothing for the rest, gives the layers all of it.
    """
    many, start = pairs[-1]
    added = {deep.layers: (deep.seconds - empty.seconds) / deep.tokens for deep, empty in pairs}
    if added[many.layers] <= 0:
        return None
    few = min(added)
    layer, once = added[many.layers] / many.layers, 0.0
    if few < many.layers:
        slope = (added[many.layers] - added[few]) / (many.layers - few)
        if 0 < slope < layer:
            layer, once = slope, added[many.layers] - many.layers * slope
    share = added[many.layers] * many.tokens / many.seconds
    return _Depth(layer, once, max(_spread(many), _spread(start)) / max(share, _LEAST_SHARE), many.depth)


def _usable(seen: Observation) -> bool:
    """Whether it tells anything: an undisturbed sample, or several of which the best two were kept."""
    return seen.clean_count > 0 or seen.disturbed_count > 1


def _spread(seen: Observation) -> float:
    """80 % of ln(time) between samples; few samples say less of it than they differ by."""
    if not seen.clean_count:
        return _DISTURBED_SPREAD
    return _OF_SAMPLES * max(log(seen.high / seen.low), _ONE_SAMPLE_SPREAD / seen.clean_count)


@dataclass(slots=True)
class _Table:
    """Observations by what they are of."""

    rows: Sequence[Observation]
    kit: Kit

    def line(self, shape: str, type_: str, threads: int, tokens: int) -> _Line | None:
        """Through the two slices of one shape; ``None`` where one is missing or disturbed, or it does not rise."""
        found = [o for o in self._of(shape, type_, threads) if o.tokens == tokens and not o.depth]
        found = [o for o in found if o.gpu_layers is None and o.kv_type == "f16"]
        by_layers = {o.layers: o for o in sorted(found, key=lambda o: o.clean_count)}  # the surest of a case holds
        if len(by_layers) < 2:
            return None
        few, many = by_layers[min(by_layers)], by_layers[max(by_layers)]
        slope = (many.seconds - few.seconds) / (many.layers - few.layers)
        if slope <= 0 or not _usable(few) or not _usable(many):
            return None
        return _Line(slope, many.seconds - many.layers * slope, max(_spread(few), _spread(many)))

    def _of(self, shape: str, type_: str, threads: int) -> Iterable[Observation]:
        return (o for o in self.rows if (o.shape, o.type, o.threads) == (shape, type_, threads))

    def deep(self, shape: str, kv_type: str, threads: int, chunk: bool) -> _Depth | None:
        """What a filled cache costs the two slices of one shape; ``None`` where a time is missing or was disturbed."""
        found = [o for o in self.rows if (o.shape, o.threads, o.kv_type) == (shape, threads, kv_type)]
        found = [o for o in found if (o.tokens > 1) == chunk and o.gpu_layers is None and _usable(o)]
        pairs: list[tuple[Observation, Observation]] = []
        for layers in sorted({o.layers for o in found if o.depth}):
            deep = [o for o in found if o.depth and o.layers == layers][-1]
            start = [o for o in found if not o.depth and (o.tokens, o.layers) == (deep.tokens, layers)]
            if start:
                pairs.append((deep, max(start, key=lambda o: o.clean_count)))
        return _depth_of(pairs) if pairs else None

    def threads(self) -> list[int]:
        """Thread counts that were measured."""
        return sorted({o.threads for o in self.rows if o.gpu_layers is None})

    def types(self, shape: str) -> list[str]:
        """Tensor types measured on a shape, in that order."""
        return list(dict.fromkeys(o.type for o in self.rows if o.shape == shape))


@dataclass(frozen=True, slots=True)
class _Costs:
    """Seconds per unit of attention's work, and what a prompt's token costs once per cached token."""

    by_work: dict[str, float]
    mask: float

    def seen_seconds(self, model: ModelSpec, tokens: int) -> float:
        """Attention of one layer per token of a prompt of ``tokens``, from an empty cache."""
        one = attention(model, (0, 1), tokens / 2, "f16")
        amounts = zip(_PREFILL_WORKS, (one.operations, one.cache_bytes, one.scores), strict=True)
        return sum(amount * self.by_work.get(work, 0.0) for work, amount in amounts)


def _rate(work: str, value: float, spread: float = 0.0, **of: Any) -> Rate:
    half = exp(spread / 2)
    low, high = sorted((value / half, value * half))
    return Rate(work=work, value=value, low=low, high=high, **of)


def rates_of(observations: Sequence[Observation], kit: Kit, device: str = kinds.CPU) -> tuple[Rate, ...]:
    """Rates that serve any model, from slices of ``kit``'s shapes."""
    table = _Table([o for o in observations if o.shape != "model"], kit)
    found: list[Rate] = []
    for threads in table.threads():
        found += _of_threads(table, threads, device)
    return tuple(found)


def _of_threads(table: _Table, threads: int, device: str) -> list[Rate]:
    cached = _attention_rates(table, threads, device)
    layer = _layer_seconds(table, threads)
    mask = next((r.value for r in cached if r.work == kinds.PREFILL_MASK), 0.0)
    costs = _Costs({r.work: 1 / r.value for r in cached if r.type == "f16"}, mask)
    row = _row_seconds(table, threads, costs)
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
        for prompt in _prefill_weights(table, type_, threads, row, costs, rate.value, device):
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


def _row_seconds(table: _Table, threads: int, costs: _Costs) -> float:
    """What a layer costs beside its weights per token and 1000 values of the hidden state."""
    tokens = table.kit.tokens
    for type_ in table.types(table.kit.narrow.name):
        lines = [table.line(shape.name, type_, threads, tokens) for shape in (table.kit.wide, table.kit.narrow)]
        if all(line is not None for line in lines):
            (_, w_large, large), (_, w_small, small) = (
                _one(table, shape, type_) for shape in (table.kit.wide, table.kit.narrow)
            )
            wide, narrow = (
                line.slope / tokens - costs.seen_seconds(model, tokens)
                for line, model in zip(lines, (large, small), strict=True)
                if line is not None
            )
            ratio = w_small / w_large
            rest = narrow - ratio * wide  # = row * (E_small - ratio * E_large) / 1000
            width = (small.n_embd - ratio * large.n_embd) / 1000
            return min(max(0.0, rest / width), 0.15 * wide / (large.n_embd / 1000)) if width > 0 else 0.0
    return 0.0


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
    table: _Table, type_: str, threads: int, row: float, costs: _Costs, decode_rate: float, device: str
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
        rest = row * model.n_embd / 1000 + costs.seen_seconds(model, tokens)
        rate = 2 * weights / max(line.slope / tokens - rest, _TINY)
        skipped = weights - sum(whole.prompt_weights.values())
        once = sum(whole.row_bytes.values()) / decode_rate
        beside = line.rest + 2 * skipped * tokens / rate - once - costs.mask * tokens * tokens / 2
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
        for chunk, works in ((False, _DECODE_WORKS), (True, _PREFILL_WORKS)):
            found += _attention_costs(table, kv_type, threads, device, chunk, works)
    for chunk, mask in ((False, kinds.DECODE_MASK), (True, kinds.PREFILL_MASK)):
        seen = [d for shape in table.kit.attention if (d := table.deep(shape.name, "f16", threads, chunk))]
        if seen:
            once = median(d.once / d.depth for d in seen)
            found.append(_rate(mask, once, device=device, threads=threads, depth=seen[0].depth))
    return found


_DECODE_WORKS = (kinds.DECODE_ATTENTION, kinds.DECODE_CACHE, kinds.DECODE_SCORES)
_PREFILL_WORKS = (kinds.PREFILL_ATTENTION, kinds.PREFILL_CACHE, kinds.PREFILL_SCORES)


def _attention_costs(
    table: _Table, kv_type: str, threads: int, device: str, chunk: bool, works: tuple[str, str, str]
) -> list[Rate]:
    """Costs of operations, bytes and scores from shapes that differ in them; fewer costs from fewer shapes."""
    rows, spread, depth = [], 0.0, 0
    for shape in table.kit.attention:
        deep = table.deep(shape.name, kv_type, threads, chunk)
        if deep is None:
            continue
        one = attention(slices.plain(shape, 1), (0, 1), deep.depth, kv_type)
        rows.append((deep.layer, (one.operations, one.cache_bytes, one.scores)))
        spread, depth = max(spread, deep.spread), deep.depth
    costs = nonnegative_costs(rows)
    return [
        _rate(work, 1 / cost, spread, device=device, type=kv_type, threads=threads, depth=depth)
        for work, cost in zip(works, costs, strict=True)
        if cost > _LEAST_COST
    ]


def link_rates_of(
    observations: Sequence[Observation], kit: Kit, device: str, host_rates: Sequence[Rate]
) -> tuple[Rate, ...]:
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


def _host_seconds(host_rates: Sequence[Rate], seen: Observation, size: float, layers: int) -> float | None:
    """A token's time in the layers that the CPU has, with the threads of the slice."""
    known = {r.work: r for r in host_rates if r.threads == seen.threads and r.type in ("", seen.type)}
    if kinds.DECODE_WEIGHTS not in known:
        return None
    layer = known[kinds.LAYER_SECONDS].value if kinds.LAYER_SECONDS in known else 0.0
    return size / known[kinds.DECODE_WEIGHTS].value + layers * layer


def model_rates_of(
    observations: Sequence[Observation], kit: Kit, model: ModelSpec, fingerprint: str, device: str = kinds.CPU
) -> tuple[Rate, ...]:
    """Times of one model's layers, from slices of that very model: (layer and rest) by file type and thread count."""
    table = _Table([o for o in observations if o.shape == "model"], kit)
    found: list[Rate] = []
    for type_ in table.types("model"):
        one_type = _Table([o for o in table.rows if o.type == type_], kit)
        for threads in one_type.threads():
            of: dict[str, Any] = {
                "device": device,
                "threads": threads,
                "model": model.name,
                "model_sha256": fingerprint,
            }
            found += _model_times(one_type, type_, threads, of)
            found += _model_attention(one_type, type_, threads, of)
    return tuple(found)


def _model_times(table: _Table, type_: str, threads: int, of: dict[str, Any]) -> list[Rate]:
    found: list[Rate] = []
    if line := table.line("model", type_, threads, 1):
        found.append(_rate(kinds.MODEL_DECODE_LAYER, line.slope, line.spread, type=type_, **of))
        found.append(_rate(kinds.MODEL_DECODE_REST, line.rest, type=type_, **of))
    for tokens in sorted({o.tokens for o in table.rows if o.tokens > 1 and not o.depth}):
        if line := table.line("model", type_, threads, tokens):
            made: dict[str, Any] = {"type": type_, "tokens": tokens, **of}
            found.append(_rate(kinds.MODEL_PREFILL_LAYER, line.slope / tokens, line.spread, **made))
            found.append(_rate(kinds.MODEL_PREFILL_REST, line.rest / tokens, **made))
    return found


def _model_attention(table: _Table, type_: str, threads: int, of: dict[str, Any]) -> list[Rate]:
    found = []
    for kv_type in dict.fromkeys(o.kv_type for o in table.rows if o.depth):
        for chunk, work, mask in (
            (False, kinds.MODEL_DECODE_CACHED, kinds.MODEL_DECODE_MASK),
            (True, kinds.MODEL_PREFILL_CACHED, kinds.MODEL_PREFILL_MASK),
        ):
            if deep := table.deep("model", kv_type, threads, chunk):
                made: dict[str, Any] = {"type": kv_type, "depth": deep.depth, **of}
                found.append(_rate(work, deep.layer / deep.depth, deep.spread, **made))
                found.append(_rate(mask, deep.once / deep.depth, **made))
    return found
