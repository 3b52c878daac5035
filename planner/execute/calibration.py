"""Texts and matrices that steps calibrate with: pinned by hash when planned, checked when used."""

from __future__ import annotations

import hashlib
from pathlib import Path

from planner.core.data import data_path
from planner.core.errors import InputError, StalePlan
from planner.core.plan import BUILT_IN, MATRIX, TEXT, CalibrationSource
from planner.execute import datasets

BUILT_IN_FOLDER = "calibration"
"""In ``data/``: its README tells what is in it and under which licences."""
MOST_TEXT_BYTES = 64 << 20
"""Far more text than any calibration needs; a path by mistake would be larger."""
MOST_MATRIX_BYTES = 4 << 30
"""A matrix of a model of a trillion weights in small experts has a few hundred million columns in all."""
_MATRIX_SUFFIXES = (".gguf", ".dat")
_SUFFIXES = (".txt", ".md")


def built_in(chunks: int | None = None, seed: int = 0) -> CalibrationSource:
    """The text that comes with qplan."""
    return _pinned(BUILT_IN, "general", text_of(data_path(BUILT_IN_FOLDER)).encode(), chunks, seed)


def from_text(path: Path, chunks: int | None = None, seed: int = 0) -> CalibrationSource:
    """A text file, all ``.txt`` and ``.md`` files of a folder in the order of their names, or ``hub:`` and a dataset.

    Raises:
        InputError: there is none, it is unreadable, not UTF-8, or too large.
        UsageError: it is no name of a dataset, or the dataset has no such split or column.
        MissingDependency: what reads a dataset is not installed.
    """
    if is_dataset(path):
        content, location = datasets.read(path.as_posix())
        return _pinned(TEXT, location, content.encode(), chunks, seed)
    return _pinned(TEXT, str(path.absolute()), text_of(path).encode(), chunks, seed)


def from_matrix(path: Path) -> CalibrationSource:
    """A finished importance matrix.

    Raises:
        InputError: it is missing or unreadable.
    """
    return _pinned(MATRIX, str(path.absolute()), _read(path), None, 0)


def _pinned(kind: str, location: str, content: bytes, chunks: int | None, seed: int) -> CalibrationSource:
    digest = hashlib.sha256(content).hexdigest()
    return CalibrationSource(
        kind=kind, location=location, sha256=digest, size_bytes=len(content), chunks=chunks, seed=seed
    )


def text_of(path: Path) -> str:
    """The text of a file or a folder.

    Raises:
        InputError: as for :func:`from_text`.
    """
    files = [path]
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.suffix in _SUFFIXES and p.name != "README.md" and p.is_file())
        if not files:
            raise InputError(f"{path} holds no {' or '.join(_SUFFIXES)} file", code="bad-text")
    try:
        return "\n".join(_read(file).decode("utf-8-sig") for file in files)
    except UnicodeDecodeError as error:
        raise InputError(f"the text {path} is not UTF-8", numbers=str(error), code="bad-text") from None


def _read(path: Path) -> bytes:
    try:
        size, most = path.stat().st_size, MOST_MATRIX_BYTES if is_matrix(path) else MOST_TEXT_BYTES
        if path.is_file() and size <= most:
            return path.read_bytes()
    except OSError as error:
        raise InputError(
            f"{path} cannot be read", numbers=error.strerror or str(error), hint="name a file", code="bad-text"
        ) from None
    raise InputError(
        f"{path} is no text to calibrate with",
        numbers=f"{size} bytes, at most {most}" if path.is_file() else "it is no ordinary file",
        code="bad-text",
    )


def text(calibration: CalibrationSource) -> str:
    """The text that was pinned.

    Raises:
        InputError: it cannot be read.
        StalePlan: it is another than when the plan was made.
    """
    if calibration.location.startswith(datasets.PREFIX):
        content, _ = datasets.read(calibration.location)
    else:
        path = data_path(BUILT_IN_FOLDER) if calibration.kind == BUILT_IN else Path(calibration.location)
        content = text_of(path)
    _check(calibration, content.encode())
    return content


def check(calibration: CalibrationSource) -> None:
    """Refuse before anything is made what the steps could not use.

    Raises:
        InputError: it cannot be read.
        StalePlan: it is another than when the plan was made.
    """
    if calibration.kind == MATRIX:
        matrix_path(calibration)
    else:
        text(calibration)


def is_dataset(path: Path) -> bool:
    """Whether a dataset of the hub is named and no file."""
    return path.as_posix().startswith(datasets.PREFIX)


def is_matrix(path: Path) -> bool:
    """Whether the file's name says that it is an importance matrix and no text."""
    return path.suffix in _MATRIX_SUFFIXES and not is_dataset(path)


def matrix_path(calibration: CalibrationSource) -> Path:
    """The matrix that was pinned, unchanged.

    Raises:
        InputError: it cannot be read.
        StalePlan: it changed.
    """
    path = Path(calibration.location)
    _check(calibration, _read(path))
    return path


def _check(calibration: CalibrationSource, content: bytes) -> None:
    if hashlib.sha256(content).hexdigest() != calibration.sha256:
        raise StalePlan(
            f"{calibration.location}, which the plan calibrates with, changed",
            numbers=f"planned with {calibration.size_bytes} bytes, found {len(content)}",
            hint="make a new plan",
            code="calibration-changed",
        )


def described(calibration: CalibrationSource) -> str:
    """What a file or a report says the text was; no folder of this machine."""
    name = "qplan's general text" if calibration.kind == BUILT_IN else Path(calibration.location).name
    if calibration.location.startswith(datasets.PREFIX):
        name = calibration.location
    return f"{name} (sha256 {calibration.sha256[:16]})"
