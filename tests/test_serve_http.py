"""llama.cpp's own server on the demo model: planned, applied, served, asked over HTTP."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from planner.core.errors import Exit
from tests.test_serving import ask, gone, serving

pytestmark = pytest.mark.slow
pytest.importorskip("llama_cpp.server.app", reason="the extra `serve` is not installed")


@pytest.fixture(scope="module")
def applied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model as Q4_K_M with its plan and its report."""
    folder = tmp_path_factory.mktemp("served")
    for arguments in (
        ("plan", "demo", "--context", "512", "--types", "Q4_K_M", "-o", "plan.json"),
        ("apply", "plan.json", "--output", ".", "--seconds", "5"),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "planner.cli", *arguments],
            cwd=folder,
            env=environment(folder),
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        assert done.returncode in {Exit.DONE, Exit.OUTSIDE}, done.stderr
    return folder


def environment(folder: Path) -> dict[str, str]:
    """Without a llama-server on PATH, and with settings that must not reach the server."""
    root = str(Path(__file__).parent.parent)
    clean = {"QPLAN_HOME": str(folder / "home"), "PYTHONPATH": root, "PATH": "/usr/bin:/bin"}
    return {**os.environ, **clean, "HOST": "0.0.0.0", "N_CTX": "64", "http_proxy": "http://127.0.0.1:9"}


@pytest.mark.parametrize(
    ("target", "more"),
    [("plan.json", ()), ("report.json", ("--no-repack",)), ("demo-Q4_K_M.gguf", ("--kv-type", "q8_0"))],
)
def test_a_chat_is_answered_over_http(applied: Path, target: str, more: tuple[str, ...]) -> None:
    with serving(environment(applied), str(applied / target), "--context", "512", *more) as (child, url):
        chat = {"messages": [{"role": "user", "content": "Say something."}], "max_tokens": 8, "temperature": 0}
        answer = ask(f"{url}/chat/completions", chat)
        (choice,) = answer["choices"]
        assert choice["message"]["role"] == "assistant" and choice["message"]["content"].strip()
        assert 1 <= answer["usage"]["completion_tokens"] <= 8
        log = "".join(path.read_text(errors="replace") for path in (applied / "home" / "logs").iterdir())
        assert re.search(r"n_ctx +=\s*512\b", log)
        child.send_signal(signal.SIGINT)
        _, complaints = child.communicate(timeout=60)
        assert child.returncode == Exit.INTERRUPTED and "Traceback" not in complaints
        assert gone(url)
