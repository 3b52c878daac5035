"""A model's files from the hub into its cache: several at a time, told as they come, and going on where it stopped.

Large files come under ``<hash>.incomplete`` in the cache's ``blobs`` and get their name when the hash is right.
huggingface_hub (seen in 2.4) keeps no part of a killed download, so it is only asked to link the finished file.
The cache's layout is documented: https://huggingface.co/docs/huggingface_hub/guides/manage-cache
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING

from planner.core.errors import ExecutionFailed, InputError
from planner.core.plan import PinnedFile, PlanModel
from planner.core.units import format_bytes
from planner.execute.process import Progress

if TYPE_CHECKING:
    from planner.models.hub_access import Hub

CONNECTION_COUNT = 4
"""Files fetched at a time: a line that one connection does not fill, and few parts to go on from."""
TRY_COUNT = 5
"""Failures in a row, nothing having come between them, after which it gives up."""
PAUSE_SECONDS = 1.0
BLOCK_BYTES = 1 << 22


def cache_folder(repository: str) -> Path:
    """The folder of ``repository`` in the hub's cache (``HF_HUB_CACHE``, ``HF_HOME``)."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE) / f"models--{repository.replace('/', '--')}"


def missing_bytes(model: PlanModel) -> int:
    """Bytes of the pinned files that the cache lacks; what an earlier download left counts as there."""
    folder = cache_folder(model.location)
    return sum(file.size_bytes - _there(folder, model.revision, file) for file in model.files)


def _there(folder: Path, revision: str | None, file: PinnedFile) -> int:
    """Bytes of ``file`` in the cache."""
    if (folder / "snapshots" / str(revision) / file.name).exists():
        return file.size_bytes
    blob = folder / "blobs" / str(file.sha256)
    if blob.exists():
        return file.size_bytes
    with contextlib.suppress(OSError):
        return min(_partial(blob).stat().st_size, file.size_bytes)
    return 0


def _partial(blob: Path) -> Path:
    return blob.with_name(f"{blob.name}.incomplete")


def fetch(model: PlanModel, progress: Progress) -> Path:
    """Bring the plan's files, and no others, into the cache; the file of a GGUF model, else their folder.

    Args:
        model: one of the hub; a catalog model pins no files, so the hub is asked which there are now.
        progress: gets the bytes that are there, from this run or an earlier one, and all.

    Raises:
        InputError: the hub refuses, does not know the repository, or cannot be reached.
        ExecutionFailed: no room in the cache, or what came has another hash.
    """
    from planner.models.hub_access import Hub

    files, revision = _files(model)
    hub, folder = Hub(), cache_folder(model.location)
    meter = Meter(progress, sum(file.size_bytes for file in files))
    meter.more(sum(_there(folder, revision, file) for file in files))
    _check_room(folder, meter.total_bytes - meter.done_bytes)
    download = _Download(hub=hub, repository=model.location, revision=revision, folder=folder, meter=meter)
    # folders last, so that the first path is one of the model's own folder
    ordered = sorted(files, key=lambda file: ("/" in file.name, file.name))
    with ThreadPoolExecutor(CONNECTION_COUNT) as pool:
        begun = [pool.submit(download.file, file) for file in ordered]
        failed = next((f for f in wait(begun, return_when=FIRST_EXCEPTION).done if f.exception()), None)
        if failed is not None:  # the others stop where they are
            download.given_up.set()
            pool.shutdown(cancel_futures=True)
            failed.result()
    paths = [done.result() for done in begun]
    meter.complete()
    return paths[0] if model.is_gguf else paths[0].parent


def _files(model: PlanModel) -> tuple[tuple[PinnedFile, ...], str | None]:
    """What to fetch, at which commit."""
    if model.files:
        return model.files, model.revision
    from planner.models.hub import spec_from_hub

    source = spec_from_hub(model.location).source
    listed = tuple(PinnedFile(name=f.name, size_bytes=f.size_bytes, sha256=f.sha256) for f in source.files)
    return listed, source.revision


