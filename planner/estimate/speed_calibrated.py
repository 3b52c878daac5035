"""Tokens per second from what ``qplan calibrate`` measured here: slices of this very model, or rates for any model.

A token costs, on each device, its weights by tensor type over the rate of that type, a time per layer, and attention
over the cache; and a time per token. A prompt costs two operations per weight and token, where the last layer's
feed-forward and the output count for one row alone, a time per row, attention, and a time per micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from math import exp, sqrt

from planner.core import rates as kinds
from planner.core.candidate import Placement, Variant
from planner.core.estimates import CALIBRATED, Z80, Prediction
from planner.core.hardware import HardwareProfile
from planner.core.measurement import DECODE
from planner.core.model import ModelSpec, shape_sha256, shape_twin
from planner.core.rates import CPU, Rates, gpu_key
from planner.estimate.memory import gpu_shares
from planner.estimate.rate_lookup import Found, rate_of, seconds_at, time_at
from planner.estimate.typed_work import Attention, Part, attention, parts

Terms = tuple[tuple[str, float, str], ...]

MODEL_SIGMA = 0.04
"""Standard deviation of ln(measured / predicted) from slices of the very model, beside what their samples spread: from
slices that were timed in another run than the whole model, root mean square of 40 cases (benchmarks/speed_local.py,
llama-cpp-python 0.3.36, a 2-core Xeon virtual machine, 2026-11-27)."""
RATES_SIGMA = 0.07
"""The same from rates that serve any model: root mean square of 88 cases of TinyLlama, Llama 3.2 3B and Llama 2 7B,
half of them with a cache, for which the next is added (the same script and machine)."""
MODEL_CACHE_SIGMA, RATES_CACHE_SIGMA = 0.05, 0.12
"""Added to attention over a filled cache of 2048 tokens, from slices of the model and from rates: 85 % of the 40 cases
and 91 % of the 88 lie inside; on busier machines the spread of the samples adds to it."""
MIXTURE_SIGMA = 0.12
"""Added for experts, whose kernels no slice that serves any model has."""
NO_FLASH_SIGMA = 0.4
"""Added to attention without flash attention. An assumption: slices are timed with it."""
LEAST_PROMPT = 32
"""Shorter prompts are read like tokens: llama.cpp copies no weights to a GPU for them, and kernels fill no tile."""


@dataclass(frozen=True, slots=True)
class _Spent:
    """A time with its uncertainty in seconds and its arithmetic."""

    seconds: float
    deviation: float
    terms: Terms


def predict(
    model: ModelSpec,
    variant: Variant,
    placement: Placement,
    hardware: HardwareProfile,
    rates: Rates,
    quantity: str,
) -> Prediction | None:
    """Tokens per second of decode or prefill with an 80 % interval; ``None`` where the rates do not cover the case.

    They cover GGUF files under llama.cpp with flash attention, one sequence, on devices that were calibrated.
    """
    if variant.method != "gguf" or variant.runtime != "llama.cpp" or placement.sequences > 1 or not rates:
        return None
    machine = _Machine(hardware, rates, placement)
    spent = _from_model(model, variant, placement, machine, quantity)
    source, sigma = f"slices of this model calibrated here at {_newest(rates)}", MODEL_SIGMA
    if spent is None:
        spent = _from_rates(model, variant, placement, machine, quantity)
        source, sigma = f"rates of this machine calibrated at {_newest(rates)}", RATES_SIGMA
        sigma = sqrt(sigma**2 + (MIXTURE_SIGMA**2 if model.mixture else 0.0))
    if spent is None or spent.seconds <= 0:
        return None
    value = (1 if quantity == DECODE else max(1, placement.prompt_tokens)) / spent.seconds
    total = sqrt(sigma**2 + (spent.deviation / spent.seconds) ** 2)
    return Prediction(
        value=value,
        low=value * exp(-Z80 * total),
        high=value * exp(Z80 * total),
        basis=CALIBRATED,
        source=source,
        terms=spent.terms,
    )


@lru_cache(maxsize=64)
def _newest(rates: Rates) -> str:
    return max((rate.measured_at for rate in rates.entries), default="") or "an unknown time"


class _Machine:
    """The devices of a placement with their rates."""

    def __init__(self, hardware: HardwareProfile, rates: Rates, placement: Placement) -> None:
        self.rates = rates
        self.threads = placement.threads or hardware.cpu.inference_threads()
        self.gpus: list[tuple[str, float]] = []
        if placement.gpu_layers > 0:
            used = hardware.gpus[: max(1, placement.gpu_count)]
            shares = gpu_shares(placement, used)
            total = sum(shares) or 1.0
            parts_ = [share / total for share in shares] if sum(shares) > 0 else [1 / len(used)] * len(used)
            self.gpus = [(gpu_key(gpu), share) for gpu, share in zip(used, parts_, strict=True) if share > 0]

    def rate(self, work: str, type_: str, device: str, tokens: int = 0) -> Found | None:
        """The rate of ``work`` for a tensor or KV type, from the nearest type where it was not measured."""
        threads = self.threads if device == CPU else 0
        return rate_of(self.rates, work, type_, device, threads, tokens)

    def attention(self, work: str, placement: Placement, device: str) -> Found | None:
        """The rate of attention; without flash attention other kernels run, which no slice was timed with."""
        found = self.rate(work, placement.kv_type, device)
        if found is None:
            return None
        added = RATES_CACHE_SIGMA**2 + (0.0 if placement.flash_attention else NO_FLASH_SIGMA**2)
        return Found(found.value, sqrt(found.sigma**2 + added), found.note)

    def seconds(self, work: str, device: str) -> float:
        """A time beside the rates, with the nearest thread count; 0 where it was not measured."""
        return seconds_at(self.rates, work, device, self.threads if device == CPU else 0)


def _from_rates(
    model: ModelSpec, variant: Variant, placement: Placement, machine: _Machine, quantity: str
) -> _Spent | None:
    if any(layer.kind == "recurrent" for layer in model.attention):
        return None  # a scan over the prompt is no kernel that slices of Llama shape have
    host, gpu = parts(model, variant, placement)
    if quantity == DECODE:
        return _joined(model, placement, machine, host, gpu, _decode_part)
    if host.layer_count and machine.gpus and placement.prompt_tokens >= LEAST_PROMPT:
        return _copied_prefill(model, placement, machine, host, gpu)
    return _joined(model, placement, machine, host, gpu, _prefill_part)


_PartTime = Callable[[ModelSpec, Placement, _Machine, Part, str, float], "_Spent | None"]


def _joined(
    model: ModelSpec, placement: Placement, machine: _Machine, host: Part, gpu: Part, time_of: _PartTime
) -> _Spent | None:
    """One device after the other, and the hidden state handed over between them."""
    pieces = [time_of(model, placement, machine, gpu, key, share) for key, share in machine.gpus]
    if not machine.gpus or host.layer_count or host.token_bytes:
        pieces.append(time_of(model, placement, machine, host, CPU, 1.0))
    known = [piece for piece in pieces if piece is not None]
    if len(known) < len(pieces):
        return None
    terms = tuple(term for piece in known for term in piece.terms)
    seconds = sum(piece.seconds for piece in known)
    if machine.gpus and host.layer_count:
        crossing = machine.seconds(kinds.CROSSING_SECONDS, machine.gpus[0][0])
        seconds, terms = seconds + crossing, (*terms, ("handing over", crossing, "s"))
    return _Spent(seconds, sqrt(sum(piece.deviation**2 for piece in known)), terms)


class _Sum:
    """Adds up times with their uncertainties."""

    def __init__(self) -> None:
        self.seconds, self.squares, self.terms = 0.0, 0.0, []
        self.missing = False

    seconds: float
    squares: float
    terms: list[tuple[str, float, str]]

    def add(self, name: str, amount: float, found: Found | None) -> None:
        """``amount`` at a rate; a rate that was not measured leaves the sum unknown."""
        if amount <= 0:
            return
        if found is None:
            self.missing = True
            return
        seconds = amount / found.value
        self.take(f"{name}{found.note}", seconds)
        self.squares += (seconds * found.sigma) ** 2

    def take(self, name: str, seconds: float) -> None:
        """A time."""
        self.seconds += seconds
        if seconds:
            self.terms.append((name, seconds, "s"))

    def spent(self) -> _Spent | None:
        """The sum; ``None`` if a rate was missing."""
        return None if self.missing else _Spent(self.seconds, sqrt(self.squares), tuple(self.terms))


def _decode_part(
    model: ModelSpec, placement: Placement, machine: _Machine, part: Part, device: str, share: float
) -> _Spent | None:
    total, where = _Sum(), _short(device)
    for type_, size in part.token_bytes.items():
        total.add(f"{where}: weights in {type_}", size * share, machine.rate(kinds.DECODE_WEIGHTS, type_, device))
    _add_decode_attention(total, model, placement, machine, part, device, share)
    layer = machine.seconds(kinds.LAYER_SECONDS, device)
    total.take(f"{where}: layers beside their weights", layer * part.layer_count * share)
    if part.row_bytes:  # the device that makes the logits carries what a token costs once
        total.take(f"{where}: token beside its layers", machine.seconds(kinds.TOKEN_SECONDS, device) * share)
        mask = machine.seconds(kinds.DECODE_MASK, device) * placement.depth
        total.take(f"{where}: mask of the cache", mask * share)
    return total.spent()


def _add_decode_attention(
    total: _Sum, model: ModelSpec, placement: Placement, machine: _Machine, part: Part, device: str, share: float
) -> None:
    one = attention(shape_twin(model), part.layers, float(placement.depth), placement.kv_type)
    works = (kinds.DECODE_ATTENTION, kinds.DECODE_CACHE, kinds.DECODE_SCORES)
    _add_attention(total, placement, machine, device, share, one, works)


def _add_attention(
    total: _Sum,
    placement: Placement,
    machine: _Machine,
    device: str,
    amount: float,
    one: Attention,
    works: tuple[str, str, str],
) -> None:
    """``amount`` times the attention of one token; a machine may have no cost for some kinds of its work."""
    found = [machine.attention(work, placement, device) for work in works]
    if one.operations and not any(found):
        total.missing = True
        return
    names = ("attention", "KV cache read", "attention's scores")
    for name, size, rate in zip(names, (one.operations, one.cache_bytes, one.scores), found, strict=True):
        if rate is not None:
            total.add(f"{_short(device)}: {name}", size * amount, rate)


def _prefill_part(
    model: ModelSpec, placement: Placement, machine: _Machine, part: Part, device: str, share: float
) -> _Spent | None:
    total, where, prompt = _Sum(), _short(device), max(1, placement.prompt_tokens)
    if prompt < LEAST_PROMPT:
        one = _decode_part(model, placement, machine, part, device, share)
        return None if one is None else _scaled(one, float(prompt))
    tokens = min(prompt, placement.ubatch, placement.batch)
    for type_, weights in part.prompt_weights.items():
        found = machine.rate(kinds.PREFILL_WEIGHTS, type_, device, tokens)
        total.add(f"{where}: matrix products in {type_}", 2 * weights * prompt * share, found)
    for type_, size in part.row_bytes.items():
        found = machine.rate(kinds.DECODE_WEIGHTS, type_, device)
        total.add(f"{where}: last row in {type_}", size * share, found)
    seen = attention(shape_twin(model), part.layers, prompt / 2, placement.kv_type)
    works = (kinds.PREFILL_ATTENTION, kinds.PREFILL_CACHE, kinds.PREFILL_SCORES)
    _add_attention(total, placement, machine, device, prompt * share, seen, works)
    row = machine.seconds(kinds.ROW_SECONDS, device) * model.n_embd / 1000
    total.take(f"{where}: rows beside matrix products", row * prompt * part.layer_count * share)
    passes = -(-prompt // max(1, min(placement.ubatch, placement.batch)))
    total.take(f"{where}: micro-batches", machine.seconds(kinds.PASS_SECONDS, device) * passes * share)
    if part.row_bytes:
        mask = machine.seconds(kinds.PREFILL_MASK, device) * prompt * prompt / 2
        total.take(f"{where}: mask of the cache", mask * share)
    return total.spent()


def _scaled(spent: _Spent, factor: float) -> _Spent:
    terms = tuple((name, value * factor, unit) for name, value, unit in spent.terms)
    return _Spent(spent.seconds * factor, spent.deviation * factor, terms)


def _copied_prefill(model: ModelSpec, placement: Placement, machine: _Machine, host: Part, gpu: Part) -> _Spent | None:
    """All layers on the GPU, and the host's weights copied to it for each micro-batch (op offload)."""
    device, _ = machine.gpus[0]
    link = machine.rate(kinds.LINK, "", device)
    whole = Part(
        token_bytes={**gpu.token_bytes},
        prompt_weights={
            type_: gpu.prompt_weights.get(type_, 0.0) + host.prompt_weights.get(type_, 0.0)
            for type_ in {**gpu.prompt_weights, **host.prompt_weights}
        },
        row_bytes=gpu.row_bytes,
        layers=(0, model.n_layer),
    )
    computed = _prefill_part(model, placement, machine, whole, device, 1.0)
    if computed is None or link is None:
        return None
    passes = -(-placement.prompt_tokens // max(1, min(placement.ubatch, placement.batch)))
    moved = passes * sum(host.token_bytes.values()) / link.value
    terms = (*computed.terms, ("host weights copied to the GPU", moved, "s"))
    return _Spent(computed.seconds + moved, sqrt(computed.deviation**2 + (moved * 0.15) ** 2), terms)


def _short(device: str) -> str:
    return "CPU" if device == CPU else device.split(":", 1)[-1]


def _from_model(
    model: ModelSpec, variant: Variant, placement: Placement, machine: _Machine, quantity: str
) -> _Spent | None:
    """From slices of this very model and file type, wholly on one device."""
    whole = not machine.gpus or (len(machine.gpus) == 1 and placement.gpu_layers >= model.offloadable_count)
    if not whole or placement.cpu_expert_layers or not placement.flash_attention:
        return None
    device = machine.gpus[0][0] if machine.gpus else CPU
    threads = 0 if machine.gpus else machine.threads
    if quantity != DECODE and placement.prompt_tokens < LEAST_PROMPT:
        one = _model_decode(model, variant, placement, machine.rates, device, threads)
        return None if one is None else _scaled(one, float(max(1, placement.prompt_tokens)))
    work = _model_decode if quantity == DECODE else _model_prefill
    return work(model, variant, placement, machine.rates, device, threads)


def _model_time(
    rates: Rates, model: ModelSpec, work: str, type_: str, device: str, threads: int
) -> tuple[Found, int] | None:
    """A time of the model's slices, and the tokens of the prompt it is for."""
    times = rates.with_type(work, type_, device, shape_sha256(model))
    decodes = work.startswith("model_decode")
    like = kinds.DECODE_WEIGHTS if decodes else kinds.PREFILL_WEIGHTS
    found = time_at(rates, like, times, device, threads)
    return None if found is None else (found, times[-1].tokens)


def _mask(rates: Rates, model: ModelSpec, work: str, kv_type: str, device: str, threads: int) -> float:
    """A time of one thread, so that of the nearest thread count stands."""
    times = rates.with_type(work, kv_type, device, shape_sha256(model))
    return min(times, key=lambda rate: abs(rate.threads - threads)).value if times else 0.0


def _model_decode(
    model: ModelSpec, variant: Variant, placement: Placement, rates: Rates, device: str, threads: int
) -> _Spent | None:
    layer = _model_time(rates, model, kinds.MODEL_DECODE_LAYER, variant.type, device, threads)
    rest = _model_time(rates, model, kinds.MODEL_DECODE_REST, variant.type, device, threads)
    where = placement.kv_type, device, threads
    cached = _model_time(rates, model, kinds.MODEL_DECODE_CACHED, *where)
    seen = attention(shape_twin(model), (0, model.n_layer), float(placement.depth), placement.kv_type).cached
    if layer is None or rest is None or (seen and cached is None):
        return None
    total = _Sum()
    total.take(f"{model.n_layer} layers", model.n_layer * layer[0].value)
    total.take("output and the rest", rest[0].value)
    deviation = (model.n_layer * layer[0].value * layer[0].sigma) ** 2
    if seen and cached is not None:
        total.take("attention over the cache", seen * cached[0].value)
        total.take("mask of the cache", placement.depth * _mask(rates, model, kinds.MODEL_DECODE_MASK, *where))
        deviation += (seen * cached[0].value) ** 2 * (cached[0].sigma ** 2 + MODEL_CACHE_SIGMA**2)
    return _Spent(total.seconds, sqrt(deviation), tuple(total.terms))


def _model_prefill(
    model: ModelSpec, variant: Variant, placement: Placement, rates: Rates, device: str, threads: int
) -> _Spent | None:
    layer = _model_time(rates, model, kinds.MODEL_PREFILL_LAYER, variant.type, device, threads)
    rest = _model_time(rates, model, kinds.MODEL_PREFILL_REST, variant.type, device, threads)
    where = placement.kv_type, device, threads
    cached = _model_time(rates, model, kinds.MODEL_PREFILL_CACHED, *where)
    if layer is None or rest is None:
        return None
    prompt, total = max(1, placement.prompt_tokens), _Sum()
    total.take(f"{model.n_layer} layers", prompt * model.n_layer * layer[0].value)
    total.take("but the last feed-forward, and the output", prompt * rest[0].value)
    beyond = max(0.0, (prompt - layer[1]) / 2)  # attention within the measured prompt is in its time
    seen = attention(shape_twin(model), (0, model.n_layer), beyond, placement.kv_type).cached
    deviation = (prompt * model.n_layer * layer[0].value * layer[0].sigma) ** 2
    if cached is not None:
        total.take("attention over the longer prompt", prompt * seen * cached[0].value)
        mask = _mask(rates, model, kinds.MODEL_PREFILL_MASK, *where)
        total.take("mask of the longer prompt", prompt * beyond * mask)
        deviation += (prompt * seen * cached[0].value) ** 2 * (cached[0].sigma ** 2 + MODEL_CACHE_SIGMA**2)
    return _Spent(total.seconds, sqrt(deviation), tuple(total.terms))
