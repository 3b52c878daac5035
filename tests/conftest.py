"""Fixtures that tests share: a store of their own, the demo checkpoint, the command line."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from planner.core.data import data_path

# The same examples every time and no deadline, so that a red test is a changed program and not a busy machine;
# `--hypothesis-profile explore` looks further.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.register_profile("explore", derandomize=False, deadline=None)
settings.load_profile("repeatable")

Qplan = Callable[..., subprocess.CompletedProcess[str]]


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--update-snapshots``: what the screens show now is what they should show."""
    parser.addoption("--update-snapshots", action="store_true", help="write tests/snapshots anew")


def hear_ctrl_c() -> None:
    """For ``preexec_fn``: a job in the background ignores SIGINT, and so would the programs that its tests start."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.fixture(autouse=True)
def _own_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or writes what the user measured."""
    monkeypatch.setenv("QPLAN_HOME", str(tmp_path_factory.mktemp("home")))
    monkeypatch.setenv("COLUMNS", "120")


@pytest.fixture(scope="session")
def demo_checkpoint() -> Path:
    """The trained model that comes with qplan."""
    return data_path("demo/model")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 3 MiB: the quantized demo model does not fit."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("mount is not permitted")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture
def qplan() -> Qplan:
    """Run the command line in a process of its own."""

    paths = (str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH"))

    def run(*arguments: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "planner.cli", *arguments],
            capture_output=True,
            text=True,
            cwd=cwd,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), **environment},
            timeout=600,
            check=False,
        )

    return run
