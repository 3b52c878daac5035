"""The doing half of no quantization: a checkpoint in another float type, shard by shard, in bounded memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from planner.convert.recast import recast_file
from planner.convert.write import sync
from planner.core.codec import content_sha256
from planner.core.errors import InputError
from planner.core.job import Job, journal_path, leave_only_progress, partial_path, remove
from planner.formats.safetensors import INDEX_FILE, Checkpoint, open_checkpoint, read_header
from planner.methods import directory_run
from planner.quantize.journal import Journal

Progress = Callable[[float, float], None]
_STORED = {"bf16": "BF16", "f16": "F16", "f32": "F32"}
_NAMES = {"bf16": "bfloat16", "f16": "float16", "f32": "float32"}


def work(job: Job, progress: Progress) -> dict[str, Any]:
    """Convert a checkpoint to the step's type. A killed run goes on with the first file that was not done.

    Raises:
        InputError: the checkpoint is damaged, quantized already, or a value does not fit in 16 bits.
        ExecutionFailed: the folder cannot be written.
    """
    source, output = Path(job.source), Path(job.output)
    checkpoint = open_checkpoint(source)
    config = directory_run.read_json_object(source / "config.json")
    _refuse_quantized(config, checkpoint)
    try:
        resumed = _convert(job, checkpoint, config, progress)
    except InputError:
        remove(partial_path(output))
        remove(journal_path(output))
        raise
    except BaseException:
        leave_only_progress([output])
        raise
    stored = sorted({tensor.dtype for tensor in checkpoint.tensors.values()})
    type_ = _STORED[str(job.step.type)]
    notes = [f"{len(checkpoint.tensors)} tensors in {len(checkpoint.files)} files, {', '.join(stored)} → {type_}"]
    if resumed:
        notes.append(f"{resumed} files were there from an interrupted run")
    return {"notes": notes, "resumed": resumed > 0}


def _refuse_quantized(config: dict[str, Any], checkpoint: Checkpoint) -> None:
    odd = sorted({t.dtype for t in checkpoint.tensors.values() if t.dtype.startswith(("F8", "F4", "F6"))})
    if "quantization_config" in config or odd:
        raise InputError(
            f"{str(checkpoint.directory)!r} is quantized already",
            numbers=f"it holds {', '.join(odd)}" if odd else "its config.json has a quantization_config",
            hint="start from the 16-bit model",
            code="already-quantized",
        )


def _convert(job: Job, checkpoint: Checkpoint, config: dict[str, Any], progress: Progress) -> int:
    """Write the folder; how many files an interrupted run had written before."""
    output, type_ = Path(job.output), str(job.step.type)
    output.parent.mkdir(parents=True, exist_ok=True)
    journal = Journal(output)
    try:
        key = _key(checkpoint, type_)
        before = journal.read(key)
        done = before.units if before else set()
        if not done:
            journal.begin(key)
        with directory_run.atomic_directory(output, kept=True) as partial:
            done = {i for i in done if i < len(checkpoint.files) and _is_whole(partial / checkpoint.files[i].name)}
            _convert_files(checkpoint, partial, type_, done, journal, progress)
            _write_papers(partial, config, checkpoint, type_)
    finally:
        journal.close()
    remove(journal_path(output))
    return len(done)


def _key(checkpoint: Checkpoint, type_: str) -> str:
    """What decides the bytes of every file."""
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
    total, read = float(checkpoint.total_bytes), 0

    def moved(count: int) -> None:
        nonlocal read
        read += count
        progress(float(read), total)

    for number, file in enumerate(checkpoint.files):
        if number in done:
            moved(sum(tensor.size_bytes for tensor in read_header(file).tensors))
            continue
        recast_file(file, folder / file.name, lambda _: _STORED[type_], moved)
        sync(folder / file.name)
        journal.done([number])


def _write_papers(folder: Path, config: dict[str, Any], checkpoint: Checkpoint, type_: str) -> None:
    directory_run.copy_papers(checkpoint.directory, folder)
    directory_run.write_json_object(folder / "config.json", directory_run.with_dtype(config, _NAMES[type_]))
    if len(checkpoint.files) > 1:
        total = sum(
            tensor.size_bytes for file in checkpoint.files for tensor in read_header(folder / file.name).tensors
        )
        names = {name: tensor.file.name for name, tensor in checkpoint.tensors.items()}
        directory_run.write_json_object(folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": names})
    directory_run.check_written(folder)
