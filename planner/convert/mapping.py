"""A checkpoint's tensors as a stream of GGUF tensors: names, shapes and where their rows lie. No weights are read."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

from planner.convert.config import Config
from planner.convert.families import Family, find_family
from planner.convert.fp8 import FP8_DTYPES, Scale, find_scale, is_scale
from planner.convert.rows import FLOAT_DTYPES, NamedTensor, RowSlice
from planner.convert.rules import MODEL_RULES, Rule, dimensions, expert_count
from planner.core.errors import InputError, UnsupportedArchitecture
from planner.formats.safetensors import Checkpoint, StoredTensor

_LAYER = re.compile(r"layers\.(\d+)\.(.+)")
_EXPERT = re.compile(r"\.experts\.(\d+)\.")
_NO_WEIGHTS = (".attention.masked_bias", ".attention.bias", ".rotary_emb.inv_freq")
"""Buffers some checkpoints store; llama.cpp computes them."""
_OTHER_PARTS = ("vision_tower.", "multi_modal_projector.", "vision_model.", "model.vision_tower.")
"""Prefixes of what is not the language model in a multimodal checkpoint."""


def stream(checkpoint: Checkpoint, config: Config) -> Iterator[NamedTensor]:
    """The GGUF tensors of ``checkpoint``, in the order of llama.cpp's converter.

    That order is: computed tensors, then by file, then by name; stacked experts where the last of a layer stands.
    Everything is checked before the first one is given out.

    Raises:
        InputError: a tensor is missing (``missing-tensor``), of the wrong shape (``wrong-shape``) or of a type that
            is not converted (``unsupported-dtype``), or an 8-bit one's scales do not fit it (``bad-scale``).
        UnsupportedArchitecture: a tensor this architecture does not have (``unknown-tensor``).
    """
    family = find_family(config.model_type)
    if family is None:
        raise UnsupportedArchitecture(f"no conversion of {config.model_type!r}")
    yield from _Mapper(config=config, family=family, sizes=dimensions(config), stored=checkpoint.tensors).map(
        checkpoint
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Mapper:
    config: Config
    family: Family
    sizes: dict[str, int]
    stored: dict[str, StoredTensor]
    found: dict[tuple[int, str], NamedTensor] = field(default_factory=dict)
    """(layer, GGUF name) → tensor; layer -1 is the model itself."""
    experts: dict[tuple[int, str], dict[int, StoredTensor]] = field(default_factory=lambda: defaultdict(dict))

    def map(self, checkpoint: Checkpoint) -> list[NamedTensor]:
        tensors = [
            NamedTensor(name=name, shape=(len(values),), dtype="F32", constant=values)
            for name, values in self.family.factors(self.config).items()
        ]
        for stored in sorted(checkpoint.tensors.values(), key=lambda tensor: (tensor.file.name, tensor.name)):
            if not is_scale(stored.name, checkpoint.tensors):
                tensors += self._place(stored)
        self._check_complete()
        return tensors

    def _place(self, stored: StoredTensor) -> list[NamedTensor]:
        name = stored.name.replace("language_model.", "")
        if name.endswith(_NO_WEIGHTS) or stored.name.startswith(_OTHER_PARTS):
            return []
        name = name.removeprefix("model.")
        match = _LAYER.fullmatch(name)
        layer, suffix = (int(match[1]), match[2]) if match else (-1, name)
        source = _EXPERT.sub(".experts.*.", suffix)
        rules = [rule for rule in (self.family.layer_rules if match else MODEL_RULES) if rule.source == source]
        if not rules or layer >= self.config.integer("num_hidden_layers"):
            raise _unknown(stored, self.config)
        _check_dtype(stored)
        _check_shape(stored, tuple(self.sizes[dim] for dim in rules[0].dims))
        if not match and rules[0].target == "output.weight" and self._tied():
            return []
        if "*" in source:
            expert = _EXPERT.search(suffix)
            return self._collect(layer, rules[0], int(expert[1]) if expert else 0, stored)
        return [self._note(layer, rule.target, self._whole(layer, rule, stored)) for rule in rules]

    def _tied(self) -> bool:
        return not self.family.keeps_output or self.config.flag("tie_word_embeddings")

    def _note(self, layer: int, target: str, tensor: NamedTensor) -> NamedTensor:
        if (layer, target) in self.found:
            raise InputError(f"{tensor.name} comes twice", numbers="two stored tensors map to it", code="bad-index")
        self.found[layer, target] = tensor
        return tensor

    def _whole(self, layer: int, rule: Rule, stored: StoredTensor) -> NamedTensor:
        index, parts = rule.part
        matrices = stored.shape[0] if len(stored.shape) == 3 else 1
        rows = stored.shape[-2] if len(stored.shape) > 1 else stored.shape[0]
        scale = self._scale(stored)
        slices = tuple(
            RowSlice(stored, matrix * rows + index * rows // parts, rows // parts, scale) for matrix in range(matrices)
        )
        if parts == 1:
            slices = (RowSlice(stored, 0, matrices * rows, scale),)
        shape = (*stored.shape[:-2], rows // parts, *stored.shape[-1:]) if len(stored.shape) > 1 else stored.shape
        return NamedTensor(
            name=_full_name(layer, rule.target),
            shape=tuple(reversed(shape)),
            dtype=_value_type(stored),
            slices=slices,
            rotary_rows=self.config.head_dim if rule.rotary and self.family.interleaved_rope else 0,
            shift=self.family.norm_shift if rule.target.endswith("norm.weight") else 0.0,
        )

    def _collect(self, layer: int, rule: Rule, expert: int, stored: StoredTensor) -> list[NamedTensor]:
        """Keep ``stored`` until its layer's experts are all there; then their stacked tensors."""
        self.experts[layer, rule.target][expert] = stored
        count = expert_count(self.config)
        stacked = [rule for rule in self.family.layer_rules if "*" in rule.source]
        if any(len(self.experts[layer, rule.target]) < count for rule in stacked):
            return []
        return [self._note(layer, rule.target, self._stack(layer, rule, count)) for rule in stacked]

    def _stack(self, layer: int, rule: Rule, count: int) -> NamedTensor:
        experts = self.experts.pop((layer, rule.target))
        missing = [number for number in range(count) if number not in experts]
        if missing or len(experts) > count or len({stored.dtype for stored in experts.values()}) > 1:
            raise InputError(
                f"the experts of layer {layer} do not fit together",
                numbers=f"{len(experts)} of {count} found, {len(missing)} missing",
                code="missing-tensor",
            )
        rows, columns = experts[0].shape
        return NamedTensor(
            name=_full_name(layer, rule.target),
            shape=(columns, rows, count),
            dtype=_value_type(experts[0]),
            slices=tuple(RowSlice(experts[number], 0, rows, self._scale(experts[number])) for number in range(count)),
        )

    def _scale(self, stored: StoredTensor) -> Scale | None:
        if stored.dtype not in FP8_DTYPES:
            return None
        return find_scale(stored, self.stored, self.config.fp8_block)

    def _check_complete(self) -> None:
        layers = range(self.config.integer("num_hidden_layers"))
        wanted = [(layer, rule.target) for layer in layers for rule in self.family.layer_rules if rule.required]
        wanted += [(-1, rule.target) for rule in MODEL_RULES if rule.required]
        if not self._tied():
            wanted.append((-1, "output.weight"))
        missing = [_full_name(*key) for key in dict.fromkeys(wanted) if key not in self.found]
        if missing:
            raise InputError(
                f"{len(missing)} tensors are missing from the checkpoint",
                numbers="\n".join(missing[:5]) + (f"\nand {len(missing) - 5} more" if len(missing) > 5 else ""),
                hint="download all files of the checkpoint again",
                code="missing-tensor",
            )


