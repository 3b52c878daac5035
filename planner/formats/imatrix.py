"""Importance matrices: mean squares of what each column of a weight matrix is multiplied with, as llama.cpp keeps them.

Two layouts are read, and the first is written: a GGUF file of type ``imatrix`` with ``NAME.in_sum2`` (sums of squares,
``[columns, matrices]``) and ``NAME.counts`` (rows summed, ``[1, matrices]``) for each tensor, and the older ``.dat``,
which holds sums already divided by their rows and multiplied by a number of calls. Source: ``tools/imatrix`` and
``common/imatrix-loader.cpp`` of llama.cpp as in llama-cpp-python 0.3.36.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from planner.core.errors import InputError
from planner.core.model import Tensor
from planner.core.units import pad
from planner.formats.gguf import read_array, read_header
from planner.formats.gguf_header import DEFAULT_ALIGNMENT, MAGIC, ArrayInfo, GgufHeader
from planner.formats.gguf_skeleton import Value, header

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

SUMS, COUNTS = ".in_sum2", ".counts"
DATASETS, CHUNK_COUNT, CHUNK_SIZE = "imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size"
_MOST_ENTRIES = 1 << 20
_MOST_NAME_BYTES = 256
_MOST_VALUES = 1 << 28
"""Bounds on a damaged ``.dat`` file: more than any model has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Importance:
    """Of one tensor: ``sums[matrices, columns]`` in float32 and ``counts[matrices]``, the rows that were summed."""

    sums: NDArray[np.float32]
    counts: NDArray[np.int64]

    def mean_squares(self) -> NDArray[np.float32]:
        """``[matrices, columns]``; ones for an expert that no token reached, as llama-quantize takes it."""
        import numpy as np

        counts = self.counts[:, None]
        return np.where(counts > 0, self.sums / np.maximum(counts, 1), np.float32(1)).astype(np.float32)


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportanceMatrix:
    """All that a file holds. ``chunk_size`` is 0 where an older file does not say."""

    entries: Mapping[str, Importance]
    chunk_count: int
    chunk_size: int
    datasets: tuple[str, ...] = ()

    def weights(self) -> dict[str, NDArray[np.float32]]:
        """Tensor name → ``matrices × columns`` mean squares in one row, as llama.cpp's quantizer wants them."""
        return {name: entry.mean_squares().reshape(-1) for name, entry in self.entries.items()}


def write_imatrix(path: Path, matrix: ImportanceMatrix) -> None:
    """Write the GGUF layout, tensors sorted by name; the caller sees to it that ``path`` is a temporary name."""
    import numpy as np

    tensors: list[tuple[str, tuple[int, ...], str]] = []
    data: list[NDArray[Any]] = []
    for name, entry in sorted(matrix.entries.items()):
        count, columns = entry.sums.shape
        tensors += [(name + SUMS, (columns, count), "F32"), (name + COUNTS, (1, count), "F32")]
        data += [entry.sums.astype("<f4"), entry.counts.astype("<f4")]
    metadata: dict[str, Value] = {
        "general.type": "imatrix",
        DATASETS: list(matrix.datasets) or [""],
        CHUNK_COUNT: matrix.chunk_count,
        CHUNK_SIZE: matrix.chunk_size,
    }
    with path.open("wb") as file:
        file.write(header(metadata, tensors))
        for array in data:
            raw = np.ascontiguousarray(array).tobytes()
            file.write(raw.ljust(pad(len(raw), DEFAULT_ALIGNMENT), b"\0"))


def read_imatrix(path: Path) -> ImportanceMatrix:
    """The importance matrix in ``path``, of either layout.

    Raises:
        InputError: the file is missing, damaged, of another kind, or holds numbers that are not finite
            (``bad-imatrix``, or as for reading a GGUF header).
    """
    try:
        with path.open("rb") as file:
            is_gguf = file.read(len(MAGIC)) == MAGIC
        return _read_gguf(path) if is_gguf else _read_dat(path)
    except FileNotFoundError:
        raise InputError(f"{path} does not exist", code="missing-file") from None
    except OSError as error:
        raise InputError(
            f"{path} cannot be read", numbers=error.strerror or str(error), code="unreadable-file"
        ) from None


def _bad(path: Path, why: str, numbers: str = "") -> InputError:
    hint = "`qplan imatrix MODEL -o FILE` makes one, and so does llama.cpp's llama-imatrix"
    return InputError(f"{path.name} is no importance matrix: {why}", numbers=numbers, hint=hint, code="bad-imatrix")


