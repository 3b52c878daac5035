"""Prefill and decode speed and VRAM of a checkpoint directory under vLLM. Runs only in a child, on a CUDA GPU.

vLLM takes most of a GPU for its KV cache unless it is told otherwise; here it gets what the planned context needs, so
that the memory measured is that of the plan. Arguments are those of ``vllm.LLM`` in vLLM 0.33.0.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from planner.core.candidate import Placement
from planner.core.errors import ExecutionFailed, MissingDependency
from planner.execute.resident import reset_peak, resident_bytes
from planner.verify.memory import GpuMemory
from planner.verify.sampling import Progress, lengths, memory_trial, random_numbers, sample_rates
from planner.verify.trial import Samples, SpeedTrial

_SHARE = {"prefill": 0.4, "decode": 0.5}
"""Shares of the time budget; the rest is for loading and warming up."""
_CACHE_SLACK = 1.05
"""vLLM keeps a block or two of its own."""


def measure_speed(
    folder: Path,
    placement: Placement,
    *,
    repetitions: int = 5,
    decode_tokens: int = 32,
    budget_seconds: float = 120.0,
    threads: int,
    cache_bytes: int | None = None,
    quantization: str | None = None,
    progress: Progress,
) -> SpeedTrial:
    """Load, warm up, time a prompt of ``placement.prompt_tokens``, then ``decode_tokens`` behind ``placement.depth``.

    One token is generated at the end of a prompt, so the decoding time is that of a longer generation less that of one
    of a single token.

    Args:
        cache_bytes: of the KV cache; ``None`` leaves it to vLLM.
        quantization: what ``--quantization`` would be told.

    Raises:
        MissingDependency: vLLM is not installed.
        ExecutionFailed: it cannot load or run the model.
    """
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # in this process, whose memory is looked at
    reset_peak()
    baseline = resident_bytes()
    gpus = GpuMemory(wanted=True)
    progress(f"load {folder.name}", 0.0)
    began = time.perf_counter()
    run = _Run(_engine(folder, placement, cache_bytes, quantization))
    load_seconds = time.perf_counter() - began
    gpus.look()
    prompt, depth = lengths(placement, decode_tokens + 1)
    prefill, decode = _timings(run, prompt, max(1, depth), decode_tokens, repetitions, budget_seconds, progress)
    gpus.look()
    return SpeedTrial(
        prefill=prefill,
        decode=decode,
        memory=memory_trial(baseline, placement.context, gpus, ()),  # the cache is allocated whole
        load_seconds=load_seconds,
        threads=threads,
        context=placement.context,
        prompt_tokens=prompt,
        depth=depth,
        gpu_layers=placement.gpu_layers,
        flash_attention=placement.flash_attention,
        repack=True,
        runtime="vllm",
    )


class _Run:
    """A loaded engine that generates behind random prompts."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._vocabulary = int(engine.get_tokenizer().vocab_size)

    def generate(self, prompt: int, count: int) -> float:
        """Seconds of generating ``count`` tokens behind ``prompt`` random ones."""
        from vllm import SamplingParams

        how = SamplingParams(temperature=0.0, max_tokens=count, min_tokens=count, ignore_eos=True, detokenize=False)
        tokens = {"prompt_token_ids": random_numbers(prompt, self._vocabulary)}
        began = time.perf_counter()
        try:
            self._engine.generate([tokens], how, use_tqdm=False)
        except RuntimeError as error:
            raise _cannot(error) from None
        return time.perf_counter() - began


def _engine(folder: Path, placement: Placement, cache_bytes: int | None, quantization: str | None) -> Any:
    try:
        import vllm
    except ImportError as error:
        raise MissingDependency("vLLM is not installed", numbers=str(error), hint="`pip install vllm`") from None
    more: dict[str, Any] = {}
    if cache_bytes is not None:
        more["kv_cache_memory_bytes"] = int(cache_bytes * _CACHE_SLACK)
    if quantization is not None:
        more["quantization"] = quantization
    try:
        return vllm.LLM(
            model=str(folder),
            max_model_len=placement.context,
            max_num_seqs=placement.sequences,
            tensor_parallel_size=placement.tensor_parallel,
            enable_prefix_caching=False,  # the same prompt is read again and again
            trust_remote_code=False,
            **more,
        )
    except (RuntimeError, ValueError) as error:
        raise _cannot(error) from None


def _cannot(error: Exception) -> ExecutionFailed:
    return ExecutionFailed("vLLM cannot run the model", numbers=str(error).strip()[:400], code="cannot-run")


def _timings(
    run: _Run,
    prompt: int,
    depth: int,
    decode_tokens: int,
    repetitions: int,
    budget_seconds: float,
    progress: Progress,
) -> tuple[Samples, Samples]:
    progress("warm up", 0.0)
    run.generate(min(prompt, 32), 2)

    def prefill() -> int:
        run.generate(prompt, 1)
        return prompt

    progress("prefill", 0.2)
    first = sample_rates(
        prefill, before=lambda: None, repetitions=repetitions, budget_seconds=budget_seconds * _SHARE["prefill"]
    )
    progress("decode", 0.6)
    return first, _decode(run, depth, decode_tokens, repetitions, budget_seconds * _SHARE["decode"])


def _decode(run: _Run, depth: int, count: int, repetitions: int, budget_seconds: float) -> Samples:
    """Rates of ``count`` tokens: of ``count + 1`` behind the prompt, less the one that ends the prompt."""
    rates: list[float] = []
    times: list[float] = []
    began = time.perf_counter()
    while len(rates) < repetitions and (not rates or time.perf_counter() - began < budget_seconds):
        seconds = max(run.generate(depth, count + 1) - run.generate(depth, 1), 1e-9)
        rates.append(count / seconds)
        times.append(seconds)
    return Samples(
        samples=tuple(rates), tokens_per_sample=(count,) * len(rates), seconds_per_sample=tuple(times), cpu_seconds=0.0
    )
