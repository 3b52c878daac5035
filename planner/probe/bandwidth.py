"""Memory bandwidth, measured: threads compare the two equal halves of a buffer with libc's ``memcmp``.

``memcmp`` reads each byte once with the widest vectors that the C library has, writes nothing, and ctypes lets go of
the interpreter's lock meanwhile, so threads run side by side without numpy. Its two streams fill more of the memory
system than ``memchr`` with one (34 against 22 GB/s on two cores of a Xeon with AMX; numpy's ``max`` 29). The
buffers are written first (untouched pages all map to one zero page, which sits in the cache) and are larger than the
last-level cache.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import mmap
import os
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from planner.core.codec import write_atomically
from planner.core.data import home
from planner.core.hardware import Cpu, Memory
from planner.probe.reader import Reader, whole

_MIN_BUFFER = 256 << 20
_MAX_BUFFER = 1 << 30
# A buffer of twice the cache and more is mostly read from memory, as it is read in order (LRU keeps nothing of it).
_CACHE_MULTIPLE = 2
# Slowest plausible: one channel of LPDDR2. Fastest: 12 channels of DDR5 in two sockets are 1.2 TB/s.
_PLAUSIBLE = (1e9, 5e12)
_FILL = 0x55


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


def read_bandwidth(*, threads: int, size: int, seconds: float = 0.5) -> float | None:
    """Bytes per second that ``threads`` threads together read from ``size`` bytes of memory; the best round.

    Args:
        threads: at least 1; each has its own part of the buffer.
        size: bytes of all buffers together.
        seconds: how long to go on; one round is read in any case.

    Returns:
        ``None`` where the memory or libc is not to be had.
    """
    threads = max(threads, 1)
    part = size // threads // (2 * mmap.PAGESIZE) * (2 * mmap.PAGESIZE)
    memcmp = _memcmp()
    if memcmp is None or part <= 0:
        return None
    try:
        with contextlib.ExitStack() as stack:
            addresses = [stack.enter_context(_buffer(part)) for _ in range(threads)]
            return _best_round(memcmp, addresses, part, seconds)
    except (OSError, MemoryError, ValueError, RuntimeError):
        return None


def _memcmp() -> Any:
    try:
        library = ctypes.CDLL("msvcrt" if sys.platform == "win32" else None)
        function = library.memcmp
    except (OSError, AttributeError, TypeError):
        return None
    function.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
    function.restype = ctypes.c_int
    return function


@contextlib.contextmanager
def _buffer(size: int) -> Iterator[int]:
    """Address of ``size`` bytes of anonymous memory in huge pages where there are such."""
    memory = mmap.mmap(-1, size)
    try:
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):
                memory.madvise(mmap.MADV_HUGEPAGE)
        view = ctypes.c_char.from_buffer(memory)
        address = ctypes.addressof(view)
        yield address
        del view
    finally:
        memory.close()


def _best_round(memcmp: Any, addresses: list[int], part: int, seconds: float) -> float | None:
    """All threads fill their part, then read it over and over; a round counts from the first start to the last end."""
    spans: list[list[tuple[float, float]]] = [[] for _ in addresses]
    state: dict[str, float] = {}
    half = part // 2

    def between_rounds() -> None:
        """Run by one thread while the others wait: the clock starts when all buffers are filled."""
        now = time.perf_counter()
        if now > state.setdefault("deadline", now + seconds):
            state["stop"] = now

    barrier = threading.Barrier(len(addresses), action=between_rounds, timeout=60)

    def work(index: int) -> None:
        ctypes.memset(addresses[index], _FILL, part)
        with contextlib.suppress(threading.BrokenBarrierError):
            while barrier.wait() >= 0 and "stop" not in state:
                start = time.perf_counter()
                memcmp(addresses[index], addresses[index] + half, half)
                spans[index].append((start, time.perf_counter()))

    workers = [threading.Thread(target=work, args=(index,), daemon=True) for index in range(len(addresses))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    rounds = [(min(s for s, _ in r), max(e for _, e in r)) for r in zip(*spans, strict=False)]
    rates = [len(addresses) * part / (end - start) for start, end in rounds if end > start]
    best = max(rates, default=None)
    return best if best is not None and _PLAUSIBLE[0] <= best <= _PLAUSIBLE[1] else None


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
    """Measure with a thread on each core that this process may use, and remember the result."""
    threads = min(cpu.physical_core_count or 1, usable_cpus())
    size = buffer_bytes(cache_bytes(reader), memory.usable_bytes())
    rate = read_bandwidth(threads=threads, size=size, seconds=seconds)
    if rate is None:
        return None
    today = datetime.now(UTC).date().isoformat()
    value = Bandwidth(bytes_per_second=float(round(rate)), thread_count=threads, buffer_bytes=size, date=today)
    _remember(identity(cpu, memory), value)
    return value


def usable_cpus() -> int:
    """Logical processors that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


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
    with contextlib.suppress(OSError):
        write_atomically(path, json.dumps(known, indent=1))
