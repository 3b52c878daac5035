"""Name, directory, GGUF file or hub id → ModelSpec, from headers only, never weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

from planner.models.resolve import resolve

if TYPE_CHECKING:
    from planner.models.catalog import CatalogEntry

__all__ = ["catalog_entries", "resolve"]


def catalog_entries() -> tuple[CatalogEntry, ...]:
    """All models known by name, in the order of the table."""
    from planner.models import catalog

    return catalog.entries()
