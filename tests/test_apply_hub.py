"""A plan for a hub id: headers when planning, the checkpoint when applying, and a question in between."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import Qplan, hear_ctrl_c
from tests.hub_server import COMMIT, FakeHub

pytestmark = pytest.mark.slow
PART = f"{64 * '?'}.incomplete"
"""A large file that is on its way is named after its hash."""


def interrupt_in_the_download(folder: Path, environment: dict[str, str]) -> None:
    """Ctrl-C once some of the weights are there."""
    own = {**os.environ, **environment, "PYTHONPATH": str(Path(__file__).parent.parent)}
    command = [sys.executable, "-m", "planner.cli", "apply", "plan.json", "--output", "out", "--yes"]
    running = subprocess.Popen(command, cwd=folder, env=own, stderr=subprocess.PIPE, text=True, preexec_fn=hear_ctrl_c)
    until = time.monotonic() + 120
    while time.monotonic() < until and running.poll() is None:
        if any(path.stat().st_size for path in (folder / "hf").rglob(PART)):
            break
        time.sleep(0.1)
    running.send_signal(signal.SIGINT)
    _, said = running.communicate(timeout=60)
    assert running.returncode == 130 and "Traceback" not in said, said


def test_a_hub_model_is_asked_for_downloaded_quantized_and_verified(
    qplan: Qplan, demo_checkpoint: Path, tmp_path: Path
) -> None:
    pytest.importorskip("huggingface_hub")
    hub = FakeHub(folders={"someone/tiny-llama": demo_checkpoint})
    server = hub.start()
    environment = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1"}
    try:
        planned = qplan(
            "plan", "someone/tiny-llama", "--context", "512", "--types", "Q6_K", cwd=tmp_path, **environment
        )
        assert planned.returncode == 0, planned.stderr
        plan = json.loads((tmp_path / "plan.json").read_text())
        assert plan["model"]["kind"] == "hub" and plan["model"]["revision"] == COMMIT
        whole = (demo_checkpoint / "model.safetensors").stat().st_size
        assert hub.sent_bytes["model.safetensors"] < whole / 10

        asked = qplan("apply", "plan.json", "--output", "out", cwd=tmp_path, **environment)
        assert asked.returncode == 6 and "--yes" in asked.stderr
        assert hub.sent_bytes["model.safetensors"] < whole / 10

        hub.piece_seconds = 0.2
        interrupt_in_the_download(tmp_path, environment)
        hub.piece_seconds = 0.0
        (kept,) = (tmp_path / "hf").rglob(PART)
        there = kept.stat().st_size
        assert 0 < there < whole
        hub.sent_bytes.clear()

        done = qplan(
            "apply", "plan.json", "--output", "out", "--yes", "--seconds", "20", "--json", cwd=tmp_path, **environment
        )
        assert done.returncode in {0, 5}, done.stderr
        assert whole - there <= hub.sent_bytes["model.safetensors"] < whole - there + (1 << 17)  # and its header
        assert "download someone/tiny-llama" in done.stderr
        assert json.loads(done.stdout)["measured"]["perplexity_ratio"] == pytest.approx(1.0, abs=0.02)
    finally:
        server.shutdown()
