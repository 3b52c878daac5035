"""An artifact as one thing, be it a file or a folder of safetensors with their configuration: its size and its hash."""

from __future__ import annotations

import hashlib
from pathlib import Path

from planner.models.fingerprint import sha256_of

WEIGHTS_SUFFIX = ".safetensors"


def size_bytes(path: Path) -> int:
    """Bytes of a file; of a folder those of its weights, which is what is predicted.

    Raises:
        OSError: it is missing or unreadable.
    """
    if not path.is_dir():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.iterdir() if file.name.endswith(WEIGHTS_SUFFIX))


def sha256(path: Path) -> str:
    """SHA-256 of a file; of a folder that of its files' hashes and names, in the order of the names.

    Raises:
        InputError: it is missing or unreadable.
    """
    if not path.is_dir():
        return sha256_of(path)
    files = sorted((file.relative_to(path).as_posix(), file) for file in path.rglob("*") if file.is_file())
    listed = "".join(f"{sha256_of(file)}  {name}\n" for name, file in files)
    return hashlib.sha256(listed.encode()).hexdigest()
