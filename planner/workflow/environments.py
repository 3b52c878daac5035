"""Install what quantizers need: what it takes is said beforehand, agreed to, and then done."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from planner.core.candidate import Variant
from planner.core.data import data_path, home
from planner.core.errors import ExecutionFailed, MissingEnvironment, NeedsConfirmation, UsageError
from planner.core.plan import Plan
from planner.core.units import MIB, format_bytes, format_seconds
from planner.execute import environments, installing, packages, torch_build
from planner.execute.environments import Status as Status
from planner.execute.installing import Tell as Tell
from planner.methods import quantizers
from planner.workflow.survey import cached_survey

SIZES = "environment_sizes.csv"
SLOW_LINK_BYTES_PER_SECOND = 25e6 / 8
"""A link of 25 Mbit/s, the FCC's broadband of 2015: the download takes no longer than over this one."""
BYTE_CODE = 1.25
"""pip compiles all modules at once, which took a fifth more disk; under uv that comes with use."""
MARGIN_BYTES = 256 * MIB
"""Left free beside it: logs, and what the installer unpacks on the side."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """What installing an environment would take. Sizes and times are ``None`` where nobody measured them."""

    name: str
    title: str
    summary: str
    build: str
    """Of torch: ``cpu`` or a CUDA tag."""
    installer: str
    """``uv`` or ``pip``."""
    place: Path
    package_count: int
    download_bytes: int | None
    """Of all wheels; less where some lie in the installer's cache."""
    disk_bytes: int | None
    seconds: float | None
    """To unpack and try it, without the download."""
    free_bytes: int | None
    """Disk at the place."""
    replaces: str | None
    """What is there now and would be replaced, in words."""
    note: str = ""

    def question(self) -> str:
        """What a person is asked."""
        return f"Install {self.title} ({self.takes()})?"

    def takes(self) -> str:
        """Size and time in words."""
        download = format_bytes(self.download_bytes) if self.download_bytes else "an unknown size"
        disk = format_bytes(self.disk_bytes) if self.disk_bytes else "an unknown size"
        return f"{download} to download, {disk} on disk, {self.takes_time()}"

    def takes_time(self) -> str:
        """The time in words: on a fast link to a slow one."""
        if self.seconds is None or self.download_bytes is None:
            return "an unknown time"
        slow = self.seconds + self.download_bytes / SLOW_LINK_BYTES_PER_SECOND
        return f"{format_seconds(self.seconds)} to {format_seconds(slow)}"


def named(text: str) -> str:
    """The environment of that name, or the default one of a method.

    Raises:
        UsageError: neither, or a method that needs no environment.
    """
    from planner import methods

    if text in environments.names():
        return text
    found = environments.of_method(text) if text in methods.names() else ()
    if found:
        return found[0].name
    if text in methods.names():
        raise UsageError(
            f"{text} needs no environment of its own", hint=f"`pip install 'qplan[{text}]'`", code="no-environment"
        )
    everything = dict.fromkeys((*environments.names(), *methods.names()))
    raise UsageError(
        f"{text!r} is no environment and no method", hint=f"one of {', '.join(everything)}", code="unknown-environment"
    )


def statuses() -> tuple[Status, ...]:
    """What there is of every environment."""
    return environments.statuses()


def status(name: str) -> Status:
    """What there is of one.

    Raises:
        UsageError: there is none of this name.
    """
    return environments.status(name)


def offer(name: str, *, installer: str | None = None) -> Offer:
    """What installing would take, on this machine.

    Raises:
        UsageError: there is no environment of this name.
    """
    row = environments.row(name)
    build = torch_build.choose(cached_survey(None))
    sizes = _sizes(name, build)
    place = environments.folder(name)
    there = environments.status(name)
    lines = installing.lock_path(name, build).read_text("utf-8").splitlines()
    return Offer(
        name=name,
        title=row.title,
        summary=row.summary,
        build=build.build,
        installer=packages.chosen(installer),
        place=place,
        package_count=len([line for line in lines if line and not line.startswith("#")]),
        download_bytes=_whole(sizes.get("download_bytes")),
        disk_bytes=_whole(sizes.get("disk_bytes")),
        seconds=_whole(sizes.get("seconds")),
        free_bytes=_free_bytes(place),
        replaces=there.note or ("what is installed" if there.installed else None),
        note=sizes.get("source", ""),
    )


