"""What lies on the GPUs and what in RAM: the placement that fits with the margin, found by the estimate itself.

llama.cpp has three levers: how many layers go to the GPUs (``--n-gpu-layers``), how these are shared between several
GPUs (``--tensor-split``), and whether the routed experts of the first layers stay in RAM although their attention is
on a GPU (``--n-cpu-moe``). Every answer was checked with :func:`planner.estimate.memory.memory`.
"""

from __future__ import annotations

import dataclasses
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate, pairwise

from planner.core.candidate import Placement, Variant
from planner.core.estimates import DeviceMemory, MemoryEstimate
from planner.core.hardware import HardwareProfile
from planner.core.model import ModelSpec
from planner.estimate import kv_cache, weights
from planner.estimate.memory import memory

_SPLIT_ROUNDS = 3
"""Times that the compute buffers of the last split serve to make the next; they move by a step at most."""
_FILL_STEPS = 12
"""Halvings in the search for an even fill: to 1/4096 of a GPU, less than a layer."""


def available_bytes(device: DeviceMemory, margin_fraction: float) -> int | None:
    """Capacity of a device less the margin; ``None`` where it is unknown."""
    return None if device.capacity_bytes is None else int(device.capacity_bytes * (1 - margin_fraction))


def holds(device: DeviceMemory, margin_fraction: float) -> bool:
    """Whether a device has room; one of unknown capacity is taken to be large enough."""
    available = available_bytes(device, margin_fraction)
    return available is None or device.needed_bytes <= available


def gpus_hold(used: MemoryEstimate, margin_fraction: float) -> bool:
    """Whether every GPU has room, whatever the host has."""
    return all(holds(device, margin_fraction) for device in used.devices)


def whole(model: ModelSpec, placement: Placement) -> bool:
    """Whether nothing but the token table stays in RAM."""
    return placement.gpu_layers > model.n_layer and not weights.expert_layers(model, placement)


def split_that_holds(
    model: ModelSpec, variant: Variant, placement: Placement, hardware: HardwareProfile, margin_fraction: float
) -> Placement | None:
    """``placement`` if its GPUs hold it, else with the ``tensor_split`` that fills all of them to the same part.

    llama.cpp's own split goes by free memory and by the number of layers; it overfills a GPU where the layers differ
    (experts in RAM, a large output matrix) or where buffers that do not shrink take most of a small one. The split is
    in whole layers, so that llama.cpp's rounding cannot move one.

    Returns:
        ``None`` if no split was found that holds. The host is not looked at.
    """
    used = memory(model, variant, placement, hardware)
    if gpus_hold(used, margin_fraction):
        return placement
    if len(used.devices) < 2 or placement.tensor_split:
        return None
    costs = _layer_costs(model, variant, placement)
    count = len(used.devices)
    for last in range(count - 1, -1, -1):
        for first in range(last + 1):
            split = _Split(model, variant, placement, hardware, margin_fraction, costs, first, last)
            found = split.found(used)
            if found is not None:
                return found
    return None


@dataclass(slots=True)
class _Split:
    """The layers between the GPUs ``first`` … ``last``; the other GPUs get none.

    What a GPU's buffers take depends on what it holds (the output's logits, a pipeline's copies), hardly on how many
    layers, so they are taken from one split to find the next.
    """

    model: ModelSpec
    variant: Variant
    placement: Placement
    hardware: HardwareProfile
    margin_fraction: float
    costs: list[int]
    first: int
    last: int

    def found(self, used: MemoryEstimate) -> Placement | None:
        """A split that holds; the sizes of ``used`` serve for capacities only."""
        counts = self.filled(used, [device.overhead_bytes for device in used.devices], even=True)
        if counts is None:
            return None
        fixed = [0] * len(used.devices)
        for _ in range(_SPLIT_ROUNDS):
            made = dataclasses.replace(self.placement, tensor_split=tuple(float(count) for count in counts))
            used = memory(self.model, self.variant, made, self.hardware)
            if gpus_hold(used, self.margin_fraction):
                return made
            now = [device.total_bytes - device.weights_bytes - device.kv_cache_bytes for device in used.devices]
            fixed = [max(known, taken) for known, taken in zip(fixed, now, strict=True)]
            before, counts = counts, self.filled(used, fixed, even=True)
            if counts is None or counts == before:  # to the brim: the last GPU's buffers may shrink with its layers
                counts = self.filled(used, now, even=False)
            if counts is None or counts == before:
                return None
        return None

    def filled(self, used: MemoryEstimate, fixed: list[int], *, even: bool) -> list[int] | None:
        """Layers for each GPU beside what its buffers take, ``None`` if they are too many.

        Not ``even``: as many as the first GPUs take, and all others on the last one.
        """
        rooms = []
        for at, (device, taken) in enumerate(zip(used.devices, fixed, strict=True)):
            available = available_bytes(device, self.margin_fraction)
            endless = available is None or (at == self.last and not even)
            room = float("inf") if endless else float((available or 0) - taken)
            rooms.append(room if self.first <= at <= self.last else 0.0)
        return _filled(self.costs, rooms, even=even)


