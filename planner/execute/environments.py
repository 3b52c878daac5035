"""Environments of Python packages that quantizers run in: which there are, and the interpreter of each.

Quantizers want versions of the same libraries that do not go together, so each runs in a child process in an
environment of its own, under ``environments/`` in qplan's home, or in this one where it has what is needed.
``planner/execute/installing.py`` makes them.
"""

from __future__ import annotations

import importlib.metadata
import os
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import ClassVar

from planner.core.codec import decode, read_json
from planner.core.data import home, named, read_document, read_rows
from planner.core.errors import InputError, MissingEnvironment
from planner.core.hardware import STRICT
from planner.core.plan import Step
from planner.methods import quantizers

TRAINING = "peft"
"""The environment that adapters are trained in."""
UNQUANTIZED = "none"
"""The method of weights as they are published."""
TABLE = "environments.toml"
FOLDER = "environments"
MARKER = "qplan-environment.json"
"""Written last: an environment without it is unfinished."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """A row of ``data/environments.toml``."""

    name: str
    title: str
    summary: str
    methods: tuple[str, ...]
    """Methods that it carries out."""
    python: str
    """Versions of Python that its lock holds for."""
    requires: tuple[str, ...]
    """Requirements that are asked for when it is made."""
    accepts: tuple[str, ...]
    """Requirements that an interpreter must meet to be used."""
    modules: tuple[str, ...]
    """What must be importable."""
    source: str
    date: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TorchBuild:
    """A build of torch, and what it asks of the machine."""

    build: str
    """``cpu``, or the tag of its CUDA version."""
    index: str
    """PyTorch's index that has it."""
    vendor: str
    min_driver: str
    min_capability: str
    source: str
    date: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """What there is of an environment on this machine."""

    name: str
    title: str
    installed: bool
    """Made by qplan, finished, and with acceptable versions."""
    current: bool
    """This interpreter has everything; then it is used."""
    python: Path | None = None
    """The interpreter that children run with; ``None`` where there is none."""
    size_bytes: int | None = None
    """Disk that the one made by qplan takes."""
    versions: tuple[tuple[str, str], ...] = ()
    """Package and version of what the row asks for, in the interpreter that is used."""
    note: str | None = None
    """Why an environment that is there is not used."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Marker:
    """What is written into an environment when it is finished."""

    __pydantic_config__: ClassVar[dict[str, str]] = STRICT

    format_version: str
    name: str
    python_version: str
    """``3.11``: packages lie in a folder of this name."""
    build: str
    """Of torch: ``cpu`` or a CUDA tag."""
    installer: str
    versions: dict[str, str]
    """Of all packages in it."""
    size_bytes: int
    seconds: float


@cache
def rows() -> tuple[Environment, ...]:
    """All environments, in the table's order."""
    return read_rows(Environment, TABLE, "environment")


def names() -> tuple[str, ...]:
    """Names of all environments."""
    return tuple(row.name for row in rows())


def row(name: str) -> Environment:
    """The row of an environment.

    Raises:
        UsageError: there is none of this name.
    """
    return named(rows(), name, what="environment of qplan", code="unknown-environment")


def torch_builds() -> tuple[TorchBuild, ...]:
    """Builds of torch, the first that a machine meets is taken; the last asks for nothing."""
    return read_rows(TorchBuild, TABLE, "torch")


def child_requires() -> tuple[str, ...]:
    """Requirements of qplan's own code where it runs in such an environment."""
    return tuple(read_document(TABLE)["child"]["requires"])


def of_method(method: str) -> tuple[Environment, ...]:
    """Environments that carry a method out, the one to take by default first."""
    return tuple(row for row in rows() if method in row.methods)


def of_step(step: Step) -> str | None:
    """Name of the environment that a step is carried out in; ``None``: qplan's own."""
    if step.finetune is not None:
        return TRAINING
    return quantizers.quantizer(step.settings.quantizer).environment if step.settings else None


def running(method: str) -> Environment:
    """The environment that runs the checkpoints of a method: the one that makes them by default."""
    return (*of_method(method), *of_method(UNQUANTIZED))[0]


def folder(name: str) -> Path:
    """Where qplan makes the environment ``name``; it need not exist."""
    return home() / FOLDER / name


def interpreter(place: Path) -> Path:
    """The interpreter of a virtual environment."""
    return place / "Scripts" / "python.exe" if os.name == "nt" else place / "bin" / "python"


def python_for(name: str) -> Path:
    """The interpreter that has everything of the environment ``name``: this one if it does, else the one made for it.

    Raises:
        UsageError: there is no environment of this name.
        MissingEnvironment: it is not installed; the hint installs it.
    """
    found = status(name)
    if found.python is not None:
        return found.python
    raise MissingEnvironment(
        f"{found.title} is not installed",
        numbers=found.note or "",
        hint=f"`qplan methods install {name}`",
        environment=name,
    )


def statuses() -> tuple[Status, ...]:
    """What there is of every environment."""
    return tuple(status(name) for name in names())


def status(name: str) -> Status:
    """What there is of the environment ``name``.

    Raises:
        UsageError: there is none of this name.
    """
    wanted = row(name)
    here = _versions_here(wanted)
    current = not unmet(wanted, here)
    marker, note = _finished(wanted)
    used = here if current else dict(marker.versions) if marker else {}
    return Status(
        name=name,
        title=wanted.title,
        installed=marker is not None,
        current=current,
        python=Path(sys.executable) if current else interpreter(folder(name)) if marker else None,
        size_bytes=marker.size_bytes if marker else None,
        versions=tuple((package, used[package]) for package in packages(wanted) if package in used),
        note=None if current else note,
    )


def made_versions(name: str) -> dict[str, str]:
    """Version of every package in the environment that qplan made; empty where there is none that is finished."""
    marker, _ = _finished(row(name))
    return dict(marker.versions) if marker else {}


def packages(wanted: Environment) -> tuple[str, ...]:
    """Names of the packages that the row asks for."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    return tuple(canonicalize_name(Requirement(text).name) for text in wanted.accepts)


def unmet(wanted: Environment, versions: dict[str, str]) -> tuple[str, ...]:
    """Requirements of the row that ``versions`` (package → version) does not meet, in words."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    found = []
    for text in wanted.accepts:
        asked = Requirement(text)
        version = versions.get(canonicalize_name(asked.name))
        if version is None:
            found.append(f"{text} (not there)")
        elif not asked.specifier.contains(version, prereleases=True):
            found.append(f"{text} (found {version})")
    return tuple(found)


def _versions_here(wanted: Environment) -> dict[str, str]:
    found = {}
    for package in packages(wanted):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _finished(wanted: Environment) -> tuple[Marker | None, str | None]:
    """The marker of the environment that qplan made, or why it is of no use; neither where there is none."""
    place = folder(wanted.name)
    if not place.exists():
        return None, None
    if not (place / MARKER).exists():
        return None, "its installation was not finished"
    try:
        marker = decode(Marker, read_json(place / MARKER), what=str(place / MARKER))
    except InputError as error:
        return None, f"its record cannot be read: {error.what}"
    lacking = unmet(wanted, marker.versions)
    if lacking:
        return None, f"made for other versions: needs {', '.join(lacking)}"
    if not interpreter(place).exists():
        return None, "the Python that it was made with is gone"
    return marker, None
