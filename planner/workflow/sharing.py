"""Measurements as files that people share: written without names and paths, checked, and imported beside one's own."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path, PureWindowsPath

from planner import __version__
from planner.core.codec import canonical_json, content_sha256, decode, encode, read_json, write_atomically
from planner.core.errors import InputError, QplanError
from planner.core.hardware import HardwareProfile
from planner.core.measurement import QUANTITIES, Measurement
from planner.core.submission import (
    FORMAT,
    KIND,
    Complaint,
    Imported,
    SharedGpu,
    SharedHardware,
    SharedMeasurement,
    Submission,
)
from planner.core.units import GIB, MIB, format_bytes
from planner.workflow.plausible import complaints
from planner.workflow.survey import measurements, survey

_LARGEST_FILE = 64 * MIB
"""A thousand measurements take 1 MB."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """A file with what is wrong with it."""

    path: Path
    submission: Submission | None
    complaints: tuple[Complaint, ...]
    error: QplanError | None = None
    """Why it cannot be read at all."""

    @property
    def ok(self) -> bool:
        """Nothing is."""
        return self.error is None and not self.complaints


def submission_of(found: Sequence[Measurement], hardware: HardwareProfile) -> Submission:
    """What was measured on ``hardware``, of the quantities that mean something elsewhere."""
    rows = [_shared(m) for m in found if m.quantity in QUANTITIES and m.hardware_identity == hardware.identity()]
    return Submission(
        format_version=FORMAT,
        kind=KIND,
        qplan_version=__version__,
        hardware=_machine(hardware),
        measurements=tuple(rows),
    )


def _machine(hardware: HardwareProfile) -> SharedHardware:
    measured = (hardware.memory.bandwidth_basis or "").startswith("measured")
    return SharedHardware(
        identity=hardware.identity(),
        os=hardware.os,
        cpu=hardware.cpu.model,
        physical_core_count=hardware.cpu.physical_core_count,
        logical_core_count=hardware.cpu.logical_core_count,
        ram_gib=_gib(hardware.memory.total_bytes),
        bandwidth_bytes_per_second=hardware.memory.bandwidth_bytes_per_second if measured else None,
        gpus=tuple(
            SharedGpu(
                name=gpu.name,
                backend=gpu.backend,
                memory_gib=_gib(gpu.memory_total_bytes),
                device=gpu.device,
                driver=gpu.driver,
            )
            for gpu in hardware.gpus
        ),
    )


def _gib(size: int | None) -> int | None:
    return round(size / GIB) if size else None


def _shared(m: Measurement) -> SharedMeasurement:
    """Without the machine, the time of day, and the folders of a model that was named by a path."""
    same = {
        field.name: getattr(m, field.name) for field in dataclasses.fields(SharedMeasurement) if field.name != "date"
    }
    return SharedMeasurement(**{**same, "model": PureWindowsPath(m.model).name or "model"}, date=m.measured_at[:10])


def share(path: Path) -> Submission:
    """Write what was measured on this machine as a submission.

    Raises:
        InputError: nothing was measured, or the file cannot be written.
    """
    made = submission_of(measurements(), survey())
    if not made.measurements:
        raise nothing_measured()
    write_atomically(path, canonical_json(made) + "\n")
    return made


def nothing_measured() -> InputError:
    """There is nothing to write."""
    return InputError(
        "nothing was measured on this machine yet",
        hint="`qplan tune`, `qplan verify` and `qplan apply` measure",
        code="nothing-measured",
    )


def read_submission(path: Path) -> Submission:
    """A submission as it is, whether it can be true or not.

    Raises:
        InputError: it cannot be read or has another shape.
    """
    try:
        size = path.stat().st_size if path.is_file() else 0
    except OSError:
        size = 0
    if size > _LARGEST_FILE:
        raise InputError(
            f"{path} is too large for a submission",
            numbers=f"{format_bytes(size)}, at most {format_bytes(_LARGEST_FILE)}",
            code="too-large",
        )
    return decode(Submission, read_json(path), what=str(path))


def check(paths: Sequence[Path]) -> tuple[Checked, ...]:
    """Each file with what is wrong with it."""
    return tuple(map(_check, paths))


def _check(path: Path) -> Checked:
    try:
        found = read_submission(path)
    except QplanError as error:
        return Checked(path=path, submission=None, complaints=(), error=error)
    return Checked(path=path, submission=found, complaints=complaints(found))


@dataclass(frozen=True, slots=True, kw_only=True)
class Added:
    """A file that was imported."""

    path: Path
    submission: Submission
    new: bool
    """False: the very same is in the store already."""


def import_files(paths: Sequence[Path]) -> tuple[Added, ...]:
    """Take submissions into the store, all or none.

    Raises:
        InputError: a file cannot be read, or what it says cannot be true.
    """
    from planner.store import Store

    checked = check(paths)
    for one in checked:
        if one.error is not None:
            raise one.error
        if one.complaints:
            raise InputError(
                f"{one.path} cannot be true",
                numbers="\n".join(complaint_line(complaint) for complaint in one.complaints[:10]),
                hint="nothing was imported; `qplan measurements check FILE` lists all that is wrong",
                code="implausible",
            )
    now = datetime.now(UTC).isoformat(timespec="seconds")
    added = []
    with Store() as store:
        for one in checked:
            assert one.submission is not None
            sha256 = content_sha256(one.submission)
            row = Imported(sha256=sha256, source=one.path.name, imported_at=now, submission=one.submission)
            added.append(Added(path=one.path, submission=one.submission, new=store.add_submission(row)))
    return tuple(added)


def complaint_line(complaint: Complaint) -> str:
    """A complaint in a line."""
    return f"{complaint.where}: {complaint.what}: {complaint.numbers} [{complaint.code}]"


def imported() -> tuple[Imported, ...]:
    """What was imported, the oldest first."""
    from planner.store import Store, default_path

    if not default_path().exists():
        return ()
    with Store(read_only=True) as store:
        return store.submissions()


def schema() -> dict[str, object]:
    """The JSON Schema of a submission."""
    from pydantic import TypeAdapter

    made = TypeAdapter(Submission).json_schema()
    title = "Measurements of qplan"
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **made, "title": title}


def document(found: Sequence[Measurement], others: Sequence[Imported] = ()) -> dict[str, object]:
    """What ``qplan measurements --json`` prints."""
    from planner import FORMAT_VERSION

    made: dict[str, object] = {"format_version": FORMAT_VERSION, "measurements": [encode(item) for item in found]}
    return made | ({"imported": [encode(item) for item in others]} if others else {})
