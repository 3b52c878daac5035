"""What the calibrating child process is asked and what it answers; both cross the process boundary as JSON."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from planner.core.hardware import STRICT
from planner.core.rates import Observation


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationRequest:
    """Measure one device within a time budget."""

    __pydantic_config__: ClassVar[dict[str, str]] = STRICT

    budget_seconds: float
    threads: tuple[int, ...]
    """Thread counts to measure, the one that matters most first; on a GPU only that one."""
    gpu: bool = False
    """All layers on the GPU that the child sees, instead of the host's cores."""
    types: tuple[str, ...]
    """Tensor types for slices that serve any model, or file types of ``model``, the most important first."""
    kv_types: tuple[str, ...] = ("f16",)
    model: str | None = None
    """Measure slices of this very model, a name that ``models.resolve`` knows."""
    imatrix: bool = False
    cache_bytes: int = 0
    """Last-level cache: slices are made larger than this."""
    memory_bytes: int | None = None
    """What all slices of one type may take."""
    depth: int = 2048
    """Cached tokens at which attention is measured; less where filling them would take too long."""
    scale: float = 1.0
    """Shrinks the widths of the slices that serve any model; for tests. Below 1 the weights may fit the caches."""
    repack: bool = True
    """Let llama.cpp hold weights in its CPU-specific layouts, its default."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationAnswer:
    """What the child measured, in the order it did."""

    __pydantic_config__: ClassVar[dict[str, str]] = STRICT

    observations: tuple[Observation, ...]
    tool_version: str
    seconds: float
    left_out: tuple[str, ...] = ()
    """What the budget or the memory had no room for."""
