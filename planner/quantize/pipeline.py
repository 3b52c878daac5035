"""Reading, hashing, quantizing and writing, each in threads of its own, with a fixed number of blocks between them.

One thread reads every shard from front to back, one hashes what was read, one per core quantizes blocks, one writes:
a file system lets one writer into a file at a time, so that more would only wait for each other. Blocks lie in a
fixed set of buffers, which bounds the memory for any model.
"""

from __future__ import annotations

import ctypes
import hashlib
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import IO, TYPE_CHECKING, Any

from planner.core.errors import InputError, StalePlan
from planner.core.units import MIB
from planner.quantize.sources import Shard, Span, largest_span, spans
from planner.quantize.work import Blockwork, Writes

if TYPE_CHECKING:
    import numpy as np

BUFFER_BYTES = 256 * MIB
"""Of all source blocks in memory together; their results take as much again at most for each type."""
BLOCK_BYTES = 8 * MIB
WRITEBACK_BYTES = 64 * MIB
"""So much written, the system is asked to begin taking it to the disk: at the end little is left to wait for."""
_SYNC_FILE_RANGE_WRITE = 2
"""sync_file_range(2): begin to write what is dirty, and do not wait."""
SMALLEST_BLOCK_BYTES = MIB
_POLL_SECONDS = 0.2


class Stopped(Exception):
    """Another thread failed, or the run was interrupted; the reason is kept there."""


class Channel:
    """A bounded queue whose ends give up when the run is stopped."""

    def __init__(self, stop: threading.Event, room: int = 0) -> None:
        self._queue: queue.Queue[Any] = queue.Queue(room)
        self._stop = stop

    def put(self, item: Any) -> None:
        """Wait for room."""
        while not self._stop.is_set():
            try:
                return self._queue.put(item, timeout=_POLL_SECONDS)
            except queue.Full:
                continue
        raise Stopped

    def get(self) -> Any:
        """Wait for an item."""
        while not self._stop.is_set():
            try:
                return self._queue.get(timeout=_POLL_SECONDS)
            except queue.Empty:
                continue
        raise Stopped


@dataclass(slots=True)
class Block:
    """Bytes that were read, until all who need them are done."""

    shard: Shard
    span: Span
    buffer: np.ndarray[Any, Any]
    holders: int

    @property
    def data(self) -> np.ndarray[Any, Any]:
        """The bytes of the span."""
        return self.buffer[: self.span.size_bytes]


