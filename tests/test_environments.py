"""Environments of quantizers: found, made, repaired, removed; children that run in them."""

from __future__ import annotations

import json
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from planner.core.errors import MissingDependency, UsageError
from planner.execute import environments
from planner.execute.process import ALONE


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QPLAN_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_an_unknown_environment_is_named_with_those_there_are() -> None:
    with pytest.raises(UsageError) as raised:
        environments.python_for("gptq-for-llama")
    assert "gptqmodel" in raised.value.hint and raised.value.code == "unknown-environment"


def test_a_missing_environment_says_how_to_make_it() -> None:
    with pytest.raises(MissingDependency) as raised:
        environments.python_for("autoawq")
    assert raised.value.hint == "`qplan methods install autoawq`"
    assert raised.value.code == "missing-dependency"


def test_a_child_of_another_interpreter_sees_qplan_and_nothing_of_ours(tmp_path: Path) -> None:
    venv.create(tmp_path / "bare")
    code = (
        "import importlib.util as u, json, planner, planner.core.data as d;"
        "print(json.dumps([planner.__version__, str(d.data_path('methods.toml')), u.find_spec('pytest') is None]))"
    )
    python = environments.interpreter(tmp_path / "bare")
    done = subprocess.run([python, "-c", code], env={"PYTHONPATH": str(ALONE)}, capture_output=True, text=True)
    from planner import __version__
    from planner.core.data import data_path

    assert json.loads(done.stdout) == [__version__, str(data_path("methods.toml")), True], done.stderr


def test_this_interpreter_is_used_where_it_has_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    have = {"bitsandbytes": "0.50.2", "transformers": "5.23.0", "accelerate": "1.15.0", "torch": "2.13.0+cpu"}
    monkeypatch.setattr(environments.importlib.metadata, "version", lambda name: have[name])
    assert environments.python_for("bitsandbytes") == Path(sys.executable)
    assert dict(environments.status("bitsandbytes").versions)["torch"] == "2.13.0+cpu"
