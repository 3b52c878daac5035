"""Prefill and decode speed and peak memory of a GGUF file, measured as llama-bench does. Runs only in a child."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from planner.core.candidate import Placement
from planner.core.errors import MissingDependency, UsageError
from planner.execute.resident import OthersShare, peak_resident_bytes, reset_peak, resident_bytes
from planner.verify import native
from planner.verify.memory import GpuMemory
from planner.verify.trial import MemoryTrial, Samples, SpeedTrial

_SHORTEST_SAMPLE_SECONDS = 0.2
"""Runs of tiny models are joined until a sample lasts this long: a scheduler's time slice is some milliseconds."""
_SHARE = {"prefill": 0.35, "decode": 0.35, "fill": 0.2}
"""Shares of the time budget; the rest is for loading and warming up."""
_SEED = 1
_FIRST_TOKEN_FRACTION = 0.01
"""Random tokens are drawn above the first 1 % of the vocabulary, where the control tokens usually lie."""


@dataclass(slots=True)
class _Run:
    """An open context with its supply of random tokens."""

    context: native.Context
    tokens: Any
    batch: int
    filled: int = 0
    longest: int = 0

    def append(self, count: int) -> None:
        """Prefill ``count`` tokens behind those in the cache, in whole batches."""
        import ctypes

        done = 0
        while done < count:
            size = min(self.batch, count - done)
            start = ctypes.addressof(self.tokens) + 4 * self.filled
            self.context.decode((ctypes.c_int32 * size).from_address(start), size)
            done += size
            self.filled += size
        self.longest = max(self.longest, self.filled)

    def step(self, count: int) -> None:
        """Decode ``count`` tokens one at a time."""
        import ctypes

        address = ctypes.addressof(self.tokens)
        for _ in range(count):
            self.context.decode((ctypes.c_int32 * 1).from_address(address + 4 * self.filled), 1)
            self.filled += 1
        self.longest = max(self.longest, self.filled)

    def empty(self) -> None:
        """Back to an empty cache."""
        self.context.clear()
        self.filled = 0

    def back_to(self, depth: int) -> None:
        """Back to ``depth`` tokens, by cutting or by prefilling again."""
        if self.filled == depth:
            return
        if depth and self.context.cut(depth):
            self.filled = depth
            return
        self.empty()
        self.append(depth)


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


def measure_speed(
    model_path: Path,
    placement: Placement,
    *,
    repetitions: int = 5,
    decode_tokens: int = 32,
    budget_seconds: float = 120.0,
    threads: int,
    repack: bool = True,
    progress: native.Progress,
) -> SpeedTrial:
    """Load, warm up, prefill ``placement.prompt_tokens`` from an empty cache, decode at ``placement.depth``; repeat.

    The context is allocated as planned (``context × sequences``), so that the peak of the resident set is that of
    the plan. When the budget allows, the cache is also filled to the end: the compute buffers then hold what a full
    context needs. Times are wall time around ``llama_decode`` and ``llama_synchronize``.

    Raises:
        InputError: llama.cpp refuses the file.
        ExecutionFailed: it cannot open the context or run the model.
        MissingDependency: layers are planned for a GPU and this llama.cpp has no GPU support.
    """
    _require_gpu_support(placement)
    native.library()
    gc.collect()
    reset_peak()
    baseline = resident_bytes()
    gpus = GpuMemory(wanted=placement.gpu_layers > 0)
    with ExitStack() as stack:
        began = time.perf_counter()
        model = stack.enter_context(
            native.open_model(model_path, offload=native.Offload.of(placement), repack=repack, progress=progress)
        )
        context = stack.enter_context(native.open_context(model, _options(placement, threads)))
        load_seconds = time.perf_counter() - began
        gpus.look()
        tokens = _random_tokens(placement.context, model.vocab_size)
        run = _Run(context, tokens, min(placement.batch, placement.context))
        prompt, depth = lengths(placement, decode_tokens)
        prefill, decode = _timings(run, prompt, depth, decode_tokens, repetitions, budget_seconds, progress)
        gpus.look()
        _fill(run, placement.context, prefill.median, budget_seconds * _SHARE["fill"], progress)
        gpus.look()
        memory = _memory_trial(baseline, run, gpus)
    return SpeedTrial(
        prefill=prefill,
        decode=decode,
        memory=memory,
        load_seconds=load_seconds,
        threads=threads,
        context=placement.context,
        prompt_tokens=prompt,
        depth=depth,
        gpu_layers=placement.gpu_layers,
        flash_attention=placement.flash_attention,
        repack=repack,
    )


def _memory_trial(baseline: int, run: _Run, gpus: GpuMemory) -> MemoryTrial:
    """What the process and the GPUs hold while the model is still open, above ``baseline`` resident bytes."""
    peak = peak_resident_bytes()
    buffers = native.LOG.take_buffers()
    return MemoryTrial(
        baseline_bytes=baseline,
        peak_rss_bytes=peak,
        peak_bytes=max(0, peak - baseline),
        filled_tokens=run.longest,
        buffers=buffers,
        devices=gpus.uses(buffers),
    )


def _require_gpu_support(placement: Placement) -> None:
    if placement.gpu_layers > 0 and not native.library().llama_supports_gpu_offload():
        raise MissingDependency(
            "the installed llama-cpp-python was built without GPU support",
            numbers=f"{placement.gpu_layers} layers are planned for a GPU",
            hint="install a build for your GPU: https://llama-cpp-python.readthedocs.io/en/latest/#installation",
            code="no-gpu-build",
        )


def _options(placement: Placement, threads: int) -> native.ContextOptions:
    return native.ContextOptions(
        context=placement.context,
        batch=placement.batch,
        ubatch=placement.ubatch,
        threads=threads,
        kv_type=placement.kv_type,
        flash_attention=int(placement.flash_attention),
        sequences=placement.sequences,
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
    import random

    chooser = random.Random(_SEED)
    first = int(vocab_size * _FIRST_TOKEN_FRACTION)
    return [chooser.randrange(first, vocab_size) for _ in range(count)]


def _random_tokens(count: int, vocab_size: int) -> Any:
    import ctypes

    return (ctypes.c_int32 * count)(*random_numbers(count, vocab_size))


def _timings(
    run: _Run,
    prompt: int,
    depth: int,
    decode_tokens: int,
    repetitions: int,
    budget_seconds: float,
    progress: native.Progress,
) -> tuple[Samples, Samples]:
    progress("warm up", 0.0)
    run.append(min(prompt, run.batch, 32))  # 32: the smallest batch that llama.cpp treats as a prompt on a GPU
    run.step(1)

    def prefill() -> int:
        run.append(prompt)
        return prompt

    def decode() -> int:
        run.step(decode_tokens)
        return decode_tokens

    progress("prefill", 0.2)
    first = sample_rates(
        prefill, before=run.empty, repetitions=repetitions, budget_seconds=budget_seconds * _SHARE["prefill"]
    )
    progress("decode", 0.6)
    second = sample_rates(
        decode,
        before=lambda: run.back_to(depth),
        repetitions=repetitions,
        budget_seconds=budget_seconds * _SHARE["decode"],
    )
    return first, second


def _fill(run: _Run, context: int, prefill_rate: float, budget_seconds: float, progress: native.Progress) -> None:
    if run.longest < context and context / prefill_rate <= budget_seconds:
        progress("fill the context", 0.9)
        run.empty()
        run.append(context)
