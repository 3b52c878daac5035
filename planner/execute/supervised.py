"""``python -m planner.execute.supervised PROGRAM…``: run a program that ends when the process that asked for it does.

A program that is not ours does not look whether its parent is alive. This stands between: its stdin is a pipe from the
parent, and when that closes, however the parent died, the program and its children are ended.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading

PARENT_GONE = 70


def main(command: list[str]) -> int:
    """Run ``command``; its exit code."""
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    threading.Thread(target=_end_with_parent, args=(child,), daemon=True).start()
    return child.wait()


def _end_with_parent(child: subprocess.Popen[bytes]) -> None:
    while os.read(0, 1 << 12):  # not through a buffer, whose lock would be held when the interpreter ends
        continue
    if os.name == "posix":
        import signal

        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)  # a build of a package has children of its own
    else:
        child.kill()
    os._exit(PARENT_GONE)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
