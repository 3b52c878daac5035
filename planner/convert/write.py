"""Convert a checkpoint directory to a GGUF file: tensor by tensor, in bounded memory, all or nothing."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from planner.convert.encode import encode
from planner.convert.keyvalue import KeyValue
from planner.convert.mapping import stream
from planner.convert.metadata import display_name, key_values
from planner.convert.rows import FLOAT_DTYPES, NamedTensor
from planner.convert.support import open_config
from planner.convert.vocab import read_vocabulary
from planner.core.errors import ExecutionFailed, InputError, MissingDependency, UsageError
from planner.core.job import partial_path
from planner.core.units import format_bytes, pad
from planner.formats.gguf_skeleton import Int32, StoredTensor, Value, header
from planner.formats.safetensors import open_checkpoint

OUT_TYPES = ("auto", "f32", "f16", "bf16")
ALIGNMENT = 32
"""``GGUF_DEFAULT_ALIGNMENT``: every tensor starts at a multiple of it."""

Progress = Callable[[int, int], None]
"""Called with the tensor bytes written so far and in all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertResult:
    """What a conversion wrote."""

    output: Path
    tensor_count: int
    tensor_bytes: int
    """Sum of the tensors, padding between them not counted."""
    file_bytes: int
    weight_type: str
    """Type of the matrices: ``F32``, ``F16`` or ``BF16``; vectors are always F32."""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversion:
    """A conversion before its first byte: the whole header, and the stream of tensors behind it."""

    architecture: str
    key_values: list[KeyValue]
    tensors: list[NamedTensor]
    weight_type: str
    notes: tuple[str, ...]

    def stored_type(self, tensor: NamedTensor) -> str:
        """GGUF type ``tensor`` is written in."""
        return "F32" if tensor.always_f32 else self.weight_type

    def stored_bytes(self, tensor: NamedTensor) -> int:
        """Bytes ``tensor`` takes in the file."""
        return tensor.element_count * FLOAT_DTYPES[self.stored_type(tensor)][1]


def prepare(directory: Path, *, out_type: str = "auto", model_name: str | None = None) -> Conversion:
    """Everything about the conversion of ``directory`` but the weights themselves; reads headers only.

    Args:
        out_type: ``f32``, ``f16``, ``bf16``, or ``auto``: the 16-bit type the checkpoint is in, ``f16`` for others.
        model_name: what ``general.name`` is derived from; by default the directory's name.

    Raises:
        InputError: weights, configuration or tokenizer are missing, malformed, refused or do not fit together.
        UnsupportedArchitecture: the family or its tokenizer is not converted here; the hint names ``--llama-cpp``.
    """
    if out_type not in OUT_TYPES:
        raise UsageError(f"{out_type!r} is no type to convert to", hint=f"one of {', '.join(OUT_TYPES)}")
    config, family, notes = open_config(directory)
    tensors = list(stream(open_checkpoint(directory), config))
    weight_type = _auto_type(tensors) if out_type == "auto" else out_type.upper()
    vocabulary = read_vocabulary(directory, config, family)
    entries = key_values(
        directory,
        config,
        family,
        tensors,
        vocabulary,
        weight_type=weight_type,
        model_name=model_name or display_name(directory),
    )
    return Conversion(
        architecture=family.architecture,
        key_values=entries,
        tensors=tensors,
        weight_type=weight_type,
        notes=notes + vocabulary.notes,
    )


def _auto_type(tensors: list[NamedTensor]) -> str:
    """BF16 or F16 as the first matrix is stored; F16 for float32, as llama.cpp's converter chooses."""
    matrices = (tensor.dtype for tensor in tensors if len(tensor.shape) > 1 and tensor.dtype != "F32")
    return next(matrices, "F16")


def convert_checkpoint(
    directory: Path,
    output: Path,
    *,
    out_type: str = "auto",
    progress: Progress | None = None,
    model_name: str | None = None,
) -> ConvertResult:
    """Write the Hugging Face checkpoint in ``directory`` as the GGUF file ``output``.

    The bytes depend on the checkpoint, ``out_type`` and the model's name only. The file appears under its name when
    it is complete and on disk, replacing what was there; until then it is ``.NAME.partial`` beside it, which is
    removed on any error and overwritten by the next run. Memory: two blocks of 32 MiB and the tokenizer.

    Raises:
        InputError: as ``prepare``; also a weight that does not fit in float16 (``f16-overflow``).
        UnsupportedArchitecture: as ``prepare``.
        ExecutionFailed: the file cannot be written (``no-space``, ``no-permission``, ``write-failed``).
        MissingDependency: the ``gguf`` extra is not installed.
    """
    require_packages()
    conversion = prepare(directory, out_type=out_type, model_name=model_name)
    with atomic_output(output) as partial:
        write_conversion(partial, conversion, progress)
    return ConvertResult(
        output=output,
        tensor_count=len(conversion.tensors),
        tensor_bytes=sum(conversion.stored_bytes(tensor) for tensor in conversion.tensors),
        file_bytes=output.stat().st_size,
        weight_type=conversion.weight_type,
        notes=conversion.notes,
    )


