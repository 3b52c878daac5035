"""The memory bandwidth that was measured on this machine: when to measure, and where the result is kept."""

from __future__ import annotations

import contextlib
import hashlib
import json
from dataclasses import dataclass
from datetime import UTC, datetime

from planner.core.codec import write_atomically
from planner.core.data import home
from planner.core.errors import InputError
from planner.core.hardware import Cpu, Memory, usable_core_count
from planner.probe.reader import Reader, whole

_MIN_BUFFER = 256 << 20
_MAX_BUFFER = 1 << 30
# A buffer of twice the cache and more is mostly read from memory, as it is read in order (LRU keeps nothing of it).
_CACHE_MULTIPLE = 2
# As in memory_read: 1 GB/s to 5 TB/s.
_PLAUSIBLE = (1e9, 5e12)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bandwidth:
    """A measured read bandwidth."""

    bytes_per_second: float
    thread_count: int
    buffer_bytes: int
    date: str
    """Day of the measurement, ISO 8601."""


def cache_bytes(reader: Reader) -> int | None:
    """Size of the last-level cache that processor 0 sees, from sysfs."""
    sizes = []
    for path in reader.glob("/sys/devices/system/cpu/cpu0/cache/index[0-9]*/size"):
        text = reader.line(path)
        unit = {"K": 1 << 10, "M": 1 << 20}.get(text[-1:], 0)
        if unit and (size := whole(text[:-1], high=1 << 30)):
            sizes.append(size * unit)
    return max(sizes, default=None)


def buffer_bytes(cache: int | None, available: int | None) -> int:
    """Bytes to read in a round: over twice the cache, from 256 MiB to 1 GiB, and at most a quarter of what is free."""
    wanted = min(max(_CACHE_MULTIPLE * (cache or 0), _MIN_BUFFER), _MAX_BUFFER)
    return min(wanted, available // 4) if available else wanted


def identity(cpu: Cpu, memory: Memory) -> str:
    """What a measurement holds for: this processor, its cores and this much RAM."""
    ram = round(memory.total_bytes / 2**30) if memory.total_bytes else None
    fields = [cpu.model, cpu.architecture, cpu.physical_core_count, cpu.logical_core_count, ram]
    return hashlib.sha256(json.dumps(fields).encode()).hexdigest()[:16]


def cached(cpu: Cpu, memory: Memory) -> Bandwidth | None:
    """The last measurement on this machine."""
    try:
        entry = json.loads((home() / "cache" / "bandwidth.json").read_text(encoding="utf-8"))[identity(cpu, memory)]
        value = Bandwidth(**entry)
        inside = _PLAUSIBLE[0] <= value.bytes_per_second <= _PLAUSIBLE[1]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return value if inside else None


def measure(reader: Reader, cpu: Cpu, memory: Memory, *, seconds: float = 0.5) -> Bandwidth | None:
    """Measure with a thread on each core that this process may use, and remember the best result so far.

    Other programs only ever take bandwidth away, so the largest figure is the machine's.
    """
    from planner.probe.memory_read import read_bandwidth

    threads = min(cpu.physical_core_count or 1, usable_core_count())
    size = buffer_bytes(cache_bytes(reader), memory.usable_bytes())
    rate = read_bandwidth(threads=threads, size=size, seconds=seconds)
    if rate is None:
        return None
    today = datetime.now(UTC).date().isoformat()
    value = Bandwidth(bytes_per_second=float(round(rate)), thread_count=threads, buffer_bytes=size, date=today)
    before = cached(cpu, memory)
    if before is not None and before.bytes_per_second >= value.bytes_per_second:
        return before
    _remember(identity(cpu, memory), value)
    return value


def _remember(key: str, value: Bandwidth) -> None:
    """Add to the cache file; a cache that cannot be written costs a second next time, and nothing else."""
    path = home() / "cache" / "bandwidth.json"
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = {}
    known = known if isinstance(known, dict) else {}
    known[key] = {
        "bytes_per_second": value.bytes_per_second,
        "thread_count": value.thread_count,
        "buffer_bytes": value.buffer_bytes,
        "date": value.date,
    }
    with contextlib.suppress(InputError):
        write_atomically(path, json.dumps(known, indent=1))
