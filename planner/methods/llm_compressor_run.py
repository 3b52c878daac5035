"""The doing half of GPTQ, AWQ and FP8 through llm-compressor. Runs only in a child process, in its environment."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from planner.core.job import Job
from planner.methods import directory_run, torch_run
from planner.methods.samples import Samples, samples
from planner.methods.torch_run import Progress

_KEPT = ["lm_head"]


@torch_run.away
def work(job: Job, progress: Progress) -> dict[str, Any]:
    """Quantize a checkpoint; with the step's calibration text unless it becomes FP8.

    Raises:
        QplanError: the checkpoint or the text is unfit, or the folder cannot be written.
    """
    torch_run.prepare_process(job)
    import torch
    from llmcompressor import oneshot
    from transformers import AutoModelForCausalLM

    source = Path(job.source)
    on, half = torch_run.device(), torch_run.half_of(source)
    chosen = None if job.step.type == "fp8" else samples(job, torch_run.tokenizer(source))
    if on == "cpu":
        _leave_memory_unpinned()
    with directory_run.atomic_directory(Path(job.output)) as folder:
        with torch_run.loading(source):
            model = AutoModelForCausalLM.from_pretrained(str(source), dtype=getattr(torch, half))
        recipe = [_told(progress, model.config.get_text_config().num_hidden_layers), *_recipe(job)]
        oneshot(model=model, recipe=recipe, **(_calibrating(chosen) if chosen else {}))
        model.save_pretrained(str(folder), save_compressed=True, max_shard_size=directory_run.SHARD_BYTES)
        _drop_recipe(folder)
        torch_run.finish(source, folder, half, narrow=False)
    told = chosen.details if chosen else {}
    details = {**told, **torch_run.facts("llm-compressor", on)}
    return {"notes": list(chosen.notes) if chosen else [], "details": details}


def _leave_memory_unpinned() -> None:
    """Pinning memory needs an accelerator; AWQ pins what it caches whether there is one or not (0.14.0)."""
    from llmcompressor.pipelines.cache import IntermediatesCache

    IntermediatesCache.pin_memory = lambda *_, **__: None


def _calibrating(chosen: Samples) -> Mapping[str, Any]:
    import torch
    from torch.utils.data import DataLoader

    data: Any = [
        {"input_ids": torch.tensor(chunk), "attention_mask": torch.ones(len(chunk), dtype=torch.int64)}
        for chunk in chosen.chunks
    ]
    return {
        "dataset": DataLoader(data, batch_size=1),
        "num_calibration_samples": len(data),
        "max_seq_length": len(chosen.chunks[0]),
        "pipeline": "sequential",  # one pass for all modifiers, so that the one that counts is told of each layer
    }


def _recipe(job: Job) -> list[Any]:
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier

    if job.step.type == "fp8":
        return [QuantizationModifier(targets="Linear", scheme="FP8_DYNAMIC", ignore=_KEPT)]
    groups = {"config_groups": {"group_0": _scheme(job)}, "ignore": _KEPT}
    if job.step.method == "awq":
        return [AWQModifier(), QuantizationModifier(**groups)]
    return [GPTQModifier(**groups)]


def _scheme(job: Job) -> Any:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    size = job.step.group_size
    whole = size is None or size <= 0
    weights = QuantizationArgs(
        num_bits=int(str(job.step.type).removesuffix("bit")),
        type="int",
        symmetric=torch_run.settings(job).symmetric,
        strategy="channel" if whole else "group",
        group_size=None if whole else size,
    )
    return QuantizationScheme(targets=["Linear"], weights=weights)


def _told(progress: Progress, layers: int) -> Any:
    """A modifier that changes nothing and is told when a layer is done, as llm-compressor tells its modifiers."""
    from llmcompressor.modifiers import Modifier

    done = 0

    class Told(Modifier):  # type: ignore[misc]
        """Counts."""

        def on_initialize(self, state: Any, **_: Any) -> bool:
            """Nothing to prepare."""
            return True

        def on_sequential_epoch_end(self, state: Any, event: Any, **_: Any) -> None:
            """A layer, or what is before and after the layers."""
            nonlocal done
            done += 1
            progress(float(min(done, layers)), float(layers + 1))

    return Told()


def _drop_recipe(folder: Path) -> None:
    """``recipe.yaml`` tells how it was made; the receipt does, and it would hold names of classes of ours."""
    (folder / "recipe.yaml").unlink(missing_ok=True)
