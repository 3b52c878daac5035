"""The doing half of no quantization: a checkpoint in another float type, shard by shard, in bounded memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from planner.convert.encode import encode
from planner.convert.rows import BLOCK_BYTES, FLOAT_DTYPES
from planner.convert.write import sync
from planner.core.codec import content_sha256
from planner.core.errors import InputError
from planner.core.job import Job, journal_path
from planner.formats.safetensors import INDEX_FILE, Checkpoint, StoredTensor, open_checkpoint, read_header
from planner.methods import directory_run
from planner.quantize.journal import Journal

if TYPE_CHECKING:
    import numpy as np

Progress = Callable[[float, float], None]
_STORED = {"bf16": "BF16", "f16": "F16", "f32": "F32"}
_NAMES = {"bf16": "bfloat16", "f16": "float16", "f32": "float32"}
_HEADER_ALIGNMENT = 8
"""safetensors pads its header with spaces to this."""


def work(job: Job, progress: Progress) -> dict[str, Any]:
    """Convert a checkpoint to the step's type. A killed run goes on with the first shard that was not done.

    Raises:
        InputError: the checkpoint is damaged, quantized already, or a value does not fit in 16 bits.
        ExecutionFailed: the folder cannot be written.
    """
    source, output, type_ = Path(job.source), Path(job.output), str(job.step.type)
    checkpoint = open_checkpoint(source)
    config = directory_run.read_json_object(source / "config.json")
    _refuse_quantized(config, checkpoint)
    journal = Journal(output)
    try:
        key = _key(checkpoint, type_)
        before = journal.read(key)
        done = before.units if before else set()
        if not done:
            journal.begin(key)
        with directory_run.atomic_directory(output, kept=True) as partial:
            done &= {i for i, file in enumerate(checkpoint.files) if _is_whole(partial / file.name)}
            _convert_files(checkpoint, partial, type_, done, journal, progress)
            _write_papers(source, partial, config, checkpoint, type_)
    finally:
        journal.close()
    journal_path(output).unlink(missing_ok=True)
    stored = sorted({tensor.dtype for tensor in checkpoint.tensors.values()})
    note = f"{len(checkpoint.tensors)} tensors in {len(checkpoint.files)} files, {', '.join(stored)} → {_STORED[type_]}"
    notes = [note, f"{len(done)} files were there from an interrupted run"] if done else [note]
    return {"notes": notes, "resumed": bool(done)}


def _refuse_quantized(config: dict[str, Any], checkpoint: Checkpoint) -> None:
    odd = sorted({t.dtype for t in checkpoint.tensors.values() if t.dtype.startswith(("F8", "F4", "F6"))})
    if "quantization_config" in config or odd:
        raise InputError(
            f"{str(checkpoint.directory)!r} is quantized already",
            numbers=f"it holds {', '.join(odd)}" if odd else "its config.json has a quantization_config",
            hint="start from the 16-bit model",
            code="already-quantized",
        )


def _key(checkpoint: Checkpoint, type_: str) -> str:
    """What decides the bytes of every shard."""
    seen = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in checkpoint.files]
    return content_sha256({"type": type_, "files": seen})


def _is_whole(path: Path) -> bool:
    try:
        read_header(path)
    except InputError:
        return False
    return True


def _convert_files(
    checkpoint: Checkpoint, folder: Path, type_: str, done: set[int], journal: Journal, progress: Progress
) -> None:
    total, moved = float(checkpoint.total_bytes), 0.0
    for number, file in enumerate(checkpoint.files):
        header = read_header(file)
        if number in done:
            moved += sum(tensor.size_bytes for tensor in header.tensors)
            continue
        with (folder / file.name).open("wb") as out:
            out.write(_header(header.tensors, header.metadata, type_))
            for tensor in header.tensors:
                for block, read in _blocks(tensor, type_):
                    _write(out, block)
                    moved += read
                    progress(moved, total)
        sync(folder / file.name)
        journal.done([number])


def _write(out: BinaryIO, block: np.ndarray[Any, Any] | bytes) -> None:
    out.write(block if isinstance(block, bytes) else block.data)


def _target(tensor: StoredTensor, type_: str) -> str:
    """The stored type it gets: whole numbers and flags stay as they are."""
    return _STORED[type_] if tensor.dtype in FLOAT_DTYPES else tensor.dtype


def _header(tensors: tuple[StoredTensor, ...], metadata: dict[str, str], type_: str) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    offset = 0
    for tensor in tensors:
        stored = _target(tensor, type_)
        size = tensor.element_count * FLOAT_DTYPES[stored][1] if stored in FLOAT_DTYPES else tensor.size_bytes
        entries[tensor.name] = {
            "dtype": stored,
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _HEADER_ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _blocks(tensor: StoredTensor, type_: str) -> Iterator[tuple[np.ndarray[Any, Any] | bytes, int]]:
    """Blocks of a tensor as they are to be stored, each with the bytes that were read for it.

    Raises:
        InputError: the file became shorter, or a value does not fit.
    """
    import numpy as np

    target = _target(tensor, type_)
    with tensor.file.open("rb") as stream:
        stream.seek(tensor.offset)
        left = tensor.size_bytes
        while left:
            raw = stream.read(min(BLOCK_BYTES, left))
            if not raw:
                raise InputError(f"{tensor.file.name!r} became shorter while it was read", code="truncated-safetensors")
            left -= len(raw)
            if target == tensor.dtype:
                yield raw, len(raw)
                continue
            values = np.frombuffer(raw, dtype=FLOAT_DTYPES[tensor.dtype][0])
            made = encode(values, tensor.dtype, target, name=tensor.name, shift=0.0)
            yield np.ascontiguousarray(made), len(raw)


def _write_papers(
    source: Path, folder: Path, config: dict[str, Any], checkpoint: Checkpoint, type_: str
) -> None:
    directory_run.copy_papers(source, folder)
    key = "dtype" if "dtype" in config or "torch_dtype" not in config else "torch_dtype"
    directory_run.write_json_object(folder / "config.json", {**config, key: _NAMES[type_]})
    if len(checkpoint.files) > 1:
        total = sum(tensor.size_bytes for file in checkpoint.files for tensor in read_header(folder / file.name).tensors)
        names = {name: tensor.file.name for name, tensor in checkpoint.tensors.items()}
        directory_run.write_json_object(folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": names})
    directory_run.check_written(folder)
