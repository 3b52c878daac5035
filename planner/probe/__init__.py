"""This machine as a :class:`~planner.core.hardware.HardwareProfile`, and machines captured as TOML files."""

from planner.probe.machine import probe
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
