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

from planner.core.codec import decode, read_json
from planner.core.errors import ExecutionFailed, InputError
from planner.core.job import Job, QuantizedFile, QuantizeJob
from planner.core.model import Tensor
from planner.core.units import MIB, format_bytes, pad
from planner.formats.ggml import tensor_bytes, type_traits
from planner.formats.gguf import GgufHeader, open_gguf
from planner.formats.imatrix import read_imatrix
from planner.methods import gguf_mix, gguf_recipe
from planner.methods.gguf_recipe import Recipe, SensitivityTable

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

    importance = read_imatrix(Path(job.imatrix)).weights() if job.imatrix else None
    made = quantize_checkpoint(
        Path(job.source),
        tuple(_target(file, importance) for file in job.files),
        threads=job.threads,
        model_name=job.model_name,
        through=job.through,
        progress=progress,
    )
    return {**describe(made), "notes": list(made.notes)}


def _target(file: QuantizedFile, importance: Mapping[str, Any] | None = None) -> Target:
    from planner.quantize import Target

    return Target(
        output=Path(file.path),
        file_type=gguf_mix.file_type(file.type).id,
        types=file.tensor_types,
        importance=importance,
    )


def _hash_notes(job: Job, found: Mapping[str, str]) -> list[str]:
    pinned = sum(name in (job.pins or {}) for name in found)
    return [f"{pinned} of {len(found)} weight files have the SHA-256 that was planned for"] if job.pins else []


def _quantize(job: Job, progress: Progress) -> dict[str, Any]:
    """Quantize to a temporary name, sync, rename: the final name never holds half a file."""
    import llama_cpp

    from planner.convert.write import atomic_output

    source = Path(job.source)
    said = _listen(llama_cpp, progress)
    weights = read_imatrix(Path(job.imatrix)).weights() if job.imatrix else {}
    recipe = _recipe(job, weights)
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = gguf_mix.file_type(recipe.file_type if recipe else str(job.step.type)).id
    params.nthread = job.threads
    borrowed = [_set_importance(llama_cpp, params, weights), _set_types(llama_cpp, params, recipe)]
    with atomic_output(Path(job.output)) as partial:
        code = llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(partial), ctypes.byref(params))
        del borrowed  # llama.cpp read these until here
        if code != 0:
            raise _refusal(job, said)
        _check_target(job, partial)
    if recipe is None:
        return {"notes": []}
    told = f"predicted KL divergence {recipe.loss:.4g} nats, by the measured sensitivities" if job.sensitivity else ""
    return {"notes": [told] if told else [], "tensor_types": recipe.types}


def _set_importance(llama_cpp: Any, params: Any, weights: Mapping[str, Any]) -> tuple[Any, ...]:
    """Hand the importance matrix over as ``llama-quantize --imatrix`` does; the caller keeps the answer meanwhile."""
    if not weights:
        return ()
    rows = (llama_cpp.llama_model_imatrix_data * (len(weights) + 1))()  # an empty row ends the list
    pointer = ctypes.POINTER(ctypes.c_float)
    for row, (name, values) in zip(rows, weights.items(), strict=False):
        row.name, row.data, row.size = name.encode(), values.ctypes.data_as(pointer), values.size
    params.imatrix = rows
    return (rows, weights)


def _set_types(llama_cpp: Any, params: Any, recipe: Recipe | None) -> Any:
    """One pattern for each tensor of the recipe; the caller keeps the answer meanwhile."""
    if recipe is None:
        return None
    rows = (llama_cpp.llama_model_tensor_override * (len(recipe.types) + 1))()
    for row, (name, type_) in zip(rows, recipe.types, strict=False):
        row.pattern, row.type = f"^{name.replace('.', chr(92) + '.')}$".encode(), type_traits(type_).id
    params.tt_overrides = rows
    return rows


def _recipe(job: Job, weights: Mapping[str, Any]) -> Recipe | None:
    """The types of a mixture: chosen by measured sensitivities within the step's target, or as planned."""
    step = job.step
    if job.sensitivity is None or step.target_bytes is None:
        return gguf_recipe.as_planned(step.tensor_types) if step.tensor_types else None
    table = decode(SensitivityTable, read_json(Path(job.sensitivity)), what="the sensitivities")
    header = open_gguf(Path(job.source))
    tensors = [Tensor(tensor.name, tensor.shape, tensor.type) for tensor in header.tensors]
    quantized = [tensor for tensor in tensors if gguf_mix.is_quantized(tensor)]
    kept = sum(pad(t.size_bytes, gguf_recipe.ALIGNMENT_BYTES) for t in header.tensors) - sum(
        pad(tensor_bytes(str(t.dtype), t.shape), gguf_recipe.ALIGNMENT_BYTES) for t in quantized
    )
    return gguf_recipe.choose(
        quantized,
        quantized_metadata_bytes(header) + kept,
        step.target_bytes,
        gguf_recipe.measured_loss(table, quantized),
        covered=weights.keys(),
        model_name=job.model_name or Path(job.source).name,
    )


_ADDED_KEYS = ("general.quantization_version", "general.file_type")


def quantized_metadata_bytes(header: GgufHeader) -> int:
    """Bytes before the tensors' data once llama.cpp has quantized the file: it adds the keys that were not there.

    At most 32 bytes too many, as the end of the source's header is only known padded.
    """
    added = sum(8 + len(key) + 4 + 4 for key in _ADDED_KEYS if key not in header.metadata)
    return pad(header.metadata_bytes + added, gguf_recipe.ALIGNMENT_BYTES)


def _check_target(job: Job, made: Path) -> None:
    target = job.step.target_bytes
    if target is not None and made.stat().st_size > target:
        raise ExecutionFailed(
            f"the file came out larger than the {target} bytes that were asked for",
            numbers=f"{made.stat().st_size} bytes",
            hint="plan again for a little less; the estimate of the metadata was too low",
            code="over-target",
        )


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
