"""What every measurement of speed does alike, whatever runs the model: prompts, timed repetitions, and the peak.

Runs only in a child.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Protocol

from planner.core.candidate import Placement
from planner.core.errors import UsageError
from planner.execute.resident import OthersShare, peak_resident_bytes
from planner.verify.memory import GpuMemory
from planner.verify.trial import Buffer, MemoryTrial, Samples

Progress = Callable[[str, float], None]
"""Called with what is being done and the fraction done."""

SHARE = {"prefill": 0.35, "decode": 0.35, "fill": 0.2}
"""Shares of the time budget; the rest is for loading and warming up."""
_SHORTEST_SAMPLE_SECONDS = 0.2
"""Runs of tiny models are joined until a sample lasts this long: a scheduler's time slice is some milliseconds."""
_WARM_TOKENS = 32
"""The smallest batch that llama.cpp treats as a prompt on a GPU."""
_SEED = 1
_FIRST_TOKEN_FRACTION = 0.01
"""Random tokens are drawn above the first 1 % of the vocabulary, where the control tokens usually lie."""


class Run(Protocol):
    """An open model with a KV cache and a supply of random tokens."""

    @property
    def longest(self) -> int:
        """Most tokens that lay in the cache."""

    def append(self, count: int) -> None:
        """Prefill ``count`` tokens behind those in the cache."""

    def step(self, count: int) -> None:
        """Decode ``count`` tokens one at a time."""

    def empty(self) -> None:
        """Back to an empty cache."""

    def back_to(self, depth: int) -> None:
        """Back to ``depth`` tokens."""


def timings(
    run: Run,
    prompt: int,
    depth: int,
    decode_tokens: int,
    repetitions: int,
    budget_seconds: float,
    progress: Progress,
) -> tuple[Samples, Samples]:
    """Warm up, then a prompt from an empty cache, then ``decode_tokens`` at ``depth``: rates of both."""
    progress("warm up", 0.0)
    run.append(min(prompt, _WARM_TOKENS))
    run.step(1)

    def prefill() -> int:
        run.append(prompt)
        return prompt

    def decode() -> int:
        run.step(decode_tokens)
        return decode_tokens

    progress("prefill", 0.2)
    first = sample_rates(
        prefill, before=run.empty, repetitions=repetitions, budget_seconds=budget_seconds * SHARE["prefill"]
    )
    progress("decode", 0.6)
    second = sample_rates(
        decode,
        before=lambda: run.back_to(depth),
        repetitions=repetitions,
        budget_seconds=budget_seconds * SHARE["decode"],
    )
    return first, second


def fill(
    run: Run,
    context: int,
    prefill_rate: float,
    budget_seconds: float,
    progress: Progress,
    append: Callable[[int], None] | None = None,
) -> None:
    """Fill the cache to the end where the budget allows, so that the peak is that of a full context.

    Args:
        append: how to prefill it, where that is not the way a prompt is timed.
    """
    if run.longest < context and context / prefill_rate <= budget_seconds * SHARE["fill"]:
        progress("fill the context", 0.9)
        run.empty()
        (append or run.append)(context)


def sample_rates(
    work: Callable[[], int], *, before: Callable[[], None], repetitions: int, budget_seconds: float
) -> Samples:
    """Timed repetitions of ``work``, each joined from as many runs as 0.2 s need.

    Args:
        work: does something and says how many tokens that was.
        before: brings the cache back to where ``work`` starts; not timed.
        repetitions: samples wanted; at least one is taken, however long it takes.
        budget_seconds: no new sample starts when the time used and a sample like the last would exceed this.
    """
    others = OthersShare()
    rates: list[float] = []
    counts: list[int] = []
    times: list[float] = []
    cpu_seconds = 0.0
    began = time.perf_counter()
    last = 0.0
    while len(rates) < repetitions and (not rates or time.perf_counter() - began + last < budget_seconds):
        sample_began = time.perf_counter()
        tokens, seconds = 0, 0.0
        while tokens == 0 or seconds < _SHORTEST_SAMPLE_SECONDS:
            before()
            start, cpu_start = time.perf_counter(), time.process_time()
            tokens += work()
            seconds += time.perf_counter() - start
            cpu_seconds += time.process_time() - cpu_start
        rates.append(tokens / seconds)
        counts.append(tokens)
        times.append(seconds)
        last = time.perf_counter() - sample_began
    return Samples(
        samples=tuple(rates),
        tokens_per_sample=tuple(counts),
        seconds_per_sample=tuple(times),
        cpu_seconds=cpu_seconds,
        others_share=others.share(),
    )


def lengths(placement: Placement, decode_tokens: int) -> tuple[int, int]:
    """Prompt and depth that leave room for the decoded tokens.

    Raises:
        UsageError: the context has no room for a prompt token and the decoded ones.
    """
    room = placement.context - decode_tokens
    if room < 1:
        raise UsageError(
            "the context is too short to measure in",
            numbers=f"{placement.context} tokens, {decode_tokens} are decoded",
            hint="plan a context of at least 64 tokens",
            code="context-too-short",
        )
    return max(1, min(placement.prompt_tokens, room)), min(placement.depth, room)


def random_numbers(count: int, vocab_size: int) -> list[int]:
    """``count`` random tokens that are hardly control tokens, the same ones every time."""
    chooser = random.Random(_SEED)
    first = int(vocab_size * _FIRST_TOKEN_FRACTION)
    return [chooser.randrange(first, vocab_size) for _ in range(count)]


def memory_trial(
    baseline: int, filled: int, gpus: GpuMemory, buffers: tuple[Buffer, ...], kind: str | None = None
) -> MemoryTrial:
    """What the process and the GPUs hold while the model is still open, above ``baseline`` resident bytes.

    Args:
        filled: most tokens that lay in the KV cache of one sequence.
        buffers: the runtime's own account.
        kind: of the buffers that stand for a GPU's use where NVML does not tell it; ``None``: all.
    """
    peak = peak_resident_bytes()
    return MemoryTrial(
        baseline_bytes=baseline,
        peak_rss_bytes=peak,
        peak_bytes=max(0, peak - baseline),
        filled_tokens=filled,
        buffers=buffers,
        devices=gpus.uses(tuple(buffer for buffer in buffers if kind in (None, buffer.kind))),
    )
