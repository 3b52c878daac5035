"""The files to be made: what each tensor becomes, where it lies, and the header in front; before a weight is read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from planner.convert.keyvalue import KeyValue, u32
from planner.convert.metadata import QUANTIZATION_VERSION
from planner.convert.rows import NamedTensor
from planner.convert.write import ALIGNMENT, Conversion, header_bytes
from planner.core.errors import InputError, UsageError
from planner.core.job import partial_path
from planner.core.units import pad
from planner.formats import ggml
from planner.quantize.kernels import demands_importance, missing_importance

if TYPE_CHECKING:
    import numpy as np

_LAYER = re.compile(r"blk\.(\d+)\.")
_TOKEN_EMBEDDINGS = ("token_embd.weight", "per_layer_token_embd.weight")
_Q2_K_S = 21
"""``LLAMA_FTYPE_MOSTLY_Q2_K_S``: the one file type whose Q2_K tensors demand an importance matrix."""

Importance = Mapping[str, "np.ndarray[Any, Any]"]
"""Tensor name → float32 weights of its columns: ``n_columns`` values, or ``n_experts × n_columns``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One file to be made."""

    output: Path
    file_type: int
    """``llama_ftype`` of llama.h, for ``general.file_type``."""
    types: Mapping[str, str]
    """GGUF tensor name → ggml type, for every tensor."""
    importance: Importance | None = None
    metadata: tuple[KeyValue, ...] = ()
    """Key-values added behind the model's own, as llama-quantize notes an importance matrix."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where one tensor lies in one file."""

    type: str
    offset: int
    row_bytes: int
    """Bytes of one row as ``NamedTensor`` counts rows: of one value in a vector."""
    importance: np.ndarray[Any, Any] | None
    """Shape ``(n_experts, n_columns)``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """A target with every tensor's place."""

    target: Target
    places: Mapping[str, Place]
    header: bytes
    file_bytes: int

    @property
    def partial(self) -> Path:
        """The name under which it is written."""
        return partial_path(self.target.output)


def lay_out(conversion: Conversion, target: Target) -> Layout:
    """Decide every byte's place, in the order and with the header of ``llama_model_quantize``.

    Raises:
        UsageError: a tensor has no type (``missing-type``).
        InputError: a row is no whole number of blocks (``row-not-divisible``), a type demands an importance matrix
            (``needs-imatrix``) or one does not fit (``bad-importance``).
    """
    tensors = sorted(conversion.tensors, key=lambda tensor: _order(tensor.name))
    lacking = [tensor.name for tensor in tensors if tensor.name not in target.types]
    if lacking:
        raise UsageError(
            f"{len(lacking)} tensors of the checkpoint have no type",
            numbers="\n".join(lacking[:5]),
            hint="the types are of another model",
            code="missing-type",
        )
    # a trailing dimension of one is not written (`ggml_n_dims`)
    listed = [(tensor.name, _trimmed(tensor.shape), target.types[tensor.name]) for tensor in tensors]
    header = header_bytes(_key_values(conversion, target), listed)
    places = {}
    position = len(header)
    for tensor in tensors:
        type_ = target.types[tensor.name]
        places[tensor.name] = Place(
            type_, position, ggml.row_bytes(type_, tensor.row_length), _importance_of(tensor, type_, target)
        )
        position += pad(ggml.tensor_bytes(type_, tensor.shape), ALIGNMENT)
    return Layout(target=target, places=places, header=header, file_bytes=position)


def _order(name: str) -> tuple[int, bytes]:
    """``weight_name_comparer`` of src/llama-model-loader.h: by layer, then by name."""
    found = _LAYER.match(name)
    return (int(found[1]) if found else -1), name.encode()


def _trimmed(shape: tuple[int, ...]) -> tuple[int, ...]:
    while len(shape) > 1 and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def _key_values(conversion: Conversion, target: Target) -> list[KeyValue]:
    """The converted file's, but the two that llama.cpp sets anew, which puts them at the end."""
    new = [
        u32("general.quantization_version", QUANTIZATION_VERSION),
        u32("general.file_type", target.file_type),
        *target.metadata,
    ]
    replaced = {entry.key for entry in new}
    return [entry for entry in conversion.key_values if entry.key not in replaced] + new


def _importance_of(tensor: NamedTensor, type_: str, target: Target) -> np.ndarray[Any, Any] | None:
    import numpy as np

    columns, experts = tensor.shape[0], tensor.shape[2] if len(tensor.shape) > 2 else 1
    found = target.importance.get(tensor.name) if target.importance is not None else None
    if found is not None and found.size != columns * experts:
        if tensor.name not in _TOKEN_EMBEDDINGS:
            raise InputError(
                f"the importance matrix does not fit {tensor.name}",
                numbers=f"{found.size} values for {experts} x {columns}",
                hint="it is of another model",
                code="bad-importance",
            )
        found = None  # llama.cpp leaves it aside too: the embedding's is a count of tokens
    if found is not None and not np.isfinite(found).all():
        raise InputError(f"the importance matrix of {tensor.name} is not finite", code="bad-importance")
    if found is None:
        low_bit_mix = target.file_type == _Q2_K_S and len(tensor.shape) > 1
        if demands_importance(tensor.name, type_, low_bit_mix=low_bit_mix):
            raise missing_importance(tensor.name, type_)
        return None
    return np.ascontiguousarray(found, dtype="<f4").reshape(experts, columns)
