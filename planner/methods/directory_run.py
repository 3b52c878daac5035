"""An artifact that is a folder: written under a temporary name, synced, and only then given its own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from planner.convert.write import sync, write_error
from planner.core.errors import ExecutionFailed
from planner.core.job import partial_path, remove
from planner.formats.safetensors import PICKLED_SUFFIXES, open_checkpoint

SHARD_BYTES = 5 * 10**9
"""Largest file of weights, as the hub's tools write them."""
_PAPERS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "spiece.model",
    "chat_template*",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)
"""Files that go with the weights, whatever is done to those. No Python: an artifact brings no code along."""


@contextmanager
def atomic_directory(output: Path, *, kept: bool = False) -> Iterator[Path]:
    """A folder to write into; when the block ends well it gets the name ``output``, else it is removed.

    Args:
        output: the final name; a folder that an earlier run of ours left there is replaced.
        kept: go on from what a killed run left, and leave what this one does if it fails.

    Raises:
        ExecutionFailed: an ``OSError`` in the block (``no-space``, ``no-permission``, ``write-failed``).
    """
    partial = partial_path(output)
    try:
        try:
            if not kept:
                remove(partial)
            partial.mkdir(parents=True, exist_ok=True)
            yield partial
            for path in sorted(partial.rglob("*")):
                sync(path)
            sync(partial)
            _take_place(partial, output)
        except OSError as error:
            raise write_error(output, error) from None
    except BaseException:
        if not kept:
            remove(partial)
        raise


def _take_place(partial: Path, output: Path) -> None:
    """Give the finished folder its name; a folder cannot be replaced in one step, so the old one steps aside."""
    old = output.with_name(f".{output.name}.old")
    remove(old)
    if output.exists():
        output.replace(old)
    partial.replace(output)
    sync(output.parent)
    remove(old)


def copy_papers(source: Path, target: Path) -> None:
    """Put the tokenizer and what else goes with the weights into ``target``, byte for byte as published."""
    for pattern in _PAPERS:
        for path in source.glob(pattern):
            if path.is_file():
                shutil.copyfile(path, target / path.name)


def check_written(folder: Path) -> int:
    """Refuse what a quantizer wrote if it cannot be read, or is pickled; the number of tensors.

    Raises:
        InputError: the weights are damaged or missing.
        ExecutionFailed: there are pickled files.
    """
    pickled = [path.name for path in folder.rglob("*") if path.name.endswith(PICKLED_SUFFIXES)]
    if pickled:
        raise ExecutionFailed(
            "the quantizer wrote pickled weights", numbers="\n".join(pickled[:5]), code="pickled-weights"
        )
    read_json_object(folder / "config.json")
    return len(open_checkpoint(folder).tensors)


def read_json_object(path: Path) -> dict[str, Any]:
    """A JSON object that a library wrote beside the weights."""
    found: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return found


def write_json_object(path: Path, content: dict[str, Any]) -> None:
    """Write JSON as transformers does: two spaces, sorted keys, a line break at the end."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def with_dtype(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """A config.json that says its weights are ``dtype``, in the key that it uses, in nested parts too."""
    found = {key: with_dtype(value, dtype) if isinstance(value, dict) else value for key, value in config.items()}
    keys = [key for key in ("dtype", "torch_dtype") if isinstance(config.get(key), str)]
    if "model_type" in config:
        found |= dict.fromkeys(keys or ["dtype"], dtype)
    return found
