"""What is done to one block: the stored rows of one tensor into the bytes of every output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from planner.convert.encode import encode
from planner.convert.rows import NamedTensor
from planner.quantize.kernels import Kernels, check_finite
from planner.quantize.sources import Span
from planner.quantize.targets import Layout, Place

if TYPE_CHECKING:
    import numpy as np

    Writes = list[tuple[int, int, np.ndarray[Any, Any]]]
    """(number of the output, offset, bytes)"""
else:
    Writes = list

SLAB_WEIGHTS = 1 << 18
"""Weights quantized at a time: their float32 form, 1 MiB, stays in the cache of a core."""
AUTO = "auto"
THROUGH = (AUTO, "F16", "BF16", "F32")


def stored_type(tensor: NamedTensor, through: str = AUTO) -> str:
    """Type of ``tensor`` in the file that two steps would have quantized from: its values are rounded to it first.

    ``auto``: BF16 for bfloat16, which holds it exactly where F16 would lose its smallest values, and F16 for all else,
    float32 and 8-bit floats too, as llama.cpp's converter does by default.
    """
    if tensor.always_f32:
        return "F32"
    if through != AUTO:
        return through
    return "BF16" if tensor.dtype == "BF16" else "F16"


@dataclass(frozen=True, slots=True)
class Blockwork:
    """Quantizes blocks for a set of outputs; shared by threads."""

    layouts: tuple[Layout, ...]
    kernels: Kernels
    through: str

    def scratch(self) -> np.ndarray[Any, Any]:
        """A thread's own room for one slab."""
        import numpy as np

        return np.empty(SLAB_WEIGHTS, dtype="<f4")

    def quantize(self, span: Span, raw: np.ndarray[Any, Any], scratch: np.ndarray[Any, Any]) -> Writes:
        """The bytes of every output for the rows in ``raw``; none of them is a view of it.

        Raises:
            QplanError: the values cannot be quantized.
        """
        assert span.unit is not None
        tensor, part = span.unit.tensor, span.unit.part
        rows = tensor.arrange(part.decode(raw, span.first_row, tensor.row_length))
        first = span.unit.first_row + span.first_row
        return self.encode_rows(tensor, rows, first, scratch)

    def encode_rows(
        self, tensor: NamedTensor, rows: np.ndarray[Any, Any], first: int, scratch: np.ndarray[Any, Any]
    ) -> Writes:
        """As ``quantize``, of rows in the order of the GGUF file, the first of which is row ``first`` of ``tensor``."""
        stored_as = stored_type(tensor, self.through)
        places = [layout.places[tensor.name] for layout in self.layouts]
        rooms = {_key(place): _room(place, len(rows)) for place in places}
        matrix_rows = tensor.shape[1] if len(tensor.shape) > 2 else first + len(rows)
        start = 0
        while start < len(rows):
            expert, row = divmod(first + start, matrix_rows)
            # a slab ends where a matrix of the stack ends: each expert has an importance of its own
            end = start + min(max(SLAB_WEIGHTS // tensor.row_length, 1), matrix_rows - row, len(rows) - start)
            self._encode_slab(tensor, rows[start:end], stored_as, rooms, (start, expert), scratch)
            start = end
        return [
            (number, place.offset + first * place.row_bytes, rooms[_key(place)][1])
            for number, place in enumerate(places)
        ]

    def _encode_slab(
        self,
        tensor: NamedTensor,
        rows: np.ndarray[Any, Any],
        stored_as: str,
        rooms: dict[tuple[str, int], tuple[Place, np.ndarray[Any, Any]]],
        where: tuple[int, int],
        scratch: np.ndarray[Any, Any],
    ) -> None:
        """Fill the rows from ``where[0]`` on of every room; ``where[1]`` is the number of their expert."""
        if (tensor.dtype, stored_as, tensor.shift) == ("F32", "F16", 0.0):
            stored = self.kernels.to_float16(rows, tensor.name)
        else:
            stored = encode(rows, tensor.dtype, stored_as, name=tensor.name, shift=tensor.shift)
        values = self.kernels.to_float32(stored, stored_as, scratch)
        check_finite(values, tensor.name)
        for place, room in rooms.values():
            out = room[where[0] * place.row_bytes : (where[0] + len(stored)) * place.row_bytes]
            if place.type == stored_as:
                out[:] = stored.reshape(-1).view("u1")
            else:
                importance = None if place.importance is None else place.importance[where[1]]
                self.kernels.quantize(values, place.type, out, importance, name=tensor.name)


def _key(place: Place) -> tuple[str, int]:
    """Outputs with the same type and importance share their bytes."""
    return place.type, id(place.importance)


def _room(place: Place, rows: int) -> tuple[Place, np.ndarray[Any, Any]]:
    import numpy as np

    return place, np.empty(rows * place.row_bytes, dtype=np.uint8)
