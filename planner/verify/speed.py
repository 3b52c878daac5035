"""Prefill and decode speed and peak memory of a GGUF file, measured as llama-bench does. Runs only in a child."""

from __future__ import annotations

import gc
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from planner.core.candidate import Placement
from planner.core.errors import MissingDependency
from planner.execute.resident import reset_peak, resident_bytes
from planner.verify import native
from planner.verify.memory import GpuMemory
from planner.verify.sampling import fill, lengths, memory_trial, random_numbers, timings
from planner.verify.trial import SpeedTrial


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
        prefill, decode = timings(run, prompt, depth, decode_tokens, repetitions, budget_seconds, progress)
        gpus.look()
        fill(run, placement.context, prefill.median, budget_seconds, progress)
        gpus.look()
        memory = memory_trial(baseline, run.longest, gpus, native.LOG.take_buffers())
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


def _random_tokens(count: int, vocab_size: int) -> Any:
    import ctypes

    return (ctypes.c_int32 * count)(*random_numbers(count, vocab_size))