def _read_gguf(path: Path) -> ImportanceMatrix:
    import numpy as np

    head = read_header(path)
    stored = {tensor.name: tensor for tensor in head.tensors}
    names = sorted(name.removesuffix(SUMS) for name in stored if name.endswith(SUMS))
    if not names:
        raise _bad(path, "it has no sums of squares", f"general.type is {head.metadata.get('general.type')!r}")
    mapped = np.memmap(path, dtype=np.uint8, mode="r")
    entries = {}
    for name in names:
        pair = [stored.get(name + suffix) for suffix in (SUMS, COUNTS)]
        if any(tensor is None or tensor.type != "F32" for tensor in pair):
            raise _bad(path, f"{name} lacks its sums or counts in F32")
        sums, counts = (
            np.frombuffer(mapped[t.offset : t.offset + t.size_bytes].tobytes(), "<f4") for t in pair if t is not None
        )
        entries[name] = _entry(path, name, sums, np.rint(counts).astype(np.int64))
    return ImportanceMatrix(
        entries=entries,
        chunk_count=_whole(head, CHUNK_COUNT),
        chunk_size=_whole(head, CHUNK_SIZE),
        datasets=_datasets(head),
    )


def _whole(head: GgufHeader, key: str) -> int:
    value = head.metadata.get(key)
    return value if isinstance(value, int) else 0


def _datasets(head: GgufHeader) -> tuple[str, ...]:
    info = head.metadata.get(DATASETS)
    if not isinstance(info, ArrayInfo) or info.type != "str":
        return ()
    return tuple(str(name) for name in read_array(head.path, info) if name)


def _entry(path: Path, name: str, sums: NDArray[np.float32], counts: NDArray[np.int64]) -> Importance:
    import numpy as np

    if not len(counts) or len(sums) % len(counts) or not len(sums):
        raise _bad(path, f"{name} has {len(sums)} sums for {len(counts)} counts")
    if not np.isfinite(sums).all() or (sums < 0).any() or (counts < 0).any():
        raise _bad(path, f"{name} holds numbers that are negative or not finite")
    return Importance(sums=sums.astype(np.float32).reshape(len(counts), -1), counts=counts)


def _read_dat(path: Path) -> ImportanceMatrix:
    import numpy as np

    raw, position = path.read_bytes(), 0

    def number() -> int:
        nonlocal position
        (value,) = struct.unpack_from("<i", raw, position)
        position += 4
        return int(value)

    def block(size: int) -> bytes:
        nonlocal position
        if size < 0 or position + size > len(raw):
            raise _bad(path, "it is cut off", f"{size} bytes wanted at {position} of {len(raw)}")
        position += size
        return raw[position - size : position]

    entries: dict[str, Importance] = {}
    try:
        for _ in range(_within(path, number(), _MOST_ENTRIES, "entries")):
            name = block(_within(path, number(), _MOST_NAME_BYTES, "bytes of a name")).decode("utf-8")
            calls = max(number(), 1)
            values = np.frombuffer(block(4 * _within(path, number(), _MOST_VALUES, "values")), "<f4")
            entries[name] = _entry(path, name, values, np.array([calls], dtype=np.int64))
        chunks = number() if position < len(raw) else 0
        named = block(number()).decode("utf-8", "replace") if position < len(raw) else ""
    except (struct.error, UnicodeDecodeError) as error:
        raise _bad(path, "it is neither a GGUF file nor an older .dat", str(error)) from None
    return ImportanceMatrix(
        entries=entries, chunk_count=max(chunks, 0), chunk_size=0, datasets=(named,) if named else ()
    )


def _within(path: Path, count: int, most: int, what: str) -> int:
    if not 0 < count <= most:
        raise _bad(path, f"it claims {count} {what}")
    return count


def check_fits(matrix: ImportanceMatrix, tensors: Iterable[Tensor], path: Path) -> int:
    """The number of ``tensors`` that the matrix covers.

    Raises:
        InputError: it covers none, or one of another shape: it is of another model (``imatrix-other-model``).
    """
    covered = 0
    for tensor in tensors:
        entry = matrix.entries.get(tensor.name)
        if entry is None:
            continue
        columns = tensor.shape[0] * (tensor.shape[2] if len(tensor.shape) > 2 else 1)
        if entry.sums.size != columns:
            numbers = f"{tensor.name} has {columns} columns, the matrix {entry.sums.size}"
            raise InputError(f"{path.name} is of another model", numbers=numbers, code="imatrix-other-model")
        covered += 1
    if not covered:
        numbers = f"it has {len(matrix.entries)} entries, none of them a tensor of this model"
        raise InputError(f"{path.name} is of another model", numbers=numbers, code="imatrix-other-model")
    return covered
