"""Resident set of this process: now, and at its peak."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from planner.core.units import KIB

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def _status_bytes(field: str) -> int | None:
    try:
        text = _STATUS.read_text()
    except OSError:
        return None
    match = re.search(rf"^{field}:\s*(\d+) kB$", text, re.MULTILINE)
    return int(match[1]) * KIB if match else None


def resident_bytes() -> int:
    """Resident set of this process now."""
    known = _status_bytes("VmRSS")
    if known is not None:
        return known
    import psutil

    return int(psutil.Process().memory_info().rss)


def reset_peak() -> None:
    """Make the peak start from now, where Linux allows it (``clear_refs``, proc(5)); else it keeps the import's."""
    try:
        _CLEAR.write_text("5")
    except OSError:
        return


def peak_resident_bytes() -> int:
    """Largest resident set of this process: VmHWM, else getrusage (KiB, on macOS bytes), else Windows' peak."""
    known = _status_bytes("VmHWM")
    if known is not None:
        return known
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * KIB)
