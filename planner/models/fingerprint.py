"""Hashes by which a plan recognises its model: of the files, and of the shapes."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

from planner.core.errors import InputError
from planner.core.model import ModelSpec, SourceFile
from planner.core.units import format_bytes
from planner.formats.json_file import size_of

WEIGHT_SUFFIXES = (".safetensors", ".gguf")


def sha256_of(path: Path) -> str:
    """SHA-256 of the file ``path`` in hex, read in pieces.

    Raises:
        InputError: missing or unreadable.
    """
    size_of(path)
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{str(path)!r} cannot be read", numbers=str(error), code="unreadable-file") from None


def pin(spec: ModelSpec, *, weights: bool = True) -> tuple[SourceFile, ...]:
    """The files behind ``spec`` with their hashes, for a plan to hold on to.

    Files on the hub keep the hashes the hub gave; a catalog model has no files.

    Args:
        spec: a resolved model.
        weights: False leaves the hashes of weight files out, which take about a second per GB.

    Raises:
        InputError: a file is gone or of another size than when the model was resolved (``model-changed``).
    """
    base = _base(spec)
    if base is None:
        return spec.source.files
    return tuple(_pin_file(base / file.name, file, weights) for file in spec.source.files)


def _base(spec: ModelSpec) -> Path | None:
    """The directory the files are in; ``None`` if they are not on this machine."""
    if spec.source.kind == "directory":
        return Path(spec.source.location)
    return Path(spec.source.location).parent if spec.source.kind == "gguf" else None


def _pin_file(path: Path, file: SourceFile, weights: bool) -> SourceFile:
    size_bytes = size_of(path)
    if size_bytes != file.size_bytes:
        raise InputError(
            f"{path.name!r} changed since the model was read",
            numbers=f"{format_bytes(file.size_bytes)} then, {format_bytes(size_bytes)} now",
            hint="make the plan again",
            code="model-changed",
        )
    if file.sha256 or (not weights and path.name.endswith(WEIGHT_SUFFIXES)):
        return file
    return replace(file, sha256=sha256_of(path))
