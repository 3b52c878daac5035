"""A model on the Hugging Face hub as a ``ModelSpec``: config.json and header ranges are fetched, never weights.

Endpoint, token, cache and offline mode are huggingface_hub's: ``HF_ENDPOINT``, ``HF_TOKEN``, ``HF_HOME``,
``HF_HUB_OFFLINE``.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from planner.core.errors import InputError, MissingDependency
from planner.core.model import ModelSource, ModelSpec, SourceFile
from planner.core.units import format_bytes
from planner.formats.gguf import GgufHeader, ShortPrefix, merge_shards, shard_names
from planner.formats.gguf import parse_header as parse_gguf
from planner.formats.json_file import read_object
from planner.formats.safetensors import StoredTensor, choose_weight_files, index_shards, parse_header, refuse_pickled
from planner.formats.safetensors_header import LENGTH_BYTES, header_length
from planner.models.directory import (
    CONFIG_FILE,
    SIDE_FILES,
    build_spec,
    read_config,
    spec_from_directory,
    tokenizer_kind,
)
from planner.models.gguf_file import spec_from_gguf, spec_from_header
from planner.models.hub_access import Hub, HubFile

INDEX_FILE = "model.safetensors.index.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
CONNECTION_COUNT = 8
"""Headers fetched at a time: what huggingface_hub's own downloads use (``max_workers`` of ``snapshot_download``)."""
FIRST_GGUF_BYTES = 1 << 20
"""First range of a GGUF header; vocabularies make most headers 1 to 16 MB long, so it grows fourfold."""
PICKLED_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")


@dataclass(frozen=True, slots=True)
class _Repository:
    """A repository at one commit."""

    id: str
    asked: str | None
    """The revision as given: a branch or tag, which the cache remembers for going offline."""
    commit: str
    files: dict[str, HubFile]
    hub: Hub

    def download(self, name: str) -> Path:
        path = self.hub.download(self.id, name, self.asked)
        # the branch may have moved since its files were listed
        return path if _commit(path, name) == self.commit else self.hub.download(self.id, name, self.commit)

    def read(self, name: str, start: int, length: int) -> bytes:
        return self.hub.read_range(self.id, name, self.commit, start, length)


def spec_from_hub(
    repository: str, *, revision: str | None = None, file: str | None = None, offline: bool = False
) -> ModelSpec:
    """The model in the hub repository ``repository`` (``org/name``).

    Args:
        repository: hub id.
        revision: branch, tag or commit; the main branch when ``None``. The spec pins the commit either way.
        file: a GGUF file of the repository, or a type as in ``Q4_K_M`` that one file's name has.
        offline: use the local cache only.

    Raises:
        MissingDependency: huggingface_hub is not installed.
        ModelNotFound: no such repository (or it is private).
        InputError: ``gated-model``, ``unknown-revision``, ``hub-unreachable``, ``not-cached``, ``choose-gguf-file``,
            ``pickled-weights``, or what the headers themselves bring up.
    """
    hub = _open_hub()
    if offline or hub.offline:
        return _from_cache(hub, repository, revision, file)
    try:
        commit, files = hub.list_files(repository, revision)
    except InputError as error:
        if error.code != "hub-unreachable" or not hub.has(repository, file or CONFIG_FILE, revision):
            raise
        return _from_cache(hub, repository, revision, file)
    found = _Repository(repository, revision, commit, files, hub)
    if file is not None:
        return _from_gguf(found, file)
    if CONFIG_FILE not in files or not choose_weight_files(list(files)):
        raise _no_checkpoint(found)
    return _from_safetensors(found)


def _open_hub() -> Hub:
    try:
        return Hub()
    except ImportError as error:
        raise MissingDependency(
            "models by hub id need huggingface_hub, which is not installed",
            numbers=str(error),
            hint="`pip install 'qplan[hub]'`; catalog names, directories and GGUF files work without it",
        ) from None


def _source(found: _Repository, names: list[str]) -> ModelSource:
    files = tuple(
        SourceFile(name=name, size_bytes=found.files[name].size_bytes, sha256=found.files[name].sha256)
        for name in names
    )
    return ModelSource(kind="hub", location=found.id, hub_id=found.id, revision=found.commit, files=files)


def _from_safetensors(found: _Repository) -> ModelSpec:
    config = read_object(found.download(CONFIG_FILE), code="bad-config")
    shards = _shards(found)
    stored = _headers(found, shards)
    tokenizer_config = {}
    if TOKENIZER_CONFIG in found.files:
        tokenizer_config = read_object(found.download(TOKENIZER_CONFIG), code="bad-config")
    return build_spec(
        config,
        stored,
        name=found.id,
        source=_source(found, [name for name in SIDE_FILES if name in found.files] + shards),
        tokenizer=tokenizer_kind(set(found.files), tokenizer_config),
    )


def _shards(found: _Repository) -> list[str]:
    if INDEX_FILE in found.files and "model.safetensors" not in found.files:
        weight_map = index_shards(read_object(found.download(INDEX_FILE), code="bad-index"))
        names = sorted(set(weight_map.values()))
    else:
        names = list(choose_weight_files(list(found.files)))
    missing = [name for name in names if name not in found.files]
    if missing:
        raise InputError(
            f"{len(missing)} of {len(names)} shards are missing from {found.id}",
            numbers="\n".join(missing[:5]),
            hint=f"ask its authors: {found.hub.page(found.id)}/discussions",
            code="missing-shard",
        )
    return names


def _headers(found: _Repository, shards: list[str]) -> list[StoredTensor]:
    with ThreadPoolExecutor(CONNECTION_COUNT) as pool:
        return [tensor for tensors in pool.map(_header_fetcher(found), shards) for tensor in tensors]


