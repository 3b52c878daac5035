"""A plan for a hub id: headers when planning, the checkpoint when applying, and a question in between."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import Qplan
from tests.hub_server import COMMIT, FakeHub

pytestmark = pytest.mark.slow


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

        done = qplan(
            "apply", "plan.json", "--output", "out", "--yes", "--seconds", "20", "--json", cwd=tmp_path, **environment
        )
        assert done.returncode in {0, 5}, done.stderr
        assert hub.sent_bytes["model.safetensors"] >= whole
        assert json.loads(done.stdout)["measured"]["perplexity_ratio"] == pytest.approx(1.0, abs=0.02)
    finally:
        server.shutdown()
