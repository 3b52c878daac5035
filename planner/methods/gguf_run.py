"""The doing half of GGUF: quantize a checkpoint or a GGUF file, or convert. Runs only in a child process."""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from planner.core.errors import ExecutionFailed, InputError
from planner.core.job import Job, QuantizedFile, QuantizeJob
from planner.core.units import MIB, format_bytes
from planner.methods import gguf_mix

if TYPE_CHECKING:
    from planner.quantize import Target

Progress = Callable[[float, float], None]

_TENSOR_LINE = re.compile(r"\[\s*(\d+)\s*/\s*(\d+)\]")
"""llama.cpp logs ``[  12/ 291] blk.1.attn_k.weight …`` for every tensor it quantizes."""
_GGML_LOG_ERROR = 4
_FULL_DISK_BYTES = 4 * MIB
"""A disk with less left is full: llama.cpp writes a tensor at a time, and those of any model are larger."""


def work(job: Job, progress: Progress) -> dict[str, Any]:
    """Carry out a ``convert`` or ``quantize`` step.

    Raises:
        QplanError: the input is unfit, or llama.cpp refused.
    """
    if job.step.kind == "convert":
        return _convert(job, progress)
    if job.step.kind == "quantize":
        return _quantize_checkpoint(job, progress) if Path(job.source).is_dir() else _quantize(job, progress)
    raise InputError(f"GGUF has no step of kind {job.step.kind!r}", code="unknown-step")


def _convert(job: Job, progress: Progress) -> dict[str, Any]:
    from planner import convert

    directory, output = Path(job.source), Path(job.output)
    out_type = (job.step.type or "auto").lower()
    reason = convert.can_convert(json.loads((directory / "config.json").read_text("utf-8")))
    if reason is not None:
        if job.llama_cpp_directory is None:
            raise InputError(reason, hint="give a llama.cpp checkout with --llama-cpp DIR", code="no-converter")
        made = convert.convert_with_script(directory, output, out_type, Path(job.llama_cpp_directory), progress)
    else:
        made = convert.convert_checkpoint(
            directory, output, out_type=out_type, progress=progress, model_name=job.model_name
        )
    check = convert.check_tokenizer(directory, output)
    if check.same is False:
        output.unlink(missing_ok=True)
        raise ExecutionFailed(
            "the converted tokenizer does not give the source's token ids",
            numbers=check.detail,
            hint="add tokenizer.model to the checkpoint if its publisher has one",
            code="tokenizer-differs",
        )
    return {"notes": [*made.notes, f"tokenizer: {check.detail}"]}


def _quantize_checkpoint(job: Job, progress: Progress) -> dict[str, Any]:
    """Straight from the checkpoint."""
    from planner.quantize import quantize_checkpoint

    file = QuantizedFile(path=job.output, type=str(job.step.type), tensor_types=job.tensor_types or {})
    made = quantize_checkpoint(
        Path(job.source),
        (_target(file),),
        threads=job.threads,
        model_name=job.model_name,
        pins=job.pins,
        progress=progress,
    )
    notes = [*made.notes, *_hash_notes(job, made.source_sha256)]
    return {"notes": notes, "resumed": made.resumed_units > 0}


def quantize_many(job: QuantizeJob, progress: Progress) -> dict[str, Any]:
    """Several files from one read of a checkpoint.

    Raises:
        QplanError: as ``quantize_checkpoint``.
    """
    from planner.quantize import quantize_checkpoint
    from planner.quantize.engine import describe

    made = quantize_checkpoint(
        Path(job.source),
        tuple(_target(file) for file in job.files),
        threads=job.threads,
        model_name=job.model_name,
        through=job.through,
        progress=progress,
    )
    return {**describe(made), "notes": list(made.notes)}


def _target(file: QuantizedFile) -> Target:
    from planner.quantize import Target

    return Target(output=Path(file.path), file_type=gguf_mix.file_type(file.type).id, types=file.tensor_types)


def _hash_notes(job: Job, found: Mapping[str, str]) -> list[str]:
    pinned = sum(name in (job.pins or {}) for name in found)
    return [f"{pinned} of {len(found)} weight files have the SHA-256 that was planned for"] if job.pins else []


def _quantize(job: Job, progress: Progress) -> dict[str, Any]:
    """Quantize to a temporary name, sync, rename: the final name never holds half a file."""
    import llama_cpp

    from planner.convert.write import atomic_output

    source = Path(job.source)
    said = _listen(llama_cpp, progress)
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = gguf_mix.file_type(str(job.step.type)).id
    params.nthread = job.threads
    with atomic_output(Path(job.output)) as partial:
        code = llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(partial), ctypes.byref(params))
        if code != 0:
            raise _refusal(job, said)
    return {"notes": []}


def _refusal(job: Job, said: list[str]) -> ExecutionFailed:
    """Why llama.cpp gave up; of a full disk it only says ``iostream error``."""
    source, folder = Path(job.source), Path(job.output).parent
    free = shutil.disk_usage(folder).free
    if free < _FULL_DISK_BYTES:
        return ExecutionFailed(
            f"no space left for {Path(job.output).name}",
            numbers=f"{format_bytes(free)} free in {folder}",
            hint="free some space and apply again: finished steps are kept",
            code="no-space",
        )
    return ExecutionFailed(
        f"llama.cpp could not quantize {source.name} to {job.step.type}",
        numbers="\n".join(dict.fromkeys(said[-3:])),
        code="quantize-failed",
    )


def _listen(llama_cpp: Any, progress: Progress) -> list[str]:
    """Turn llama.cpp's log into progress; returns the list that collects its errors."""
    import sys

    errors: list[str] = []

    def hear(level: int, text: bytes, _: Any) -> None:
        line = text.decode("utf-8", "replace")
        sys.stderr.write(line)
        if found := _TENSOR_LINE.search(line):
            progress(int(found[1]), int(found[2]))
        if level == _GGML_LOG_ERROR:
            errors.append(line.strip())

    callback = llama_cpp.llama_log_callback(hear)
    llama_cpp.llama_log_set(callback, ctypes.c_void_p(0))
    _kept.append(callback)
    return errors


_kept: list[Any] = []
"""Callbacks that llama.cpp holds a pointer to."""