def _layer_costs(model: ModelSpec, variant: Variant, placement: Placement) -> list[int]:
    """Bytes that each offloaded layer, and the output, takes on a GPU: its weights and its part of the cache."""
    sums, experts = weights.layer_sums(model, variant, True)
    cache = kv_cache.bytes_per_layer(model, placement, on_gpu=True)
    moved = weights.expert_layers(model, placement)
    start = max(0, model.offloadable_count - placement.gpu_layers)
    costs = [b - a for a, b in pairwise(sums)]
    for layer in range(start, model.n_layer):
        costs[layer] += cache[layer] - (experts[layer + 1] - experts[layer] if layer < moved else 0)
    costs[-1:-1] = [0] * (model.offloadable_count - len(costs))
    return costs[start:]


def _filled(costs: list[int], rooms: list[float], *, even: bool) -> list[int] | None:
    """Layers for each GPU so that all are filled to the same part, or the first ones to the brim; ``None``: too many.

    Each GPU takes neighbouring layers, so filling them one after the other is the best there is.
    """
    sums = list(accumulate(costs, initial=0))
    best = _counts(sums, rooms, 1.0)
    if best is None or not even:
        return best
    low, high = 0.0, 1.0
    for _ in range(_FILL_STEPS):
        middle = (low + high) / 2
        found = _counts(sums, rooms, middle)
        low, high = (middle, high) if found is None else (low, middle)
        best = found or best
    return best


def _counts(sums: list[int], rooms: list[float], part: float) -> list[int] | None:
    at, counts = 0, []
    for room in rooms:
        end = max(at, bisect_right(sums, sums[at] + part * room) - 1)
        counts.append(end - at)
        at = end
    return counts if at == len(sums) - 1 else None


def best_offload(
    model: ModelSpec,
    variant: Variant,
    placement: Placement,
    hardware: HardwareProfile,
    margin_fraction: float,
    *,
    move_experts: bool = True,
) -> Placement | None:
    """The placement that fits and leaves the least in RAM, everything else as in ``placement``.

    All layers on the GPUs if they hold them. Else, for a mixture of experts, all layers with the experts of as few as
    possible in RAM, as attention and the cache gain most by a GPU; and only where even that is too much, or the model
    is dense, fewer layers. Memory shared by CPU and GPU has no room to win by moving experts.

    Returns:
        ``None`` if the host has no room for what stays there.
    """
    search = _Search(model, variant, placement, hardware, margin_fraction, move_experts=move_experts)
    found = search.found()
    if found is not None and search.fits(found):
        return found
    bare = search.placed(0, 0)
    return bare if found != bare and search.fits(bare) else None


class _Search:
    """One search, with what it has tried."""

    def __init__(
        self,
        model: ModelSpec,
        variant: Variant,
        placement: Placement,
        hardware: HardwareProfile,
        margin_fraction: float,
        *,
        move_experts: bool,
    ) -> None:
        self.model, self.variant, self.placement = model, variant, placement
        self.hardware, self.margin_fraction = hardware, margin_fraction
        self.count = placement.gpu_count or len(hardware.gpus)
        shared = any(gpu.unified_memory for gpu in hardware.gpus[: self.count])
        self.moves_experts = move_experts and model.mixture is not None and not shared
        self.tried: dict[tuple[int, int], Placement | None] = {}

    def found(self) -> Placement | None:
        """The best placement that the GPUs hold."""
        full, experts = self.model.offloadable_count, 0
        if not self.hardware.gpus:
            return self.placed(0, 0)
        if self.held(full, 0):
            return self.held(full, 0)
        if self.moves_experts:
            experts = self.model.n_layer
            if self.held(full, experts):
                return self.held(full, self.fewest(experts))
        return self.held(self.most(full, experts), experts)

    def fewest(self, high: int) -> int:
        """The fewest layers with experts in RAM, where ``high`` are enough."""
        least = high - largest(0, high, lambda saved: self.held(self.model.offloadable_count, high - saved) is not None)
        # a copy of a layer's experts in the compute buffer comes with the first of a kind, so look beyond a step
        return next((n for n in range(max(1, least - 2), least) if self.held(self.model.offloadable_count, n)), least)

    def most(self, full: int, experts: int) -> int:
        """The most layers, where ``full`` are too many.

        The compute buffer can shrink by a step when the last layer leaves the host, so look beyond one.
        """
        best = largest(0, full - 1, lambda layers: self.held(layers, experts) is not None)
        return best + 2 if best < full - 1 and self.held(best + 2, experts) else best

    def placed(self, layers: int, experts: int) -> Placement:
        """The placement with so many layers on the GPUs."""
        return dataclasses.replace(
            self.placement,
            gpu_layers=layers,
            gpu_count=self.count if layers else 0,
            cpu_expert_layers=experts if layers else 0,
        )

    def held(self, layers: int, experts: int) -> Placement | None:
        """The same, split so that the GPUs hold it; ``None`` if they cannot."""
        key = (layers, experts)
        if key not in self.tried:
            self.tried[key] = split_that_holds(
                self.model, self.variant, self.placed(*key), self.hardware, self.margin_fraction
            )
        return self.tried[key]

    def fits(self, placement: Placement) -> bool:
        """Whether the host has room as well as the GPUs."""
        used = memory(self.model, self.variant, placement, self.hardware)
        return gpus_hold(used, self.margin_fraction) and holds(used.host, self.margin_fraction)


def largest(low: int, high: int, holding: Callable[[int], bool]) -> int:
    """The largest number in ``low`` … ``high`` that holds, if holding is lost once on the way up; ``low`` else."""
    while low < high:
        middle = (low + high + 1) // 2
        if holding(middle):
            low = middle
        else:
            high = middle - 1
    return low
