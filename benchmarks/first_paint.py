"""Time from the start of a program to its first frame: the wizard beside the least that Textual can paint.

Each program runs in a pseudo-terminal of 80 columns and 24 lines and is ended once its text has come. They take turns,
so that a busy machine slows both; processor time, the child's own, depends less on what else runs.

    python benchmarks/first_paint.py [ROUNDS]
"""

from __future__ import annotations

import fcntl
import os
import pty
import resource
import select
import signal
import struct
import sys
import tempfile
import termios
import time
from pathlib import Path
from statistics import median

ROUNDS = 11
LONGEST_SECONDS = 60.0
ROOT = Path(__file__).parent.parent
BARE = """
from textual.app import App
from textual.widgets import Footer, Static

class Bare(App):
    BINDINGS = [("q", "quit", "Quit")]

    def compose(self):
        yield Static("first words")
        yield Footer()

Bare().run(inline=False)
"""
PROGRAMS = {
    "Python alone": ([sys.executable, "-c", "print('first words', flush=True); input()"], b"first words"),
    "bare Textual app": ([sys.executable, "-c", BARE], b"first words"),
    "qplan wizard": ([sys.executable, "-m", "planner.cli", "wizard"], b"this machine"),
}
"""Program and the words of its first frame."""


def first_frame(command: list[str], words: bytes, home: str) -> tuple[float, float]:
    """Seconds from the start to the first frame by the clock, and of processor time."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    child, terminal = pty.fork()
    if child == 0:
        own = {"TERM": "xterm-256color", "QPLAN_HOME": home, "PYTHONPATH": str(ROOT), "COLORTERM": "truecolor"}
        os.execvpe(command[0], command, {**os.environ, **own})
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    try:
        _wait_for(terminal, words, began)
        seconds = time.perf_counter() - began
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(terminal)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def _wait_for(terminal: int, words: bytes, began: float) -> None:
    seen = b""
    while words not in seen:
        if not select.select([terminal], [], [], began + LONGEST_SECONDS - time.perf_counter())[0]:
            raise SystemExit(f"nothing was painted in {LONGEST_SECONDS:g} s; the end of it: {seen[-300:]!r}")
        seen += os.read(terminal, 1 << 16)


def main() -> None:
    """Print medians and the ratio."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else ROUNDS
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in PROGRAMS}
    with tempfile.TemporaryDirectory() as home:
        for number in range(rounds + 1):  # the first round fills the caches of files
            for name, (command, words) in PROGRAMS.items():
                taken = first_frame(command, words, home)
                if number:
                    found[name].append(taken)
    middle = {name: tuple(median(column) for column in zip(*taken, strict=True)) for name, taken in found.items()}
    print(f"first frame, median of {rounds} by turns; load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    for name, (seconds, cpu) in middle.items():
        fastest = min(taken[0] for taken in found[name])
        print(f"{name:<18} {seconds:6.3f} s  fastest {fastest:6.3f} s  processor {cpu:6.3f} s")
    wizard, bare = middle["qplan wizard"], middle["bare Textual app"]
    print(f"wizard / bare Textual app: {wizard[0] / bare[0]:.2f} by the clock, {wizard[1] / bare[1]:.2f} of processor")


if __name__ == "__main__":
    main()
