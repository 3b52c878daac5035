"""Apply on real files with the real quantizer: results, resuming, interruption, refusals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from planner.models.fingerprint import sha256_of
from tests.conftest import Qplan, hear_ctrl_c

pytestmark = pytest.mark.slow

ARTIFACT = "demo-Q4_K_M.gguf"


@pytest.fixture(scope="module")
def applied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model planned and applied once; the folder holds plan.json, the artifact and the report."""
    folder = tmp_path_factory.mktemp("applied")
    run(folder, "plan", "demo", "--context", "512", "--types", "Q4_K_M", "-o", "plan.json")
    done = run(folder, "apply", "plan.json", "--output", ".", "--seconds", "30")
    assert done.returncode in {0, 5}, done.stderr
    return folder


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "QPLAN_HOME": str(folder / "home"), "PYTHONPATH": str(Path(__file__).parent.parent)}
    command = [sys.executable, "-m", "planner.cli", *arguments]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600, check=False
    )


def test_the_report_keeps_the_contract(applied: Path) -> None:
    report = json.loads((applied / "report.json").read_text())
    keys = {"format_version", "plan_sha256", "artifact", "steps", "predicted", "measured", "verdicts", "ok"}
    assert keys <= set(report)
    quantities = {"file_bytes", "peak_memory_bytes", "prefill_tokens_per_second", "decode_tokens_per_second"}
    quantities |= {"perplexity_ratio", "kl_divergence_nats"}
    assert quantities <= set(report["measured"])
    assert {v["quantity"] for v in report["verdicts"]} == quantities
    assert all({"quantity", "predicted", "low", "high", "measured", "ok"} <= set(v) for v in report["verdicts"])


def test_the_file_has_the_predicted_size_and_the_quality_is_plausible(applied: Path) -> None:
    report = json.loads((applied / "report.json").read_text())
    size = (applied / ARTIFACT).stat().st_size
    assert report["measured"]["file_bytes"] == size
    assert size == pytest.approx(report["predicted"]["file_bytes"], rel=0.005)
    assert 1.0 < report["measured"]["perplexity_ratio"] < 1.05
    assert 0.0 < report["measured"]["kl_divergence_nats"] < 0.1


def test_only_the_artifact_and_the_papers_stay(applied: Path) -> None:
    names = {path.name for path in applied.iterdir()}
    assert names == {ARTIFACT, "plan.json", "report.json", "report.html", ".qplan", "home"}


def test_a_second_apply_has_nothing_to_do(applied: Path) -> None:
    before = (applied / ARTIFACT).stat().st_mtime_ns
    done = run(applied, "apply", "plan.json", "--output", ".")
    assert "nothing to do" in done.stderr
    assert (applied / ARTIFACT).stat().st_mtime_ns == before


def test_the_next_estimate_here_names_the_measurement(applied: Path) -> None:
    plan = json.loads((applied / "plan.json").read_text())
    done = run(
        applied, "recommend", "demo", "--context", "512", "--types", "Q4_K_M", "--json",
        "--threads", str(plan["placement"]["threads"]),
    )  # fmt: skip
    chosen = json.loads(done.stdout)["chosen"]
    report = json.loads((applied / "report.json").read_text())
    assert chosen["quality"]["basis"] == "measured"
    assert chosen["quality"]["perplexity_ratio"] == pytest.approx(report["measured"]["perplexity_ratio"], rel=1e-4)
    if any("not remembered" in note for note in report["notes"]):
        pytest.skip("other programs were busy while the speed was measured, so it was rightly not kept")
    assert chosen["speed"]["basis"] == "measured"
    assert chosen["speed"]["decode_tokens_per_second"] == pytest.approx(
        report["measured"]["decode_tokens_per_second"], rel=1e-4
    )


def test_verify_measures_the_artifact_again(applied: Path) -> None:
    done = run(applied, "verify", ARTIFACT, "--seconds", "20", "--json")
    assert done.returncode in {0, 5}, done.stderr
    assert json.loads(done.stdout)["measured"]["decode_tokens_per_second"] > 0


def test_a_quantized_file_is_recommended_as_it_is(applied: Path) -> None:
    done = run(applied, "recommend", ARTIFACT, "--context", "512", "--json")
    chosen = json.loads(done.stdout)["chosen"]
    assert chosen["type"] == "Q4_K_M" and chosen["file_bytes"] == (applied / ARTIFACT).stat().st_size
    assert ARTIFACT in chosen["commands"]["serve"]
    refused = run(applied, "plan", ARTIFACT, "-o", "other.json")
    assert refused.returncode == 2 and "already-quantized" in refused.stderr


def test_killed_at_any_moment_and_rerun_it_makes_the_same_bytes(applied: Path, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_bytes((applied / "plan.json").read_bytes())
    wanted = sha256_of(applied / ARTIFACT)
    environment = {**os.environ, "QPLAN_HOME": str(tmp_path / "home"), "PYTHONPATH": str(Path(__file__).parent.parent)}
    command = [sys.executable, "-m", "planner.cli", "apply", "plan.json", "--output", "out", "--seconds", "10"]
    for delay in (0.4, 0.8, 1.2, 1.6, 2.4):
        process = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.DEVNULL, stdout=-1)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        made = tmp_path / "out" / ARTIFACT
        assert not made.exists() or sha256_of(made) == wanted
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode in {0, 5}, done.stderr
    assert sha256_of(tmp_path / "out" / ARTIFACT) == wanted
    left = {path.name for path in (tmp_path / "out").iterdir()}
    assert left == {ARTIFACT, "report.json", "report.html", ".qplan"}


def test_ctrl_c_leaves_nothing_half_written(applied: Path, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_bytes((applied / "plan.json").read_bytes())
    environment = {**os.environ, "QPLAN_HOME": str(tmp_path / "home"), "PYTHONPATH": str(Path(__file__).parent.parent)}
    command = [sys.executable, "-m", "planner.cli", "apply", "plan.json", "--output", "out"]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stderr=-1, stdout=-1, text=True, preexec_fn=hear_ctrl_c
    )
    time.sleep(2.0)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert not [path for path in (tmp_path / "out").iterdir() if path.name.endswith(".partial")]


def test_a_file_of_somebody_else_is_never_replaced(applied: Path, tmp_path: Path, qplan: Qplan) -> None:
    (tmp_path / ARTIFACT).write_text("mine")
    done = qplan("apply", str(applied / "plan.json"), "--output", str(tmp_path))
    assert done.returncode == 1 and "output-exists" in done.stderr
    assert (tmp_path / ARTIFACT).read_text() == "mine"


def test_no_space_is_said_before_anything_is_written(
    applied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    from planner.core.errors import QplanError
    from planner.workflow.applying import check
    from planner.workflow.planning import load_plan

    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1 << 20})())
    with pytest.raises(QplanError) as caught:
        check(load_plan(applied / "plan.json"), tmp_path)
    assert caught.value.code == "no-space" and "free" in caught.value.numbers
    assert list(tmp_path.iterdir()) == []
