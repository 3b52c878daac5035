"""Safetensors checkpoints: which files of a directory hold the weights, and all their tensors, from headers only."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from planner.core.errors import InputError
from planner.formats.json_file import read_object
from planner.formats.safetensors_header import Header, StoredTensor, parse_header, read_header, read_tensor_bytes

__all__ = [
    "Checkpoint",
    "Header",
    "StoredTensor",
    "choose_weight_files",
    "index_shards",
    "open_checkpoint",
    "parse_header",
    "read_header",
    "read_tensor_bytes",
    "refuse_pickled",
]

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PICKLED_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
"""Formats whose loading runs code from the file; qplan never opens them."""
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors")


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """The weights of a directory, by name. Never their bytes."""

    directory: Path
    files: tuple[Path, ...]
    """The safetensors files, in order."""
    tensors: dict[str, StoredTensor]

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors, headers not counted."""
        return sum(tensor.size_bytes for tensor in self.tensors.values())

    @property
    def parameter_count(self) -> int:
        """Values in all tensors as stored."""
        return sum(tensor.element_count for tensor in self.tensors.values())


def refuse_pickled(name: str) -> InputError:
    """The error for weights that only exist as a pickle in ``name``."""
    return InputError(
        f"{name!r} holds pickled weights, and opening a pickle can run any program",
        hint="convert it where you trust it: `AutoModelForCausalLM.from_pretrained(DIR)"
        '.save_pretrained("safe", safe_serialization=True)` writes safetensors',
        code="pickled-weights",
    )


def choose_weight_files(names: list[str]) -> tuple[str, ...]:
    """Which of a directory's files, by name, hold its safetensors weights when there is no index.

    ``model.safetensors`` first, then ``model-*.safetensors``, then any but ``consolidated*`` and adapters (copies of
    the same weights in another layout, and not weights of the model). Empty when there is none.
    """
    top = (name for name in names if name.endswith(".safetensors") and "/" not in name)  # subfolders: other exports
    names = sorted(name for name in top if not name.startswith("adapter_"))
    if SINGLE_FILE in names:
        return (SINGLE_FILE,)
    for chosen in (
        [name for name in names if name.startswith("model-")],
        [name for name in names if not name.startswith("consolidated")],
    ):
        if chosen:
            return tuple(chosen)
    return tuple(names)


def index_shards(index: dict[str, object], name: str = INDEX_FILE) -> dict[str, str]:
    """Tensor name → shard name of a ``model.safetensors.index.json``.

    Raises:
        InputError: no ``weight_map`` of file names (``bad-index``).
    """
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{name} has no weight_map", code="bad-index")
    for tensor, shard in weight_map.items():
        plain = isinstance(shard, str) and shard.endswith(".safetensors") and not re.search(r"[/\\\0]", shard)
        if not plain:
            raise InputError(
                f"{name} maps {tensor!r} to something that is no safetensors file of the same directory",
                numbers=repr(shard)[:120],
                code="bad-index",
            )
    return weight_map


def open_checkpoint(directory: Path) -> Checkpoint:
    """The tensors of the safetensors checkpoint in ``directory``, from headers only.

    Raises:
        InputError: no directory, no weights (``no-weights``), pickled weights (``pickled-weights``), a shard missing
            (``missing-shard``), a tensor twice or not where the index says (``bad-index``), or a bad header.
    """
    try:
        names = [entry.name for entry in directory.iterdir()]
    except OSError as error:
        raise InputError(f"{str(directory)!r} is not a directory", numbers=str(error), code="missing-file") from None
    weight_map: dict[str, str] = {}
    if INDEX_FILE in names and SINGLE_FILE not in names:
        weight_map = index_shards(read_object(directory / INDEX_FILE, code="bad-index"))
        chosen = tuple(sorted(set(weight_map.values())))
    else:
        chosen = choose_weight_files(names)
        _check_numbering(chosen)
    if not chosen:
        raise _no_weights(directory, names)
    _check_present(directory, chosen)
    tensors = _merge([directory / name for name in chosen])
    _check_index(weight_map, tensors)
    return Checkpoint(directory=directory, files=tuple(directory / name for name in chosen), tensors=tensors)


def _no_weights(directory: Path, names: list[str]) -> InputError:
    for name in sorted(names):
        # optimizer.pt, training_args.bin and the like lie beside weights; any of them means a pickled checkpoint here
        if name.endswith(PICKLED_SUFFIXES):
            return refuse_pickled(name)
    return InputError(
        f"{str(directory)!r} has no weights",
        numbers="no *.safetensors file in it",
        hint="give the directory that holds config.json and model.safetensors",
        code="no-weights",
    )


def _check_numbering(chosen: tuple[str, ...]) -> None:
    """Shards named ``…-00001-of-0000N`` are all there, where no index tells."""
    for name in chosen:
        if match := _SHARD.fullmatch(name):
            prefix, count = match[1], match[3]
            here = sum(1 for other in chosen if other.startswith(prefix) and other.endswith(f"-of-{count}.safetensors"))
            if here != int(count):
                raise InputError(
                    f"shards of {prefix!r} are missing",
                    numbers=f"{here} of {int(count)} are there",
                    hint="download the missing files",
                    code="missing-shard",
                )


def _check_present(directory: Path, chosen: tuple[str, ...]) -> None:
    missing = [name for name in chosen if not (directory / name).is_file()]
    if missing:
        raise InputError(
            f"{len(missing)} of {len(chosen)} shards are missing from {str(directory)!r}",
            numbers="\n".join(missing[:5]),
            hint="download the missing files",
            code="missing-shard",
        )


def _merge(files: list[Path]) -> dict[str, StoredTensor]:
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        for tensor in read_header(file).tensors:
            if other := tensors.get(tensor.name):
                raise InputError(
                    f"{tensor.name!r} is in two files",
                    numbers=f"{other.file.name} and {file.name}",
                    hint="keep one set of weight files in the directory",
                    code="bad-index",
                )
            tensors[tensor.name] = tensor
    return tensors


def _check_index(weight_map: dict[str, str], tensors: dict[str, StoredTensor]) -> None:
    for name, shard in weight_map.items():
        tensor = tensors.get(name)
        if tensor is None or tensor.file.name != shard:
            found = "in no shard" if tensor is None else f"in {tensor.file.name}"
            raise InputError(
                f"{name!r} is not where {INDEX_FILE} says",
                numbers=f"expected in {shard}, {found}",
                hint="download the index and the shards again, of one revision",
                code="bad-index",
            )
