"""What a person wants to do, from words and from the texts of a form, as a ``Workload``."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

from planner.core.errors import InputError, UsageError
from planner.core.finetuning import BASES, FinetuneWish
from planner.core.units import parse_bytes
from planner.core.workload import KV_TYPES, OBJECTIVES, Workload

AUTOMATIC = "auto"


@dataclass(frozen=True, slots=True, kw_only=True)
class Use:
    """A use with options to start from: a choice to change, not a measurement."""

    name: str
    summary: str
    context: int
    concurrency: int = 1
    prompt_tokens: int = 512


USES = (
    Use(name="chat", summary="questions and answers, one person", context=8192),
    Use(name="code", summary="a few source files at a time", context=16384, prompt_tokens=4096),
    Use(name="documents", summary="reports of some fifty pages", context=32768, prompt_tokens=16384),
    Use(name="service", summary="eight people at once", context=8192, concurrency=8),
)
"""``documents``: a page of 400 words is about 600 tokens, as English takes 1.3 to 1.5 tokens a word."""


def workload_of(
    *,
    context: str = "",
    users: str = "",
    objective: str = "balanced",
    min_decode: str = "",
    max_memory: str = "",
    kv_type: str = AUTOMATIC,
    cpu_only: bool = False,
    prompt_tokens: int = 512,
    finetuning: FinetuneWish | None = None,
    base: Workload | None = None,
) -> Workload:
    """The workload of a form's fields; an empty one is no wish.

    Args:
        finetuning: of the objective ``finetune``.
        base: what the form does not ask for: methods, types, threads.

    Raises:
        UsageError: naming the field and what it takes.
    """
    kept = base or Workload()
    if objective not in OBJECTIVES:
        raise UsageError(f"{objective!r} is no objective", hint=f"one of {', '.join(OBJECTIVES)}")
    if kv_type not in (AUTOMATIC, *KV_TYPES):
        raise UsageError(f"{kv_type!r} is no KV cache type", hint=f"one of {', '.join(KV_TYPES)}")
    return Workload(
        context=_whole("context", context) or Workload().context,
        context_fixed=bool(context.strip()),
        objective=objective,
        concurrency=_whole("users at once", users) or 1,
        prompt_tokens=prompt_tokens,
        min_decode_tokens_per_second=_positive("least decode speed", min_decode),
        max_memory_bytes=parse_bytes(max_memory) if max_memory.strip() else None,
        methods=kept.methods,
        types=kept.types,
        kv_type=None if kv_type == AUTOMATIC else kv_type,
        gpu_layers=kept.gpu_layers,
        threads=kept.threads,
        cpu_only=cpu_only,
        finetuning=finetuning if finetuning is not None and objective == "finetune" else FinetuneWish(),
    )


def finetune_wish(
    *, lora: str = AUTOMATIC, rank: str = "", sequence_length: str = "", batch: str = "", kept: FinetuneWish
) -> FinetuneWish:
    """What a form's fields want of a fine-tuning; what it does not ask for stays as in ``kept``.

    Raises:
        UsageError: naming the field and what it takes.
    """
    if lora not in (AUTOMATIC, *BASES):
        raise UsageError(f"{lora!r} is no base of a fine-tuning", hint=f"one of {', '.join(BASES)}")
    return replace(
        kept,
        base=None if lora == AUTOMATIC else lora,
        rank=_whole("the rank", rank),
        sequence_length=_whole("the sequence length", sequence_length),
        batch=_whole("the batch", batch),
    )


def dataset(text: str) -> Path | None:
    """What a fine-tuning trains with; ``None`` where the field is empty.

    Raises:
        InputError: there is no such file.
    """
    if not text.strip():
        return None
    path = Path(text.strip()).expanduser()
    if not path.is_file():
        raise InputError(f"{path} is no file", hint="a .jsonl file of examples, or text", code="no-file")
    return path


def _whole(what: str, text: str) -> int | None:
    text = text.strip().replace(",", "").replace("_", "")
    if not text:
        return None
    if not text.isdecimal() or len(text) > 9 or int(text) < 1:
        raise UsageError(f"{what} must be a whole number from 1", numbers=f"got {text[:20]!r}")
    return int(text)


def _positive(what: str, text: str) -> float | None:
    if not text.strip():
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise UsageError(f"{what} must be a positive number", numbers=f"got {text.strip()[:20]!r}")
    return value
