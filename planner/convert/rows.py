"""A GGUF tensor as rows of stored tensors: read block by block, never whole, and never copied more than once.

Everything llama.cpp's converter does to a tensor of the families here is a choice of rows: experts are stacked,
a fused matrix is split, the halves of each rotary head are interleaved, a norm is shifted by one. So a tensor is a
list of row slices and two numbers, which can be read by range, sent to another process, and quantized in one pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from planner.convert.fp8 import FP8_DTYPES, Scale, dequantize
from planner.core.errors import InputError
from planner.core.model import Tensor
from planner.core.units import MIB
from planner.formats.safetensors import StoredTensor

if TYPE_CHECKING:
    import numpy as np

BLOCK_BYTES = 32 * MIB
"""Source bytes read at a time: large enough for the disk, small beside any model."""
FLOAT_DTYPES = {"F32": ("<f4", 4), "F16": ("<f2", 2), "BF16": ("<u2", 2)}
"""Stored type → (numpy type, bytes). numpy has no bfloat16: its bits travel as 16-bit integers."""


@dataclass(frozen=True, slots=True)
class RowSlice:
    """``count`` rows of ``tensor`` from row ``start``; leading dimensions are flattened into rows."""

    tensor: StoredTensor
    start: int
    count: int
    scale: Scale | None = None
    """What the values of an 8-bit tensor are multiplied with."""

    @property
    def value_bytes(self) -> int:
        """Bytes of one stored value."""
        return 1 if self.tensor.dtype in FP8_DTYPES else FLOAT_DTYPES[self.tensor.dtype][1]

    def decode(self, raw: Any, first_row: int, row_length: int) -> np.ndarray[Any, Any]:
        """Whole rows, from row ``first_row`` of the slice, out of their bytes ``raw``; shape ``(rows, row_length)``.

        A view of ``raw`` in the stored type (``BF16`` as 16-bit integers); 8-bit floats become float32, scaled.
        """
        import numpy as np

        if self.tensor.dtype in FP8_DTYPES:
            stored = np.frombuffer(raw, dtype=np.uint8).reshape(-1, row_length)
            return dequantize(stored, self.tensor.dtype, self.scale, self.start + first_row)
        return np.frombuffer(raw, dtype=FLOAT_DTYPES[self.tensor.dtype][0]).reshape(-1, row_length)


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedTensor:
    """One tensor of the GGUF file to be, as a recipe."""

    name: str
    shape: tuple[int, ...]
    """ggml's order: ``shape[0]`` is the row length."""
    dtype: str
    """What ``blocks`` and ``load`` give: ``F32`` (8-bit floats too), ``F16``, or ``BF16`` (bits in 16-bit integers)."""
    slices: tuple[RowSlice, ...] = ()
    rotary_rows: int = 0
    """Rows of one attention head whose halves are interleaved (llama's Q and K); 0 leaves the order."""
    shift: float = 0.0
    """Added to every value, in float32 (Gemma's norms)."""
    constant: tuple[float, ...] = ()
    """The values themselves, where no stored tensor is behind it (rotary factors)."""

    @property
    def element_count(self) -> int:
        """Number of values."""
        return Tensor(self.name, self.shape).element_count

    @property
    def row_length(self) -> int:
        """Values in one row; 1 for a vector, whose rows are its values."""
        return self.shape[0] if len(self.shape) > 1 else 1

    @property
    def always_f32(self) -> bool:
        """Stays F32 in every GGUF file: vectors, norms and expert routers, as in llama.cpp's converter."""
        if len(self.shape) <= 1 or not self.name.endswith(".weight"):
            return True
        return self.name.endswith(("_norm.weight", "ffn_gate_inp.weight", "ffn_gate_inp_shexp.weight"))

    def blocks(self, block_bytes: int = BLOCK_BYTES) -> Iterator[np.ndarray[Any, Any]]:
        """The values in order, as arrays of whole rows of about ``block_bytes`` bytes, shape ``(rows, row_length)``.

        Raises:
            InputError: a file became unreadable or shorter since its header was read (``truncated-safetensors``).
        """
        import numpy as np

        if self.constant:
            yield np.array(self.constant, dtype="<f4").reshape(-1, self.row_length)
            return
        for part in self.slices:
            row_bytes = self.row_length * part.value_bytes
            step = self.rows_per_block(part, block_bytes)
            for start in range(0, part.count, step):
                count = min(step, part.count - start)
                raw = _read(part.tensor, (part.start + start) * row_bytes, count * row_bytes)
                yield self.arrange(part.decode(raw, start, self.row_length))

    def rows_per_block(self, part: RowSlice, block_bytes: int) -> int:
        """Whole rows (whole attention heads where they are interleaved) of about ``block_bytes`` stored bytes."""
        unit = self.rotary_rows or 1
        return max(block_bytes // (self.row_length * part.value_bytes) // unit, 1) * unit

    def arrange(self, block: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Rows as they are stored in the order of the GGUF file."""
        return _interleave(block, self.rotary_rows) if self.rotary_rows else block

    def load(self) -> np.ndarray[Any, Any]:
        """The whole tensor, shape in Hugging Face's order (``shape`` reversed); ``BF16`` as 16-bit integers."""
        import numpy as np

        return np.concatenate(list(self.blocks())).reshape(self.shape[::-1])


def _read(tensor: StoredTensor, offset: int, size: int) -> bytes:
    try:
        with tensor.file.open("rb", buffering=0) as stream:
            stream.seek(tensor.offset + offset)
            raw = stream.read(size)
            # one read() returns at most 2,147,479,552 bytes on Linux, and less when interrupted
            while len(raw) < size and (more := stream.read(size - len(raw))):
                raw += more
    except OSError as error:
        raise InputError(f"{tensor.file.name!r} cannot be read", numbers=str(error), code="unreadable-file") from None
    if len(raw) < size:
        raise InputError(
            f"{tensor.file.name!r} is cut short",
            numbers=f"{tensor.name}: {size} bytes expected at {tensor.offset + offset}, {len(raw)} there",
            hint="download the file again",
            code="truncated-safetensors",
        )
    return raw


def _interleave(block: np.ndarray[Any, Any], head_rows: int) -> np.ndarray[Any, Any]:
    """Row ``2k + j`` of a head from row ``j * head_rows / 2 + k``.

    Hugging Face keeps the two values of a rotary pair half a head apart, ggml's "normal" RoPE side by side:
    ``LlamaModel.permute`` in llama.cpp's conversion/llama.py.
    """
    rows, length = block.shape
    halves = block.reshape(rows // head_rows, 2, head_rows // 2, length)
    return halves.swapaxes(1, 2).reshape(rows, length)
