"""From what a person calls a model to a ``ModelSpec``: demo, path, catalog name, hub id or size, in this order."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from planner.core.data import data_path
from planner.core.errors import InputError, ModelNotFound, QplanError
from planner.core.model import ModelSpec

DEMO = "demo"
DEMO_FOLDER = "demo/model"
"""The shipped demo model, below ``data/``."""
NEAREST_COUNT = 3
MAX_TEXT_LENGTH = 1024
"""Longer than any path or hub id a person types; stops an error message from filling the screen."""

_HUB_URL = re.compile(r"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/")
_HUB_ID = re.compile(
    r"(?P<repository>[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95})(?:@(?P<revision>[\w./-]{1,200}))?"
    r"(?::(?P<file>[\w./ +-]{1,200}))?",
    re.ASCII,
)
_HUB_OUT_OF_REACH = ("missing-dependency", "hub-unreachable", "not-cached", "gated-model")
_WEIGHT_SUFFIXES = (".gguf", ".safetensors", ".bin", ".pt", ".pth", ".ckpt")


def resolve(text: str, *, offline: bool = False) -> ModelSpec:
    """The model that ``text`` names.

    Args:
        text: ``demo``, a checkpoint directory, a GGUF file, a catalog name or alias, a hub id
            ``org/name[@revision][:file.gguf]``, or a size such as ``14b`` or ``30b-a3b``.
        offline: ask no network; a hub id then has to be in the hub's local cache.

    Raises:
        ModelNotFound: nothing has this name; the hint names what comes near.
        InputError: the path or repository is there but cannot be used.
        UnsupportedArchitecture: readable, but without shape rules.
        MissingDependency: a hub id without ``huggingface_hub``.
    """
    text = text.strip()
    if not text or len(text) > MAX_TEXT_LENGTH or not text.isprintable():
        raise _no_name(text)
    if text == DEMO:
        return _demo()
    return _from_path(text) or _from_name(text) or _from_hub(text, offline) or _not_found(text)


def _no_name(text: str) -> ModelNotFound:
    shown = repr(text[:40]) + ("…" if len(text) > 40 else "")
    odd = next((character for character in text if not character.isprintable()), None)
    return ModelNotFound(
        f"{shown} cannot be a model's name",
        numbers="" if odd is None else f"U+{ord(odd):04X} in it cannot be printed",
        hint="`qplan models` lists names; a path works too" + (", through a link of another name" if odd else ""),
    )


def _demo() -> ModelSpec:
    from planner.models.directory import spec_from_directory

    folder = data_path(DEMO_FOLDER)
    if not folder.is_dir():
        raise InputError(
            "the demo model is not in this installation",
            numbers=f"looked in {folder}",
            hint="reinstall qplan: `pip install --force-reinstall qplan`",
            code="broken-install",
        )
    return spec_from_directory(folder, name=DEMO)


def _from_path(text: str) -> ModelSpec | None:
    """The model at the path ``text``; ``None`` if it is no path. A path that leads nowhere is an error."""
    try:
        path = Path(text).expanduser()
        is_directory, is_file = path.is_dir(), path.is_file()
        exists = is_directory or is_file or path.exists()
    except (OSError, RuntimeError, ValueError):  # name too long, no such user, NUL
        return None
    if is_directory:
        from planner.models.directory import spec_from_directory

        return spec_from_directory(path)
    if is_file:
        return _from_file(path)
    if exists:
        raise InputError(f"{text!r} is neither a file nor a directory", code="unreadable-file")
    if _looks_like_path(text):
        raise InputError(
            f"there is no file or directory {text!r}",
            hint=f"look at `ls {path.parent}`",
            code="missing-file",
        )
    return None


def _from_file(path: Path) -> ModelSpec:
    if path.suffix.lower() == ".gguf" or _starts_with_magic(path):
        from planner.models.gguf_file import spec_from_gguf

        return spec_from_gguf(path)
    if path.suffix in (".bin", ".pt", ".pth", ".ckpt"):
        from planner.formats.safetensors import refuse_pickled

        raise refuse_pickled(path.name)
    if path.suffix == ".safetensors":
        what = f"{path.name!r} is one weight file; the model's shapes are in the config.json beside it"
    else:
        what = f"{path.name!r} is neither a GGUF file nor a checkpoint directory"
    folder = path.absolute().parent
    hint = f"give the directory: {folder}" if (folder / "config.json").is_file() else "`qplan models` lists names"
    raise InputError(what, hint=hint, code="not-a-model")


def _starts_with_magic(path: Path) -> bool:
    try:
        with path.open("rb") as stream:
            return stream.read(4) == b"GGUF"
    except OSError as error:
        raise InputError(f"{str(path)!r} cannot be read", numbers=str(error), code="unreadable-file") from None


def _looks_like_path(text: str) -> bool:
    if text.startswith(("./", "../", "/", "~", ".\\", "..\\")) or re.match(r"[A-Za-z]:[\\/]", text):
        return True
    return text.lower().endswith(_WEIGHT_SUFFIXES) and ":" not in text


def _from_name(text: str) -> ModelSpec | None:
    """A catalog entry, or a size."""
    from planner.models import catalog, size_model

    if "@" in text or ":" in text:  # a pinned revision or a chosen file is not what the catalog describes
        return None
    return catalog.lookup(text) or size_model.spec_from_size(text)


def _from_hub(text: str, offline: bool) -> ModelSpec | None:
    match = _HUB_ID.fullmatch(_HUB_URL.sub("", text).rstrip("/"))
    if match is None:
        return None
    from planner.models import catalog
    from planner.models.hub import spec_from_hub

    try:
        return spec_from_hub(match["repository"], revision=match["revision"], file=match["file"], offline=offline)
    except QplanError as error:
        known = catalog.lookup(match["repository"]) if match["file"] is None else None
        if known is None or error.code not in _HUB_OUT_OF_REACH:
            raise
    note = f"shapes from the catalog: revision {match['revision']!r} could not be looked up on the hub"
    return replace(known, notes=(*known.notes, note))


def _not_found(text: str) -> ModelSpec:
    from planner.models import catalog

    near = catalog.nearest(text, NEAREST_COUNT)
    wanted = f"did you mean {', '.join(near)}? " if near else ""
    raise ModelNotFound(
        f"no model is called {text!r}",
        numbers="looked for a path, a catalog name, a hub id org/name and a size such as 14b",
        hint=f"{wanted}`qplan models` lists all names",
    )
