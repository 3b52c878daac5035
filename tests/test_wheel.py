"""The wheel, installed elsewhere without a checkout in sight, answers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_the_wheel_recommends_outside_the_checkout(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--outdir", str(tmp_path), str(ROOT)],
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    pages = {f"planner/report/templates/{name}" for name in ("report.html", "compare.html", "style.css")}
    assert pages | {"planner/tui/wizard.tcss"} <= set(zipfile.ZipFile(wheel).namelist())
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([str(python), "-m", "pip", "install", "--quiet", str(wheel)], check=True)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    environment["QPLAN_HOME"] = str(tmp_path / "home")
    qplan = tmp_path / "venv" / "bin" / "qplan"

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(qplan), *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )

    answer = run("recommend", "llama-2-13b", "--profile", "rtx-4090", "--json")
    assert answer.returncode == 0, answer.stderr
    assert json.loads(answer.stdout)["chosen"]["type"]
    assert run("plan", "demo", "--context", "512", "-o", "plan.json").returncode == 0
    assert run("doctor").returncode == 0
    refused = run("apply", "plan.json", "--output", "out")
    assert refused.returncode == 1 and "qplan[gguf]" in refused.stderr
