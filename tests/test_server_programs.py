"""Where transformers' server is: this Python, an environment that qplan made for a quantizer, or somewhere on PATH."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from planner import FORMAT_VERSION
from planner.core.candidate import Variant
from planner.core.errors import MissingDependency
from planner.execute import environments, installing
from planner.execute.environments import MARKER
from planner.runtimes.service import server
from planner.workflow import server_programs
from planner.workflow.serve_target import Options
from planner.workflow.server_programs import check, find
from planner.workflow.serving import prepare, print_text
from tests.test_serving import answers, gone, serving

NF4 = Variant(method="bitsandbytes", format="bitsandbytes", runtime="transformers", type="nf4")
ROW = server("transformers")
QUANTIZES = {"bitsandbytes": "0.50.2", "transformers": "5.23.0", "accelerate": "1.15.0", "torch": "2.13.0+cpu"}
SERVES = {"fastapi": "0.165.0", "uvicorn": "0.54.0", "openai": "3.57.0", "pydantic": "2.14.4"}
ECHO = "import sys\nprint(*sys.argv[1:], sep='\\n')\n"
STAND_IN = """
import http.server, sys
class Ready(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Ready).serve_forever()
"""


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A home of one's own, and a Python that has no quantizer and is no server."""
    monkeypatch.setenv("QPLAN_HOME", str(tmp_path / "qplan home"))
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.setattr(environments, "_versions_here", lambda _: {})
    monkeypatch.setattr(server_programs.importlib.util, "find_spec", lambda _: None)
    return tmp_path / "qplan home"


def program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!{sys.executable}\n{text}")
    path.chmod(0o755)
    return path


def made(name: str, versions: dict[str, str], text: str = ECHO) -> Path:
    """An environment as it is after its installation, as far as it is looked at; its program of transformers."""
    place = environments.folder(name)
    python = environments.interpreter(place)
    python.parent.mkdir(parents=True)
    python.symlink_to(sys.executable)
    marker = {"format_version": FORMAT_VERSION, "name": name, "python_version": "3.11", "build": "cpu"}
    marker |= {"installer": "pip", "versions": versions, "size_bytes": 1, "seconds": 1.0}
    (place / MARKER).write_text(json.dumps(marker))
    return program(python.with_name("transformers"), text)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "a model"
    folder.mkdir()
    config = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(b"")
    return folder


def test_the_printed_command_names_the_environments_program_and_runs_when_pasted(checkpoint: Path) -> None:
    there = made("bitsandbytes", QUANTIZES | SERVES)
    printed = print_text(prepare(checkpoint, Options(), to_run=False), "command", None)
    assert str(there) in shlex.split(printed)
    done = subprocess.run(["bash", "-c", printed], capture_output=True, text=True, check=True)
    first, target, *options = done.stdout.splitlines()
    assert (first, target) == ("serve", str(checkpoint)) and "bnb-4bit" in options
    assert print_text(prepare(checkpoint, Options(), to_run=True), "command", None) == printed


def test_packages_of_this_python_do_not_reach_the_environment(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made("bitsandbytes", QUANTIZES | SERVES, "import os\nprint(repr(os.environ.get('PYTHONPATH')))\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    printed = print_text(prepare(checkpoint, Options(), to_run=False), "command", None)
    done = subprocess.run(["bash", "-c", printed], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "''"
    monkeypatch.delenv("PYTHONPATH")
    assert "PYTHONPATH" not in print_text(prepare(checkpoint, Options(), to_run=False), "command", None)


def test_it_is_started_from_the_environment(checkpoint: Path, elsewhere: Path) -> None:
    made("bitsandbytes", QUANTIZES | SERVES, STAND_IN)
    root = str(Path(__file__).parent.parent)
    with serving({**os.environ, "PYTHONPATH": root}, str(checkpoint)) as (child, url):
        assert answers(f"{url}/models")
        child.terminate()
        _, said = child.communicate(timeout=60)
        assert child.returncode == 0 and f"{checkpoint} answers there" in said, "it is pinned to the path"
    assert gone(url)


def test_without_any_it_is_printed_by_name_and_not_started(checkpoint: Path) -> None:
    printed = print_text(prepare(checkpoint, Options(), to_run=False), "command", None)
    assert " transformers serve " in f" {printed} "
    with pytest.raises(MissingDependency) as error:
        prepare(checkpoint, Options(), to_run=True)
    assert "`qplan methods install bitsandbytes`" in error.value.hint and "--print command" in error.value.hint


def test_an_environment_that_cannot_serve_says_what_it_lacks() -> None:
    made("bitsandbytes", QUANTIZES | {"fastapi": "0.165.0", "uvicorn": "0.54.0", "pydantic": "2.14.4"})
    found = find(ROW, NF4)
    assert found.path is None and found.lacking
    with pytest.raises(MissingDependency, match="transformers") as error:
        check(ROW, NF4)
    assert "methods remove bitsandbytes" in error.value.hint and "lacks openai" in error.value.hint


def test_each_artifact_is_served_by_the_environment_that_verifies_it() -> None:
    assert [environments.running(name).name for name in ("awq", "gptq", "bitsandbytes", "none")] == [
        "gptqmodel",
        "gptqmodel",
        "bitsandbytes",
        "bitsandbytes",
    ]
    there = made("bitsandbytes", QUANTIZES | SERVES)
    gptq = Variant(method="gptq", format="gptq", runtime="transformers", type="4bit", group_size=128)
    assert find(ROW, NF4).path == str(there) and find(ROW, gptq).lacking
    assert not find(ROW).lacking, "as `qplan methods` lists it"


def test_this_python_comes_first_and_path_last(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, checkpoint: Path
) -> None:
    other = program(tmp_path / "conda" / "transformers", ECHO)
    monkeypatch.setenv("PATH", f"{other.parent}:/usr/bin:/bin")
    assert find(ROW, NF4).path == str(other)
    there = made("bitsandbytes", QUANTIZES | SERVES)
    assert find(ROW, NF4).path == str(there)
    here = program(tmp_path / "here" / "transformers", ECHO)
    monkeypatch.setattr(server_programs.sys, "executable", str(here.with_name("python")))
    monkeypatch.setattr(server_programs.importlib.util, "find_spec", lambda name: name)
    assert find(ROW, NF4).path == str(there), "this Python serves, but has no bitsandbytes"
    assert find(ROW, Variant(method="none", format="safetensors", runtime="transformers", type="bf16")).path == str(
        here
    )
    monkeypatch.setattr(environments, "_versions_here", lambda _: QUANTIZES)
    assert find(ROW, NF4).path == str(here)


def test_locks_of_environments_that_run_artifacts_hold_a_server() -> None:
    for name in ("gptqmodel", "bitsandbytes"):
        for build in environments.torch_builds():
            lock = installing.lock_path(name, build)
            assert all(installing.pinned(lock, module) for module in ROW.modules), lock.name
