"""Resident set of this process, now and at its peak, and what other programs took of the cores."""

from __future__ import annotations

import re
import sys
import time
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


class OthersShare:
    """Share of all cores' time that other programs had since this was made."""

    def __init__(self) -> None:
        self._began = self._now()

    def share(self) -> float | None:
        """0 … 1; ``None`` where no time has passed or the system does not tell."""
        (busy, idle, own), (busy_before, idle_before, own_before) = self._now(), self._began
        total = busy - busy_before + idle - idle_before
        if total <= 0:
            return None
        return min(1.0, max(0.0, (busy - busy_before - (own - own_before)) / total))

    @staticmethod
    def _now() -> tuple[float, float, float]:
        """Seconds of all cores since boot: busy (time that a hypervisor took included), idle; and this process's."""
        import psutil

        times = psutil.cpu_times()._asdict()
        counted = {name: value for name, value in times.items() if not name.startswith("guest")}  # in user's already
        idle = counted.pop("idle", 0.0) + counted.pop("iowait", 0.0)
        return sum(counted.values()), idle, time.process_time()
