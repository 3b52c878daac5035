"""What was measured on this machine, in SQLite, and as the value that estimates take.

``read_calibration`` costs a file lookup when nothing was ever measured: ``sqlite3`` is imported only after that.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from planner.core.measurement import Calibration
    from planner.store.database import Store

__all__ = ["FILE_NAME", "Store", "default_path", "read_calibration"]

FILE_NAME = "measurements.sqlite3"


def __getattr__(name: str) -> object:
    if name == "Store":
        from planner.store.database import Store

        return Store
    raise AttributeError(name)


def default_path() -> Path:
    """Where measurements are kept: under ``QPLAN_HOME``."""
    from planner.core.data import home

    return home() / FILE_NAME


def read_calibration(hardware_identity: str, path: Path | None = None) -> Calibration | None:
    """Everything measured on the machine, or ``None`` when there is no store; never creates one.

    Raises:
        InputError: the file is damaged, of a newer qplan, or another program's.
    """
    file = path or default_path()
    if not file.is_file():
        return None
    from planner.store.database import Store

    with Store(file, read_only=True) as store:
        return store.calibration(hardware_identity)
