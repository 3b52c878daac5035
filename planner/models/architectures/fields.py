"""Reading a published ``config.json`` with care: aliases of keys, nesting, and values nobody checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from planner.core.errors import InputError

# The largest open model so far has 126 blocks (Llama 3.1 405B); this only stops a hostile file from filling memory.
MAX_LAYER_COUNT = 2048
# ggml keeps a tensor's extent in 64 bits, but llama.cpp's metadata integers have 32.
MAX_EXTENT = 2**31 - 1

_DTYPES = {"bfloat16": "bf16", "float16": "f16", "float32": "f32", "float8_e4m3fn": "fp8"}


@dataclass(frozen=True, slots=True)
class Fields:
    """A config as one flat mapping (``text_config`` of a multimodal model on top) with checked access."""

    values: Mapping[str, Any]
    model_type: str

    def get(self, *names: str) -> object:
        """The first of ``names`` that is present and not null, else ``None``."""
        for name in names:
            value = self.values.get(name)
            if value is not None:
                return value
        return None

    def count(self, *names: str, default: int | None = None) -> int:
        """A positive integer under the first of ``names``.

        Raises:
            InputError: missing without a default, or not a positive integer (``bad-config``).
        """
        value = self.optional_count(*names)
        if value is None:
            if default is None:
                raise _bad(self.model_type, names, "is missing")
            return default
        return value

    def optional_count(self, *names: str) -> int | None:
        """A positive integer under the first of ``names``; ``None`` if absent, null or 0."""
        value = self.get(*names)
        if value is None or (value == 0 and not isinstance(value, bool)):
            return None
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= MAX_EXTENT:
            raise _bad(self.model_type, names, f"is {value!r}, not a positive integer")
        return value

    def fraction(self, *names: str, default: float) -> float:
        """A number in (0, 1], for partial rotary embeddings."""
        value = self.get(*names)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
            raise _bad(self.model_type, names, f"is {value!r}, not in (0, 1]")
        return float(value)

    def flag(self, name: str, *, default: bool = False) -> bool:
        """A boolean; 0 and 1 are read as such."""
        value = self.get(name)
        if value is not None and (not isinstance(value, (bool, int)) or value not in (0, 1)):
            raise _bad(self.model_type, (name,), f"is {value!r}, not true or false")
        return default if value is None else bool(value)

    @property
    def layer_count(self) -> int:
        """Number of blocks."""
        count = self.count("num_hidden_layers", "n_layer", "num_layers", "n_layers")
        if count > MAX_LAYER_COUNT:
            raise _bad(self.model_type, ("num_hidden_layers",), f"is {count}, above {MAX_LAYER_COUNT}")
        return count

    @property
    def rope(self) -> Mapping[str, Any]:
        """Rotary embedding parameters: ``rope_parameters`` since transformers 5, ``rope_scaling`` before."""
        for name in ("rope_parameters", "rope_scaling"):
            value = self.values.get(name)
            if isinstance(value, Mapping):
                full = value.get("full_attention")
                return full if isinstance(full, Mapping) else value
        return {}

    @property
    def rope_type(self) -> str:
        """``llama3``, ``longrope``, ``su``, ``yarn`` …; empty without scaling."""
        kind = self.rope.get("rope_type", self.rope.get("type", ""))
        return kind.lower() if isinstance(kind, str) else ""

    def layer_types(self, layer_count: int) -> tuple[str, ...] | None:
        """``layer_types``, one per block; ``None`` if the config has none."""
        value = self.get("layer_types", "layers_block_type")
        if not isinstance(value, list):
            return None
        if len(value) < layer_count or not all(isinstance(kind, str) for kind in value):
            raise _bad(self.model_type, ("layer_types",), f"has {len(value)} entries for {layer_count} blocks")
        return tuple(value[:layer_count])

    @property
    def dtype(self) -> str:
        """Type the weights were published in; a packed format's name wins over ``torch_dtype``."""
        quantization = self.get("quantization_config")
        if isinstance(quantization, Mapping) and quantization.get("quant_method") in ("fp8", "mxfp4"):
            return str(quantization["quant_method"])
        return _DTYPES.get(str(self.get("torch_dtype", "dtype")).removeprefix("torch."), "bf16")

    @property
    def packed_by(self) -> str | None:
        """Method that already quantized this checkpoint (``awq``, ``gptq`` …); ``None`` for a full-precision one."""
        quantization = self.get("quantization_config")
        if not isinstance(quantization, Mapping):
            return None
        method = quantization.get("quant_method")
        return method if isinstance(method, str) and method not in ("fp8", "mxfp4") else None


def flatten(config: Mapping[str, Any]) -> dict[str, Any]:
    """The language model's fields: those of ``text_config`` (or its kin) over the outer ones."""
    flat = dict(config)
    for nested in ("text_config", "llm_config", "language_config"):
        inner = config.get(nested)
        if isinstance(inner, Mapping):
            flat.update({key: value for key, value in inner.items() if value is not None})
    return flat


def _bad(model_type: str, names: tuple[str, ...], problem: str) -> InputError:
    return InputError(
        f"config.json of a {model_type} model: {names[0]} {problem}",
        numbers=f"also looked for {', '.join(names[1:])}" if len(names) > 1 else "",
        hint="compare with the model's page on the Hugging Face hub",
        code="bad-config",
    )
