"""A plausible model for a bare size: the shape of the nearest well-known model, stretched to the parameter count."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from math import inf, log
from typing import Any

from planner.core.errors import UsageError
from planner.core.model import ModelSource, ModelSpec
from planner.models import catalog
from planner.models.architectures import spec_from_config

# Ladders of ordinary shapes (grouped-query attention, gated feed-forward), one or two a size class.
DENSE_TEMPLATES = (
    "smollm2-135m",
    "smollm2-360m",
    "qwen3-0.6b",
    "llama-3.2-1b",
    "qwen3-1.7b",
    "llama-3.2-3b",
    "qwen3-4b",
    "mistral-7b-v0.3",
    "qwen3-8b",
    "mistral-nemo-12b",
    "qwen3-14b",
    "mistral-small-24b",
    "qwen3-32b",
    "llama-3.1-70b",
    "mistral-large-123b",
    "llama-3.1-405b",
)
MIXTURE_TEMPLATES = (
    "olmoe-1b-7b",
    "qwen3-30b-a3b",
    "mixtral-8x7b",
    "mixtral-8x22b",
    "qwen3-235b-a22b",
    "qwen3-coder-480b-a35b",
)
MIN_PARAMETERS = 1e6
MAX_PARAMETERS = 5e12
# Below this even the smallest template's vocabulary outweighs the rest.
SMALL_PARAMETERS = 1e8
TOLERANCE_FRACTION = 0.01
# Rows of 256 weights keep every K-quant applicable; finer steps only where a small model needs them.
_WIDTH_STEPS = (256, 64, 32)
_UNITS = {"k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmbt])(?:[-_ ]?a(\d+(?:\.\d+)?)\s*([kmb]))?", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class _Template:
    """A model's parameter count as a formula: ``outside + layers * (block + 3 * width * n_embd * experts)``."""

    config: dict[str, Any]
    spec: ModelSpec
    outside: int
    block: int
    """Attention, norms and router of one block."""

    def count(self, layers: int, width: int, experts: int = 1) -> int:
        router = 0 if self.spec.mixture is None else self.spec.n_embd * (experts - self.spec.mixture.expert_count)
        return self.outside + layers * (self.block + router + 3 * width * self.spec.n_embd * experts)

    def width_for(self, parameters: float, layers: int, experts: int, step: int) -> int:
        rest = parameters - self.count(layers, 0, experts)
        return max(round(rest / (layers * 3 * self.spec.n_embd * experts) / step), 1) * step


def spec_from_size(text: str) -> ModelSpec | None:
    """The spec for ``14b``, ``7B``, ``350m`` or ``30b-a3b`` (total and active); ``None`` if ``text`` is no size.

    Raises:
        UsageError: the size is out of range, or more is active than there is (``bad-size``).
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        return None
    total, unit, active, active_unit = match.groups()
    parameters = float(total) * _UNITS[unit.lower()]
    used = float(active) * _UNITS[active_unit.lower()] if active else None
    return replace(spec_from_parameters(parameters, used), name=text.strip().lower())


@cache
def spec_from_parameters(params: float, active: float | None = None) -> ModelSpec:
    """The spec of a dense model of ``params`` weights, or of a mixture that uses ``active`` of them per token.

    Raises:
        UsageError: below a million or above five trillion, or more is active than there is (``bad-size``).
    """
    _check(params, active)
    dense = active is None or active >= params * (1 - TOLERANCE_FRACTION)
    config, origin = _dense_config(params) if dense or active is None else _mixture_config(params, active)
    label = _label(params) if dense or active is None else f"{_label(params)}-a{_label(active)}"
    source = ModelSource(kind="size", location=label, source=origin)
    spec = spec_from_config(config, name=label, family="generic", source=source, dtype="bf16", tokenizer="bpe")
    note = f"made-up model of {spec.parameter_count / 1e9:.4g} billion weights, shaped after {origin}"
    if not dense:
        note += f"; {spec.active_parameter_count / 1e9:.3g} billion active"
    return replace(spec, notes=(*spec.notes, note))


def _check(params: float, active: float | None) -> None:
    if not MIN_PARAMETERS <= params <= MAX_PARAMETERS:
        raise UsageError(
            "a model size must lie between a million and five trillion weights",
            numbers=f"{params:g}",
            hint="write it as 350m, 7b, 30b-a3b or 1t",
            code="bad-size",
        )
    if active is not None and not 0 < active <= params:
        raise UsageError(
            "the active weights of a mixture are a part of all its weights",
            numbers=f"{active:g} active of {params:g}",
            hint="total first: 30b-a3b",
            code="bad-size",
        )


def _label(parameters: float) -> str:
    unit = "b" if parameters >= 1e9 else "m"
    return f"{parameters / _UNITS[unit]:.4g}{unit}"


@cache
def _template(name: str) -> _Template:
    spec, config = catalog.lookup(name), catalog.config(name)
    if spec is None or config is None:
        raise LookupError(name)
    return _measured(spec, config)


def _measured(spec: ModelSpec, config: dict[str, Any]) -> _Template:
    blocks = sum(tensor.element_count for tensor in spec.tensors if tensor.layer == 0)
    routed = (spec.mixture.expert_feed_forward, spec.mixture.expert_count) if spec.mixture else (spec.n_ff, 1)
    feed_forward = 3 * spec.n_embd * routed[0] * routed[1]
    return _Template(config, spec, spec.parameter_count - spec.n_layer * blocks, blocks - feed_forward)


def _dense_config(parameters: float) -> tuple[dict[str, Any], str]:
    if parameters < SMALL_PARAMETERS:
        template, origin = _small_template(parameters), "Llama in miniature"
    else:
        origin = min(DENSE_TEMPLATES, key=lambda name: abs(log(_template(name).spec.parameter_count / parameters)))
        template = _template(origin)
    layers, width = _dense_fit(template, parameters)
    config = {**template.config, "num_hidden_layers": layers, "intermediate_size": width}
    if parameters < SMALL_PARAMETERS:  # steps of the width are coarse here: the vocabulary takes the rest
        config["vocab_size"] += round((parameters - template.count(layers, width)) / template.spec.n_embd)
    return config, origin


def _dense_fit(template: _Template, parameters: float) -> tuple[int, int]:
    """Block count and feed-forward width nearest to the template's shape within the tolerance."""
    spec = template.spec
    best, best_cost = (spec.n_layer, spec.n_ff), inf
    for step in _WIDTH_STEPS:
        for layers in _layer_counts(template, parameters):
            width = template.width_for(parameters, layers, 1, step)
            error = abs(template.count(layers, width) / parameters - 1)
            cost = abs(log(width / spec.n_ff)) + (100 if error > TOLERANCE_FRACTION / 2 else 0) + error
            if cost < best_cost:
                best, best_cost = (layers, width), cost
        if best_cost < 1:
            break
    return best


