"""What a source reads from: files under a root and the output of tools. Reading never raises."""

from __future__ import annotations

import glob
import os
import shutil
from collections.abc import Callable, Iterable

_MAX_CHARS = 8_000_000
_TOOL_SECONDS = 10.0

Run = Callable[[tuple[str, ...]], str]


def run_tool(argv: tuple[str, ...]) -> str:
    """Standard output of a program; ``""`` where it is missing, fails or takes over ten seconds."""
    import subprocess

    try:
        done = subprocess.run(argv, capture_output=True, timeout=_TOOL_SECONDS, check=False, stdin=subprocess.DEVNULL)
    except (OSError, ValueError, subprocess.SubprocessError):
        return ""
    return done.stdout.decode("utf-8", "replace") if done.returncode == 0 else ""


class Reader:
    """Files below ``root`` and tools run by ``run``: the real machine, or a captured one in a test.

    Args:
        root: the directory that stands for ``/``.
        run: maps an argument vector to what the program printed; ``""`` is a failure.
        tools: names of the programs that exist; ``None`` looks in the PATH.
    """

    def __init__(self, root: str = "/", run: Run = run_tool, tools: Iterable[str] | None = None) -> None:
        self._root = str(root).rstrip("/")
        self._run = run
        self._tools = None if tools is None else frozenset(tools)

    def text(self, path: str) -> str:
        """Content of the file ``path`` (absolute), undecodable bytes replaced; ``""`` where it cannot be read."""
        try:
            with open(self._root + path, "rb") as file:  # noqa: PTH123 - sysfs has hundreds; Path costs half again
                return file.read(_MAX_CHARS).decode("utf-8", "replace").replace("\0", "")
        except (OSError, ValueError):
            return ""

    def line(self, path: str) -> str:
        """First line of ``path``, stripped."""
        return self.text(path).partition("\n")[0].strip()

    def exists(self, path: str) -> bool:
        """Whether ``path`` is there."""
        return os.path.exists(self._root + path)  # noqa: PTH110

    def glob(self, pattern: str) -> list[str]:
        """Sorted paths that match ``pattern``."""
        skip = len(self._root)
        return sorted(path[skip:] for path in glob.glob(glob.escape(self._root) + pattern))  # noqa: PTH207

    def resolve(self, path: str) -> str:
        """``path`` with links followed, for the name of the PCI device behind a card."""
        return os.path.realpath(self._root + path)

    def has_tool(self, name: str) -> bool:
        """Whether the program ``name`` is installed."""
        return shutil.which(name) is not None if self._tools is None else name in self._tools

    def tool(self, *argv: str) -> str:
        """What ``argv`` printed; ``""`` where the program is missing or fails."""
        return self._run(argv) if self.has_tool(argv[0]) else ""


def whole(text: object, *, low: int = 1, high: int = 1 << 62) -> int | None:
    """The whole number in ``text`` if it is between ``low`` and ``high``; a source that says 0 or -1 knows nothing."""
    if isinstance(text, bool):
        return None
    if isinstance(text, int):
        value = text
    else:
        digits = str(text).strip()
        if len(digits) > 30:
            return None
        try:
            value = int(digits, 16) if digits[:2].lower() == "0x" else int(digits)
        except ValueError:
            return None
    return value if low <= value <= high else None


def cpu_list(text: str) -> tuple[int, ...]:
    """Numbers of a kernel list such as ``0-3,8``; ``()`` for one that is malformed."""
    numbers: list[int] = []
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        low, high = whole(first, low=0, high=1 << 20), whole(last or first, low=0, high=1 << 20)
        if low is None or high is None or high < low or high - low > 8192:
            return ()
        numbers += range(low, high + 1)
    return tuple(numbers)
