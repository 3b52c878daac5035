"""Free disk space where a model would be written."""

from __future__ import annotations

import shutil
from pathlib import Path

from planner.core.hardware import Disk
from planner.probe.reader import whole


def free_disk(output: Path | None) -> tuple[Disk, list[str]]:
    """The file system of ``output`` (the working directory if ``None``), by its nearest parent that exists."""
    try:
        place = (output or Path.cwd()).expanduser().absolute()
        while not place.exists() and place != place.parent:
            place = place.parent
        free = whole(shutil.disk_usage(place).free, high=1 << 60)
    except (OSError, RuntimeError, ValueError) as error:
        return Disk(path=str(output or ".")), [f"free disk space is unknown: {error}"]
    notes = [] if free is not None else [f"no free space on the file system of {place}"]
    return Disk(path=str(place), free_bytes=free), notes