def write_conversion(path: Path, conversion: Conversion, progress: Progress | None = None) -> None:
    """Write the whole file to ``path``, which may exist; neither atomic nor synced.

    Raises:
        InputError: as ``convert_checkpoint``.
        OSError: it cannot be written.
    """
    total = sum(conversion.stored_bytes(tensor) for tensor in conversion.tensors)
    made = header_bytes(conversion.key_values, _stored_tensors(conversion))
    path.write_bytes(made)
    _write_data(path, conversion, len(made), total, progress or _ignore)


def _ignore(done_bytes: int, total_bytes: int) -> None:
    """No progress is wanted."""


def require_packages() -> None:
    """Raises ``MissingDependency`` where the packages of the ``gguf`` extra are not installed."""
    from importlib.util import find_spec

    missing = [name for name in ("numpy", "gguf") if find_spec(name) is None]
    if missing:
        raise MissingDependency(
            "converting to GGUF needs packages that are not installed",
            numbers=", ".join(missing),
            hint='`pip install "qplan[gguf]"`',
        )


def _stored_tensors(conversion: Conversion) -> list[StoredTensor]:
    return [(tensor.name, tensor.shape, conversion.stored_type(tensor)) for tensor in conversion.tensors]


def header_bytes(key_values: list[KeyValue], tensors: list[StoredTensor]) -> bytes:
    """Magic, key-values and tensor infos, padded: where it ends the first tensor begins.

    The tensors' data is to follow in the order of ``tensors``, each padded to ``ALIGNMENT``.

    Raises:
        InputError: a value does not fit in its GGUF type (``bad-config``).
    """
    try:
        return header({entry.key: _value(entry) for entry in key_values}, tensors)
    except (struct.error, TypeError, ValueError, OverflowError, UnicodeEncodeError) as error:
        raise InputError("the model's settings cannot be written", numbers=str(error), code="bad-config") from None


def _value(entry: KeyValue) -> Value:
    if entry.kind == "i32":
        return Int32(entry.value)
    if entry.kind == "bytes":
        return bytes(entry.value)
    value: Value = entry.value
    return value


def _write_data(partial: Path, conversion: Conversion, offset: int, total_bytes: int, progress: Progress) -> None:
    done = 0
    with partial.open("r+b") as file:
        padded = sum(pad(conversion.stored_bytes(tensor), ALIGNMENT) for tensor in conversion.tensors)
        reserve(file.fileno(), offset + padded)
        file.seek(offset)
        progress(0, total_bytes)
        for tensor in conversion.tensors:
            start = done
            for block in encoded_blocks(tensor, conversion.stored_type(tensor)):
                file.write(block.data)
                done += block.nbytes
                progress(done, total_bytes)
            size = done - start
            if size != conversion.stored_bytes(tensor):
                raise ExecutionFailed(
                    f"{tensor.name} came out at the wrong size",
                    numbers=f"{size} bytes, {conversion.stored_bytes(tensor)} expected",
                )
            file.write(bytes(pad(size, ALIGNMENT) - size))


def encoded_blocks(tensor: NamedTensor, stored_type: str) -> Iterator[Any]:
    """The values of ``tensor`` as they are stored: contiguous numpy arrays, in order."""
    for block in tensor.blocks():
        yield encode(block, tensor.dtype, stored_type, name=tensor.name, shift=tensor.shift)


def reserve(descriptor: int, size: int) -> None:
    """Take the disk space at once, so that a full disk shows before the work."""
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(descriptor, 0, size)
        except OSError as error:
            # file systems without preallocation; a full disk is reported as such
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                raise


@contextmanager
def atomic_output(output: Path) -> Iterator[Path]:
    """A name to write to; when the block ends well the file gets the name ``output``, else it is removed.

    Raises:
        ExecutionFailed: an ``OSError`` in the block (``no-space``, ``no-permission``, ``write-failed``).
    """
    partial = partial_path(output)
    try:
        try:
            yield partial
            sync(partial)
            partial.replace(output)
            sync(output.parent)
        except OSError as error:
            raise write_error(output, error) from None
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def sync(path: Path) -> None:
    """Put the file or directory ``path`` on the disk."""
    if path.is_dir() and os.name == "nt":  # directories cannot be opened there
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_error(output: Path, error: OSError) -> ExecutionFailed:
    """Why ``output`` could not be written: ``no-space``, ``no-permission`` or ``write-failed``."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = os.statvfs(output.parent).f_bavail * os.statvfs(output.parent).f_frsize if os.name != "nt" else None
        return ExecutionFailed(
            f"no space left for {output.name}",
            numbers=f"{format_bytes(free)} free in {output.parent}",
            hint="give another output directory with --output",
            code="no-space",
        )
    code = "no-permission" if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS) else "write-failed"
    return ExecutionFailed(
        f"{output.name} cannot be written",
        numbers=str(error),
        hint="give another output directory with --output",
        code=code,
    )
