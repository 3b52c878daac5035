"""How fast a machine does each kind of work, as ``qplan calibrate`` measured it on slices of models."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from math import log
from typing import ClassVar

from planner.core.estimates import Z80
from planner.core.hardware import STRICT, Gpu

# What a rate is of. Its type: a tensor type for weights, a KV cache type for attention, a file type for slices of a
# model.
DECODE_WEIGHTS = "decode_weights_bytes_per_second"
"""Weights of one tensor type read and multiplied for one token."""
PREFILL_WEIGHTS = "prefill_weights_flops"
"""Weights of one tensor type multiplied with a prompt, two operations per weight and token."""
DECODE_ATTENTION = "decode_attention_flops"
"""Attention of one token over the cache: two operations per query value and cached token, K and V."""
DECODE_CACHE = "decode_cache_bytes_per_second"
"""What attention of one token takes beside that, by bytes of the KV cache."""
DECODE_SCORES = "decode_scores_per_second"
"""What it takes beside both, by scores: one for each head and cached token, so that short heads cost more."""
PREFILL_ATTENTION = "prefill_attention_flops"
"""Attention of a prompt, as that of a token."""
PREFILL_CACHE = "prefill_cache_bytes_per_second"
PREFILL_SCORES = "prefill_scores_per_second"
DECODE_MASK = "decode_mask_seconds"
"""What a token costs once, however many layers there are, per cached token: the mask, on one thread."""
PREFILL_MASK = "prefill_mask_seconds"
"""The same per token of a prompt and cached token."""
LAYER_SECONDS = "decode_layer_seconds"
"""What a layer costs beside its weights for one token: barriers, launches, norms."""
TOKEN_SECONDS = "decode_token_seconds"
"""What a token costs beside layers and weights."""
ROW_SECONDS = "prefill_row_seconds"
"""What a layer costs beside its weights per token of a prompt and 1000 values of the hidden state."""
PASS_SECONDS = "prefill_pass_seconds"
"""What a micro-batch costs beside its tokens."""
MEMORY_READ = "memory_read_bytes_per_second"
LINK = "link_bytes_per_second"
"""Weights in RAM copied to a GPU while a prompt is read."""
CROSSING_SECONDS = "crossing_seconds"
"""One token handed from a GPU to the CPU and back."""
MODEL_DECODE_LAYER = "model_decode_layer_seconds"
"""One mean layer of this very model and file type, for one token with an empty cache."""
MODEL_DECODE_REST = "model_decode_rest_seconds"
"""The same without layers: the output matrix and what a token costs beside."""
MODEL_PREFILL_LAYER = "model_prefill_layer_seconds"
"""One mean layer, per token of a prompt of ``tokens`` from an empty cache."""
MODEL_PREFILL_REST = "model_prefill_rest_seconds"
"""The same without layers, per token: negative, as the last layer's feed-forward runs for one row alone."""
MODEL_DECODE_CACHED = "model_decode_cached_seconds"
"""Attention of one token in one layer, per cached token; the type is the KV cache's."""
MODEL_PREFILL_CACHED = "model_prefill_cached_seconds"
"""Attention of one layer per token of a prompt and cached token; the type is the KV cache's."""
MODEL_DECODE_MASK = "model_decode_mask_seconds"
"""What a token costs once, beside its layers, per cached token; the type is the KV cache's."""
MODEL_PREFILL_MASK = "model_prefill_mask_seconds"
"""The same per token of a prompt and cached token."""

ALIKE = 0.03
"""Two runs of one case on a quiet machine differ by about 2 %: within this, two thread counts are as fast."""

CPU = "cpu"
"""The device of a rate of the host's cores."""


def gpu_key(gpu: Gpu) -> str:
    """The device of a rate of ``gpu``: GPUs of one name and back end are alike."""
    return f"{gpu.backend}:{gpu.name}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """One timed case of one slice."""

    __pydantic_config__: ClassVar[dict[str, str]] = STRICT

    shape: str
    """Name of a plain shape, or ``model``."""
    layers: int
    type: str
    threads: int
    kv_type: str = "f16"
    depth: int = 0
    """Cached tokens before."""
    tokens: int = 1
    """1: a token is decoded; more: a prompt is read."""
    gpu_layers: int | None = None
    """Set where a slice is split between GPU and CPU."""
    seconds: float
    """Median of the undisturbed samples, of one token or of the whole prompt."""
    low: float
    high: float
    """10 % and 90 % quantiles of them."""
    clean_count: int
    """Samples in which the process had its cores for itself."""
    disturbed_count: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Rate:
    """One measured rate, or time, of one kind of work."""

    __pydantic_config__: ClassVar[dict[str, str]] = STRICT

    work: str
    """One of the kinds above; its name ends in the unit of ``value``."""
    value: float
    low: float
    high: float
    """80 % of what the undisturbed samples said."""
    device: str = CPU
    type: str = ""
    threads: int = 0
    """0 where the host's threads do not matter."""
    tokens: int = 0
    """Tokens of a micro-batch, for prefill."""
    depth: int = 0
    """Cached tokens, for attention."""
    model: str = ""
    model_sha256: str = ""
    """Fingerprint of the model's shape; empty for a rate that holds for any model."""
    hardware_identity: str = ""
    hardware_name: str = ""
    tool_version: str = ""
    measured_at: str = ""
    """UTC, ISO 8601."""

    @property
    def sigma(self) -> float:
        """Standard deviation of the logarithm, from the range; 0 for a time that may be 0 or negative."""
        if not 0 < self.low <= self.high:
            return 0.0
        return log(self.high / self.low) / (2 * Z80)


@dataclass(frozen=True, eq=False)
class Rates:
    """All rates of one machine. Compared by identity, so that what is worked out from them can be cached."""

    entries: tuple[Rate, ...] = field(default=())

    @cached_property
    def _index(self) -> dict[tuple[str, str, str], list[Rate]]:
        index: dict[tuple[str, str, str], list[Rate]] = {}
        for rate in self.entries:
            index.setdefault((rate.work, rate.device, rate.model_sha256), []).append(rate)
        return index

    def of(self, work: str, device: str = CPU, model_sha256: str = "") -> list[Rate]:
        """Rates of one kind of work, of all types and thread counts."""
        return self._index.get((work, device, model_sha256), [])

    def with_type(self, work: str, type_: str, device: str = CPU, model_sha256: str = "") -> list[Rate]:
        """Those of one type, by threads."""
        found = [rate for rate in self.of(work, device, model_sha256) if rate.type == type_]
        return sorted(found, key=lambda rate: (rate.threads, rate.tokens))

    def best_threads(self, usual: int | None = None) -> int | None:
        """Thread count with the fastest decode of the type that was measured with the most counts.

        Args:
            usual: a count that is kept where it is no more than :data:`ALIKE` slower than the fastest.
        """
        cases: dict[tuple[str, str, str], list[Rate]] = {}
        for rate in self.entries:
            if rate.work in (DECODE_WEIGHTS, MODEL_DECODE_LAYER) and rate.device == CPU:
                cases.setdefault((rate.work, rate.type, rate.model_sha256), []).append(rate)
        most = max(cases.values(), key=len, default=[])
        if len(most) < 2:
            return None
        seconds = {rate.threads: 1 / rate.value if rate.work == DECODE_WEIGHTS else rate.value for rate in most}
        best = min(seconds, key=lambda count: seconds[count])
        return usual if usual in seconds and seconds[usual] <= (1 + ALIKE) * seconds[best] else best

    def __bool__(self) -> bool:
        return bool(self.entries)


NO_RATES = Rates()
