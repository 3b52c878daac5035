"""What a person set in the wizard: the theme and changed keys, in ``wizard.json`` under qplan's home."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from planner.core.data import home
from planner.core.errors import InputError
from planner.core.strict import STRICT
from planner.tui import keys

DARK, LIGHT = "textual-dark", "textual-light"


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Kept between runs."""

    __pydantic_config__: ClassVar[dict[str, str]] = STRICT

    theme: str = DARK
    keymap: dict[str, str] = field(default_factory=dict)
    """Action id → key, where it is not the usual one."""


def path() -> Path:
    """Where the settings lie."""
    return home() / "wizard.json"


def load() -> Settings:
    """The settings; the usual ones where there are none or they are damaged."""
    if not path().is_file():
        return Settings()
    from planner.core.codec import decode, read_json  # not before the first frame where nobody set anything

    try:
        found = decode(Settings, read_json(path()), what=str(path()))
    except InputError:
        return Settings()
    return Settings(theme=found.theme, keymap=keys.known(found.keymap))


def save(settings: Settings) -> None:
    """Keep them.

    Raises:
        InputError: they cannot be written.
    """
    from planner.core.codec import canonical_json, write_atomically

    write_atomically(path(), canonical_json(settings) + "\n")
