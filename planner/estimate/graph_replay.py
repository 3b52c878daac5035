"""Replay of ggml's graph allocator: how large a compute buffer grows, given when each tensor comes and goes.

The events of a program are cut at the layers. A layer that is like another one is replayed from the other's events,
and if the buffer's free blocks were the same before it, its outcome is known already: after a few layers the replay
only looks up. Source: ggml/src/ggml-alloc.c of llama.cpp as in llama-cpp-python 0.3.36.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from planner.estimate.graph import Terms, WeightKey

GPU_ALIGNMENT_BYTES = 128
HOST_ALIGNMENT_BYTES = 32
_ENDLESS = 1 << 62
"""Length of the last free block; it stays above half of this, which no other block reaches."""


@dataclass(frozen=True, slots=True)
class Segment:
    """What one layer does to one device's buffer."""

    events: tuple[int, ...]
    """Slot ``s`` is allocated (``s``) or freed (``~s``)."""
    weights: tuple[tuple[int, WeightKey], ...]
    """Slots that hold copies of weights."""
    carried_in: tuple[int, ...]
    """Slots that the layer before left for this one."""
    carried_out: tuple[int, ...]
    """Slots that this layer leaves for the next one."""


@dataclass(frozen=True, slots=True)
class Step:
    """A layer of the model, or several alike: which segment they replay, and whose weights."""

    segment: int
    layer: int
    kind: int | None = None
    """Equal for layers with the same segment and the same sizes; ``None`` if it must be replayed itself."""
    count: int = 1
    """Layers of this kind one after the other, of which ``layer`` is the first."""


@dataclass(frozen=True, slots=True)
class Program:
    """Allocations and frees per device, cut at the layers, with symbolic sizes."""

    devices: tuple[tuple[Segment, ...], ...]
    sizes: tuple[Terms, ...]
    split_count: int

    def peaks(
        self, symbols: Sequence[int], steps: Sequence[Step], weight_bytes: Callable[[int, WeightKey], int]
    ) -> tuple[int, ...]:
        """Bytes of each device's compute buffer; the last device is the host.

        Args:
            symbols: values of :data:`planner.estimate.graph.SYMBOLS`.
            steps: the model's layers; the first stands for what comes before them.
            weight_bytes: bytes of a weight of a layer.
        """
        bytes_of = [
            size[0][0] * symbols[size[0][1]] if len(size) == 1 else sum(factor * symbols[i] for factor, i in size)
            for size in self.sizes
        ]
        last = len(self.devices) - 1
        return tuple(
            _Buffer(HOST_ALIGNMENT_BYTES if device == last else GPU_ALIGNMENT_BYTES, bytes_of, weight_bytes).run(
                segments, steps
            )
            for device, segments in enumerate(self.devices)
        )


class _Buffer:
    """One device's buffer: free blocks in the order of their addresses, of which the last is endless."""

    def __init__(self, alignment: int, bytes_of: list[int], weight_bytes: Callable[[int, WeightKey], int]) -> None:
        self.alignment = alignment
        self.bytes_of = [-(-size // alignment) * alignment for size in bytes_of]
        self.weight_bytes = weight_bytes
        self.starts, self.lengths = [0], [_ENDLESS]
        self.where: dict[int, int] = {}
        self.peak = 0

    def run(self, segments: tuple[Segment, ...], steps: Sequence[Step]) -> int:
        """The highest address reached over all ``steps``."""
        if not any(segment.events for segment in segments):
            return 0
        known: dict[object, tuple[list[int], list[int], tuple[int, ...]]] = {}
        left: tuple[int, ...] = ()
        where = self.where
        for step in steps:
            segment, before = segments[step.segment], None
            for _ in range(step.count):
                places = tuple([where[slot] for slot in left])
                where.update(zip(segment.carried_in, places, strict=False))
                left = segment.carried_out if segment.events else segment.carried_out or left
                if not segment.events:
                    break
                if step.kind is None:
                    self._replay(segment, step.layer)
                    continue
                key = (step.kind, step.segment, tuple(self.starts), tuple(self.lengths), places)
                if key == before:
                    break  # one more layer changes nothing, nor do those after it
                before = key
                if key in known:
                    starts, lengths, places_out = known[key]
                    self.starts, self.lengths = starts.copy(), lengths.copy()
                    where.update(zip(left, places_out, strict=True))
                    continue
                self._replay(segment, step.layer)
                known[key] = (self.starts.copy(), self.lengths.copy(), tuple([where[slot] for slot in left]))
        return self.peak

    def _replay(self, segment: Segment, layer: int) -> None:
        for slot, key in segment.weights:
            self.bytes_of[slot] = -(-self.weight_bytes(layer, key) // self.alignment) * self.alignment
        bytes_of, where = self.bytes_of, self.where
        starts, lengths, peak = self.starts, self.lengths, self.peak
        for event in segment.events:
            if event < 0:
                if size := bytes_of[~event]:
                    _free(starts, lengths, where[~event], size)
                continue
            # best fit, the endless block only if no other fits (``ggml_dyn_tallocr_alloc``)
            size = bytes_of[event]
            if len(lengths) == 1:
                best = 0
            else:
                best, best_length = -1, _ENDLESS >> 1
                for i, length in enumerate(lengths):
                    if size <= length <= best_length:
                        best, best_length = i, length
            where[event] = start = starts[best]
            if lengths[best] == size:
                del starts[best], lengths[best]
            else:
                starts[best] = end = start + size
                lengths[best] -= size
                if end > peak:
                    peak = end
        self.peak = peak


def _free(starts: list[int], lengths: list[int], start: int, size: int) -> None:
    """Return a block and join it with its neighbours (``ggml_dyn_tallocr_free_bytes``)."""
    i = bisect_left(starts, start)
    end = start + size
    if i and starts[i - 1] + lengths[i - 1] == start:
        if starts[i] == end:  # the endless block comes after every block
            lengths[i - 1] += size + lengths[i]
            del starts[i], lengths[i]
        else:
            lengths[i - 1] += size
    elif starts[i] == end:
        starts[i] = start
        lengths[i] += size
    else:
        starts.insert(i, start)
        lengths.insert(i, size)
