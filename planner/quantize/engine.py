"""Quantize a checkpoint into one or more GGUF files: prepare, go on or begin, run, sync, rename."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from planner import __version__
from planner.convert.check import require_same_tokens
from planner.convert.write import Conversion, prepare, require_packages, reserve, sync, write_error
from planner.core.codec import content_sha256
from planner.core.errors import QplanError, UsageError
from planner.core.job import journal_path, leave_only_progress
from planner.quantize import journal, kernels
from planner.quantize.pipeline import Pipeline, Tally
from planner.quantize.sources import Shard, shards
from planner.quantize.targets import Layout, Target, lay_out
from planner.quantize.work import AUTO, THROUGH, Blockwork

ProgressReport = Callable[[int, int], None]
"""Called with the bytes of the checkpoint done with, and all of them."""
CHECKPOINT_SECONDS = 5.0
"""How often what was written is synced and journaled: so much work a killed run loses."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeResult:
    """What a run wrote."""

    file_bytes: tuple[int, ...]
    """Of each target, in order."""
    source_sha256: Mapping[str, str]
    """Of every shard, by name."""
    read_bytes: int
    """Read from the checkpoint's weights in this run."""
    written_bytes: int
    """Of tensor data written in this run; less than all where an earlier run had begun."""
    resumed_units: int
    seconds: float
    cpu_seconds: Mapping[str, float]
    """Processor time by stage: ``read``, ``hash``, ``quantize`` (all threads), ``write``."""
    notes: tuple[str, ...]


@dataclass(slots=True)
class _Run:
    """A run between its preparation and its end."""

    conversion: Conversion
    layouts: tuple[Layout, ...]
    sources: tuple[Shard, ...]
    key: str
    earlier: journal.Progress = field(default_factory=journal.Progress)
    resumes: bool = False

    @property
    def output(self) -> Path:
        """The journal lies beside the first output."""
        return self.layouts[0].target.output


def quantize_checkpoint(
    directory: Path,
    targets: tuple[Target, ...],
    *,
    threads: int = 1,
    model_name: str | None = None,
    through: str = AUTO,
    pins: Mapping[str, str] | None = None,
    progress: ProgressReport | None = None,
    checkpoint_seconds: float = CHECKPOINT_SECONDS,
) -> QuantizeResult:
    """Quantize the safetensors checkpoint in ``directory``, read once, into all ``targets``.

    A file appears under its name when it is complete and on the disk. A run that was killed goes on where it was when
    it is started again with the same arguments, and makes the same bytes; after an error nothing is left. The bytes
    depend on neither the number of threads nor the interruptions. Memory: the tokenizer and some hundred MiB.

    Args:
        threads: that quantize; reading, hashing and writing have one each besides.
        model_name: what ``general.name`` is derived from; by default the directory's name.
        through: type that matrices are rounded to first (``THROUGH``), as the 16-bit file of two steps would.
        pins: SHA-256 that the weight files must have, by name.
        progress: told now and then.
        checkpoint_seconds: how often the work so far is made safe from a crash.

    Raises:
        InputError: the checkpoint is missing, malformed or damaged, its tokenizer cannot be had in llama.cpp, or a
            type demands an importance matrix.
        UnsupportedArchitecture: it is not converted here.
        StalePlan: a weight file is not the pinned one (``model-changed``).
        ExecutionFailed: an output cannot be written (``no-space``, ``no-permission``, ``write-failed``).
        MissingDependency: the ``gguf`` extra is not installed.
    """
    began = time.monotonic()
    require_packages()
    library = kernels.load()
    run = _prepare(directory, targets, model_name, through)
    library.prepare({type_ for target in targets for type_ in target.types.values()})
    blockwork = Blockwork(run.layouts, library, through)
    tally = Tally()
    notes: tuple[str, ...] = ()
    with _held(run) as book:
        _look_for_earlier(run, book)
        if not run.earlier.complete:
            with ExitStack() as stack:
                files = [stack.enter_context(_opened(layout, fresh=not run.resumes)) for layout in run.layouts]
                notes = _begin(directory, run, blockwork, files)
                pipeline = _pipeline(run, blockwork, files, threads, pins or {})
                _carry_out(run, book, pipeline, files, progress or _ignore, checkpoint_seconds)
                tally = pipeline.tally
        _finish(run)
    hashes = {name: str(facts["sha256"]) for name, facts in run.earlier.shards.items()}
    return QuantizeResult(
        file_bytes=tuple(layout.file_bytes for layout in run.layouts),
        source_sha256=hashes,
        read_bytes=tally.read_bytes,
        written_bytes=tally.written_bytes,
        resumed_units=len(run.earlier.units) if run.resumes else 0,
        seconds=time.monotonic() - began,
        cpu_seconds=dict(tally.cpu_seconds),
        notes=(*run.conversion.notes, *notes),
    )


