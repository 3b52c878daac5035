"""Calibration text out of a dataset on the hub: data files alone, at a pinned commit, and never a script of it.

A text is named ``hub:ORG/NAME[@REVISION][:SPLIT[:COLUMN]]``. Of the files of the split, in the order of their names, as
many rows are taken as fill :data:`TEXT_BYTES`; a plan pins the commit and the text's hash, so that it is the same text
whenever and wherever it is read again.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from planner.core.errors import InputError, MissingDependency, ModelNotFound, UsageError, first_line
from planner.core.units import MIB, format_bytes

if TYPE_CHECKING:
    from planner.models.hub_access import Hub

PREFIX = "hub:"
TEXT_BYTES = 8 * MIB
"""Fifty times what the default number of chunks holds, and no long read."""
MOST_FILE_BYTES = 2 << 30
"""A shard of a large dataset is a few hundred megabytes."""
LINE_CHARACTERS = 64 << 20
_NAMED = re.compile(
    r"(?P<repository>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?(?::(?P<split>[\w./-]*)(?::(?P<column>[^:]+))?)?"
)
_SUFFIXES = (".parquet", ".jsonl", ".json", ".txt", ".md")
_TABLES = (".parquet", ".jsonl", ".json")
_SPLITS = ("train", "validation", "test")
"""Which is taken where none is named: the first that there is."""
_COLUMNS = ("text", "content", "messages", "conversations", "article", "document")
"""Usual names of the column with the text, the likelier first."""


@dataclass(frozen=True, slots=True)
class Dataset:
    """What is named: a repository, and what of it."""

    repository: str
    revision: str | None
    split: str
    column: str

    def location(self, commit: str) -> str:
        """The same at a commit, as a plan pins it."""
        return f"{PREFIX}{self.repository}@{commit}:{self.split}:{self.column}".rstrip(":")


def parsed(text: str) -> Dataset:
    """The dataset that ``text`` names.

    Raises:
        UsageError: it is not of the form.
    """
    found = _NAMED.fullmatch(text.removeprefix(PREFIX))
    if found is None:
        raise UsageError(
            f"{text!r} names no dataset",
            hint="hub:ORG/NAME[@REVISION][:SPLIT[:COLUMN]], as hub:Salesforce/wikitext:wikitext-2-raw-v1/train:text",
            code="bad-dataset",
        )
    return Dataset(found["repository"], found["revision"], found["split"] or "", found["column"] or "")


def read(text: str) -> tuple[str, str]:
    """The text of a dataset, and where it came from: the name with its commit.

    Raises:
        UsageError: ``text`` is not of the form, or the dataset has no such split or column.
        InputError: there is no such dataset, it cannot be fetched, or it is unreadable.
        MissingDependency: huggingface_hub, or pyarrow for a parquet file, is not installed.
    """
    wanted, hub = parsed(text), _hub()
    try:
        if hub.offline:
            commit, files = hub.cached_dataset(wanted.repository, wanted.revision)
        else:
            commit, files = hub.list_files(wanted.repository, wanted.revision, dataset=True)
    except ModelNotFound as error:
        raise InputError(
            f"the hub has no dataset {wanted.repository}", numbers=error.numbers, code="no-dataset"
        ) from None
    sizes = {name: file.size_bytes for name, file in files.items()}
    parts = _filled(_all_rows(hub, wanted, commit, sizes))
    if not parts:
        raise InputError(f"{text} holds no text", code="bad-dataset")
    return b"\n\n".join(parts).decode("utf-8", errors="ignore"), wanted.location(commit)


def _all_rows(hub: Hub, wanted: Dataset, commit: str, sizes: dict[str, int]) -> Iterator[str]:
    """Rows of the chosen files, each fetched when the ones before it are used up."""
    for name in chosen(tuple(sizes), wanted):
        if sizes[name] > MOST_FILE_BYTES:
            raise InputError(
                f"{name} of {wanted.repository} is too large to calibrate with",
                numbers=f"{format_bytes(sizes[name])}, at most {format_bytes(MOST_FILE_BYTES)}",
                hint="name another split",
                code="bad-dataset",
            )
        yield from _rows(hub.download(wanted.repository, name, commit, dataset=True), name, wanted)


def _filled(rows: Iterator[str]) -> list[bytes]:
    """As many rows as fill the text; the last is cut."""
    parts: list[bytes] = []
    left = TEXT_BYTES
    for row in rows:
        if encoded := row.strip().encode("utf-8", errors="replace")[:left]:
            parts.append(encoded)
            left -= len(encoded) + 2
        if left <= 0:
            break
    return parts


def _hub() -> Hub:
    from planner.models.hub_access import Hub

    try:
        return Hub()
    except ImportError:
        raise MissingDependency(
            "a dataset of the hub needs huggingface_hub",
            hint="`pip install 'qplan[datasets]'`, or download it and name the FILE",
        ) from None


def chosen(names: tuple[str, ...], wanted: Dataset) -> list[str]:
    """The data files of the split, in order; of the first usual split where none is named.

    Raises:
        UsageError: there is no data file, or none of the split.
    """
    data = sorted(name for name in names if _suffix(name) in _SUFFIXES and not _is_about(name))
    splits = (wanted.split,) if wanted.split else _SPLITS
    for split in splits:
        found = [name for name in data if _is_of(name, split)]
        if found:
            return found
    if data and not wanted.split:
        return data
    raise UsageError(
        f"{wanted.repository} has no data file{f' of a split {wanted.split!r}' if wanted.split else ''}",
        numbers=f"files: {', '.join(data[:12]) or 'none of ' + ', '.join(_SUFFIXES)}",
        hint="name a split that is part of a file's name; datasets that need a script to be run are not read",
        code="bad-dataset",
    )


def _suffix(name: str) -> str:
    return PurePosixPath(name.removesuffix(".gz")).suffix


def _is_about(name: str) -> bool:
    """Whether a file tells of the dataset and is none of it."""
    return PurePosixPath(name).name.lower() in {"readme.md", "license.txt", "license.md", "dataset_infos.json"}


def _is_of(name: str, split: str) -> bool:
    """Whether ``split``, a word or a path of words, is in the name: ``data/train-00000-of-00002.parquet``."""
    parts = [re.split(r"[^a-z0-9]+", part) for part in name.lower().split("/")]
    *folders, last = split.lower().split("/")
    words = re.split(r"[^a-z0-9]+", last)
    inside = any(part[i : i + len(words)] == words for part in parts for i in range(len(part)))
    return inside and all(folder in name.lower().split("/") for folder in folders)


def _rows(path: Path, name: str, wanted: Dataset) -> Iterator[str]:
    """Texts of a file's rows."""
    kind = _suffix(name)
    try:
        if kind == ".parquet":
            yield from _of_parquet(path, wanted)
        elif kind in _TABLES:
            yield from _of_json(path, name, wanted)
        else:
            yield from _lines(path, name)
    except (OSError, EOFError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise InputError(
            f"{name} of {wanted.repository} cannot be read", numbers=first_line(error), code="bad-dataset"
        ) from None


def _lines(path: Path, name: str) -> Iterator[str]:
    """Lines of a text that may be compressed; one without an end does not fill the memory."""
    with gzip.open(path, "rt", encoding="utf-8") if name.endswith(".gz") else path.open(encoding="utf-8-sig") as file:
        yield from iter(lambda: file.readline(LINE_CHARACTERS), "")


def _of_json(path: Path, name: str, wanted: Dataset) -> Iterator[str]:
    """Of one object a line, or of a file that is one list of objects."""
    filled = (line for line in _lines(path, name) if line.strip())
    first = next(filled, "")
    rows: Any = (json.loads(line) for line in chain([first] if first else [], filled))
    if first.lstrip().startswith("["):
        whole = first
        for line in filled:
            whole += line
            if len(whole) > LINE_CHARACTERS:
                raise ValueError(f"a list of more than {LINE_CHARACTERS} characters; one object a line may be longer")
        rows = json.loads(whole)
    for row in rows:
        if not isinstance(row, dict):
            raise ValueError("a row is no object")
        yield _text(row[_column(tuple(row), wanted)], wanted)


def _of_parquet(path: Path, wanted: Dataset) -> Iterator[str]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise MissingDependency(
            f"{wanted.repository} holds parquet files, which pyarrow reads", hint="`pip install 'qplan[datasets]'`"
        ) from None
    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            column = _column(tuple(table.schema_arrow.names), wanted)
            for batch in table.iter_batches(batch_size=256, columns=[column]):
                for value in batch.column(0).to_pylist():
                    yield _text(value, wanted)
    except pyarrow.ArrowException as error:
        raise ValueError(str(error)) from None


def _column(names: tuple[str, ...], wanted: Dataset) -> str:
    """The column that was named, or the one that by its name holds the text.

    Raises:
        UsageError: there is none.
    """
    likely = (wanted.column,) if wanted.column else _COLUMNS
    for name in likely:
        if name in names:
            return name
    raise UsageError(
        f"{wanted.repository} has no column {wanted.column!r}" if wanted.column else "which column holds the text?",
        numbers=f"columns: {', '.join(names)}",
        hint=f"{PREFIX}{wanted.repository}:{wanted.split or 'train'}:COLUMN",
        code="bad-dataset",
    )


def _text(value: object, wanted: Dataset) -> str:
    """A text, or the turns of a conversation one under the other."""
    if value is None or isinstance(value, str):
        return value or ""
    if isinstance(value, list) and all(isinstance(turn, dict) for turn in value):
        turns = ((turn.get("role") or turn.get("from"), turn.get("content") or turn.get("value")) for turn in value)
        return "\n".join(f"{who}: {said}" if who else str(said) for who, said in turns if isinstance(said, str))
    raise UsageError(
        f"the column of {wanted.repository} holds no text",
        numbers=f"but {type(value).__name__}",
        hint=f"{PREFIX}{wanted.repository}:{wanted.split or 'train'}:COLUMN names another",
        code="bad-dataset",
    )
