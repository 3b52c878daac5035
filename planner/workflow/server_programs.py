"""Where a server is on this machine: on PATH, in this Python, or in an environment that qplan made for a quantizer."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from packaging.utils import canonicalize_name

from planner.core.candidate import Variant
from planner.core.errors import MissingDependency
from planner.execute import environments
from planner.runtimes.service import Server

PYTHON_SERVER = "llama-cpp-python"
"""It runs in this Python, as a module of qplan's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """A server as it is here."""

    path: str | None = None
    """The program to start; ``None``: its command is whole as it is, or it is not here."""
    lacking: tuple[str, ...] = ()
    """Programs or modules that it needs and that are not here; empty: it can be started."""
    own_environment: bool = False
    """It lies in an environment of qplan's: what this Python is told of packages is not for it."""
    hint: str = ""
    """What would bring it, besides what its row says."""


def find(row: Server, variant: Variant | None = None) -> Program:
    """The server, able to run ``variant`` if one is given, else any artifact that it reads."""
    if not row.modules:
        return Program(lacking=() if shutil.which(row.program) else (row.program,))
    absent = tuple(name for name in row.modules if importlib.util.find_spec(name) is None)
    if row.name == PYTHON_SERVER:
        return Program(lacking=absent)
    names = _environments(variant)
    if not absent and (variant is None or _runs_here(variant)):
        return Program(path=_beside(Path(sys.executable), row))
    for name in names:
        status = environments.status(name)
        if status.python is not None and not status.current and not _lacking_in(name, row):
            return Program(path=_beside(status.python, row), own_environment=True)
    if elsewhere := _on_path(row, names):
        return Program(path=elsewhere)
    return Program(lacking=absent or (f"what runs {variant.method if variant else 'it'}",), hint=_hint(names[0], row))


def _environments(variant: Variant | None) -> tuple[str, ...]:
    """The environment that runs the artifact, as a verification takes it; of no artifact, those of all methods."""
    if variant is not None:
        return (environments.running(variant.method).name,)
    return tuple(dict.fromkeys(row.name for row in environments.rows() if row.methods))


def _runs_here(variant: Variant) -> bool:
    """Whether this Python has what the variant's method needs; weights as published ask for nothing."""
    wanted = environments.running(variant.method).name
    return variant.method == environments.UNQUANTIZED or environments.status(wanted).current


def _beside(python: Path, row: Server) -> str | None:
    """The program in the folder of an interpreter; ``None``: there is none, and its name must do."""
    return shutil.which(row.program, path=str(python.parent))


def _lacking_in(name: str, row: Server) -> tuple[str, ...]:
    """Modules that the environment ``name``, which is finished, was made without."""
    there = environments.made_versions(name)
    return tuple(module for module in row.modules if canonicalize_name(module) not in there)


def _on_path(row: Server, names: tuple[str, ...]) -> str | None:
    """The program of somebody else's Python; what lies beside this one, or in qplan's own, was looked at already."""
    known = {Path(sys.executable).parent, *(environments.interpreter(environments.folder(n)).parent for n in names)}
    for folder in _folders():
        found = shutil.which(row.program, path=folder) if Path(folder) not in known else None
        if found:
            return found
    return None


def _folders() -> Iterator[str]:
    yield from filter(None, os.environ.get("PATH", os.defpath).split(os.pathsep))


def _hint(name: str, row: Server) -> str:
    status = environments.status(name)
    if status.current:
        return ""  # it is this Python that lacks the modules of a server
    if status.installed:
        return (
            f"`qplan methods remove {name}` and `qplan methods install {name}`: the one that is there lacks "
            f"{', '.join(_lacking_in(name, row))}"
        )
    return f"`qplan methods install {name}`"


def check(row: Server, variant: Variant) -> Program:
    """The server for ``variant``.

    Raises:
        MissingDependency: it is not here, with what brings it.
    """
    found = find(row, variant)
    if found.lacking:
        ways = " or ".join(filter(None, (found.hint, row.install)))
        raise MissingDependency(
            f"{row.name} is not installed",
            numbers=f"missing: {', '.join(found.lacking)}",
            hint=f"{ways}; `--print command` shows how it would be started",
        )
    return found
