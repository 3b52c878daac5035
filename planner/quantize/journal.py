"""What is safely on the disk of an unfinished file, so that a killed run goes on where it stopped.

A journal lies beside the partial file. Its first line holds the key: a hash of all that decides the outputs' bytes.
Each further line was written after the data it speaks of had been synced. A line that was cut off is left out, and a
journal with another key is worth nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from planner.core.errors import ExecutionFailed
from planner.core.job import journal_path

FORMAT = 1


@dataclass(slots=True)
class Progress:
    """What a journal tells."""

    units: set[int] = field(default_factory=set)
    """Numbers of the units whose bytes are in every partial file."""
    shards: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Shards that were read to their end: ``sha256``, and ``size`` and ``mtime_ns`` as they were."""
    complete: bool = False
    """Everything was written and synced; only the renaming may be left."""


def _entry(line: str) -> dict[str, Any]:
    if not line.endswith("\n"):
        return {}  # cut off by a crash
    with contextlib.suppress(json.JSONDecodeError):
        entry = json.loads(line)
        return entry if isinstance(entry, dict) else {}
    return {}


class Journal:
    """The journal of one output, held by one process at a time."""

    def __init__(self, output: Path) -> None:
        """Open it, empty where there is none.

        Raises:
            ExecutionFailed: another process is making the same output (``locked``).
            OSError: it cannot be written.
        """
        self._descriptor = os.open(journal_path(output), os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            import fcntl

            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:
            pass  # Windows has no advisory locks
        except OSError:
            os.close(self._descriptor)
            raise ExecutionFailed(
                f"another qplan is making {output}", hint="wait for it, or choose another name", code="locked"
            ) from None

    def read(self, key: str) -> Progress | None:
        """What an earlier run left; ``None`` where there was none, or it was about something else."""
        os.lseek(self._descriptor, 0, os.SEEK_SET)
        with os.fdopen(os.dup(self._descriptor), encoding="utf-8", errors="replace") as stream:
            lines = [line for line in stream if line.strip()]
        found = Progress()
        for number, line in enumerate(lines):
            entry = _entry(line)
            if number == 0 and (entry.get("format"), entry.get("key")) != (FORMAT, key):
                return None
            for first, last in entry.get("units", ()):
                found.units.update(range(first, last + 1))
            found.shards.update(entry.get("shards", {}))
            found.complete = found.complete or bool(entry.get("complete"))
        return found if lines else None

    def begin(self, key: str) -> None:
        """Forget what it held; this run is about ``key``."""
        os.ftruncate(self._descriptor, 0)
        self._append({"format": FORMAT, "key": key})

    def done(self, units: Iterable[int]) -> None:
        """Units are on the disk."""
        self._append({"units": _runs(sorted(units))})

    def shard(self, name: str, facts: dict[str, Any]) -> None:
        """A shard was read to its end."""
        self._append({"shards": {name: facts}})

    def complete(self) -> None:
        """All is on the disk."""
        self._append({"complete": True})

    def close(self) -> None:
        """Close the file and leave it."""
        os.close(self._descriptor)

    def _append(self, entry: dict[str, Any]) -> None:
        # a line that an earlier run left unfinished must not swallow this one
        os.write(self._descriptor, ("\n" + json.dumps(entry, separators=(",", ":")) + "\n").encode())
        os.fsync(self._descriptor)


def _runs(numbers: list[int]) -> list[list[int]]:
    """Sorted numbers as [first, last] of each run."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return runs
