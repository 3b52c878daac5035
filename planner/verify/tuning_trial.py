"""What the tuning child process is asked and what it answers; both cross the process boundary as JSON."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from planner.core.candidate import Placement
from planner.core.hardware import STRICT

MEASURED, FAILED, NOT_REACHED, ALIKE = "measured", "failed", "not reached", "alike"
"""What became of a setting."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TuneRequest:
    """Find the best of some settings within a time budget."""

    __pydantic_config__: ClassVar[dict[str, str]] = STRICT

    budget_seconds: float
    settings: tuple[Placement, ...]
    """The recommended one first, the others the more promising the earlier."""
    objective: str
    """``decode``, ``prefill`` or ``balanced``."""
    prompt_tokens: int
    answer_tokens: int
    """Weights of the two speeds where both count."""
    depth: int = 0
    """Cached tokens when a token is decoded."""
    model: str
    """A name that ``models.resolve`` knows."""
    type: str
    imatrix: bool = False
    path: str | None = None
    """The GGUF file to run; ``None``: one of random weights is made."""
    layers: int | None = None
    """Of random weights: only so many layers of the model; ``None``: all."""
    offloadable_count: int = 0
    """Layers of the whole model as llama.cpp counts them for a GPU."""
    most_contexts: int = 1
    """Contexts that may be open at once."""
    repack: bool = True
    """Let llama.cpp hold weights in its CPU-specific layouts, its default."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TuneRow:
    """What became of one setting."""

    __pydantic_config__: ClassVar[dict[str, str]] = STRICT

    status: str
    decode_seconds: tuple[float, ...] = ()
    """Of a token, in each good sample, the fastest first."""
    prefill_seconds: tuple[float, ...] = ()
    """Of a prompt of the answer's ``prompt_tokens``."""
    set_aside_count: int = 0
    """Samples in which other programs had the cores, or the bandwidth where there were enough without."""
    disturbed: tuple[str, ...] = ()
    """``decode`` or ``prefill`` where there was no sample without others on the cores: the fastest two stand."""
    rungs: int = 0
    """Rungs of the search that it was in."""
    note: str = ""
    """Why it failed, or which setting it is alike to."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TuneAnswer:
    """What the child measured."""

    __pydantic_config__: ClassVar[dict[str, str]] = STRICT

    rows: tuple[TuneRow, ...]
    """In the order of the request's settings."""
    ranking: tuple[int, ...]
    """Settings that were measured, best first."""
    prompt_tokens: int
    """Of the prompts that were read."""
    depth: int
    context: int
    """Cells of the contexts that were open."""
    tool_version: str
    seconds: float
