"""The doing half of GPTQ and AWQ through GPTQModel. Runs only in a child process, in GPTQModel's environment."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from planner.core.errors import ExecutionFailed
from planner.core.job import Job, remove
from planner.methods import directory_run, torch_run
from planner.methods.samples import samples
from planner.methods.torch_run import Progress

_OFFLOADED = ".offloaded"
"""Layers that are done, inside the unfinished folder: the memory holds one at a time."""


@torch_run.away
def work(job: Job, progress: Progress) -> dict[str, Any]:
    """Quantize a checkpoint with the step's calibration text.

    Raises:
        QplanError: the checkpoint or the text is unfit, or GPTQModel refused.
    """
    torch_run.prepare_process(job)
    source = Path(job.source)
    on = torch_run.device()
    tokenizer = torch_run.tokenizer(source)
    chosen = samples(job, tokenizer)
    half = torch_run.half_of(source)
    # a CPU multiplies 16-bit floats six times slower than float32, which holds both kinds; AWQ's takes only those
    dtype = "float32" if on == "cpu" and job.step.method == "gptq" else half
    with directory_run.atomic_directory(Path(job.output)) as folder:
        model = _quantized(job, folder, on, dtype, chosen.chunks, tokenizer, progress)
        model.save(str(folder), max_shard_size=directory_run.SHARD_BYTES)
        losses = _losses(model)
        del model
        remove(folder / _OFFLOADED)
        torch_run.finish(source, folder, half, narrow=dtype == "float32")
    details = {**chosen.details, **losses, **torch_run.facts("gptqmodel", on)}
    return {"notes": [*chosen.notes, *_warnings(job, on)], "details": details}


def _quantized(
    job: Job, folder: Path, on: str, dtype: str, chunks: tuple[list[int], ...], tokenizer: Any, progress: Progress
) -> Any:
    import torch
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

    config = QuantizeConfig(**_config(job, folder, on))
    with torch_run.loading(Path(job.source)):
        model = GPTQModel.load(
            job.source, config, dtype=getattr(torch, dtype), device=on, trust_remote_code=False, backend=BACKEND.AUTO
        )
    model.layer_callback = _Told(progress, int(model.model.config.get_text_config().num_hidden_layers))
    data = [{"input_ids": chunk, "attention_mask": [1] * len(chunk)} for chunk in chunks]
    # the kernel only matters for checking the settings, and the default one would be compiled first, for minutes
    plain = BACKEND.AWQ_TORCH if job.step.method == "awq" else BACKEND.GPTQ_TORCH
    try:
        model.quantize(
            data,
            batch_size=1,
            tokenizer=tokenizer,
            backend=plain,
            calibration_sort=None,
        )
    except (ValueError, NotImplementedError) as error:
        raise ExecutionFailed(
            f"GPTQModel could not quantize {Path(job.source).name} to {job.step.type}",
            numbers=str(error)[:500],
            code="quantize-failed",
        ) from error
    return model


def _config(job: Job, folder: Path, on: str) -> dict[str, Any]:
    """Arguments of ``QuantizeConfig``; ``pack_impl``: its default compiles C++ for most of a minute first."""
    step, chosen = job.step, torch_run.settings(job)
    bits = int(str(step.type).removesuffix("bit"))
    config: dict[str, Any] = {
        "bits": bits,
        "group_size": step.group_size,
        "sym": chosen.symmetric,
        "method": step.method,
        "format": chosen.format.removeprefix("awq-"),
        "pack_impl": "original" if on == "cpu" else "gpu",
        "offload_to_disk": True,
        "offload_to_disk_path": str(folder / _OFFLOADED),
    }
    return config | ({"desc_act": chosen.act_order} if step.method == "gptq" else {})


class _Told:
    """GPTQModel's callback: layers that are done."""

    def __init__(self, progress: Progress, layers: int) -> None:
        self._progress, self._layers = progress, layers

    def layer_complete(self, *, layer_idx: int, submodule_finalized: bool, **_: Any) -> None:
        """A layer is quantized, or has been packed."""
        if not submodule_finalized:
            self._progress(min(layer_idx + 1, self._layers), self._layers + 1)


def _losses(model: Any) -> dict[str, float]:
    """Mean squared error of the layers' outputs, as GPTQModel logged it."""
    found = [float(row["loss"]) for row in getattr(model, "quant_log", None) or () if _is_number(row.get("loss"))]
    return {"mean_layer_loss": sum(found) / len(found)} if found else {}


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return True


def _warnings(job: Job, on: str) -> list[str]:
    if job.step.method == "gptq" and on == "cpu" and not torch_run.settings(job).symmetric:
        return [
            "GPTQModel's fp32 kernel multiplies weights with zero points wrongly on some CPUs (an Intel Xeon with "
            "AMX): run this artifact in bfloat16 on a CPU, or make a symmetric one"
        ]
    return []
