"""Name, directory, GGUF file or hub id → ModelSpec, from headers only, never weights."""

from __future__ import annotations

from planner.models.resolve import resolve

__all__ = ["resolve"]