def _value_type(stored: StoredTensor) -> str:
    """Type of the values that a stored tensor's rows decode to."""
    return "F32" if stored.dtype in FP8_DTYPES else stored.dtype


def _full_name(layer: int, target: str) -> str:
    return target if layer < 0 else f"blk.{layer}.{target}"


def _unknown(stored: StoredTensor, config: Config) -> UnsupportedArchitecture:
    return UnsupportedArchitecture(
        f"{stored.name!r} is no tensor of a {config.model_type} model as llama.cpp knows it",
        numbers=f"{stored.file.name}, shape {list(stored.shape)}, {config.get('num_hidden_layers')} layers",
        hint="pass --llama-cpp DIR with a llama.cpp checkout to use its own converter",
        code="unknown-tensor",
    )


def _check_dtype(stored: StoredTensor) -> None:
    if stored.dtype in FLOAT_DTYPES or stored.dtype in FP8_DTYPES:
        return
    raise InputError(
        f"{stored.name} is of type {stored.dtype}, not a float tensor",
        numbers="F32, F16, BF16 and 8-bit floats are converted",
        hint="a checkpoint that is quantized already is run as it is, not converted",
        code="unsupported-dtype",
    )


def _check_shape(stored: StoredTensor, expected: tuple[int, ...]) -> None:
    if stored.shape != expected:
        raise InputError(
            f"{stored.name} does not have the shape that config.json implies",
            numbers=f"{list(stored.shape)} stored, {list(expected)} expected",
            hint="config.json and the weights are of different models or revisions",
            code="wrong-shape",
        )
