"""Refresh the outputs in README.md: a block from ``<!-- run: … -->`` to ``<!-- end -->`` holds what it names printed.

python benchmarks/readme.py           # all blocks; the apply block quantizes and measures the demo model
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
_BLOCK = re.compile(r"<!-- run: (?P<command>.+?) -->\n.*?<!-- end -->", re.DOTALL)
WIDTH = 100
LINES_SHOWN = 40


def shown(command: str, folder: Path) -> str:
    """What a command line (several joined by ``&&``) prints on stdout."""
    environment = {
        **os.environ,
        "COLUMNS": str(WIDTH),
        "QPLAN_HOME": str(folder / "home"),
        "PYTHONPATH": str(ROOT),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    done = subprocess.run(["bash", "-c", command], cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode not in {0, 5}:
        raise SystemExit(f"{command} exited with {done.returncode}:\n{done.stderr}")
    lines = [line.rstrip() for line in done.stdout.splitlines()]
    body = "\n".join(lines[:LINES_SHOWN]).strip("\n")
    return f"{body}\n…" if len(lines) > LINES_SHOWN else body


def main() -> None:
    """Rewrite the blocks in place."""
    with tempfile.TemporaryDirectory() as folder:

        def refreshed(match: re.Match[str]) -> str:
            command = match["command"]
            return f"<!-- run: {command} -->\n```\n$ {command}\n{shown(command, Path(folder))}\n```\n<!-- end -->"

        README.write_text(_BLOCK.sub(refreshed, README.read_text("utf-8")), "utf-8")


if __name__ == "__main__":
    main()
