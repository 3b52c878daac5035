"""Calibration text as samples of tokens: chunks of equal length, drawn by a seed."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from planner.core.errors import InputError
from planner.core.job import Job


def choose_chunks(tokens: Sequence[int], size: int, most: int | None, seed: int) -> list[Sequence[int]]:
    """Whole chunks of ``tokens``: all in order, or ``most`` of them drawn by ``seed``, in the text's order.

    Raises:
        InputError: not even one is whole (``text-too-short``).
    """
    count = len(tokens) // size
    if not count:
        raise InputError(
            "the calibration text is too short",
            numbers=f"{len(tokens)} tokens, one chunk has {size}",
            hint="give a longer one with --calibration",
            code="text-too-short",
        )
    chosen = range(count) if most is None or most >= count else sorted(random.Random(seed).sample(range(count), most))
    return [tokens[i * size : (i + 1) * size] for i in chosen]


@dataclass(frozen=True, slots=True)
class Samples:
    """Token ids to calibrate with, and what a receipt says of them."""

    chunks: tuple[list[int], ...]
    details: dict[str, str | int | float]
    notes: tuple[str, ...]


def samples(job: Job, tokenizer: Any) -> Samples:
    """The samples of the step's calibration text, without the tokens that a tokenizer puts around a text.

    Raises:
        InputError: the plan names no text, or it has too few tokens.
    """
    asked = job.step.calibration
    if asked is None or job.calibration_text is None:
        raise InputError(f"the step {job.step.name!r} names nothing to calibrate with", code="bad-plan")
    tokens: list[int] = tokenizer(
        job.calibration_text, add_special_tokens=False, split_special_tokens=True, verbose=False
    ).input_ids
    chosen = [list(chunk) for chunk in choose_chunks(tokens, asked.chunk_tokens, asked.chunks, asked.seed)]
    details: dict[str, str | int | float] = {
        "samples": len(chosen),
        "sample_tokens": asked.chunk_tokens,
        "tokens": len(chosen) * asked.chunk_tokens,
        "seed": asked.seed,
        "text": asked.kind,
        "text_sha256": asked.sha256,
    }
    notes = []
    if asked.chunks is not None and len(chosen) < asked.chunks:
        notes.append(
            f"the text has {len(chosen)} samples of {asked.chunk_tokens} tokens, {asked.chunks} were asked for"
        )
    return Samples(tuple(chosen), details, tuple(notes))
