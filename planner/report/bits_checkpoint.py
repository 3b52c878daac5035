"""Bits per weight by layer and kind of tensor, read from the headers of a checkpoint's safetensors files."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from planner.formats.safetensors import StoredTensor, open_checkpoint
from planner.models.directory import read_config
from planner.report.bits import SMALL, Bits, Kind

_LAYER = re.compile(r"\blayers?\.(\d+)\.")
_PACKED = (".qweight", ".qzeros", ".scales", ".g_idx", ".weight_packed", ".weight_scale", ".weight_shape",
           ".weight_zero_point", ".weight_g_idx", ".SCB", ".weight_format")  # fmt: skip
"""Ends of the tensors that a quantizer writes in place of a layer's ``.weight``: GPTQ and AWQ, compressed-tensors,
LLM.int8()."""
_STATE = re.compile(r"\.weight\.(?:absmax|quant_map|nested_absmax|nested_quant_map|quant_state\..+)$")
"""What bitsandbytes keeps beside a weight of 4 bits."""


@dataclass(frozen=True, slots=True)
class _Linear:
    """All tensors that make up one weight."""

    name: str
    type: str
    weight_count: int
    size_bytes: int
    rank: int

    @property
    def layer(self) -> int | None:
        match = _LAYER.search(self.name)
        return int(match[1]) if match else None

    @property
    def kind(self) -> str:
        """``q_proj``; all vectors are one kind."""
        return SMALL if self.rank == 1 else self.name.rsplit(".", 1)[-1]


def bits_of_checkpoint(folder: Path) -> Bits | None:
    """The tensors of the checkpoint in ``folder``; ``None`` if there are none.

    Raises:
        InputError: no checkpoint, or a damaged one.
    """
    config = read_config(folder)
    quantization = config.get("quantization_config") or {}
    tensors = open_checkpoint(folder).tensors.values()
    grouped: dict[str, list[StoredTensor]] = {}
    for tensor in tensors:
        grouped.setdefault(_owner(tensor.name), []).append(tensor)
    found = [_linear(name, parts, quantization) for name, parts in grouped.items()]
    kinds: dict[str, list[_Linear]] = {}
    for linear in found:
        kinds.setdefault(linear.kind, []).append(linear)
    layers = max((linear.layer + 1 for linear in found if linear.layer is not None), default=0)
    rows = tuple(_row(name, items) for name, items in kinds.items())
    return Bits(kinds=rows, layer_count=layers) if rows else None


def _owner(name: str) -> str:
    """The layer that a tensor belongs to: ``model.layers.0.mlp.up_proj``."""
    if (match := _STATE.search(name)) is not None:
        return name[: match.start()]
    for end in (*_PACKED, ".weight"):
        if name.endswith(end):
            return name.removesuffix(end)
    return name


def _linear(name: str, parts: list[StoredTensor], quantization: dict[str, Any]) -> _Linear:
    sizes = sum(part.size_bytes for part in parts)
    main = max(parts, key=lambda part: part.size_bytes)
    by_end = {part.name.rsplit(".", 1)[-1]: part for part in parts}
    method, bits = str(quantization.get("quant_method", "")), _bits(quantization)
    packed = by_end.get("qweight") or by_end.get("weight_packed")
    if packed is not None and bits:  # whole words of 32 bits: K * N * bits / 32 of them
        return _Linear(name, f"{method} {bits} bits", packed.element_count * 32 // bits, sizes, 2)
    if "absmax" in by_end and "weight" in by_end:  # two weights to a byte
        return _Linear(name, str(quantization.get("bnb_4bit_quant_type", "4 bits")), 2 * main.element_count, sizes, 2)
    if "SCB" in by_end:
        return _Linear(name, "int8", main.element_count, sizes, 2)
    return _Linear(name, main.dtype, main.element_count, sizes, len(main.shape))


def _bits(quantization: dict[str, Any]) -> int | None:
    """Bits of a packed weight: GPTQ and AWQ say it at the top, compressed-tensors in its groups."""
    stated = quantization.get("bits")
    if stated is None:
        groups = quantization.get("config_groups") or {}
        first: Any = next(iter(groups.values()), {}) if isinstance(groups, dict) else {}
        stated = (first.get("weights") or {}).get("num_bits") if isinstance(first, dict) else None
    return stated if isinstance(stated, int) and 0 < stated <= 32 else None


def _row(name: str, items: list[_Linear]) -> Kind:
    by_layer: dict[int, list[_Linear]] = {}
    for item in items:
        if item.layer is not None and name != SMALL:
            by_layer.setdefault(item.layer, []).append(item)
    return Kind(
        name=name,
        types=tuple(Counter(item.type for item in items).most_common()),
        weight_count=sum(item.weight_count for item in items),
        size_bytes=sum(item.size_bytes for item in items),
        cells=tuple((layer, found[0].type, _per_weight(found)) for layer, found in sorted(by_layer.items())),
    )


def _per_weight(items: Iterable[_Linear]) -> float:
    found = list(items)
    return 8 * sum(item.size_bytes for item in found) / max(1, sum(item.weight_count for item in found))
