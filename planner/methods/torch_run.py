"""What the doing halves on torch share: the process, the device, loading, and finishing the folder."""

from __future__ import annotations

import functools
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

from planner.convert.recast import recast_file
from planner.convert.rows import FLOAT_DTYPES
from planner.core.errors import MODEL_REFUSED, InputError, first_line
from planner.core.job import Job
from planner.core.plan import Settings
from planner.formats.safetensors import StoredTensor, open_checkpoint
from planner.methods import directory_run, quantizers

Progress = Callable[[float, float], None]
Work = Callable[[Job, Progress], dict[str, Any]]
_HALVES = {"BF16": "bfloat16", "F16": "float16"}
_MACHINE_KEYS = ("offload_to_disk", "offload_to_disk_path")
"""What GPTQModel notes of the folder that it worked in: nothing that an artifact should tell."""


def prepare_process(job: Job) -> None:
    """Set what the libraries read when they are imported: threads, whether there is a GPU, that nothing is fetched.

    On shared cores, OpenMP threads that wait busily made a forward pass ten times slower (2 cores, 2026-11-23).
    """
    os.environ["OMP_NUM_THREADS"] = str(job.threads)
    os.environ["GPTQMODEL_CPU_WORKERS"] = str(job.threads)
    if job.step.gpu_layers == 0:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["HF_HUB_OFFLINE"] = "1"


def away(work: Work) -> Work:
    """``work`` in a working directory of its own: quantizers leave logs in the one that they are started in."""

    @functools.wraps(work)
    def moved(job: Job, progress: Progress) -> dict[str, Any]:
        before = Path.cwd()
        paths = replace(job, source=str(Path(job.source).absolute()), output=str(Path(job.output).absolute()))
        with tempfile.TemporaryDirectory(prefix="qplan-") as folder:
            os.chdir(folder)
            try:
                return work(paths, progress)
            finally:
                os.chdir(before)

    return moved


def settings(job: Job) -> Settings:
    """How the step is to make its layers.

    Raises:
        InputError: the plan does not say.
    """
    if job.step.settings is None:
        raise InputError(f"the step {job.step.name!r} does not say how to quantize", code="bad-plan")
    return job.step.settings


def device() -> str:
    """Where the model is run while it is quantized: the GPU if the plan uses it and torch reaches it."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def half_of(source: Path) -> str:
    """The 16-bit type that the checkpoint's weights are kept in: its own, bfloat16 for a float32 one."""
    tensors = open_checkpoint(source).tensors.values()
    sizes = {name: sum(t.element_count for t in tensors if t.dtype == name) for name in _HALVES}
    return "float16" if sizes["F16"] > sizes["BF16"] else "bfloat16"


@contextmanager
def loading(source: Path) -> Iterator[None]:
    """A block in which a library reads the checkpoint ``source``.

    Raises:
        InputError: it refused, for another reason than memory.
    """
    import torch

    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise InputError(
            f"{source} cannot be loaded",
            numbers=first_line(error)[:300],
            hint="a checkpoint has config.json, a tokenizer and safetensors files; of several, also an index of them",
            code=MODEL_REFUSED,
        ) from error


def tokenizer(source: Path) -> Any:
    """The checkpoint's tokenizer, without code of its own."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(source))


def facts(quantizer: str, on: str) -> dict[str, str | int | float]:
    """What a receipt tells of the work: the quantizer's packages as they are here, the device, and what it took."""
    import torch

    found: dict[str, str | int | float] = {
        **{name: metadata.version(name) for name in quantizers.quantizer(quantizer).packages},
        "device": on,
        "processor_seconds": round(time.process_time(), 1),
    }
    if on == "cuda":
        found["gpu_peak_bytes"] = int(torch.cuda.max_memory_reserved())
    return found


def finish(source: Path, folder: Path, dtype: str, *, narrow: bool) -> dict[str, Any]:
    """Turn what a quantizer saved into the artifact; its ``quantization_config``.

    The configuration and the tokenizer are the model's own and not what a library made of them on the way; weights that
    stayed as they were are in the model's 16-bit type although the work was done in float32.

    Args:
        source: the checkpoint that was quantized.
        folder: what was saved.
        dtype: torch's name of the type of the weights that were not quantized.
        narrow: whether those are in float32.

    Raises:
        QplanError: what was saved cannot be read, or is pickled.
    """
    written = directory_run.read_json_object(folder / "config.json")
    quantization = _without_machine(written["quantization_config"])
    config = {**directory_run.read_json_object(source / "config.json"), "quantization_config": quantization}
    directory_run.write_json_object(folder / "config.json", directory_run.with_dtype(config, dtype))
    for extra in ("quantize_config.json", "quant_config.json"):  # older loaders read this one
        if (folder / extra).exists():
            content = directory_run.read_json_object(folder / extra)
            directory_run.write_json_object(folder / extra, _without_machine(content))
    for log in folder.glob("*.csv"):
        log.unlink()
    if narrow:
        _narrow(source, folder, dtype)
    directory_run.copy_papers(source, folder)
    directory_run.check_written(folder)
    return quantization


def _without_machine(config: Mapping[str, Any]) -> dict[str, Any]:
    meta = config.get("meta")
    if not isinstance(meta, dict):
        return dict(config)
    return {**config, "meta": {key: value for key, value in meta.items() if key not in _MACHINE_KEYS}}


def _narrow(source: Path, folder: Path, dtype: str) -> None:
    """Put weights that the checkpoint has in 16 bits and the artifact in 32 back into 16."""
    halves = {name for name, tensor in open_checkpoint(source).tensors.items() if tensor.dtype != "F32"}
    stored = next(name for name, torch_name in _HALVES.items() if torch_name == dtype)

    def type_of(tensor: StoredTensor) -> str:
        return stored if tensor.dtype == "F32" and tensor.name in halves else tensor.dtype

    for file in open_checkpoint(folder).files:
        narrowed = file.with_name(f".{file.name}.16bit")
        recast_file(file, narrowed, type_of)
        narrowed.replace(file)
    _correct_index(folder)


def _correct_index(folder: Path) -> None:
    """Of several files, the index also states their bytes."""
    from planner.formats.safetensors import INDEX_FILE

    path = folder / INDEX_FILE
    if path.exists():
        index = directory_run.read_json_object(path)
        total = open_checkpoint(folder).total_bytes
        directory_run.write_json_object(path, {**index, "metadata": {"total_size": total}})


assert set(_HALVES) <= set(FLOAT_DTYPES)
