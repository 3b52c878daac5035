"""The doing half of GGUF: quantize a checkpoint or a GGUF file, or convert. Runs only in a child process."""

from __future__ import annotations

import ctypes
import dataclasses
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from planner.core.errors import ExecutionFailed, InputError, StalePlan
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
    if _refusal_to_convert(job) is not None:
        made = convert.convert_with_script(directory, output, out_type, _checkout(job), progress)
    else:
        made = convert.convert_checkpoint(
            directory, output, out_type=out_type, progress=progress, model_name=job.model_name
        )
    return {"notes": [*made.notes, *_checked_tokens(directory, output)]}


def _refusal_to_convert(job: Job) -> str | None:
    """Why qplan does not convert the checkpoint itself.

    Raises:
        InputError: neither does it, nor is llama.cpp's own converter given (``no-converter``).
    """
    from planner import convert

    reason = convert.can_convert(json.loads((Path(job.source) / "config.json").read_text("utf-8")))
    if reason is not None and job.llama_cpp_directory is None:
        raise InputError(reason, hint="give a llama.cpp checkout with --llama-cpp DIR", code="no-converter")
    return reason


def _checkout(job: Job) -> Path | None:
    return Path(job.llama_cpp_directory) if job.llama_cpp_directory else None


def _checked_tokens(directory: Path, output: Path) -> list[str]:
    from planner import convert

    check = convert.check_tokenizer(directory, output)
    if check.same is False:
        output.unlink(missing_ok=True)
        raise ExecutionFailed(
            "the converted tokenizer does not give the source's token ids",
            numbers=check.detail,
            hint="add tokenizer.model to the checkpoint if its publisher has one",
            code="tokenizer-differs",
        )
    return [f"tokenizer: {check.detail}"]


def _quantize_checkpoint(job: Job, progress: Progress) -> dict[str, Any]:
    """Straight from the checkpoint, or, where only llama.cpp's converter knows it, by way of a 16-bit file."""
    if _refusal_to_convert(job) is not None:
        return _quantize_by_script(job, progress)
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
    return {"notes": [*made.notes, *_hash_notes(job, made.source_sha256)]}


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


def _quantize_by_script(job: Job, progress: Progress) -> dict[str, Any]:
    """A 16-bit file by llama.cpp's converter, quantized and removed."""
    from planner import convert

    directory, output = Path(job.source), Path(job.output)
    _check_pins(directory, job.pins or {})
    between = output.with_name(f".{output.name}.16bit")
    try:
        made = convert.convert_with_script(directory, between, "auto", _checkout(job), progress)
        tokens = _checked_tokens(directory, between)
        _quantize(dataclasses.replace(job, source=str(between)), progress)
    finally:
        between.unlink(missing_ok=True)
    return {"notes": [*made.notes, *tokens]}


def _check_pins(directory: Path, pins: Mapping[str, str]) -> None:
    for name, sha256 in pins.items():
        with (directory / name).open("rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
        if found != sha256:
            raise StalePlan(
                f"{directory / name} is not the file that was planned for",
                numbers=f"SHA-256 {sha256[:16]}… expected, {found[:16]}… read",
                hint="download it again, or make a new plan with `qplan plan`",
                code="model-changed",
            )


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
