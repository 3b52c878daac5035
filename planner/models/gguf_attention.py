"""What each block of a GGUF model keeps between tokens, from the file's metadata alone.

The rules are those by which llama.cpp fills ``llama_hparams`` (``src/llama-model.cpp``, ``src/llama-hparams.cpp`` and
``src/models/*.cpp`` at the version in llama-cpp-python 0.3.36).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from planner.core.errors import InputError
from planner.core.model import AttentionLayer
from planner.formats.gguf import ArrayInfo

MAX_LAYER_COUNT = 2048
"""Stops a hostile file from filling memory; llama.cpp's own limit (``LLAMA_MAX_LAYERS``) is 1024."""
MAX_COUNT = 2**31 - 1
"""llama.cpp reads these figures into 32-bit integers."""
STATE_VALUE_BYTES = 4
"""Recurrent states are kept as f32 (``llama_memory_recurrent``: ``GGML_TYPE_F32``)."""


@dataclass(frozen=True, slots=True)
class SlidingRule:
    """Which blocks of an architecture see only a window, where the file does not list them (``period`` 1: none)."""

    period: int
    dense_first: bool = False
    """The full block comes first of each period, not last."""
    window: int | None = None
    """Window where the file names none; ``None``: then no block slides."""
    forced: bool = False
    """llama.cpp takes ``window`` whatever the file says."""


# Arguments of `load_swa_pattern` and presets of `n_swa`, one row per file in src/models/. phi3 is left out: there
# llama.cpp reads the window and turns it off again (pull request 13676).
SLIDING_RULES = {
    "afmoe": SlidingRule(4),
    "cohere2": SlidingRule(4),
    "cohere2moe": SlidingRule(4, dense_first=True),
    "exaone-moe": SlidingRule(4, window=128),
    "exaone4": SlidingRule(4, window=4096),
    "gemma-embedding": SlidingRule(6),
    "gemma2": SlidingRule(2, window=4096),
    "gemma3": SlidingRule(6),
    "gemma3n": SlidingRule(5),
    "gemma4": SlidingRule(1),
    "gpt-oss": SlidingRule(2),
    "granite_swa": SlidingRule(1),
    "laguna": SlidingRule(4, dense_first=True),
    "llama4": SlidingRule(4, window=8192, forced=True),
    "mellum": SlidingRule(4),
    "mimo2": SlidingRule(1),
    "muse-glimmer": SlidingRule(4),
    "olmo2": SlidingRule(4),
    "plamo3": SlidingRule(8),
    "smallthinker": SlidingRule(4, dense_first=True, window=4096, forced=True),
    "step35": SlidingRule(1),
}
# `full_attn_interval` of qwen3next.cpp, qwen35.cpp and qwen35moe.cpp: three recurrent blocks, then a full one
_INTERVAL_ARCHITECTURES = ("qwen3next", "qwen35", "qwen35moe")
_DEFAULT_INTERVAL = 4
# `llm_arch_is_recurrent` of llama-arch.cpp
_RECURRENT_ARCHITECTURES = ("mamba", "mamba2", "rwkv6", "rwkv6qwen2", "rwkv7", "arwkv7")
_GEMMA3N_KV_LAYERS = 20
"""``n_layer_kv_from_start`` of gemma3n.cpp: blocks beyond read an earlier block's cache."""


