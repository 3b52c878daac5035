"""Which machine is planned for: this one, a captured profile, or a device of the table."""

from __future__ import annotations

import dataclasses
from functools import lru_cache
from pathlib import Path

from planner.core.data import read_table
from planner.core.errors import QplanError
from planner.core.hardware import ASSUMED, HardwareProfile
from planner.core.measurement import Calibration, Measurement

ASSUMED_HOST = "desktop-pcie4"
"""The row of ``data/hosts.csv`` that stands in for a CPU whose memory bandwidth was never measured."""


def survey(
    profile: str | None = None, *, output: Path | None = None, measure: bool = False, again: bool = False
) -> HardwareProfile:
    """The captured machine ``profile`` (a name or a TOML file), or this machine.

    Args:
        profile: name in ``profiles/`` or a path; ``None`` is this machine.
        output: where a model would be written, for the free disk space.
        measure: measure the memory bandwidth (about a second) if it never was on this machine. Otherwise an unknown
            one is assumed to be an ordinary desktop's, and speeds that rest on it get a wide range.
        again: measure it even so; the better measurement is kept, as a busy machine only ever measures too little.

    Raises:
        UsageError: no profile has this name.
    """
    from planner import probe

    if profile is not None:
        return probe.load_profile(profile)
    found = probe.probe(output=output, measure_bandwidth=measure, again=again)
    return found if found.memory.bandwidth_bytes_per_second else _with_assumed_bandwidth(found)


def _with_assumed_bandwidth(hardware: HardwareProfile) -> HardwareProfile:
    """The machine with the memory bandwidth of a desktop with two channels of DDR4, from ``data/hosts.csv``."""
    row = next(row for row in read_table("hosts.csv") if row["host"] == ASSUMED_HOST)
    memory = dataclasses.replace(
        hardware.memory,
        bandwidth_bytes_per_second=float(row["bandwidth_bytes_per_second"]),
        bandwidth_basis=f"{ASSUMED}: {row['memory_type']}",
    )
    return dataclasses.replace(hardware, memory=memory)


@lru_cache(maxsize=256)
def simulated(device: str, count: int, backend: str | None) -> HardwareProfile:
    """A machine around ``count`` devices of the device table, as published.

    Raises:
        UsageError: no device has this name.
    """
    from planner.core.devices import hardware_from_device

    return hardware_from_device(device, count=count, backend=backend)


@lru_cache(maxsize=64)
def cached_survey(profile: str | None) -> HardwareProfile:
    """:func:`survey` once per process, for batches."""
    return survey(profile)


def calibration_of(hardware: HardwareProfile) -> tuple[Calibration | None, tuple[str, ...]]:
    """What the store holds for this machine; ``None`` if nothing was ever measured on it, or, with a note, if the
    store cannot be read: an answer from formulas beats none."""
    from planner.store import read_calibration

    try:
        return read_calibration(hardware.identity()), ()
    except QplanError as error:
        return None, (f"measurements are left out: {error.what}; {error.hint}",)


def save_profile(hardware: HardwareProfile, path: Path) -> Path:
    """Write a machine as a profile that ``--profile`` reads.

    Raises:
        InputError: the file cannot be written.
    """
    from planner import probe

    return probe.save_profile(hardware, path)


def profiles() -> tuple[tuple[str, HardwareProfile], ...]:
    """All captured machines by name."""
    from planner import probe

    return tuple((name, probe.load_profile(name)) for name in probe.profile_names())


def measurements(*, all_machines: bool = False) -> tuple[Measurement, ...]:
    """What the store holds for this machine, or for all, oldest first."""
    from planner.store import Store, default_path

    if not default_path().exists():
        return ()
    with Store() as store:
        return store.list() if all_machines else store.list(hardware_identity=survey().identity())
