"""Whether a checkpoint can be converted, from its config.json alone; no heavy import."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from planner.convert.config import Config, make_config
from planner.convert.families import FAMILIES, Family, find_family
from planner.core.errors import InputError, UnsupportedArchitecture
from planner.formats.json_file import read_object

_ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "su", "llama3")
_SILU = ("silu", "swish")


def supported_model_types() -> tuple[str, ...]:
    """``model_type`` values of config.json that qplan converts itself."""
    return tuple(name for family in FAMILIES for name in family.model_types)


def can_convert(config: Mapping[str, Any]) -> str | None:
    """Why a checkpoint with this ``config.json`` cannot be converted here; ``None`` if it can."""
    family = find_family(config.get("model_type"))
    if family is None:
        return f"qplan has no conversion for model_type {config.get('model_type')!r}"
    quantization = config.get("quantization_config")
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    if quantization and method != "fp8":
        return f"it is quantized already ({method or 'of an unnamed method'}); the 16-bit checkpoint is needed"
    try:
        made = make_config(str(config.get("model_type")), config, family.defaults)
    except InputError as error:
        return str(error)
    return _refusal(made, family)


def _refusal(config: Config, family: Family) -> str | None:
    if reason := family.refuse(config):
        return reason
    kind = config.rope.get("rope_type")
    if kind is not None and str(kind).lower() not in _ROPE_TYPES:
        return f"its rotary scaling {kind!r} is not one of llama.cpp's"
    activation = config.get("hidden_act")
    if activation is not None and activation not in _SILU and not family.architecture.startswith("gemma"):
        return f"its activation is {activation!r}; llama.cpp's {family.architecture} has SiLU"
    if family.architecture != "phi3" and config.rope.get("partial_rotary_factor") not in (None, 1, 1.0):
        return f"it rotates {config.rope['partial_rotary_factor']} of each head; llama.cpp's {family.architecture} all"
    return None


def open_config(directory: Path) -> tuple[Config, Family, tuple[str, ...]]:
    """Configuration, family and notes of the checkpoint in ``directory``.

    Raises:
        InputError: config.json is missing (``missing-file``) or malformed (``bad-json``, ``bad-config``).
        UnsupportedArchitecture: it cannot be converted here (``unsupported-architecture``).
    """
    raw = read_object(directory / "config.json")
    reason = can_convert(raw)
    family = find_family(raw.get("model_type"))
    if reason is not None or family is None:
        raise UnsupportedArchitecture(
            f"qplan cannot convert {directory.name!r} to GGUF: {reason}",
            numbers=f"model_type {raw.get('model_type')!r}; converted are {', '.join(supported_model_types())}",
            hint="pass --llama-cpp DIR with a llama.cpp checkout to use its own converter",
        )
    config = make_config(str(raw["model_type"]), raw, family.defaults)
    return config, family, _notes(config)


def _notes(config: Config) -> tuple[str, ...]:
    """What llama.cpp does differently from transformers with this model."""
    notes = []
    windowed = config.model_type in ("mistral", "mixtral", "phi3") or bool(config.get("use_sliding_window"))
    if windowed and config.get("sliding_window") and not config.model_type.startswith("gemma"):
        window = config.integer("sliding_window")
        if window < config.integer("max_position_embeddings"):
            # phi3.cpp and llama.cpp of llama.cpp's src/models load these without a window
            notes.append(f"llama.cpp ignores this model's sliding window: results differ beyond {window} tokens")
    if config.rope.get("rope_type") == "dynamic":
        notes.append("llama.cpp ignores dynamic rotary scaling: good up to the trained context only")
    return tuple(notes)
