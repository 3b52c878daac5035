"""A file that one process at a time holds."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from planner.core.errors import ExecutionFailed


@contextlib.contextmanager
def exclusive(path: Path, *, busy: str, unwritable: str, hint: str, unwritable_hint: str) -> Iterator[None]:
    """Hold the file ``path``; its folder is made.

    Raises:
        ExecutionFailed: another process holds it (``locked``), or it cannot be written (``output-not-writable``).
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = path.open("w")
    except OSError as error:
        raise ExecutionFailed(
            unwritable, numbers=str(error), hint=unwritable_hint, code="output-not-writable"
        ) from None
    with handle:
        try:
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:
            pass  # Windows: no advisory locks; two at once are the user's to avoid
        except OSError:
            raise ExecutionFailed(busy, hint=hint, code="locked") from None
        yield
