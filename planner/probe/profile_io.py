"""Machines as TOML files: the captured ones in ``profiles/`` and those that ``qplan probe --save`` writes."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from planner.core.codec import decode, encode, write_atomically
from planner.core.data import profiles_path
from planner.core.errors import InputError, UsageError
from planner.core.hardware import Cpu, Gpu, HardwareProfile, Memory
from planner.core.units import format_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileSummary:
    """One line of ``qplan profiles``."""

    name: str
    cpu: str
    ram_bytes: int | None
    gpus: tuple[str, ...]
    """Name and memory of each GPU."""
    source: str
    date: str | None


def profile_names() -> tuple[str, ...]:
    """Names of the captured machines, sorted."""
    return tuple(sorted(path.stem for path in profiles_path().glob("*.toml")))


def load_profile(name_or_path: str | Path) -> HardwareProfile:
    """A captured machine by its name, or the profile in a TOML file by its path.

    A text that ends in ``.toml`` or has a directory in it is a path.

    Raises:
        UsageError: no profile has this name.
        InputError: the file is missing, unreadable, no TOML, or no profile.
    """
    text = str(name_or_path)
    if isinstance(name_or_path, Path) or text.endswith(".toml") or "/" in text or "\\" in text:
        return _read(Path(text).expanduser())
    if text not in profile_names():
        from difflib import get_close_matches

        near = get_close_matches(text.lower(), profile_names(), n=3, cutoff=0.4) or profile_names()[:3]
        raise UsageError(
            f"no profile is called {text!r}",
            hint=f"near it: {', '.join(near)}; `qplan profiles` lists all, and a path to a .toml file works too",
            code="unknown-profile",
        )
    return _captured(text)


@cache
def _captured(name: str) -> HardwareProfile:
    """A shipped profile, built without pydantic, which costs more than the rest of ``recommend``'s start-up.

    A test decodes every shipped profile strictly and compares.
    """
    data = read_toml(profiles_path() / f"{name}.toml")
    cpu = _cpu(data.pop("cpu"))
    memory = Memory(**data.pop("memory"))
    gpus = tuple(Gpu(**gpu) for gpu in data.pop("gpus", ()))
    notes = tuple(data.pop("notes", ()))
    return HardwareProfile(cpu=cpu, memory=memory, gpus=gpus, notes=notes, **data)


def _cpu(data: dict[str, Any]) -> Cpu:
    return Cpu(**(data | {"simd": tuple(data.get("simd", ()))}))


def _read(path: Path) -> HardwareProfile:
    return decode(HardwareProfile, read_toml(path), what=str(path))


def read_toml(path: Path) -> dict[str, Any]:
    """The parsed TOML file ``path``.

    Raises:
        InputError: the file is missing, unreadable or no TOML.
    """
    import tomllib

    try:
        with path.open("rb") as file:
            return tomllib.load(file)
    except FileNotFoundError:
        raise InputError(
            f"{path} does not exist", hint="`qplan probe --save FILE` writes a profile", code="missing-file"
        ) from None
    except OSError as error:
        raise InputError(f"{path} cannot be read", numbers=str(error), code="unreadable-file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"{path} is not TOML", numbers=str(error), code="bad-toml") from None


def save_profile(profile: HardwareProfile, path: Path) -> Path:
    """Write ``profile`` to ``path`` as TOML that :func:`load_profile` reads back to an equal value.

    Returns:
        ``path``.

    Raises:
        InputError: the file cannot be written.
    """
    try:
        write_atomically(path, profile_toml(profile))
    except OSError as error:
        raise InputError(f"{path} cannot be written", numbers=str(error), code="unwritable-file") from None
    return path


def profile_toml(profile: HardwareProfile) -> str:
    """``profile`` as a TOML document; unknown values are left out."""
    document: dict[str, Any] = encode(profile)
    tables = {key: document.pop(key) for key in ("cpu", "memory", "disk")}
    gpus = document.pop("gpus")
    parts = [_pairs(document), *(f"[{key}]\n{_pairs(value)}" for key, value in tables.items() if value)]
    parts += [f"[[gpus]]\n{_pairs(gpu)}" for gpu in gpus]
    return "\n".join(parts)


def _pairs(table: dict[str, Any]) -> str:
    return "".join(f"{key} = {_scalar(value)}\n" for key, value in table.items() if value is not None)


def _scalar(value: Any) -> str:
    """A TOML value: JSON's spelling of strings, numbers, booleans and lists is TOML's as well, but for DEL."""
    if isinstance(value, list):
        return "[" + ", ".join(_scalar(item) for item in value) + "]"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def profile_summaries() -> tuple[ProfileSummary, ...]:
    """One :class:`ProfileSummary` for each captured machine, by name."""
    return tuple(summary(name, load_profile(name)) for name in profile_names())


def summary(name: str, profile: HardwareProfile) -> ProfileSummary:
    """The line of ``qplan profiles`` for ``profile``."""
    return ProfileSummary(
        name=name,
        cpu=profile.cpu.model,
        ram_bytes=profile.memory.total_bytes,
        gpus=tuple(f"{gpu.name}, {format_bytes(gpu.memory_total_bytes)}" for gpu in profile.gpus),
        source=profile.source,
        date=profile.date,
    )


def without_free_memory(profile: HardwareProfile) -> HardwareProfile:
    """``profile`` as a machine to plan for: without what was free at the moment of the probe."""
    return dataclasses.replace(
        profile,
        gpus=tuple(dataclasses.replace(gpu, memory_free_bytes=None) for gpu in profile.gpus),
        memory=dataclasses.replace(profile.memory, available_bytes=None),
        disk=None,
    )
