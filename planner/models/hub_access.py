"""The few calls qplan makes to the Hugging Face hub, and what their failures mean to a person.

Works with huggingface_hub since 0.30, whose HTTP client was first requests and is now httpx.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from planner.core.errors import InputError, ModelNotFound, QplanError

TIMEOUT_SECONDS = 30
"""For one small answer; huggingface_hub waits 10 s, which slow lines miss."""
NEAREST_COUNT = 3


@dataclass(frozen=True, slots=True)
class HubFile:
    """One file of a repository, as the hub describes it."""

    size_bytes: int
    sha256: str | None
    """Known for large files, which the hub keeps by their hash."""


class Hub:
    """The hub that ``HF_ENDPOINT`` names.

    Raises:
        ImportError: huggingface_hub is not installed.
    """

    def __init__(self) -> None:
        import huggingface_hub
        from huggingface_hub import constants, utils

        self._library: Any = huggingface_hub
        self._utils: Any = utils
        self.offline = bool(constants.HF_HUB_OFFLINE)
        self.endpoint = str(constants.ENDPOINT)

    def page(self, repository: str) -> str:
        """Address of the repository's page."""
        return f"{self.endpoint}/{repository}"

    def list_files(
        self, repository: str, revision: str | None, *, dataset: bool = False
    ) -> tuple[str, dict[str, HubFile]]:
        """The commit behind ``revision`` and all files there."""
        ask = self._library.HfApi().dataset_info if dataset else self._library.HfApi().model_info
        with self._failures(repository, revision):
            info = ask(repository, revision=revision, files_metadata=True)
        files = {}
        for sibling in info.siblings or ():
            sha256 = sibling.lfs.sha256 if sibling.lfs else None
            files[sibling.rfilename] = HubFile(int(sibling.size or 0), sha256)
        return str(info.sha or revision), files

    def cached_dataset(self, repository: str, revision: str | None) -> tuple[str, dict[str, HubFile]]:
        """The commit and the files of a dataset that lie in the local cache.

        Raises:
            InputError: there are none (``not-cached``).
        """
        from huggingface_hub.errors import HFValidationError

        try:
            found = self._library.snapshot_download(
                repository, repo_type="dataset", revision=revision, local_files_only=True
            )
        except (HFValidationError, OSError) as error:
            raise InputError(
                f"the dataset {repository} is not in the local cache, and qplan is offline",
                numbers=_first_line(error),
                hint=f"`hf download {repository} --repo-type dataset` while online",
                code="not-cached",
            ) from None
        folder = Path(found)
        paths = (path for path in folder.rglob("*") if path.is_file())
        return folder.name, {path.relative_to(folder).as_posix(): HubFile(path.stat().st_size, None) for path in paths}

    def download(self, repository: str, name: str, revision: str | None, *, dataset: bool = False) -> Path:
        """The file ``name``, through the local cache."""
        kind = "dataset" if dataset else None
        with self._failures(repository, revision):
            return Path(self._library.hf_hub_download(repository, name, revision=revision, repo_type=kind))

    def cached(self, repository: str, name: str, revision: str | None) -> Path:
        """The file ``name`` out of the local cache.

        Raises:
            InputError: it is not there (``not-cached``).
        """
        from huggingface_hub.errors import EntryNotFoundError, HFValidationError

        try:
            return Path(self._library.hf_hub_download(repository, name, revision=revision, local_files_only=True))
        except (EntryNotFoundError, HFValidationError, OSError) as error:
            raise InputError(
                f"{repository} is not in the local cache, and qplan is offline",
                numbers=f"{name}: {_first_line(error)}",
                hint=f"`hf download {repository}` while online; catalog names work offline: `qplan models`",
                code="not-cached",
            ) from None

    def has(self, repository: str, name: str, revision: str | None) -> bool:
        """Whether the local cache has the file ``name``."""
        try:
            return self.cached(repository, name, revision).is_file()
        except InputError:
            return False

    def read_range(self, repository: str, name: str, revision: str, start: int, length: int) -> bytes:
        """``length`` bytes of the file ``name`` from ``start``, whatever the file's size.

        Raises:
            InputError: fewer bytes came (``hub-unreachable``), or the request failed.
        """
        if length <= 0:
            return b""
        with self._failures(repository, revision):
            found = bytearray()
            with self._opened(repository, name, revision, f"{start}-{start + length - 1}") as (skipping, pieces):
                skip = start if skipping else 0
                for piece in pieces:  # no further than needed, even if the server sends the whole file
                    found += piece
                    if len(found) >= skip + length:
                        break
            found = found[skip : skip + length]
        if len(found) < length:
            raise InputError(
                f"{repository} sent less of {name!r} than asked for",
                numbers=f"{len(found)} of {length} bytes from byte {start}",
                hint="try again",
                code="hub-unreachable",
            )
        return bytes(found)

    def pour(
        self, repository: str, name: str, revision: str | None, start: int, write: Callable[[bytes], None]
    ) -> None:
        """The file ``name`` from byte ``start`` to its end into ``write``, piece by piece.

        Raises:
            InputError: the request failed, or broke off; ``write`` has had what came until then.
        """
        with (
            self._failures(repository, revision),
            self._opened(repository, name, revision, f"{start}-") as (skipping, pieces),
        ):
            skip = start if skipping else 0
            for piece in pieces:
                if skip < len(piece):
                    write(piece[skip:])
                skip = max(skip - len(piece), 0)

    @contextmanager
    def _opened(
        self, repository: str, name: str, revision: str | None, span: str
    ) -> Iterator[tuple[bool, Iterator[bytes]]]:
        """A request for the bytes ``span``: whether the server sends the whole file instead, and what comes."""
        url = self._library.hf_hub_url(repository, name, revision=revision)
        headers = self._utils.build_hf_headers() | {"Range": f"bytes={span}", "Accept-Encoding": "identity"}
        session = self._utils.get_session()
        if callable(getattr(session, "stream", None)):  # httpx; a flag in requests
            opened = session.stream("GET", url, headers=headers, timeout=TIMEOUT_SECONDS, follow_redirects=True)
        else:  # requests, as in huggingface_hub before 1.0
            opened = session.get(url, headers=headers, timeout=TIMEOUT_SECONDS, stream=True)
        with opened as response:
            if response.status_code >= 400 and hasattr(response, "read"):
                response.read()  # httpx gives no error text before
            self._utils.hf_raise_for_status(response)
            pieces = response.iter_bytes() if hasattr(response, "iter_bytes") else response.iter_content(1 << 16)
            yield response.status_code != 206, pieces

    @contextmanager
    def _failures(self, repository: str, revision: str | None) -> Iterator[None]:
        try:
            yield
        except QplanError:
            raise
        except _failure_types() as error:
            raise self._explain(error, repository, revision) from None

    def _explain(self, error: Exception, repository: str, revision: str | None) -> QplanError:
        from huggingface_hub import errors

        if isinstance(error, errors.GatedRepoError):
            return self._gated(repository)
        if isinstance(error, errors.RevisionNotFoundError):
            return InputError(
                f"{repository} has no revision {revision!r}",
                hint=f"its branches and tags: {self.page(repository)}/tree/main",
                code="unknown-revision",
            )
        if isinstance(error, errors.RepositoryNotFoundError | errors.HFValidationError):
            return _unknown(repository, error)
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403):
            return self._gated(repository)
        if status == 404:
            return InputError(
                f"{repository} lacks a file it should have", numbers=_first_line(error), code="no-weights"
            )
        return InputError(
            f"{self.endpoint} could not be asked about {repository}",
            numbers=_first_line(error),
            hint="catalog names, directories and GGUF files work without a network: `qplan models`",
            code="hub-unreachable",
        )

    def _gated(self, repository: str) -> InputError:
        return InputError(
            f"{repository} is only given to those who accepted its licence",
            hint=f"accept it at {self.page(repository)}, then set HF_TOKEN or run `hf auth login`; "
            "the catalog has the shapes of many gated models: `qplan models`",
            code="gated-model",
        )


def _unknown(repository: str, error: Exception) -> ModelNotFound:
    from planner.models import catalog

    near = catalog.nearest(repository.rpartition("/")[2], NEAREST_COUNT)
    return ModelNotFound(
        f"the hub has no model {repository!r}, or it is private",
        numbers=_first_line(error),
        hint=(f"did you mean {', '.join(near)}? " if near else "")
        + "for a private one set HF_TOKEN or run `hf auth login`",
    )


def _failure_types() -> tuple[type[Exception], ...]:
    """Everything huggingface_hub and its HTTP client raise for network and hub reasons."""
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError

    # requests' exceptions are OSErrors; those of httpx are not, and the client's module has been renamed once
    clients = [sys.modules[name].HTTPError for name in ("httpx", "httpx2") if name in sys.modules]
    return (OSError, HfHubHTTPError, EntryNotFoundError, HFValidationError, *clients)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
