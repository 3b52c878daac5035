"""Prefill and decode speed and peak memory of a checkpoint directory under transformers. Runs only in a child.

Measured is what users get: the checkpoint loaded by transformers' own quantizers, one forward pass over the prompt,
then greedy decoding token by token with a KV cache. What ``generate()`` adds around a forward pass is left out.
"""

from __future__ import annotations

import gc
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from planner.core.candidate import Placement
from planner.core.errors import ExecutionFailed
from planner.execute.resident import reset_peak, resident_bytes
from planner.verify.memory import GpuMemory
from planner.verify.sampling import Progress, fill, lengths, memory_trial, random_numbers, timings
from planner.verify.torch_engine import Checkpoint, import_backend, open_checkpoint
from planner.verify.trial import AS_IT_IS, Buffer, Loading, SpeedTrial

RESERVED = "reserved"
"""Of torch's account of a GPU: what its allocator holds, which stands for the GPU's use where NVML does not tell it."""


@dataclass(slots=True)
class _Run:
    """A loaded model with a KV cache and a supply of random tokens."""

    checkpoint: Checkpoint
    tokens: Any
    """``[context]`` on the model's device."""
    cache: Any = None
    filled: int = 0
    longest: int = 0
    next_token: Any = None

    def append(self, count: int, chunk: int | None = None) -> None:
        """Prefill ``count`` tokens behind those in the cache: in one pass, as transformers does, or in chunks."""
        import torch

        done = 0
        with torch.inference_mode():
            while done < count:
                size = min(chunk or count, count - done)
                self._forward(self.tokens[None, self.filled : self.filled + size])
                done += size
                self.filled += size
        self.longest = max(self.longest, self.filled)
        self.finish()

    def step(self, count: int) -> None:
        """Decode ``count`` tokens greedily, one at a time."""
        import torch

        with torch.inference_mode():
            for _ in range(count):
                self._forward(self.next_token)
                self.filled += 1
        self.longest = max(self.longest, self.filled)
        self.finish()

    def _forward(self, tokens: Any) -> None:
        made = self.checkpoint.model(input_ids=tokens, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.cache = made.past_key_values
        self.next_token = made.logits[:, -1:].argmax(-1)

    def finish(self) -> None:
        """Wait for the GPU, which works behind Python."""
        import torch

        if self.checkpoint.model.device.type == "cuda":
            torch.cuda.synchronize()

    def empty(self) -> None:
        """Back to an empty cache."""
        self.cache, self.filled, self.next_token = None, 0, self.tokens[None, :1]

    def back_to(self, depth: int) -> None:
        """Back to ``depth`` tokens, by cutting or, where layers keep a state or a window, by prefilling again."""
        if self.filled == depth and self.next_token is not None:
            return
        if depth and self._cut(depth):
            self.filled = depth
            return
        self.empty()
        if depth:
            self.append(depth)

    def _cut(self, depth: int) -> bool:
        kinds = {type(layer).__name__ for layer in getattr(self.cache, "layers", ())}
        if kinds != {"DynamicLayer"} or self.filled < depth:
            return False
        if self.filled > depth:
            self.cache.crop(depth - self.filled)  # tokens to remove: transformers 5.23 refuses a length to keep
        return True


def measure_speed(
    folder: Path,
    placement: Placement,
    *,
    repetitions: int = 5,
    decode_tokens: int = 32,
    budget_seconds: float = 120.0,
    threads: int,
    loading: Loading = AS_IT_IS,
    progress: Progress,
) -> SpeedTrial:
    """Load, warm up, prefill ``placement.prompt_tokens`` from an empty cache, decode at ``placement.depth``; repeat.

    When the budget allows, the cache is also filled to the planned context, so that the peak holds all of it:
    transformers allocates it as it grows.

    Raises:
        InputError: transformers refuses the directory.
        ExecutionFailed: the memory does not suffice.
        MissingDependency: a package is missing, or a GPU is planned and torch sees none.
    """
    import_backend(folder)
    gc.collect()
    reset_peak()
    baseline = resident_bytes()
    on_gpu = placement.gpu_layers > 0
    gpus = GpuMemory(wanted=on_gpu)
    as_stored = replace(loading, dtype=loading.dtype or "auto")  # as users run it, not exactly
    began = time.perf_counter()
    checkpoint = open_checkpoint(folder, on_gpu=on_gpu, threads=threads, progress=progress, loading=as_stored)
    load_seconds = time.perf_counter() - began
    gpus.look()
    run = _Run(checkpoint, _tokens(placement.context, checkpoint))
    run.empty()
    prompt, depth = lengths(placement, decode_tokens)
    try:
        prefill, decode = timings(run, prompt, depth, decode_tokens, repetitions, budget_seconds, progress)
        gpus.look()
        in_chunks = partial(run.append, chunk=max(1, placement.ubatch))
        fill(run, placement.context, prefill.median, budget_seconds, progress, append=in_chunks)
    except RuntimeError as error:  # torch's OutOfMemoryError, and what a kernel refuses
        raise ExecutionFailed(
            f"transformers cannot run {folder.name}", numbers=str(error).strip()[:400], code="cannot-run"
        ) from None
    gpus.look()
    return SpeedTrial(
        prefill=prefill,
        decode=decode,
        memory=memory_trial(baseline, run.longest, gpus, _cuda_peaks(run), kind=RESERVED),
        load_seconds=load_seconds,
        threads=threads,
        context=placement.context,
        prompt_tokens=prompt,
        depth=depth,
        gpu_layers=placement.gpu_layers,
        flash_attention=placement.flash_attention,
        repack=True,
        runtime="transformers",
    )


def _tokens(count: int, checkpoint: Checkpoint) -> Any:
    import torch

    return torch.tensor(random_numbers(count, checkpoint.vocab_size), device=checkpoint.model.device)


def _cuda_peaks(run: _Run) -> tuple[Buffer, ...]:
    """torch's own account of the GPUs: most bytes of tensors, and most that its allocator held for them."""
    import torch

    if run.checkpoint.model.device.type != "cuda":
        return ()
    found = []
    for index in range(torch.cuda.device_count()):
        name = f"CUDA{index}"
        allocated, reserved = torch.cuda.max_memory_allocated(index), torch.cuda.max_memory_reserved(index)
        if reserved:
            found.append(Buffer(name=name, kind="allocated", size_bytes=allocated))
            found.append(Buffer(name=name, kind=RESERVED, size_bytes=reserved))
    return tuple(found)
