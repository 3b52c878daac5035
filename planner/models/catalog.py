"""The table of well-known models: found by name, alias or hub id; a block is parsed only when it is asked for."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from typing import Any

from planner.core.data import data_path
from planner.core.model import ModelSource, ModelSpec
from planner.models.architectures import spec_from_config

_SPLIT = "\n[[model]]\n"
_NAME = re.compile(r'^name = "([^"]*)"$', re.MULTILINE)
_LISTS = re.compile(r"^(hub_ids|aliases) = \[(.*)\]$", re.MULTILINE)
_QUOTED = re.compile(r'"([^"]*)"')
# Endings of hub names that do not change the shapes; tried only after the full text was not found.
_VARIANT = re.compile(r"-(instruct|chat|it|pt|base|hf)$")


@dataclass(frozen=True, slots=True, kw_only=True)
class CatalogEntry:
    """One row of ``qplan models``, without the tensor list."""

    name: str
    family: str
    license: str
    gated: bool
    hub_id: str
    hub_ids: tuple[str, ...]
    aliases: tuple[str, ...]
    parameter_count: int
    """As published; else the sum over the shapes, without the tables that only a GGUF file holds."""
    architecture: str


def lookup(text: str) -> ModelSpec | None:
    """The model whose name, alias or hub id is ``text``, whatever its case; ``None`` if there is none.

    The spec's source names the hub id that was given, else the first of the entry, and an ``@revision`` after it.
    """
    wanted, _, revision = text.strip().partition("@")
    number = _index().get(wanted.lower())
    if number is None:
        return None
    return _spec(number, wanted if "/" in wanted else None, revision or None)


def names() -> tuple[str, ...]:
    """Names of all models, in the order of the table: by family, small to large."""
    return tuple(_name(block) for block in _blocks())


def entries() -> tuple[CatalogEntry, ...]:
    """All models as light rows; builds every spec, so about 0.2 s."""
    return tuple(_entry(number) for number in range(len(_blocks())))


def relatives(family: str) -> tuple[ModelSpec, ...]:
    """The models of one family, in the order of the table; builds no other."""
    line = f'\nfamily = "{family}"\n'
    return tuple(_spec(number, None, None) for number, block in enumerate(_blocks()) if line in block)


def entry(name: str) -> CatalogEntry | None:
    """The row of one model by name, alias or hub id; ``None`` if there is none."""
    number = _index().get(name.strip().partition("@")[0].lower())
    return None if number is None else _entry(number)


def config(name: str) -> dict[str, Any] | None:
    """The ``config.json`` fields of one model by name, alias or hub id, as a fresh copy; ``None`` if unknown."""
    from copy import deepcopy

    number = _index().get(name.lower())
    return None if number is None else deepcopy(_parsed(number)["config"])


def nearest(text: str, count: int = 5) -> tuple[str, ...]:
    """Names that look most like ``text``, best first, at most ``count``.

    Case, separators, the organisation and endings such as ``-instruct`` are ignored, so ``Llama2 13B-chat`` finds
    ``llama-2-13b``; aliases count for their model.
    """
    from difflib import SequenceMatcher

    wanted = _normal(text)
    best: dict[str, float] = {}
    for key, number in _index().items():
        matcher = SequenceMatcher(None, _normal(key), wanted)
        name = _name(_blocks()[number])
        if matcher.real_quick_ratio() > best.get(name, 0.5):
            best[name] = max(best.get(name, 0.0), matcher.ratio())
    order = {name: place for place, name in enumerate(names())}
    ranked = sorted(best, key=lambda name: (-best[name], order[name]))
    return tuple(name for name in ranked if best[name] > 0.5)[:count]


def _normal(text: str) -> str:
    short = text.strip().lower().rsplit("/", 1)[-1].partition("@")[0]
    short = re.sub(r"[\s_:]+", "-", short)
    return re.sub(r"[-.]", "", _VARIANT.sub("", short))


@cache
def _blocks() -> tuple[str, ...]:
    """The text of every block, unparsed."""
    return tuple(data_path("models.toml").read_text(encoding="utf-8").split(_SPLIT)[1:])


@cache
def _index() -> dict[str, int]:
    """Lower-case name, alias and hub id → number of the block."""
    index: dict[str, int] = {}
    for number, block in enumerate(_blocks()):
        head = block.partition("\n[model.config]")[0]
        keys = [_name(head)]
        for _, items in _LISTS.findall(head):
            keys += _QUOTED.findall(items)
        for key in keys:
            index.setdefault(key.lower(), number)
    return index


def _name(block: str) -> str:
    found = _NAME.search(block)
    return found.group(1) if found else ""


@cache
def _parsed(number: int) -> dict[str, Any]:
    import tomllib

    model: dict[str, Any] = tomllib.loads(_SPLIT + _blocks()[number])["model"][0]
    return model


@cache
def _spec(number: int, hub_id: str | None, revision: str | None) -> ModelSpec:
    model = _parsed(number)
    source = ModelSource(
        kind="catalog",
        location=model["name"],
        hub_id=hub_id or model["hub_ids"][0],
        revision=revision,
        source=model["source"],
        date=model["date"],
    )
    return spec_from_config(
        model["config"],
        name=model["name"],
        family=model["family"],
        source=source,
        dtype=model["dtype"],
        tokenizer=model["tokenizer"],
    )


def _entry(number: int) -> CatalogEntry:
    model, spec = _parsed(number), _spec(number, None, None)
    tables = sum(tensor.element_count for tensor in spec.tensors if tensor.name.startswith("rope_"))
    return CatalogEntry(
        name=spec.name,
        family=spec.family,
        license=model["license"],
        gated=model["gated"],
        hub_id=model["hub_ids"][0],
        hub_ids=tuple(model["hub_ids"]),
        aliases=tuple(model["aliases"]),
        parameter_count=model.get("parameter_count", spec.parameter_count - tables),
        architecture=spec.architecture,
    )