def _ignore(done_bytes: int, total_bytes: int) -> None:
    """No progress is wanted."""


def _prepare(directory: Path, targets: tuple[Target, ...], model_name: str | None, through: str) -> _Run:
    if through not in THROUGH:
        raise UsageError(f"{through!r} is no type to go through", hint=f"one of {', '.join(THROUGH)}")
    if not targets or len({target.output.absolute() for target in targets}) < len(targets):
        raise UsageError("each output needs a name of its own", numbers=", ".join(str(t.output) for t in targets))
    conversion = prepare(directory, model_name=model_name)
    layouts = tuple(lay_out(conversion, target) for target in targets)
    run = _Run(conversion, layouts, shards(conversion.tensors), "")
    run.key = _key(run, through)
    return run


@contextmanager
def _held(run: _Run) -> Iterator[journal.Journal]:
    """The journal, for this process alone. What an error leaves is removed; what an interruption leaves is kept."""
    try:
        book = journal.Journal(run.output)
    except OSError as error:
        raise write_error(run.output, error) from None
    try:
        yield book
    except OSError as error:
        _discard(run)
        raise write_error(run.output, error) from None
    except QplanError:
        _discard(run)
        raise
    except BaseException:
        leave_only_progress([layout.target.output for layout in run.layouts])
        raise
    finally:
        book.close()


def _look_for_earlier(run: _Run, book: journal.Journal) -> None:
    earlier = book.read(run.key)
    if earlier is not None and all(_is_partial_of(layout, complete=earlier.complete) for layout in run.layouts):
        run.earlier, run.resumes = earlier, True
    else:
        book.begin(run.key)


def _key(run: _Run, through: str) -> str:
    """Hash of all that decides the outputs' bytes, and of the shards as far as a look at them tells."""
    library = kernels.library_files()[0]
    outputs = [
        {
            "name": layout.target.output.name,
            "header": hashlib.sha256(layout.header).hexdigest(),
            "importance": _importance_sha256(layout.target),
        }
        for layout in run.layouts
    ]
    status = [(shard.path, shard.path.stat()) for shard in run.sources]
    content = {
        "qplan": __version__,
        "through": through,
        "outputs": outputs,
        "library": hashlib.sha256(library.read_bytes()).hexdigest(),
        "shards": [[str(path), found.st_size, found.st_mtime_ns] for path, found in status],
        "units": [[u.tensor.name, u.first_row, u.offset, u.size_bytes] for s in run.sources for u in s.units],
    }
    return content_sha256(content)


def _importance_sha256(target: Target) -> str:
    digest = hashlib.sha256()
    for name, values in sorted((target.importance or {}).items()):
        digest.update(f"{name}\n".encode())
        digest.update(values.tobytes())
    return digest.hexdigest()


def _is_partial_of(layout: Layout, *, complete: bool) -> bool:
    """Whether the partial file of ``layout`` is there, or, after everything was written, the file itself."""
    places = (layout.partial, layout.target.output) if complete else (layout.partial,)
    for path in places:
        try:
            with path.open("rb") as stream:
                if path.stat().st_size == layout.file_bytes and stream.read(len(layout.header)) == layout.header:
                    return True
        except OSError:
            continue
    return False


