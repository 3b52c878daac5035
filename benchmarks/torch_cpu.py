"""Time a checkpoint under transformers on this CPU: ``torch_cpu.py DIR DTYPE``; ``data/torch_cpu.toml`` rests on it.

Prints the least wall and processor time of a prompt of 256 tokens and of one decoded token, and the resident set above
that of a process with everything imported. The least of many, as one process among others is only ever slowed down.
Needs torch, transformers and what the checkpoint's quantization asks for; run it with TORCHDYNAMO_DISABLE=1 and
OMP_WAIT_POLICY=PASSIVE, as ``qplan verify`` does.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from planner.execute.resident import peak_resident_bytes, reset_peak, resident_bytes
from planner.verify.torch_engine import import_backend, open_checkpoint
from planner.verify.trial import Loading

PROMPT, DECODED, ROUNDS = 256, 16, 5


def main(arguments: list[str]) -> int:
    """Measure one checkpoint and print a JSON object."""
    folder, dtype, threads = Path(arguments[0]), arguments[1], int(arguments[2]) if len(arguments) > 2 else 2
    import_backend(folder)
    reset_peak()
    baseline = resident_bytes()
    loading = Loading(dtype=dtype)
    opened = open_checkpoint(folder, on_gpu=False, threads=threads, loading=loading, progress=lambda *_: None)
    found = {"checkpoint": folder.name, "dtype": dtype, "threads": threads, **_times(opened.model, opened.vocab_size)}
    found["peak_bytes_above_process"] = peak_resident_bytes() - baseline
    found["process_bytes"] = baseline
    print(json.dumps(found))
    return 0


def _times(model: Any, vocabulary: int) -> dict[str, float]:
    import torch

    prefill, decode = [], []
    with torch.inference_mode():
        for _ in range(ROUNDS):
            tokens = torch.randint(vocabulary // 100, vocabulary, (1, PROMPT))
            made, took = _timed(lambda tokens=tokens: model(input_ids=tokens, use_cache=True, logits_to_keep=1))
            prefill.append(took)
            for _ in range(DECODED):
                token, cache = made.logits[:, -1:].argmax(-1), made.past_key_values
                made, took = _timed(
                    lambda token=token, cache=cache: model(
                        input_ids=token, past_key_values=cache, use_cache=True, logits_to_keep=1
                    )
                )
                decode.append(took)
    return {
        f"{name}_{kind}_seconds": min(taken[index] for taken in times)
        for name, times in (("prefill", prefill), ("decode", decode))
        for index, kind in enumerate(("wall", "processor"))
    }


def _timed(work: Any) -> tuple[Any, tuple[float, float]]:
    wall, processor = time.perf_counter(), time.process_time()
    made = work()
    return made, (time.perf_counter() - wall, time.process_time() - processor)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
