"""Look models up: by part of a name, with the sizes they would have."""

from __future__ import annotations

import json
import shlex
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from planner.core.errors import QplanError
from planner.core.model import ModelSpec

if TYPE_CHECKING:
    from planner.core.candidate import Candidate
    from planner.models.catalog import CatalogEntry as CatalogEntry

NEAR_COUNT = 8
SHOWN_TYPES = ("BF16", "Q8_0", "Q6_K", "Q4_K_M", "IQ2_M")
"""Types whose sizes say at a glance what a model takes, from 16 bits to 2.7."""


def search(text: str) -> tuple[CatalogEntry, ...]:
    """Catalog models whose name, alias or hub id holds every word of ``text``; where none does, the nearest names."""
    words = text.lower().split()
    found = tuple(entry for entry, names in _searchable() if all(word in names for word in words))
    if found or not words:
        return found
    from planner.models import catalog

    near = catalog.nearest(text, NEAR_COUNT)
    by_name = {entry.name: entry for entry, _ in _searchable()}
    return tuple(by_name[name] for name in near if name in by_name)


@cache
def _searchable() -> tuple[tuple[CatalogEntry, str], ...]:
    from planner.models import catalog_entries

    entries = catalog_entries()
    return tuple((e, " ".join((e.name, e.family, *e.aliases, *e.hub_ids)).lower()) for e in entries)


def names_itself(text: str) -> bool:
    """Whether ``text`` names a model without the catalog: a path, a hub id, or a bare size."""
    from planner.models.size_model import spec_from_size

    if any(mark in text for mark in "/\\@:") or text.startswith(("~", ".")) or text.lower().endswith(".gguf"):
        return True
    try:
        return spec_from_size(text) is not None
    except QplanError:
        return True


def resolve(text: str) -> ModelSpec:
    """The model that ``text`` names.

    Raises:
        ModelNotFound: nothing has this name.
        InputError: it is there but cannot be used.
    """
    from planner import models

    return models.resolve(text)


def sizes(model: ModelSpec) -> tuple[tuple[str, int], ...]:
    """File bytes of the model in a few GGUF types, as ``qplan estimate --type`` prints them."""
    from planner.methods import gguf

    found = []
    for type_ in SHOWN_TYPES:
        try:
            found.append((type_, gguf.size(model, gguf.variant(type_)).file_bytes))
        except QplanError:  # a shape that this type cannot hold
            continue
    return tuple(found)


def commands(model: ModelSpec, candidate: Candidate) -> dict[str, str]:
    """Text for a person: how to quantize by hand and how to serve."""
    from planner import methods

    return methods.get(candidate.variant.method).commands(model, candidate)


def executable(candidate: Candidate) -> bool:
    """Whether ``qplan apply`` carries the candidate's method out."""
    from planner import methods

    return methods.row(candidate.variant.method).executable


def question_line(url: str, model: str) -> str:
    """A command that asks a served model something."""
    said = json.dumps({"model": model, "messages": [{"role": "user", "content": "Hello!"}]})
    return shlex.join(["curl", f"{url}/chat/completions", "-H", "Content-Type: application/json", "-d", said])


def log_since(path: Path, start: int) -> tuple[str, int]:
    """What a log has from byte ``start`` on, and where it ends now; nothing where it cannot be read."""
    try:
        with path.open("rb") as stream:
            if path.stat().st_size < start:  # begun anew
                start = 0
            stream.seek(start)
            found = stream.read()
    except OSError:
        return "", start
    return found.decode("utf-8", errors="replace"), start + len(found)