def _header_fetcher(found: _Repository) -> Callable[[str], tuple[StoredTensor, ...]]:
    def fetch(name: str) -> tuple[StoredTensor, ...]:
        size_bytes, path = found.files[name].size_bytes, Path(name)
        prefix = found.read(name, 0, LENGTH_BYTES)
        length = header_length(prefix, size_bytes, path)
        return parse_header(prefix + found.read(name, LENGTH_BYTES, length), size_bytes, path).tensors

    return fetch


def _from_gguf(found: _Repository, wanted: str) -> ModelSpec:
    first = _choose_gguf(found, wanted)
    folder = first.rpartition("/")[0]
    names = [f"{folder}/{name}" if folder else name for name in shard_names(Path(first).name)]
    missing = [name for name in names if name not in found.files]
    if missing:
        raise InputError(
            f"{len(missing)} of {len(names)} shards of {first!r} are missing from {found.id}",
            numbers="\n".join(missing[:5]),
            code="missing-shard",
        )
    header = merge_shards([_gguf_header(found, name) for name in names])
    spec = spec_from_header(header, _source(found, names))
    return replace(spec, name=f"{found.id}:{first}")


def _choose_gguf(found: _Repository, wanted: str) -> str:
    names = _gguf_names(found)
    if wanted in names:
        return wanted
    near = [name for name in names if wanted.lower() in name.lower()]
    if len(near) == 1 and not wanted.endswith(".gguf"):
        return near[0]
    raise InputError(
        f"{found.id} has no GGUF file {wanted!r}" if not near else f"{wanted!r} means more than one file of {found.id}",
        numbers=_list_files(found, near or names),
        hint=f"`{found.id}:{(near or names or ['FILE.gguf'])[0]}` names one of them",
        code="choose-gguf-file",
    )


def _gguf_names(found: _Repository) -> list[str]:
    """GGUF models of the repository; of a split one, its first shard."""
    names = sorted(name for name in found.files if name.endswith(".gguf") and "mmproj" not in name.lower())
    return [name for name in names if shard_names(Path(name).name)[:1] == (Path(name).name,)]


def _gguf_header(found: _Repository, name: str) -> GgufHeader:
    size_bytes, prefix = found.files[name].size_bytes, b""
    wanted = min(FIRST_GGUF_BYTES, size_bytes)
    while True:
        prefix += found.read(name, len(prefix), wanted - len(prefix))
        try:
            return parse_gguf(prefix, size_bytes, Path(name))
        except ShortPrefix:
            wanted = min(4 * wanted, size_bytes)


def _list_files(found: _Repository, names: list[str]) -> str:
    shown = [f"{name}  {format_bytes(found.files[name].size_bytes)}" for name in names[:20]]
    return "\n".join(shown + ([f"and {len(names) - 20} more"] if len(names) > 20 else []))


def _no_checkpoint(found: _Repository) -> InputError:
    ggufs = _gguf_names(found)
    if ggufs:
        return InputError(
            f"{found.id} holds GGUF files; say which",
            numbers=_list_files(found, ggufs),
            hint=f"`{found.id}:{ggufs[0]}`, or the repository it was made from to choose the type yourself",
            code="choose-gguf-file",
        )
    if "adapter_config.json" in found.files:
        return InputError(
            f"{found.id} is an adapter, not a model",
            hint="merge it into its base model first: `PeftModel.merge_and_unload()`, then give the merged directory",
            code="adapter-only",
        )
    for name in sorted(found.files):
        if name.endswith(PICKLED_SUFFIXES):
            return refuse_pickled(f"{found.id}/{name}")
    what = "safetensors weights" if CONFIG_FILE in found.files else CONFIG_FILE
    return InputError(
        f"{found.id} has no {what}",
        numbers=f"{len(found.files)} files",
        hint=f"look at {found.hub.page(found.id)}",
        code="no-weights",
    )


def _from_cache(hub: Hub, repository: str, revision: str | None, file: str | None) -> ModelSpec:
    """What an earlier download left in the hub's cache: the whole model, or its config alone."""
    source = ModelSource(kind="hub", location=repository, hub_id=repository, revision=revision)
    if file is not None:
        path = hub.cached(repository, file, revision)
        spec = spec_from_gguf(path)
        files = spec.source.files
        commit = _commit(path, file) or revision
        return replace(spec, name=f"{repository}:{file}", source=replace(source, revision=commit, files=files))
    config = hub.cached(repository, CONFIG_FILE, revision)
    source = replace(source, revision=_commit(config, CONFIG_FILE) or revision)
    try:
        return spec_from_directory(config.parent, name=repository, source=source)
    except InputError as error:
        if error.code not in ("no-weights", "missing-shard"):
            raise
    return _from_config_alone(config.parent, repository, source)


def _from_config_alone(directory: Path, repository: str, source: ModelSource) -> ModelSpec:
    config: dict[str, Any] = read_config(directory)
    side = directory / TOKENIZER_CONFIG
    tokenizer = tokenizer_kind(set(), read_object(side, code="bad-config") if side.is_file() else {})
    spec = build_spec(config, (), name=repository, source=source, tokenizer=tokenizer)
    note = "offline, and only config.json is in the local cache: the weights' own shapes were not seen"
    return replace(spec, notes=(*spec.notes, note))


def _commit(path: Path, name: str) -> str | None:
    """The commit of a file in the hub's cache: ``…/snapshots/<commit>/<name>``."""
    folder = path.parents[name.count("/")]
    return folder.name if folder.parent.name == "snapshots" else None