@dataclass(slots=True)
class Tally:
    """What is done so far; guarded by ``lock``."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    source_bytes: int = 0
    """Of the shards, done with."""
    read_bytes: int = 0
    written_bytes: int = 0
    waiting: dict[int, int] = field(default_factory=dict)
    """Unit → stored bytes that are not written yet."""
    units: set[int] = field(default_factory=set)
    """Written, not yet taken by ``take``."""
    shards: dict[str, dict[str, Any]] = field(default_factory=dict)
    cpu_seconds: dict[str, float] = field(default_factory=dict)

    def take(self) -> tuple[set[int], dict[str, dict[str, Any]]]:
        """Units and shards that were finished since the last call."""
        with self.lock:
            units, self.units = self.units, set()
            shards, self.shards = self.shards, {}
        return units, shards


class Pipeline:
    """One run over the shards."""

    def __init__(
        self,
        shards: tuple[Shard, ...],
        blockwork: Blockwork,
        files: list[IO[bytes]],
        *,
        threads: int,
        done_units: set[int],
        pins: Mapping[str, str],
    ) -> None:
        """Take the shards to read (none of ``done_units`` is quantized again) and the files to write, in order.

        ``pins`` are the SHA-256 that shards should have, by name.
        """
        self.tally = Tally()
        self._shards, self._blockwork, self._files, self._pins = shards, blockwork, files, pins
        self._threads, self._done_units = max(1, threads), done_units
        self._stop = threading.Event()
        self._error: BaseException | None = None
        buffers = self._threads + 3
        self._block_bytes = max(SMALLEST_BLOCK_BYTES, min(BLOCK_BYTES, BUFFER_BYTES // buffers))
        self._free, self._to_hash = Channel(self._stop), Channel(self._stop)
        self._to_quantize, self._to_write = Channel(self._stop), Channel(self._stop, room=self._threads + 1)
        self._buffer_count = buffers
        self._unsynced = 0

    @property
    def source_bytes(self) -> int:
        """Of all shards to be read."""
        return sum(shard.size_bytes for shard in self._shards)

    def run(self, tick: Callable[[], None], tick_seconds: float = _POLL_SECONDS) -> None:
        """Carry everything out; ``tick`` is called in this thread all the while.

        Raises:
            QplanError: a shard is damaged, not the pinned one, or cannot be quantized.
            OSError: an output cannot be written.
        """
        import numpy as np

        size = largest_span(self._shards, self._block_bytes)
        for _ in range(self._buffer_count):
            self._free.put(np.empty(size, dtype=np.uint8))
        stages = [("read", self._read), ("hash", self._hash), ("write", self._write)]
        stages += [("quantize", self._quantize)] * self._threads
        threads = [threading.Thread(target=self._guarded, args=stage, daemon=True) for stage in stages]
        for thread in threads:
            thread.start()
        try:
            while any(thread.is_alive() for thread in threads):
                for thread in threads:
                    thread.join(tick_seconds / len(threads))
                tick()
        finally:
            self._stop.set()
            for thread in threads:
                thread.join()
        if self._error is not None:
            raise self._error
        tick()

    def _guarded(self, name: str, stage: Callable[[], None]) -> None:
        try:
            stage()
        except Stopped:
            pass
        except BaseException as error:  # noqa: BLE001 - carried to the caller's thread
            with self.tally.lock:
                self._error = self._error or error
            self._stop.set()
        with self.tally.lock:
            spent = self.tally.cpu_seconds
            spent[name] = spent.get(name, 0.0) + time.thread_time()

    def _read(self) -> None:
        for shard in self._shards:
            with _opened(shard) as stream:
                for span in spans(shard, self._block_bytes):
                    wanted = span.unit is not None and span.unit.number not in self._done_units
                    block = Block(shard, span, self._free.get(), 2 if wanted else 1)
                    _fill(stream, block)
                    with self.tally.lock:
                        self.tally.read_bytes += span.size_bytes
                        if wanted and span.unit is not None:
                            self.tally.waiting.setdefault(span.unit.number, span.unit.size_bytes)
                    self._to_hash.put(block)
                    if wanted:
                        self._to_quantize.put(block)
        self._to_hash.put(None)
        for _ in range(self._threads):
            self._to_quantize.put(None)

    def _hash(self) -> None:
        digest, current = hashlib.sha256(), None
        while (block := self._to_hash.get()) is not None:
            if block.shard is not current:
                digest, current = hashlib.sha256(), block.shard
            digest.update(block.data)
            span = block.span
            self._release(block)
            if span.offset + span.size_bytes == current.size_bytes:
                self._hashed(current, digest.hexdigest())

    def _hashed(self, shard: Shard, sha256: str) -> None:
        pinned = self._pins.get(shard.path.name)
        if pinned is not None and pinned != sha256:
            raise StalePlan(
                f"{shard.path} is not the file that was planned for",
                numbers=f"SHA-256 {pinned[:16]}… expected, {sha256[:16]}… read",
                hint="download it again, or make a new plan with `qplan plan`",
                code="model-changed",
            )
        status = shard.path.stat()
        with self.tally.lock:
            facts = {"sha256": sha256, "size": status.st_size, "mtime_ns": status.st_mtime_ns}
            self.tally.shards[shard.path.name] = facts

    def _quantize(self) -> None:
        scratch = self._blockwork.scratch()
        while (block := self._to_quantize.get()) is not None:
            made = self._blockwork.quantize(block.span, block.data, scratch)
            self._release(block)
            self._to_write.put((block.span, made))
        self._to_write.put(None)

    def _write(self) -> None:
        working = self._threads
        while working:
            item = self._to_write.get()
            if item is None:
                working -= 1
                continue
            span, made = item
            self._store(span, made)

    def _store(self, span: Span, made: Writes) -> None:
        for number, offset, data in made:
            file, view = self._files[number], data.data
            file.seek(offset)
            while view:
                view = view[file.write(view) :]
        unit = span.unit
        assert unit is not None
        self._unsynced += sum(data.size for _, _, data in made)
        if self._unsynced >= WRITEBACK_BYTES:
            self._unsynced = 0
            for file in self._files:
                _begin_writeback(file)
        with self.tally.lock:
            self.tally.source_bytes += span.size_bytes
            self.tally.written_bytes += sum(data.size for _, _, data in made)
            self.tally.waiting[unit.number] -= span.size_bytes
            if not self.tally.waiting[unit.number]:
                del self.tally.waiting[unit.number]
                self.tally.units.add(unit.number)

    def _release(self, block: Block) -> None:
        with self.tally.lock:
            block.holders -= 1
            last = not block.holders
            if last and (block.span.unit is None or block.span.unit.number in self._done_units):
                self.tally.source_bytes += block.span.size_bytes
        if last:
            self._free.put(block.buffer)


def _begin_writeback(file: IO[bytes]) -> None:
    """On Linux; elsewhere the syncs now and then do."""
    if function := _sync_file_range():
        function(file.fileno(), 0, 0, _SYNC_FILE_RANGE_WRITE)


@cache
def _sync_file_range() -> Any:
    if sys.platform != "linux":
        return None
    found = getattr(ctypes.CDLL(None), "sync_file_range", None)
    if found is not None:
        found.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    return found


@contextmanager
def _opened(shard: Shard) -> Iterator[IO[bytes]]:
    try:
        stream = shard.path.open("rb", buffering=0)
    except OSError as error:
        raise _unreadable(shard, error) from None
    with stream:
        yield stream


def _fill(stream: IO[bytes], block: Block) -> None:
    """Read the span into the block's buffer; spans follow each other in the file."""
    view = block.data.data
    done = 0
    try:
        while done < len(view) and (count := stream.readinto(view[done:])):  # type: ignore[attr-defined]
            done += count
    except OSError as error:
        raise _unreadable(block.shard, error) from None
    if done < len(view):
        raise InputError(
            f"{block.shard.path.name!r} is cut short",
            numbers=f"{len(view)} bytes expected at {block.span.offset}, {done} there",
            hint="download the file again",
            code="truncated-safetensors",
        )


def _unreadable(shard: Shard, error: OSError) -> InputError:
    return InputError(f"{shard.path.name!r} cannot be read", numbers=str(error), code="unreadable-file")
