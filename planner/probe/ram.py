"""RAM: what the kernel has, what is available, and what the control group leaves of it."""

from __future__ import annotations

from dataclasses import dataclass

from planner.core.hardware import Memory
from planner.probe.reader import Reader, whole

# cgroup v1 writes "no limit" as the largest multiple of the page size below 2**63.
_UNLIMITED = 1 << 60
_MAX_BYTES = 1 << 50


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Limit and use of a memory control group, in bytes."""

    limit_bytes: int | None = None
    used_bytes: int | None = None
    """Without the page cache that the kernel would drop (``inactive_file``)."""


def parse_meminfo(text: str) -> tuple[int | None, int | None]:
    """(total, available) bytes of ``/proc/meminfo``.

    Kernels before 3.14 have no ``MemAvailable``; free + buffers + cache stands in, as ``free`` did it then.
    """
    found: dict[str, int] = {}
    for line in text.splitlines():
        key, _, rest = line.partition(":")
        words = rest.split()
        value = whole(words[0], low=0, high=_MAX_BYTES >> 10) if words and words[1:] in ([], ["kB"]) else None
        if value is not None:
            found.setdefault(key.strip(), value << 10)
    total = found.get("MemTotal") or None
    available = found.get("MemAvailable")
    if available is None and "MemFree" in found:
        available = found["MemFree"] + found.get("Buffers", 0) + found.get("Cached", 0)
    if total is None or not available or available > total:
        available = None
    return total, available


def memory_groups(text: str) -> tuple[str | None, str | None]:
    """(v1 path, v2 path) of this process from ``/proc/self/cgroup``."""
    first = second = None
    for line in text.splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if not path.startswith("/") or ".." in path:
            continue
        if "memory" in controllers.split(","):
            first = path
        elif number == "0" and not controllers:
            second = path
    return first, second


def _ancestors(path: str) -> list[str]:
    parts = [part for part in path.split("/") if part]
    return ["/" + "/".join(parts[:count]) if count else "" for count in range(len(parts), -1, -1)]


def _limit(text: str) -> int | None:
    value = whole(text)
    return None if value is None or value >= _UNLIMITED else value


def _used(reader: Reader, folder: str, current: str, inactive: str) -> int | None:
    used = whole(reader.line(f"{folder}/{current}"), low=0)
    if used is None:
        return None
    for line in reader.text(f"{folder}/memory.stat").splitlines():
        key, _, value = line.partition(" ")
        if key == inactive:
            return max(used - (whole(value, low=0) or 0), 0)
    return used


def control_group(reader: Reader) -> Group:
    """The tightest limit of this process's control group and its ancestors, v2 before v1.

    In a container the path is often that of the host and not visible: the mount's root is then the group's own.
    """
    first, second = memory_groups(reader.text("/proc/self/cgroup"))
    places = [
        ("/sys/fs/cgroup" + p, "memory.max", "memory.current", "inactive_file") for p in _ancestors(second or "/")
    ]
    places += [
        ("/sys/fs/cgroup/memory" + p, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        for p in _ancestors(first or "/")
    ]
    groups = []
    for folder, maximum, current, inactive in places:
        limit = _limit(reader.line(f"{folder}/{maximum}"))
        if limit is not None:
            groups.append(Group(limit_bytes=limit, used_bytes=_used(reader, folder, current, inactive)))
    return min(groups, key=lambda group: group.limit_bytes or 0, default=Group())


def linux_memory(reader: Reader) -> tuple[Memory, list[str]]:
    """RAM of a Linux machine or container, and notes."""
    total, available = parse_meminfo(reader.text("/proc/meminfo"))
    if total is None:
        return system_memory("/proc/meminfo has no MemTotal")
    group = control_group(reader)
    limit = group.limit_bytes if group.limit_bytes is not None and group.limit_bytes < total else None
    notes = []
    if limit is not None:
        notes.append(f"a control group limits memory to {limit >> 20} MiB of {total >> 20} MiB")
        left = limit - (group.used_bytes or 0)
        available = min(available, left) if available is not None else left
        available = available if available > 0 else None
    return Memory(total_bytes=total, available_bytes=available, limit_bytes=limit), notes


def system_memory(reason: str | None = None) -> tuple[Memory, list[str]]:
    """RAM as psutil reports it, for systems without ``/proc/meminfo``."""
    notes = [reason] if reason else []
    try:
        import psutil

        found = psutil.virtual_memory()
        total, available = whole(found.total, high=_MAX_BYTES), whole(found.available, high=_MAX_BYTES)
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        return Memory(), [*notes, f"RAM is unknown: {error}"]
    return Memory(total_bytes=total, available_bytes=available), notes