def _check_room(folder: Path, needed: int) -> None:
    there = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(there).free
    if needed > free:
        raise ExecutionFailed(
            f"not enough disk space at {there} for the download",
            numbers=f"needs {format_bytes(needed)}, {format_bytes(free)} free",
            hint="free some space, or set HF_HOME to a folder on another disk",
            code="no-space",
        )


class Meter:
    """Bytes of all files together, told from several threads one at a time."""

    def __init__(self, progress: Progress, total_bytes: int) -> None:
        self._progress, self._lock = progress, threading.Lock()
        self.done_bytes, self.total_bytes = 0, total_bytes

    def more(self, count: int) -> None:
        """So many came; negative: so many were of no use."""
        with self._lock:
            self.done_bytes += count
            self._progress(self.done_bytes, self.total_bytes)

    def complete(self) -> None:
        """Everything is there; small files are told only now."""
        self.more(self.total_bytes - self.done_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Download:
    """Where files come from and go to."""

    hub: Hub
    repository: str
    revision: str | None
    folder: Path
    meter: Meter
    given_up: threading.Event = field(default_factory=threading.Event)
    """Another file failed."""

    def file(self, file: PinnedFile) -> Path:
        """``file`` in the cache: fetched if it is not there."""
        if file.sha256 is not None and _there(self.folder, self.revision, file) < file.size_bytes:
            self._blob(file, self.folder / "blobs" / file.sha256)
        with _as_download(self.repository):
            return self.hub.download(self.repository, file.name, self.revision)

    def _blob(self, file: PinnedFile, blob: Path) -> None:
        """The large file ``file`` under its hash."""
        partial = _partial(blob)
        partial.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("ab") as stream, _locked(stream):
            if blob.exists():  # another process was faster
                return
            digest = hashlib.sha256()
            with partial.open("rb") as before:
                while block := before.read(BLOCK_BYTES):
                    digest.update(block)
            self._rest(file, stream, digest.update)
            if digest.hexdigest() != file.sha256:
                self.meter.more(-file.size_bytes)
                partial.unlink()
                raise InputError(
                    f"{file.name} of {self.repository} arrived damaged",
                    numbers=f"SHA-256 {digest.hexdigest()[:16]}…, the plan has {str(file.sha256)[:16]}…",
                    hint="start it again: the file is fetched anew",
                    code="download-failed",
                )
            partial.replace(blob)

    def _rest(self, file: PinnedFile, stream: IO[bytes], hashed: Callable[[bytes], None]) -> None:
        """What is missing at the end of ``stream``; a connection that breaks off is opened again."""

        def write(piece: bytes) -> None:
            if self.given_up.is_set():
                raise ExecutionFailed("another file could not be downloaded", code="download-failed")
            stream.write(piece)
            hashed(piece)
            self.meter.more(len(piece))

        failures = 0
        while (start := stream.tell()) < file.size_bytes:
            try:
                with _as_download(self.repository):
                    self.hub.pour(self.repository, file.name, self.revision, start, write)
                    if stream.tell() == start:
                        raise InputError(f"{self.repository} sends nothing of {file.name}", code="download-failed")
            except InputError as error:
                failures = failures + 1 if stream.tell() == start else 1
                if error.code != "download-failed" or failures == TRY_COUNT:
                    raise
                if self.given_up.wait(PAUSE_SECONDS * failures):
                    raise


@contextlib.contextmanager
def _as_download(repository: str) -> Iterator[None]:
    """A line that breaks is no reason to look for another model."""
    try:
        yield
    except InputError as error:
        if error.code != "hub-unreachable":
            raise
        raise InputError(
            f"{repository} could not be downloaded",
            numbers=error.numbers,
            hint="start it again: it goes on where it stopped; a checkpoint directory works without the hub",
            code="download-failed",
        ) from None


@contextlib.contextmanager
def _locked(stream: IO[bytes]) -> Iterator[None]:
    """One process at a time appends to a file; the others wait until it is whole."""
    try:
        import fcntl

        fcntl.flock(stream, fcntl.LOCK_EX)
    except (ImportError, OSError):  # Windows, and file systems without locks
        pass
    yield
