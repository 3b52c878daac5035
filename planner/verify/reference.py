"""The 16-bit model that quality is measured against, out of the checkpoint itself: in memory, or in a file for a while.

On Linux it is streamed into an anonymous file in memory (memfd_create(2)) or, where memory does not allow, into a file
without a name in the output's folder; llama.cpp opens both by /proc/self/fd. Neither outlives the process.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from planner.convert.write import convert_checkpoint, prepare, write_conversion, write_error
from planner.core.errors import ExecutionFailed
from planner.core.units import MIB, format_bytes

Progress = Callable[[str, float], None]

NO_ROOM = "no-room-for-reference"
_DISK_MARGIN_BYTES = 64 * MIB


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where the reference comes from and where it may lie."""

    checkpoint: Path
    folder: Path
    """For a temporary file, where memory does not allow."""
    memory_bytes: int | None
    """Memory it may take; ``None`` is unknown, and taken as too little."""
    keep: Path | None = None
    """A file to keep it in."""


@contextmanager
def sixteen_bit(source: Source, progress: Progress) -> Iterator[tuple[Path, str]]:
    """A path that llama.cpp can open while the block lasts, and a note on where the model lies.

    Raises:
        InputError, UnsupportedArchitecture: the checkpoint cannot be converted.
        ExecutionFailed: neither the memory nor the disk holds it (``NO_ROOM``).
    """

    def tell(done: int, total: int) -> None:
        progress("convert the reference", done / total if total else 1.0)

    if source.keep is not None:
        made = convert_checkpoint(source.checkpoint, source.keep, progress=tell)
        yield source.keep, f"quality is against the checkpoint as {made.weight_type}, kept in {source.keep.name}"
        return
    conversion = prepare(source.checkpoint)
    needed = sum(conversion.stored_bytes(tensor) for tensor in conversion.tensors)
    shown = f"quality is against the checkpoint as {conversion.weight_type} ({format_bytes(needed)})"
    reason = _why_not_in_memory(needed, source.memory_bytes)
    if reason is not None:
        free = shutil.disk_usage(source.folder).free
        if free < needed + _DISK_MARGIN_BYTES:
            raise ExecutionFailed(
                "neither memory nor disk holds the 16-bit model",
                numbers=f"it takes {format_bytes(needed)}; {reason}; {format_bytes(free)} of disk are free",
                code=NO_ROOM,
            )
    with _anonymous(source.folder, in_memory=reason is None) as path:
        try:
            write_conversion(path, conversion, tell)
        except OSError as error:
            raise write_error(source.folder / "the 16-bit model", error) from None
        where = "held in memory" if reason is None else f"in a temporary file, as {reason}"
        yield path, f"{shown}, {where}"


def _why_not_in_memory(needed: int, memory_bytes: int | None) -> str | None:
    if not hasattr(os, "memfd_create"):
        return f"{sys.platform} has no files in memory"
    if memory_bytes is None:
        return "the free memory is not known"
    if needed > memory_bytes:
        return f"{format_bytes(max(0, memory_bytes))} of memory are free for it"
    return None


@contextmanager
def _anonymous(folder: Path, *, in_memory: bool) -> Iterator[Path]:
    """An empty file that goes with the process, by a path that can be opened."""
    if in_memory:
        descriptor = os.memfd_create("qplan-reference", os.MFD_CLOEXEC)
        try:
            yield Path(f"/proc/self/fd/{descriptor}")
        finally:
            os.close(descriptor)
    elif Path("/proc/self/fd").is_dir():
        with tempfile.TemporaryFile(dir=folder) as file:
            yield Path(f"/proc/self/fd/{file.fileno()}")
    else:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".reference-") as inside:
            yield Path(inside) / "reference.gguf"