def _layer_counts(template: _Template, parameters: float) -> Iterator[int]:
    """Block counts around the one that the template's width asks for."""
    per_block = (template.spec.parameter_count - template.outside) / template.spec.n_layer
    middle = max((parameters - template.outside) / per_block, 1.0)
    low, high = max(int(middle * 0.7), 1), int(middle * 1.4) + 2
    yield from range(low, high, max((high - low) // 40, 1))


def _small_template(parameters: float) -> _Template:
    """A miniature Llama: a quarter of the weights in a tied vocabulary of at most 32,000 tokens."""
    embedding = next((width for width in (64, 128, 256, 384) if parameters < 600 * width * width), 512)
    config: dict[str, Any] = {
        "model_type": "llama",
        "hidden_size": embedding,
        "intermediate_size": 3 * embedding,
        "num_hidden_layers": 8,
        "num_attention_heads": embedding // 64,
        "vocab_size": max(min(int(parameters / 4 / embedding), 32000), 256),
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
    }
    source = ModelSource(kind="size", location="small")
    return _measured(spec_from_config(config, name="small", family=None, source=source), config)


def _mixture_config(parameters: float, active: float) -> tuple[dict[str, Any], str]:
    def distance(name: str) -> float:
        spec = _template(name).spec
        return abs(log(spec.parameter_count / parameters)) + abs(log(spec.active_parameter_count / active))

    origin = min(MIXTURE_TEMPLATES, key=distance)
    template = _template(origin)
    layers, width, experts, used = _mixture_fit(template, parameters, active)
    config = {**template.config, "num_hidden_layers": layers, "num_experts_per_tok": used}
    config["num_local_experts" if "num_local_experts" in config else "num_experts"] = experts
    config["moe_intermediate_size" if "moe_intermediate_size" in config else "intermediate_size"] = width
    return config, origin


def _mixture_fit(template: _Template, parameters: float, active: float) -> tuple[int, int, int, int]:
    """Block count, expert width, expert count and experts used that come nearest to both counts."""
    mixture, spec = template.spec.mixture, template.spec
    assert mixture is not None
    best, best_cost = (spec.n_layer, mixture.expert_feed_forward, mixture.expert_count, 1), inf
    unused = 0 if spec.tied_embeddings else spec.n_embd * spec.n_vocab
    for layers in _some(spec.n_layer, 0.25, 3.0):
        for experts in _some(mixture.expert_count, 0.25, 4.0):
            step = 64 if mixture.expert_feed_forward < 4096 else 256
            width = template.width_for(parameters, layers, experts, step)
            total = template.count(layers, width, experts)
            per_expert = layers * 3 * width * spec.n_embd
            share = (active - (total - unused - experts * per_expert)) / per_expert
            used = min(max(round(share), 1), experts)
            got = total - unused - (experts - used) * per_expert
            error = abs(total / parameters - 1)
            shape = sum(
                abs(log(got_size / own))
                for got_size, own in (
                    (layers, spec.n_layer),
                    (width, mixture.expert_feed_forward),
                    (experts, mixture.expert_count),
                )
            )
            cost = (100 if error > TOLERANCE_FRACTION / 2 else 0) + 5 * abs(log(got / active)) + 0.2 * shape + error
            if cost < best_cost:
                best, best_cost = (layers, width, experts, used), cost
    return best


def _some(middle: int, low: float, high: float) -> Iterator[int]:
    """At most about sixty whole numbers from ``low`` to ``high`` times ``middle``."""
    first, last = max(round(middle * low), 2), round(middle * high)
    yield from range(first, last + 1, max((last - first) // 60, 1))