def needed_by(plan: Plan) -> tuple[Offer, ...]:
    """What ``apply`` would have to install first, in its order; empty where all of it is there."""
    names = dict.fromkeys(environments.of_step(step) for step in plan.making_steps())
    return tuple(offer(name) for name in names if name and status(name).python is None)


def needed_by_variant(variant: Variant) -> Offer | None:
    """What making ``variant`` would have to install first; ``None`` where nothing."""
    way = quantizers.way_of(variant)
    name = quantizers.quantizer(way.quantizer).environment if way else None
    return offer(name) if name and status(name).python is None else None


def _sizes(name: str, build: environments.TorchBuild) -> dict[str, str]:
    kind = torch_build.CPU if build.build == torch_build.CPU else "cuda"
    with data_path(SIZES).open(newline="", encoding="utf-8") as file:
        return next((r for r in csv.DictReader(file) if (r["environment"], r["build"]) == (name, kind)), {})


def _whole(text: str | None) -> int | None:
    return int(text) if text else None


def _free_bytes(place: Path) -> int | None:
    there = next((folder for folder in place.absolute().parents if folder.exists()), None)
    return shutil.disk_usage(there).free if there else None


def confirm(wanted: Offer, *, assume_yes: bool, ask: Callable[[str], bool] | None) -> None:
    """Ask before fetching it.

    Raises:
        NeedsConfirmation: there is nobody to ask, or the answer was no.
    """
    if assume_yes or (ask is not None and ask(wanted.question())):
        return
    raise NeedsConfirmation(
        f"{wanted.title} must be installed",
        numbers=wanted.takes(),
        hint=f"--yes agrees beforehand; so does `qplan methods install {wanted.name} --yes`",
        code="install-needs-yes",
    )


def check_room(wanted: Offer) -> None:
    """Refuse what the disk cannot hold: what is downloaded is kept by the installer, and unpacked beside it.

    Raises:
        ExecutionFailed: ``no-space`` with needed and free.
    """
    if wanted.disk_bytes is None or wanted.free_bytes is None:
        return
    needed = round(wanted.disk_bytes * BYTE_CODE) + (wanted.download_bytes or 0) + MARGIN_BYTES
    if needed > wanted.free_bytes:
        raise ExecutionFailed(
            f"not enough disk space at {home()}",
            numbers=f"needs {format_bytes(needed)}, {format_bytes(wanted.free_bytes)} free",
            hint="free some space, or set QPLAN_HOME to a folder on another disk",
            code="no-space",
        )


def install(wanted: Offer, tell: Tell | None = None) -> Status:
    """Install it; what is there is replaced.

    Raises:
        ExecutionFailed: no room, or it could not be installed.
        Stopped: a person stopped it; the next run begins anew, with what is downloaded by then.
    """
    check_room(wanted)
    build = next(row for row in environments.torch_builds() if row.build == wanted.build)
    installing.install(wanted.name, build, installer=wanted.installer, tell=tell)
    return environments.status(wanted.name)


def remove(name: str) -> int | None:
    """Remove what qplan made of an environment; the bytes it took, ``None`` where there was nothing.

    Raises:
        UsageError: there is no environment of this name.
        ExecutionFailed: it is being made now, or cannot be removed.
    """
    return installing.remove(name)


def prepare(
    check: Callable[[], Any],
    *,
    assume_yes: bool,
    ask: Callable[[str], bool] | None,
    tell: Callable[[Offer], Tell] | None = None,
) -> None:
    """Install every environment that ``check`` finds missing, after size and time were said and agreed to.

    Args:
        check: raises ``MissingEnvironment`` as long as one is missing.
        assume_yes: agree beforehand.
        ask: asks a person; ``None`` where there is nobody to ask.
        tell: is told of each installation when it begins; the returned function gets its progress.

    Raises:
        NeedsConfirmation: there is nobody to ask, or the answer was no.
        ExecutionFailed: no room, or it could not be installed.
    """
    tried: set[str] = set()
    while True:
        try:
            check()
        except MissingEnvironment as missing:
            if not missing.environment or missing.environment in tried:
                raise
            wanted = offer(missing.environment)
            confirm(wanted, assume_yes=assume_yes, ask=ask)
            install(wanted, tell(wanted) if tell else None)
            tried.add(missing.environment)
        else:
            return
