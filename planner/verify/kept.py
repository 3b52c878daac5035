"""What a measurement had found when it was killed, so that a rerun goes on from there and ends with the same bytes.

Both kinds of file carry a key: a hash of the model, the text and all settings. One with another key, or a damaged one,
is worth nothing, and the measurement starts over. Nothing here is trusted beyond that: arrays are read without pickles.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
import zipfile
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from planner.core.codec import content_sha256

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

EVERY_CHUNKS, EVERY_SECONDS = 16, 30.0
"""Sums are kept after so many chunks, or so long after the last time: some megabytes each time."""
_SAMPLES, _SAMPLE_BYTES = 64, 1 << 16
"""Of a model's file, spread evenly from its header to its end: other weights differ in all of them."""


def kept_path(output: Path) -> Path:
    """Where the step that makes ``output`` notes how far it is."""
    return output.with_name(f".{output.name}.partial.kept")


def key_of(model: Path, text: str, **settings: object) -> str:
    """Hash of all that decides what is measured: the model's bytes, the text, the settings and llama.cpp's version."""
    try:
        version = metadata.version("llama-cpp-python")
    except metadata.PackageNotFoundError:
        version = ""
    said = {name: value if isinstance(value, int | None) else str(value) for name, value in settings.items()}
    text_sha256 = hashlib.sha256(text.encode()).hexdigest()
    return content_sha256({"model": _fingerprint(model), "text": text_sha256, "tool": version, **said})


def _fingerprint(path: Path) -> str:
    size, digest = path.stat().st_size, hashlib.sha256()
    digest.update(str(size).encode())
    with path.open("rb") as file:
        for number in range(_SAMPLES):
            file.seek(max(0, size - _SAMPLE_BYTES) * number // (_SAMPLES - 1))
            digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


@dataclass(slots=True)
class KeptSums:
    """Sums over the first so many chunks, in one file that is replaced as a whole."""

    path: Path
    key: str
    resumed: bool = False
    _done: int = 0
    _at: float = field(default_factory=time.monotonic)

    def restore(self, sums: dict[str, NDArray[np.float64]], counts: dict[str, NDArray[np.int64]]) -> int:
        """Put back what was kept; the number of chunks that are in it, 0 where there is nothing."""
        import numpy as np

        with contextlib.suppress(OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            with np.load(self.path, allow_pickle=False) as stored:
                if str(stored["key"]) != self.key:
                    return 0
                names = [str(name) for name in stored["names"]]
                found = {name: (stored[f"sums.{i}"], stored[f"counts.{i}"]) for i, name in enumerate(names)}
                done = int(stored["done"])
            sums.update({name: values for name, (values, _) in found.items()})
            counts.update({name: rows for name, (_, rows) in found.items()})
            self._done, self.resumed = done, done > 0
            return done
        return 0

    def offer(self, done: int, sums: dict[str, NDArray[np.float64]], counts: dict[str, NDArray[np.int64]]) -> None:
        """Keep the sums over ``done`` chunks if it is time to."""
        if done - self._done < EVERY_CHUNKS and time.monotonic() - self._at < EVERY_SECONDS:
            return
        import numpy as np

        names = sorted(sums)
        arrays: dict[str, NDArray[Any]] = {f"sums.{i}": sums[name] for i, name in enumerate(names)}
        arrays |= {f"counts.{i}": counts[name] for i, name in enumerate(names)}
        fresh = self.path.with_name(f"{self.path.name}.new")
        with fresh.open("wb") as file:
            np.savez(file, key=np.array(self.key), names=np.array(names), done=np.array(done), **arrays)  # type: ignore[arg-type]
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(self.path)
        self._done, self._at = done, time.monotonic()

    def forget(self) -> None:
        """The measurement is complete."""
        self.path.unlink(missing_ok=True)
        self.path.with_name(f"{self.path.name}.new").unlink(missing_ok=True)


class KeptRows:
    """Named results, a line each, written as they are found."""

    def __init__(self, path: Path, key: str) -> None:
        """Open it; empty where there is none, or one of another measurement."""
        self.path = path
        self._rows = self._read(key)
        self.resumed = bool(self._rows)
        if not self._rows:
            path.write_text(json.dumps({"key": key}) + "\n", encoding="utf-8")

    def _read(self, key: str) -> dict[str, Any]:
        rows: dict[str, Any] = {}
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            lines = self.path.read_bytes().splitlines(keepends=True)
            whole = [line for line in lines if line.endswith(b"\n")]
            if not whole or json.loads(whole[0]).get("key") != key:
                return {}
            for line in whole[1:]:
                entry = json.loads(line)
                rows[str(entry["name"])] = entry["value"]
            if len(whole) < len(lines):  # the last line was cut off
                self.path.write_bytes(b"".join(whole))
        return rows

    def get(self, name: str) -> Any:
        """What was found; ``None`` where it was not yet."""
        return self._rows.get(name)

    def put(self, name: str, value: Any) -> None:
        """Keep a result: numbers come back as they were, to the last bit."""
        self._rows[name] = value
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"name": name, "value": value}) + "\n")

    def forget(self) -> None:
        """The measurement is complete."""
        self.path.unlink(missing_ok=True)
