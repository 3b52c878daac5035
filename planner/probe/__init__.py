"""This machine as a :class:`~planner.core.hardware.HardwareProfile`, and machines captured as TOML files."""

from __future__ import annotations

from typing import TYPE_CHECKING

from planner.probe.profile_io import (
    ProfileSummary,
    load_profile,
    profile_names,
    profile_summaries,
    profile_toml,
    save_profile,
    summary,
    without_free_memory,
)
from planner.probe.reader import Reader

if TYPE_CHECKING:
    from planner.probe.machine import probe

__all__ = [
    "ProfileSummary",
    "Reader",
    "load_profile",
    "probe",
    "profile_names",
    "profile_summaries",
    "profile_toml",
    "save_profile",
    "summary",
    "without_free_memory",
]


def __getattr__(name: str) -> object:
    """``probe`` on first use: a captured profile needs none of its sources."""
    if name == "probe":
        from planner.probe.machine import probe

        return probe
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
