"""The doing half of bitsandbytes: a checkpoint is quantized as it is loaded, and saved so. Only in a child process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from planner.core.job import Job
from planner.methods import directory_run, torch_run
from planner.methods.torch_run import Progress

LOADED_SHARE = 0.8
"""Of the step's work, for want of a count: loading, in which it quantizes, takes longer than saving."""


@torch_run.away
def work(job: Job, progress: Progress) -> dict[str, Any]:
    """Quantize a checkpoint to NF4, FP4 or INT8.

    Raises:
        QplanError: the checkpoint is unfit, or the folder cannot be written.
    """
    torch_run.prepare_process(job)
    import torch
    from transformers import AutoModelForCausalLM

    source, half = Path(job.source), torch_run.half_of(Path(job.source))
    on = torch_run.device()
    with directory_run.atomic_directory(Path(job.output)) as folder:
        progress(0.0, 1.0)
        with torch_run.loading(source):
            model = AutoModelForCausalLM.from_pretrained(
                str(source), quantization_config=_config(job), dtype=getattr(torch, half), device_map={"": on}
            )
        progress(LOADED_SHARE, 1.0)
        model.save_pretrained(str(folder), max_shard_size=directory_run.SHARD_BYTES)
        torch_run.finish(source, folder, half, narrow=False)
    progress(1.0, 1.0)
    return {"notes": [], "details": torch_run.facts("bitsandbytes", on)}


def _config(job: Job) -> Any:
    import torch
    import transformers

    config: Any = transformers.BitsAndBytesConfig
    if job.step.type == "int8":
        return config(load_in_8bit=True)
    chosen = torch_run.settings(job)
    return config(
        load_in_4bit=True,
        bnb_4bit_quant_type=str(job.step.type),
        bnb_4bit_use_double_quant=chosen.double_quantization,
        bnb_4bit_compute_dtype=getattr(torch, chosen.compute_dtype or "bfloat16"),
    )
