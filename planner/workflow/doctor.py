"""Examine an installation: each finding says what was looked at, what was found and what would help."""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata

from planner import __version__, methods
from planner.core.data import data_path, home, profiles_path
from planner.core.errors import QplanError
from planner.workflow import environments
from planner.workflow.survey import survey


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that was looked at. ``state`` is ``ok``, ``missing`` (optional) or ``broken``."""

    state: str
    what: str
    found: str
    hint: str = ""


EXTRAS = {
    "llama-cpp-python": "`pip install 'qplan[gguf]'` to quantize and measure GGUF models",
    "gguf": "`pip install 'qplan[gguf]'`",
    "sentencepiece": "`pip install 'qplan[gguf]'`",
    "huggingface_hub": "`pip install 'qplan[hub]'` for models by hub id",
    "pandas": "`pip install 'qplan[analysis]'` to compare measurements and write them as CSV",
    "pyarrow": "`pip install 'qplan[analysis]'` to write measurements as Parquet",
    "textual": "`pip install 'qplan[tui]'` for the wizard",
    "textual-serve": "`pip install 'qplan[tui]'` for the wizard in a browser",
}


def examine() -> tuple[Finding, ...]:
    """All findings; none raises."""
    checks: tuple[Callable[[], Finding], ...] = (_python, _data, _machine, _store)
    packages = tuple(_package(name, hint) for name, hint in EXTRAS.items())
    return tuple(_guarded(check) for check in checks) + packages + _environments()


def _guarded(check: Callable[[], Finding]) -> Finding:
    try:
        return check()
    except (QplanError, OSError) as error:
        return Finding(state="broken", what=check.__name__.strip("_"), found=str(error).splitlines()[0])


def _python() -> Finding:
    return Finding(state="ok", what="qplan", found=f"{__version__} on Python {platform.python_version()}")


def _data() -> Finding:
    tables = len([path for path in data_path("").iterdir() if path.suffix in {".csv", ".toml"}])
    profiles = len(list(profiles_path().glob("*.toml")))
    return Finding(
        state="ok", what="data", found=f"{tables} tables, {profiles} profiles, {len(methods.rows())} methods"
    )


def _machine() -> Finding:
    here = survey()
    notes = "; ".join(here.notes)
    return Finding(state="ok", what="machine", found=f"{here.cpu.model}, {len(here.gpus)} GPUs", hint=notes)


def _store() -> Finding:
    from planner.store import Store, default_path

    hint = "`qplan calibrate` makes speeds on this machine tighter"
    if not default_path().exists():
        return Finding(state="ok", what="measurements", found=f"none yet; they will lie under {home()}", hint=hint)
    with Store() as store:
        count, rates = len(store.list()), len(store.rates(survey().identity()))
    found = f"{count} and {rates} calibrated rates in {default_path()}"
    return Finding(state="ok", what="measurements", found=found, hint="" if rates else hint)


def _environments() -> tuple[Finding, ...]:
    """Of the quantizers; all are optional."""
    found = []
    for status in environments.statuses():
        what, hint = f"environment {status.name}", f"`qplan methods install {status.name}`"
        if status.python is not None:
            versions = ", ".join(f"{name} {version}" for name, version in status.versions)
            where = "this Python" if status.current else str(status.python)
            found.append(Finding(state="ok", what=what, found=f"{versions} in {where}"))
        elif status.note:
            found.append(Finding(state="missing", what=what, found=status.note, hint=f"{hint} makes it anew"))
        else:
            found.append(Finding(state="missing", what=what, found="not installed", hint=hint))
    return tuple(found)


def _package(name: str, hint: str) -> Finding:
    try:
        return Finding(state="ok", what=name, found=metadata.version(name))
    except metadata.PackageNotFoundError:
        return Finding(state="missing", what=name, found="not installed", hint=hint)