@dataclass(frozen=True, slots=True)
class Figures:
    """The ``<architecture>.*`` metadata of one file, with checked access."""

    values: Mapping[str, Any]
    architecture: str
    path: Path

    def raw(self, key: str) -> Any:
        """The value of ``<architecture>.<key>``, else ``None``."""
        return self.values.get(f"{self.architecture}.{key}")

    def bad(self, key: str, problem: str) -> InputError:
        """The error for a figure with this ``problem``."""
        name = f"{self.architecture}.{key}"
        hint = "convert the model again with a current llama.cpp"
        return InputError(f"{self.path.name!r}: {name} {problem}", hint=hint, code="bad-gguf-metadata")

    def count(self, key: str, default: int | None = None) -> int:
        """A whole number ≥ 0; the largest of an array.

        Raises:
            InputError: missing without ``default``, or no such number (``bad-gguf-metadata``).
        """
        value = self.raw(key)
        if isinstance(value, ArrayInfo):
            value = max(value.values, default=None) if value.values else None
        if value is None and default is not None:
            return default
        if value is None:
            raise self.bad(key, "is missing")
        return self._checked(key, value)

    def per_layer(self, key: str, layer_count: int, default: tuple[int, ...]) -> tuple[int, ...]:
        """One number per block, from a single number or an array; ``default`` where there is none."""
        value = self.raw(key)
        if value is None:
            return default
        if not isinstance(value, ArrayInfo):
            return (self._checked(key, value),) * layer_count
        if value.values is None or value.count < layer_count:
            raise self.bad(key, f"has {value.count} entries for {layer_count} blocks")
        return tuple(self._checked(key, entry) for entry in value.values[:layer_count])

    def _checked(self, key: str, value: Any) -> int:
        if not isinstance(value, int) or not 0 <= value <= MAX_COUNT:
            raise self.bad(key, f"is {value!r}, not a count")
        return int(value)

    @property
    def layer_count(self) -> int:
        """Blocks of the decoder, without those that only predict further tokens."""
        total = self.count("block_count")
        if not 0 < total <= MAX_LAYER_COUNT:
            raise self.bad("block_count", f"is {total}; 1 to {MAX_LAYER_COUNT} are possible")
        extra = self.count("nextn_predict_layers", 0)
        if extra >= total:
            raise self.bad("nextn_predict_layers", f"is {extra} of {total} blocks")
        return total - extra


def is_latent(figures: Figures) -> bool:
    """Multi-head latent attention that is stored compressed: ``llama_hparams::is_mla``."""
    return figures.count("attention.key_length_mla", 0) > 0 and figures.count("attention.value_length_mla", 0) > 0


def attention_layers(figures: Figures) -> tuple[AttentionLayer, ...]:
    """One ``AttentionLayer`` per block.

    Raises:
        InputError: a figure is missing or impossible (``bad-gguf-metadata``).
    """
    layer_count = figures.layer_count
    heads = figures.per_layer("attention.head_count", layer_count, (0,) * layer_count)
    heads_kv = figures.per_layer("attention.head_count_kv", layer_count, heads)
    windows = _windows(figures, layer_count)
    recurrent = _recurrent_layers(figures, layer_count, heads_kv)
    cached = _cached_layer_count(figures, layer_count)
    full, sliding = _head_dims(figures, max(heads), ""), _head_dims(figures, max(heads), "_swa")
    state_bytes = _state_bytes(figures, max(heads))
    layers = []
    for layer in range(layer_count):
        window = windows[layer]
        if layer in recurrent or not heads_kv[layer]:
            kind = "recurrent" if layer in recurrent else "none"
            kept = state_bytes if layer in recurrent else 0
            layers.append(_cacheless(kind, heads[layer], kept))
            continue
        k_dim, v_dim = full if window is None else sliding
        layers.append(
            AttentionLayer(
                kind="full" if window is None else "sliding",
                head_count=heads[layer],
                head_count_kv=heads_kv[layer],
                k_dim=k_dim,
                v_dim=0 if is_latent(figures) else v_dim,
                window=window,
                owns_kv_cache=layer < cached,
            )
        )
    return tuple(layers)


def _cacheless(kind: str, head_count: int, state_bytes: int) -> AttentionLayer:
    return AttentionLayer(
        kind=kind,
        head_count=head_count,
        head_count_kv=0,
        k_dim=0,
        v_dim=0,
        owns_kv_cache=False,
        state_bytes=state_bytes,
    )


