"""pip or uv: makes virtual environments and installs into them, with the settings that a user made for either."""

from __future__ import annotations

import ast
import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO

from planner.core.errors import ExecutionFailed, UsageError
from planner.execute.environments import interpreter
from planner.execute.process import check_stopped, last_lines

PIP, UV = "pip", "uv"
_LOOK_SECONDS = 0.1
_MIRRORS = (
    "where the package index cannot be reached, PIP_INDEX_URL or UV_DEFAULT_INDEX name a mirror, "
    "and PIP_FIND_LINKS a folder of wheels"
)
_OF_UV = {
    "index-url": ("--default-index", ("UV_DEFAULT_INDEX", "UV_INDEX_URL")),
    "extra-index-url": ("--index", ("UV_INDEX", "UV_EXTRA_INDEX_URL")),
    "find-links": ("--find-links", ("UV_FIND_LINKS",)),
    "trusted-host": ("--allow-insecure-host", ("UV_INSECURE_HOST",)),
    "constraint": ("--constraints", ("UV_CONSTRAINT",)),
}
"""pip's settings, uv's option for each, and the variables by which a user has told uv otherwise."""
_ELSEWHERE = ("PIP_TARGET", "PIP_PREFIX", "PIP_ROOT", "PIP_USER", "PIP_REQUIRE_VIRTUALENV", "PYTHONPATH", "PYTHONHOME")
"""Settings that would have pip install into another place, or look there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Installer:
    """What installs into the virtual environment ``place``, and the file for its output."""

    name: str
    program: tuple[str, ...]
    place: Path
    log: Path

    def make(self) -> None:
        """Make the virtual environment, of this Python."""
        if self.name == UV:
            command = (*self.program, "venv", "--no-project", "--python", sys.executable, str(self.place))
        else:
            command = (sys.executable, "-m", "venv", "--without-pip", str(self.place))
        self._run(command, "making a virtual environment", {})

    def install(self, *arguments: str, index: str | None = None) -> None:
        """Install requirements.

        Raises:
            ExecutionFailed: the installer failed; the end of its output is told.
            Stopped: a person stopped it.
        """
        command, variables = self._install(index)
        self._run((*command, *arguments), f"{self.name} install", variables)

    def would_fetch(self, requirement: str) -> tuple[str, ...]:
        """Names of the packages that the usual index gives for a requirement; nothing is installed."""
        command, variables = self._install(None)
        if self.name == UV:
            self._run((*command, "--dry-run", requirement), "asking for torch", variables, fresh_log=True)
            lines = self.log.read_text("utf-8", errors="replace").splitlines()
            return tuple(line.split()[1].split("==")[0] for line in lines if line.strip().startswith("+ "))
        report = self.log.with_suffix(".json")
        self._run(
            (*command, "--quiet", "--dry-run", "--report", str(report), requirement), "asking for torch", variables
        )
        names = tuple(item["metadata"]["name"] for item in json.loads(report.read_text("utf-8"))["install"])
        report.unlink()
        return names

    def _install(self, index: str | None) -> tuple[tuple[str, ...], dict[str, str]]:
        python = str(interpreter(self.place))
        if self.name == PIP:
            chosen = ("--index-url", index) if index else ()
            return (*self.program, "--python", python, "install", "--progress-bar", "off", "--no-input", *chosen), {}
        options, variables = _settings_for_uv(without_index=index is not None)
        chosen = ("--default-index", index) if index else ()
        return (*self.program, "pip", "install", "--python", python, "--no-progress", *options, *chosen), variables

    def _run(self, command: tuple[str, ...], what: str, variables: dict[str, str], *, fresh_log: bool = False) -> None:
        environment = {key: value for key, value in os.environ.items() if key not in _ELSEWHERE}
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with (
            self.log.open("wb" if fresh_log else "ab") as sink,
            _started(command, sink, {**environment, **variables}) as child,
        ):
            while child.poll() is None:
                check_stopped()
                time.sleep(_LOOK_SECONDS)
        if child.returncode:
            raise ExecutionFailed(f"{what} failed", numbers=last_lines(self.log), hint=_MIRRORS, code="install-failed")


def find(wish: str | None, place: Path, log: Path) -> Installer:
    """uv where it is there, else pip.

    Args:
        wish: ``uv`` or ``pip``; ``None`` leaves the choice.
        place: the virtual environment to be.
        log: file for the output.

    Raises:
        UsageError: the one that was wished for is not there.
    """
    program = uv() if wish != PIP else None
    if program is not None:
        return Installer(name=UV, program=(program,), place=place, log=log)
    if wish == UV or not has_pip():
        raise UsageError(
            f"{wish or 'pip'} is not installed", hint="`python -m ensurepip`, or `pip install uv`", code="no-installer"
        )
    return Installer(name=PIP, program=(sys.executable, "-m", "pip"), place=place, log=log)


def chosen(wish: str | None = None) -> str:
    """Which of the two :func:`find` takes."""
    return UV if wish != PIP and uv() is not None else wish or PIP


def uv() -> str | None:
    """The program ``uv``: on the path, or beside this interpreter."""
    return shutil.which("uv") or shutil.which("uv", path=str(Path(sys.executable).parent))


def has_pip() -> bool:
    """Whether this interpreter has pip."""
    import importlib.util

    return importlib.util.find_spec("pip") is not None


@contextlib.contextmanager
def _started(
    command: tuple[str, ...], sink: IO[bytes], environment: dict[str, str]
) -> Iterator[subprocess.Popen[bytes]]:
    """A child that ends with what is inside and with this process, however they end."""
    supervised = (sys.executable, "-I", str(Path(__file__).with_name("supervised.py")), *command)
    child = subprocess.Popen(
        supervised,
        stdin=subprocess.PIPE,
        stdout=sink,
        stderr=subprocess.STDOUT,
        env=environment,
        start_new_session=True,
    )
    assert child.stdin is not None
    try:
        yield child
    finally:
        child.stdin.close()
        child.wait()


def _settings_for_uv(*, without_index: bool) -> tuple[tuple[str, ...], dict[str, str]]:
    """What pip is set to as options of uv, where uv was not told itself; and variables."""
    told = pip_settings()
    options: list[str] = []
    for key, (option, variables) in _OF_UV.items():
        if key not in told or any(name in os.environ for name in variables):
            continue
        if not (without_index and key == "index-url"):
            options += [part for value in told[key].split() for part in (option, value)]
    if "--index" in options and "UV_INDEX_STRATEGY" not in os.environ:
        options += ["--index-strategy", "unsafe-best-match"]  # as pip looks at several indexes
    if told.get("no-index", "").lower() in {"1", "true", "yes", "on"} and not without_index:
        options.append("--no-index")
    found = {"SSL_CERT_FILE": told.get("cert"), "UV_HTTP_TIMEOUT": told.get("default-timeout") or told.get("timeout")}
    return tuple(options), {key: value for key, value in found.items() if value and key not in os.environ}


@cache
def pip_settings() -> dict[str, str]:
    """pip's settings, from its files and from variables: name → text; empty where pip is not there."""
    asked = (sys.executable, "-m", "pip", "config", "list")
    done = subprocess.run(asked, capture_output=True, text=True, check=False)
    settings = {}
    for line in done.stdout.splitlines() if done.returncode == 0 else ():
        key, _, value = line.partition("=")
        with contextlib.suppress(ValueError, SyntaxError):
            settings[key.rpartition(".")[2]] = str(ast.literal_eval(value))
    # variables come last among pip's sources, whatever the order in which they are listed
    ours = {"PIP_INDEX_URL": "index-url", "PIP_EXTRA_INDEX_URL": "extra-index-url", "PIP_FIND_LINKS": "find-links"}
    return settings | {key: os.environ[name] for name, key in ours.items() if name in os.environ}