def _opened(layout: Layout, *, fresh: bool) -> IO[bytes]:
    """The partial file, at its full size with its header."""
    file = layout.partial.open("w+b" if fresh else "r+b", buffering=0)
    try:
        if fresh:
            os.ftruncate(file.fileno(), layout.file_bytes)
            reserve(file.fileno(), layout.file_bytes)
            file.write(layout.header)
    except BaseException:
        file.close()
        raise
    return file


def _begin(directory: Path, run: _Run, blockwork: Blockwork, files: list[IO[bytes]]) -> tuple[str, ...]:
    """Write the computed tensors, and compare the tokenizer: before hours of work, not after."""
    for tensor in run.conversion.tensors:
        if tensor.constant:
            (values,) = tensor.blocks()
            for number, offset, data in blockwork.encode_rows(tensor, values, 0, blockwork.scratch()):
                files[number].seek(offset)
                files[number].write(data.data)
    checked = require_same_tokens(directory, run.layouts[0].partial)
    return (*checked.notes, f"tokenizer: {checked.detail}")


def _pipeline(
    run: _Run, blockwork: Blockwork, files: list[IO[bytes]], threads: int, pins: Mapping[str, str]
) -> Pipeline:
    """Over the shards that are not wholly done."""
    units = run.earlier.units
    open_shards = tuple(shard for shard in run.sources if not _is_done(shard, run.earlier, pins))
    return Pipeline(open_shards, blockwork, files, threads=threads, done_units=units, pins=pins)


def _is_done(shard: Shard, earlier: journal.Progress, pins: Mapping[str, str]) -> bool:
    facts = earlier.shards.get(shard.path.name)
    if facts is None or any(unit.number not in earlier.units for unit in shard.units):
        return False
    status = shard.path.stat()
    same = (facts.get("size"), facts.get("mtime_ns")) == (status.st_size, status.st_mtime_ns)
    return same and facts.get("sha256") == pins.get(shard.path.name, facts.get("sha256"))


def _carry_out(
    run: _Run,
    book: journal.Journal,
    pipeline: Pipeline,
    files: list[IO[bytes]],
    progress: ProgressReport,
    checkpoint_seconds: float,
) -> None:
    total = sum(shard.size_bytes for shard in run.sources)
    skipped = total - pipeline.source_bytes
    last = time.monotonic()

    def checkpoint() -> None:
        units, finished = pipeline.tally.take()
        if units:
            for file in files:
                _sync_data(file)
            book.done(units)
        for name, facts in finished.items():
            book.shard(name, facts)
        run.earlier.shards.update(finished)

    def tick() -> None:
        nonlocal last
        progress(skipped + pipeline.tally.source_bytes, total)
        if time.monotonic() - last >= checkpoint_seconds:
            checkpoint()
            last = time.monotonic()

    pipeline.run(tick)
    checkpoint()
    for file in files:
        os.fsync(file.fileno())
    book.complete()


def _sync_data(file: IO[bytes]) -> None:
    getattr(os, "fdatasync", os.fsync)(file.fileno())


def _finish(run: _Run) -> None:
    """Give every file its name; a crash in between is made good by the next run."""
    for layout in run.layouts:
        if layout.partial.exists():
            layout.partial.replace(layout.target.output)
    for folder in {layout.target.output.absolute().parent for layout in run.layouts}:
        sync(folder)
    journal_path(run.output).unlink(missing_ok=True)


def _discard(run: _Run) -> None:
    for layout in run.layouts:
        layout.partial.unlink(missing_ok=True)
    journal_path(run.output).unlink(missing_ok=True)


def describe(result: QuantizeResult) -> dict[str, Any]:
    """The result as the report of a step holds it."""
    return {
        "read_bytes": result.read_bytes,
        "written_bytes": result.written_bytes,
        "resumed": result.resumed_units > 0,
        "source_sha256": dict(result.source_sha256),
        "cpu_seconds": {name: round(value, 3) for name, value in result.cpu_seconds.items()},
    }
