"""Make, repair and remove the environments that quantizers run in.

The marker is written last. What was killed before leaves a folder without one, and is made anew at the next run; what
was downloaded by then lies in the installer's cache.
"""

from __future__ import annotations

import contextlib
import platform
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from planner import FORMAT_VERSION
from planner.core.codec import canonical_json, write_atomically
from planner.core.data import data_path
from planner.core.errors import ExecutionFailed, InputError, UsageError
from planner.execute import environments, packages, torch_build
from planner.execute.environments import MARKER, Environment, Marker, TorchBuild
from planner.execute.locks import exclusive
from planner.execute.process import run_child

Tell = Callable[[str, float], None]
"""Gets what is done now and the share of all that is behind."""

LOCKS = "locks"


def lock_path(name: str, build: TorchBuild) -> Path:
    """The pins of all packages of an environment."""
    return data_path(LOCKS) / f"{name}-{'cpu' if build.build == torch_build.CPU else 'cuda'}.txt"


def log_path(name: str) -> Path:
    """Where the installer's output of the last run lies."""
    return environments.folder(name).with_name(f"{name}.log")


def install(name: str, build: TorchBuild, *, installer: str | None = None, tell: Tell | None = None) -> Marker:
    """Make the environment ``name`` in qplan's home; one that is there, whole or not, is replaced.

    Args:
        name: of the row.
        build: of torch.
        installer: ``uv`` or ``pip``; ``None``: uv where it is there.
        tell: told how far it is.

    Raises:
        UsageError: there is no such environment, it is not for this Python, or the installer is not there.
        ExecutionFailed: another process is at it, an installation failed, or what it gave cannot be imported.
        Stopped: a person stopped it; what there is by then is no finished environment.
    """
    row = environments.row(name)
    _check_python(row)
    say = tell or (lambda _what, _fraction: None)
    began, log = time.monotonic(), log_path(name)
    with _locked(name):
        place = environments.folder(name)
        _clear(place)
        log.unlink(missing_ok=True)
        tool = packages.find(installer, place, log)
        say("making a virtual environment", 0.0)
        tool.make()
        _install(row, build, tool, say)
        say("trying it", 0.9)
        answer = _tried(row, place)
        marker = _marker(row, build, tool.name, answer, place, time.monotonic() - began)
        write_atomically(place / MARKER, canonical_json(marker) + "\n")
        say("done", 1.0)
    return marker


def remove(name: str) -> int | None:
    """Remove what qplan made of an environment; the bytes that it took, ``None`` where there was nothing.

    Raises:
        UsageError: there is no environment of this name.
        ExecutionFailed: another process is making it, or it cannot be removed.
    """
    place = environments.folder(environments.row(name).name)
    if not place.exists():
        return None
    with _locked(name):
        size = folder_bytes(place)
        _clear(place)
        log_path(name).unlink(missing_ok=True)
    return size


def folder_bytes(place: Path) -> int:
    """Bytes of all files of a folder; links are not followed."""
    return sum(path.lstat().st_size for path in place.rglob("*") if path.is_symlink() or path.is_file())


def _check_python(row: Environment) -> None:
    from packaging.specifiers import SpecifierSet

    if not SpecifierSet(row.python).contains(platform.python_version(), prereleases=True):
        raise UsageError(
            f"{row.title} is not for this Python",
            numbers=f"Python {platform.python_version()}, needed {row.python}",
            hint="run qplan with another Python",
            code="wrong-python",
        )


@contextlib.contextmanager
def _locked(name: str) -> Iterator[None]:
    path = environments.folder(name).with_name(f"{name}.lock")
    with exclusive(
        path,
        busy=f"another qplan is installing {name}",
        unwritable=f"{path.parent} cannot be written",
        hint="wait for it",
        unwritable_hint="set QPLAN_HOME to a folder that you can write",
    ):
        yield


def _clear(place: Path) -> None:
    """Remove an environment, its marker first: half of one must not look whole."""
    try:
        (place / MARKER).unlink(missing_ok=True)
        if place.exists():
            shutil.rmtree(place)
    except OSError as error:
        raise ExecutionFailed(
            f"{place} cannot be removed", numbers=str(error), hint="remove it by hand", code="unwritable-file"
        ) from None


def _install(row: Environment, build: TorchBuild, tool: packages.Installer, say: Tell) -> None:
    """torch first where it comes from an index of its own, then everything that the lock pins and nothing else."""
    lock = lock_path(row.name, build)
    if not lock.exists():
        raise InputError(f"{lock} is missing", hint="reinstall qplan", code="broken-install")
    torch = pinned(lock, "torch")
    if torch is not None:
        say("asking for torch", 0.05)
        index = torch_build.index_of(build, tool.would_fetch(torch))
        if index is not None:
            say(f"torch for {build.build}", 0.1)
            # CUDA's libraries come from the same index with it; those of the lock are for the usual index's build
            lock = lock_path(row.name, environments.torch_builds()[-1])
            tool.install(*(() if build.build != torch_build.CPU else ("--no-deps",)), torch, index=index)
    say(f"{row.title} and what it needs", 0.4)
    tool.install("--no-deps", "--requirement", str(lock))


def pinned(lock: Path, package: str) -> str | None:
    """The line of a lock that pins a package, without its marker."""
    for line in lock.read_text("utf-8").splitlines():
        if line.startswith(f"{package}=="):
            return line.partition(";")[0].strip()
    return None


def _tried(row: Environment, place: Path) -> dict[str, Any]:
    return run_child(
        "planner.execute.environment_child",
        {"modules": list(row.modules)},
        what=f"trying {row.title}",
        log=log_path(row.name).with_suffix(".child.log"),
        python=environments.interpreter(place),
    )


def _marker(
    row: Environment, build: TorchBuild, installer: str, answer: dict[str, Any], place: Path, seconds: float
) -> Marker:
    lacking = environments.unmet(row, answer["versions"])
    if lacking:
        raise ExecutionFailed(
            f"{row.title} was installed in other versions", numbers="\n".join(lacking), code="install-failed"
        )
    return Marker(
        format_version=FORMAT_VERSION,
        name=row.name,
        python_version=answer["python_version"],
        build=build.build if answer["cuda"] or build.build == torch_build.CPU else torch_build.CPU,
        installer=installer,
        versions=answer["versions"],
        size_bytes=folder_bytes(place),
        seconds=seconds,
    )
