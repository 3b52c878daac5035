"""Values ↔ JSON. Reading is strict: unknown keys, wrong types and missing fields are errors with a path.

The values are plain dataclasses; pydantic checks them where they cross a file or process boundary and is
imported only then, as it costs a quarter of ``recommend``'s start-up.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from planner.core.errors import InputError

if TYPE_CHECKING:
    from pydantic import TypeAdapter

T = TypeVar("T")


_adapters: dict[type, TypeAdapter[Any]] = {}
"""Built once per class: building one costs milliseconds."""


def _adapter(cls: type[T]) -> TypeAdapter[T]:
    if cls not in _adapters:
        from pydantic import TypeAdapter

        _adapters[cls] = TypeAdapter(cls)
    return _adapters[cls]


def decode(cls: type[T], data: object, *, what: str) -> T:
    """``data`` (parsed JSON or TOML) as a ``cls``.

    Args:
        cls: a dataclass of ``planner.core``.
        data: what the file held.
        what: the file's name for the error.

    Raises:
        InputError: with the path and the reason of at most five faults.
    """
    from pydantic import ValidationError

    try:
        value: T = _adapter(cls).validate_python(data)
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, e['loc'])) or '(top)'}: {e['msg']}" for e in error.errors()[:5]]
        raise InputError(
            f"{what} is not a valid {cls.__name__}",
            numbers="\n".join(faults),
            hint="compare it with one that qplan wrote; keys it does not know are refused",
            code="bad-document",
        ) from None
    return value


def encode(value: object) -> Any:
    """``value`` as JSON-ready dicts, lists and scalars."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: encode(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): encode(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [encode(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    return value


def canonical_json(value: object) -> str:
    """``value`` as JSON with sorted keys and no spaces: the same bytes for the same content."""
    return json.dumps(encode(value), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def content_sha256(value: object) -> str:
    """SHA-256 of :func:`canonical_json`."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def read_json(path: Path) -> Any:
    """Parsed JSON of ``path``; a byte order mark, as some editors write, is skipped.

    Raises:
        InputError: the file is missing, unreadable or no JSON: not UTF-8, too deep, a number of thousands of digits,
            or one of Python's own ``NaN`` and ``Infinity``.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        document = json.loads(text, parse_constant=_no_number)
        if "\\ud" in text.lower():
            canonical_json(document).encode()  # half of a surrogate pair can be escaped but is no text
    except FileNotFoundError:
        raise InputError(f"{path} does not exist", code="missing-file") from None
    except OSError as error:
        raise InputError(
            f"{path} cannot be read", numbers=error.strerror or str(error), code="unreadable-file"
        ) from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON", numbers=str(error), code="bad-json") from None
    return document


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is no JSON number")


def write_atomically(path: Path, text: str) -> None:
    """Write ``text`` so that ``path`` holds either its old content or all of the new one.

    A symbolic link stays one; a device or a pipe, as ``/dev/stdout``, is written to and never replaced.

    Raises:
        InputError: no such folder can be made, no permission, no space, or a folder has this name.
    """
    try:
        if path.exists() and not path.is_file() and not path.is_dir():
            path.write_text(text, encoding="utf-8")
        else:
            if path.is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            _replace(path.resolve() if path.is_symlink() else path, text)
    except OSError as error:
        raise InputError(
            f"{path} cannot be written",
            numbers=error.strerror or str(error),
            hint="name a file in a folder that you can write and that has room",
            code="unwritable-file",
        ) from None


def _replace(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
