"""A headless Chromium: what a page looks like, asks of the network and says on the console."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-extensions",
    "--virtual-time-budget=15000", "--enable-logging=stderr",
)  # fmt: skip


@dataclass(frozen=True)
class Visit:
    """What came of opening a page."""

    dom: str
    console: list[str]
    requests: list[str]
    """URLs that the page asked for over a network."""


def chromium() -> str:
    """The browser's program; the test is skipped where there is none."""
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        pytest.skip("chromium is not installed (`apt-get install chromium`)")
    return found


def visit(url: str, scratch: Path, *extra: str) -> Visit:
    """Open ``url`` with a profile of its own, without any name resolved."""
    log = scratch / "net.json"
    profile = f"--user-data-dir={scratch / 'profile'}"
    command = [chromium(), *FLAGS, profile, f"--log-net-log={log}", "--host-resolver-rules=MAP * ~NOTFOUND", *extra]
    done = subprocess.run([*command, "--dump-dom", url], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return Visit(dom=done.stdout, console=console, requests=_requests(log))


def _requests(log: Path) -> list[str]:
    """URLs of the requests that pages started; the browser's own (updates, accounts) start without an initiator."""
    try:
        events = json.loads(log.read_text())["events"]
    except ValueError:  # the browser was ended before it closed the list
        events = json.loads(log.read_text().rstrip().rstrip(",") + "]}")["events"]
    started = [event.get("params", {}) for event in events]
    pages = [p["url"] for p in started if "url" in p and str(p.get("initiator", "")).startswith(("file", "null"))]
    return sorted({url for url in pages if re.match(r"(https?|wss?|ftp):", url)})


def screenshot(url: str, target: Path, width: int, height: int) -> bytes:
    """A picture of ``url`` in a window of this size."""
    profile = f"--user-data-dir={target.parent / f'profile-{width}'}"
    command = [chromium(), *FLAGS, profile, f"--window-size={width},{height}", f"--screenshot={target}", url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return target.read_bytes()


def axe_source() -> Path:
    """axe-core's program: ``AXE_CORE`` names it, or npm fetches it; the test is skipped where neither works."""
    if named := os.environ.get("AXE_CORE"):
        return Path(named)
    home = Path.home() / ".cache" / "qplan-tests" / "axe-core"
    found = home / "node_modules" / "axe-core" / "axe.min.js"
    if not found.is_file():
        if shutil.which("npm") is None:
            pytest.skip("axe-core is not here and there is no npm to fetch it (`apt-get install npm`)")
        command = ["npm", "install", "--prefix", str(home), "--no-save", "--ignore-scripts", "axe-core@4"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        if not found.is_file():
            pytest.skip(f"npm could not fetch axe-core: {done.stderr.strip()[-200:]}")
    return found


RUN_AXE = """
<script>{axe}</script>
<script>
axe.run(document, {{resultTypes: ["violations"]}}).then(found => {{
  const shown = found.violations.map(v => ({{id: v.id, nodes: v.nodes.map(n => n.html.slice(0, 200))}}));
  const box = document.createElement("pre");
  box.id = "axe-result";
  box.textContent = JSON.stringify({{violations: shown, passes: found.passes.length}});
  document.body.append(box);
}});
</script>
"""


def axe_violations(page: Path, scratch: Path, *extra: str) -> list[dict[str, object]]:
    """What axe-core finds wrong with the HTML file ``page``, whose content policy (no scripts) is lifted for it."""
    from html import unescape

    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page.read_text())
    copy = scratch / "with-axe.html"
    copy.write_text(text.replace("</body>", RUN_AXE.format(axe=axe_source().read_text()) + "</body>"))
    dom = visit(copy.as_uri(), scratch, *extra).dom
    found = re.search(r'<pre id="axe-result">(.*?)</pre>', dom, re.DOTALL)
    assert found is not None, "axe gave no answer"
    answer = json.loads(unescape(found[1]))
    assert answer["passes"] > 10
    violations: list[dict[str, object]] = answer["violations"]
    return violations