def _head_dims(figures: Figures, head_count: int, suffix: str) -> tuple[int, int]:
    """Width of a key and a value head; sliding blocks (``_swa``) may have their own."""
    even = figures.count("embedding_length") // head_count if head_count else 0
    k_dim, v_dim = figures.count("attention.key_length", even), figures.count("attention.value_length", even)
    if suffix:
        k_dim = figures.count(f"attention.key_length{suffix}", k_dim)
        v_dim = figures.count(f"attention.value_length{suffix}", v_dim)
    return k_dim, v_dim


def _windows(figures: Figures, layer_count: int) -> tuple[int | None, ...]:
    """The window of each block; ``None`` where it sees everything."""
    rule = SLIDING_RULES.get(figures.architecture)
    if rule is None or (figures.architecture == "exaone4" and layer_count != 64):  # only the 32B slides: exaone4.cpp
        return (None,) * layer_count
    window = figures.count("attention.sliding_window", rule.window or 0)
    if window and rule.forced:
        window = rule.window or 0
    if not window:
        return (None,) * layer_count
    listed = figures.raw("attention.sliding_window_pattern")
    if isinstance(listed, ArrayInfo):
        slides = figures.per_layer("attention.sliding_window_pattern", layer_count, ())
        return tuple(window if here else None for here in slides)
    period = figures.count("attention.sliding_window_pattern", rule.period)
    full_place = 0 if rule.dense_first else period - 1
    return tuple(window if period == 0 or layer % period != full_place else None for layer in range(layer_count))


def _recurrent_layers(figures: Figures, layer_count: int, heads_kv: tuple[int, ...]) -> frozenset[int]:
    """Blocks that keep a state instead of a cache."""
    everything = range(layer_count)
    if figures.architecture in _RECURRENT_ARCHITECTURES:
        return frozenset(everything)
    if figures.architecture in _INTERVAL_ARCHITECTURES:
        interval = figures.count("full_attention_interval", _DEFAULT_INTERVAL) or _DEFAULT_INTERVAL
        usual = tuple(int((layer + 1) % interval != 0) for layer in everything)
        listed = figures.per_layer("attention.recurrent_layers", layer_count, usual)
        return frozenset(layer for layer in everything if listed[layer])
    if not _state_bytes(figures, 0):
        return frozenset()
    widths = figures.per_layer("feed_forward_length", layer_count, (0,) * layer_count)
    plain = figures.architecture.startswith("nemotron_h")  # a block is attention, a state or an FFN: nemotron-h.cpp
    return frozenset(layer for layer in everything if not heads_kv[layer] and not (plain and widths[layer]))


def _state_bytes(figures: Figures, head_count: int) -> int:
    """Bytes of one block's state for one sequence: ``n_embd_r`` + ``n_embd_s`` of llama-hparams.cpp."""
    width = figures.count("embedding_length")
    if head_size := figures.count("wkv.head_size", 0):
        return STATE_VALUE_BYTES * width * (figures.count("token_shift_count", 2) + head_size)
    if cache := figures.count("shortconv.l_cache", 0):
        return STATE_VALUE_BYTES * width * (cache - 1)
    kernel = figures.count("ssm.conv_kernel", 0)
    if head_dim := figures.count("kda.head_dim", 0):
        inner = head_count * head_dim
        return STATE_VALUE_BYTES * (3 * (kernel - 1 if kernel else 3) * inner + head_dim * inner)
    inner, state = figures.count("ssm.inner_size", 0), figures.count("ssm.state_size", 0)
    convolved = inner + 2 * figures.count("ssm.group_count", 0) * state
    return STATE_VALUE_BYTES * (max(kernel - 1, 0) * convolved + state * inner)


def _cached_layer_count(figures: Figures, layer_count: int) -> int:
    """First blocks, which own a KV cache; the others read one of these."""
    if figures.architecture == "gemma3n":
        return min(layer_count, _GEMMA3N_KV_LAYERS)
    return max(layer_count - figures.count("attention.shared_kv_layers", 0), 0)
