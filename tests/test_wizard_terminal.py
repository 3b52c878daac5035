"""The real wizard in a real terminal, and in a browser: no pilot, no patched part."""

from __future__ import annotations

import asyncio
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("textual", reason="the wizard's extra is not installed: pip install 'qplan[tui]'")

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.slow


class Terminal:
    """A terminal in a tmux server of its own."""

    def __init__(self, folder: Path, width: int, height: int) -> None:
        self._socket = folder / "tmux"
        self._size = ("-x", str(width), "-y", str(height))

    def _tmux(self, *arguments: str) -> str:
        command = ["tmux", "-S", str(self._socket), "-f", os.devnull, *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=False).stdout

    def start(self, command: str, folder: Path) -> None:
        self._tmux("new-session", "-d", *self._size, "-c", str(folder), command)

    def keys(self, *names: str) -> None:
        for name in names:
            self._tmux("send-keys", name)
            time.sleep(0.05)

    def type(self, text: str) -> None:
        self._tmux("send-keys", "-l", text)

    def screen(self) -> str:
        return self._tmux("capture-pane", "-p")

    def wait_for(self, text: str, seconds: float = 60.0) -> str:
        """The screen once it shows ``text``."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if re.search(text, shown := self.screen()):
                return shown
            time.sleep(0.1)
        raise AssertionError(f"{text!r} did not come:\n{self.screen()}")

    def close(self) -> None:
        self._tmux("kill-server")


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Terminal]:
    """80×24, the smallest that all of the wizard is for."""
    if shutil.which("tmux") is None:
        pytest.skip("tmux is not installed (`apt-get install tmux`)")
    made = Terminal(tmp_path, 80, 24)
    yield made
    made.close()


def environment(folder: Path) -> dict[str, str]:
    return {"QPLAN_HOME": str(folder / "home"), "PYTHONPATH": str(ROOT), "TERM": "xterm-256color"}


def test_from_start_to_a_verified_demo_model(terminal: Terminal, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    exported = " ".join(f"{name}={shlex.quote(value)}" for name, value in environment(tmp_path).items())
    qplan = f"{exported} {shlex.quote(sys.executable)} -m planner.cli"
    # bare `qplan` on a terminal; its stdout, the command lines, stays to be read after it ends
    terminal.start(f"{qplan}; echo left with $?; sleep 600", tmp_path)
    terminal.wait_for("Hardware")
    terminal.wait_for("RAM .*usable")
    terminal.keys("Enter")
    terminal.wait_for("path, hub id or size")
    terminal.type("demo")
    terminal.wait_for("demo .*5.8 M|use demo")
    terminal.keys("Enter")
    terminal.wait_for("Users at once")
    terminal.wait_for(r"→ GGUF")
    terminal.keys("Enter")
    terminal.wait_for(r"decode t/s")
    terminal.keys("Enter")
    terminal.wait_for("Carry it out")
    terminal.wait_for("95 % range")
    terminal.keys("Enter")
    terminal.wait_for(r"quantity +predicted", 400)
    shown = terminal.screen()
    assert "perplexity ratio" in shown and "KL divergence" in shown
    terminal.keys("s")
    shown = terminal.wait_for(r"answers at http://127|could not be served", 200)
    served = "answers at" in shown
    if not served:  # the extra is not installed
        assert "missing-dependency" in shown
    terminal.keys("Escape")
    terminal.wait_for(r"quantity +predicted")
    terminal.keys("C-q")
    if served:
        terminal.wait_for("Stop and leave")
        terminal.keys("y")
    said = re.sub(r"\s+", " ", terminal.wait_for(r"left with [05]"))
    assert "qplan plan demo" in said and "qplan apply plan.json --output ." in said
    assert ("qplan serve report.json" in said) or not served
    assert (tmp_path / "report.json").is_file() and (tmp_path / "report.html").is_file()
    assert list(tmp_path.glob("demo-*.gguf"))


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def status(url: str, **headers: str) -> int:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=10) as answer:
            code: int = answer.status
            return code
    except urllib.error.HTTPError as error:
        return error.code


def test_the_same_wizard_in_a_browser_for_this_machine_alone(tmp_path: Path) -> None:
    pytest.importorskip("textual_serve")
    port = free_port()
    command = [sys.executable, "-m", "planner.cli", "wizard", "--web", "--port", str(port)]
    own = {**os.environ, **environment(tmp_path)}
    server = subprocess.Popen(command, cwd=tmp_path, env=own, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}/"
    try:
        until = time.monotonic() + 60
        while time.monotonic() < until:
            try:
                assert status(url) == 200
                break
            except urllib.error.URLError:
                time.sleep(0.2)
        assert status(url) == 200
        assert status(url, Host="evil.example") == 403
        assert status(f"{url}ws", Origin="http://evil.example", Connection="Upgrade", Upgrade="websocket") == 403
        assert _listening(port) == {"127.0.0.1"}
        assert "Hardware" in asyncio.run(asyncio.wait_for(_painted(f"{url}ws?width=100&height=30"), 60))
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(20)


async def _painted(url: str) -> str:
    """What the wizard paints for a browser that opens its page, up to the first head of a screen."""
    import aiohttp

    seen = ""
    async with aiohttp.ClientSession() as session, session.ws_connect(url) as page:
        async for message in page:
            data = message.data
            seen += data.decode("utf-8", errors="replace") if isinstance(data, bytes) else ""
            if "Result" in seen:
                break
    return seen


def _listening(port: int) -> set[str]:
    """Addresses that a server listens on at ``port``, from /proc."""
    found = set()
    for table in (Path("/proc/net/tcp"), Path("/proc/net/tcp6")):
        if not table.is_file():
            pytest.skip("no /proc/net to look at")
        for line in table.read_text().splitlines()[1:]:
            local, state = line.split()[1], line.split()[3]
            address, _, number = local.partition(":")
            if int(number, 16) == port and state == "0A":
                found.add(
                    ".".join(str(int(address[i : i + 2], 16)) for i in (6, 4, 2, 0)) if len(address) == 8 else address
                )
    return found
