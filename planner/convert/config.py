"""``config.json`` as conversion needs it: the text model's part, with its family's defaults filled in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from planner.core.errors import InputError

MAX_DIMENSION = 1 << 31
"""Sanity bound of any count in a config.json; the largest vocabulary published is 262,208."""
_THETA_KEYS = ("global_rope_theta", "rope_theta")
_LOCAL_THETA_KEYS = ("local_rope_theta", "rope_local_base_freq")


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Hyperparameters of one text model."""

    model_type: str
    values: Mapping[str, Any]
    """``config.json`` merged with its ``text_config`` and the family's defaults."""
    rope: Mapping[str, Any]
    """Rotary embedding of the full-attention layers: ``rope_theta``, ``rope_type``, ``factor`` …"""
    rope_theta_sliding: float | None
    """Rotary base of sliding-window layers where it differs (Gemma 3)."""

    def get(self, name: str) -> Any:
        """The value of ``name``; ``None`` where it is absent or null."""
        return self.values.get(name)

    def integer(self, name: str) -> int:
        """The count called ``name``.

        Raises:
            InputError: absent, no whole number, or beyond reason (``bad-config``).
        """
        value = self.values.get(name)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < MAX_DIMENSION:
            raise bad_value(name, value, "a whole number above 0")
        return value

    def flag(self, name: str) -> bool:
        """The switch called ``name``; absent it is off.

        Raises:
            InputError: neither true nor false (``bad-config``): the text "false" would count as true.
        """
        value = self.values.get(name)
        if value is not None and not isinstance(value, bool):
            raise bad_value(name, value, "true or false")
        return bool(value)

    def number(self, name: str) -> float:
        """The number called ``name``.

        Raises:
            InputError: absent or no number (``bad-config``).
        """
        return checked_number(name, self.values.get(name))

    def rope_number(self, name: str, default: float | None = None) -> float:
        """The rotary setting ``name``, above 0.

        Raises:
            InputError: no number above 0, or absent without a ``default`` (``bad-config``).
        """
        value = self.rope.get(name)
        number = checked_number(f"rope_parameters.{name}", default if value is None else value)
        if number <= 0:
            raise bad_value(f"rope_parameters.{name}", value, "a number above 0")
        return number

    @property
    def fp8_block(self) -> tuple[int, int] | None:
        """Rows and columns that share a scale in an 8-bit checkpoint; ``None`` where they are not in blocks.

        Raises:
            InputError: no two whole numbers (``bad-config``).
        """
        quantization = self.get("quantization_config")
        stated = quantization.get("weight_block_size") if isinstance(quantization, dict) else None
        if stated is None:
            return None
        if not isinstance(stated, list) or len(stated) != 2 or not all(type(n) is int and n > 0 for n in stated):
            raise bad_value("quantization_config.weight_block_size", stated, "two whole numbers above 0")
        return stated[0], stated[1]

    @property
    def head_dim(self) -> int:
        """Values of one attention head: ``head_dim``, else hidden size over heads."""
        if self.get("head_dim") is not None:
            return self.integer("head_dim")
        return self.integer("hidden_size") // self.integer("num_attention_heads")


def checked_number(name: str, value: object) -> float:
    """``value`` as a number that fits in 32 bits.

    Raises:
        InputError: it is none (``bad-config``).
    """
    # beyond 1e38 a float32 is infinite; GGUF stores these as float32
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e38:
        raise bad_value(name, value, "a number")
    return float(value)


def bad_value(name: str, value: object, wanted: str) -> InputError:
    """The error for a config.json whose ``name`` is not ``wanted``."""
    return InputError(f"config.json: {name} should be {wanted}", numbers=f"it is {value!r}"[:200], code="bad-config")


def text_values(config: Mapping[str, Any]) -> dict[str, Any]:
    """The text model's part of ``config``: ``text_config`` laid over the rest, as multimodal checkpoints nest it."""
    nested = config.get("text_config")
    return {**config, **nested} if isinstance(nested, dict) else dict(config)


def make_config(model_type: str, config: Mapping[str, Any], defaults: Mapping[str, Any]) -> Config:
    """``config`` with ``defaults`` for what it leaves out, and its rotary settings in one form.

    Both spellings are read: ``rope_theta`` and ``rope_scaling`` (transformers 4) and ``rope_parameters``
    (transformers 5), the latter by layer kind where kinds differ.
    """
    values = dict(defaults)
    values.update({key: value for key, value in text_values(config).items() if value is not None or key not in values})
    if values.get("num_key_value_heads") is None:
        values["num_key_value_heads"] = values.get("num_attention_heads")
    stored = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if not isinstance(stored, dict):
        raise bad_value("rope_parameters", stored, "an object")
    full, sliding = stored.get("full_attention") or stored, stored.get("sliding_attention") or {}
    if not isinstance(full, dict) or not isinstance(sliding, dict):
        raise bad_value("rope_parameters", stored, "an object")
    full = dict(full)
    full.setdefault("rope_type", full.get("type"))
    for key, names in (("rope_theta", _THETA_KEYS), ("local", _LOCAL_THETA_KEYS)):
        found = next((values[name] for name in names if values.get(name) is not None), None)
        if key == "local":
            sliding = {"rope_theta": found, **sliding} if found is not None else sliding
        elif full.get(key) is None:
            full[key] = found
    for key in ("partial_rotary_factor", "original_max_position_embeddings"):
        if full.get(key) is None and values.get(key) is not None:
            full[key] = values[key]
    theta = sliding.get("rope_theta")
    return Config(
        model_type=model_type,
        values=values,
        rope={key: value for key, value in full.items() if value is not None},
        rope_theta_sliding=checked_number("rope_theta", theta) if theta is not None else None,
    )
