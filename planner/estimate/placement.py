"""How much of a model goes where: the most layers on the GPUs, the longest context, and what else would fit.

Every answer comes from the memory estimate itself, not from a ratio of sizes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from planner.core.candidate import Placement, Variant
from planner.core.estimates import DeviceMemory, MemoryEstimate
from planner.core.hardware import HardwareProfile
from planner.core.model import ModelSpec
from planner.estimate.kv_cache import CELL_PADDING
from planner.estimate.memory import memory


@dataclass(frozen=True, slots=True, kw_only=True)
class Shortage:
    """The device that lacks most."""

    device: str
    needed_bytes: int
    available_bytes: int
    """Capacity less the margin."""

    @property
    def lacking_bytes(self) -> int:
        """Bytes that are missing."""
        return self.needed_bytes - self.available_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One line of a what-if table: with this context and KV type, so many layers fit."""

    context: int
    kv_type: str
    gpu_layers: int | None
    """``None``: not even the host has room."""


def shortage(used: MemoryEstimate, margin_fraction: float) -> Shortage | None:
    """What is missing for ``used`` where ``margin_fraction`` of each capacity stays free; ``None`` if it fits.

    A device of unknown capacity is taken to be large enough.
    """
    lacks = [lack for device in (*used.devices, used.host) if (lack := _lack(device, margin_fraction)) is not None]
    return max(lacks, key=lambda lack: lack.lacking_bytes, default=None)


def _lack(device: DeviceMemory, margin_fraction: float) -> Shortage | None:
    if device.capacity_bytes is None:
        return None
    available = int(device.capacity_bytes * (1 - margin_fraction))
    if device.total_bytes <= available:
        return None
    return Shortage(device=device.name, needed_bytes=device.total_bytes, available_bytes=available)


def fits(used: MemoryEstimate, margin_fraction: float) -> bool:
    """Whether ``used`` leaves ``margin_fraction`` of every device's capacity free."""
    return shortage(used, margin_fraction) is None


def most_gpu_layers(
    model: ModelSpec, variant: Variant, placement: Placement, hardware: HardwareProfile, margin_fraction: float
) -> int | None:
    """The largest ``gpu_layers`` (1 … ``n_layer + 1``; 0 if none) that fits, everything else as in ``placement``.

    Found by bisection: the GPUs' memory grows with their layers. The compute buffer can shrink by a step when the
    last layer leaves the host, so all layers are tried first, and the neighbours of the bisection's answer last.

    Returns:
        ``None`` if the host has no room for what stays there.
    """
    full = model.n_layer + 1
    if not hardware.gpus:
        return 0 if _fits_with(model, variant, placement, hardware, margin_fraction, 0) else None
    lacking: dict[int, bool] = {}

    def gpus_hold(layers: int) -> bool:
        if layers not in lacking:
            used = memory(model, variant, _with_layers(placement, hardware, layers), hardware)
            lacking[layers] = all(_lack(device, margin_fraction) is None for device in used.devices)
        return lacking[layers]

    best = full if gpus_hold(full) else _largest(0, full - 1, gpus_hold)
    if best < full - 1 and gpus_hold(best + 2):
        best += 2
    if _fits_with(model, variant, placement, hardware, margin_fraction, best):
        return best
    return 0 if best and _fits_with(model, variant, placement, hardware, margin_fraction, 0) else None


def _fits_with(
    model: ModelSpec,
    variant: Variant,
    placement: Placement,
    hardware: HardwareProfile,
    margin_fraction: float,
    layers: int,
) -> bool:
    return fits(memory(model, variant, _with_layers(placement, hardware, layers), hardware), margin_fraction)


def _with_layers(placement: Placement, hardware: HardwareProfile, layers: int) -> Placement:
    count = (placement.gpu_count or len(hardware.gpus)) if layers else 0
    return dataclasses.replace(placement, gpu_layers=layers, gpu_count=count)


def _largest(low: int, high: int, holds: Callable[[int], bool]) -> int:
    """The largest number in ``low`` … ``high`` that holds, if holding is lost once on the way up; ``low`` else."""
    while low < high:
        middle = (low + high + 1) // 2
        if holds(middle):
            low = middle
        else:
            high = middle - 1
    return low


def longest_context(
    model: ModelSpec,
    variant: Variant,
    placement: Placement,
    hardware: HardwareProfile,
    margin_fraction: float,
    limit: int | None = None,
) -> int | None:
    """The longest context per sequence that fits, in whole cells of the cache, up to ``limit``.

    Args:
        limit: by default the context the model was trained with.

    Returns:
        ``None`` if not even the shortest fits.
    """

    def holds(steps: int) -> bool:
        asked = dataclasses.replace(placement, context=steps * CELL_PADDING)
        return fits(memory(model, variant, asked, hardware), margin_fraction)

    ceiling = max(limit or model.n_ctx_train, CELL_PADDING)
    most = ceiling // CELL_PADDING
    best = most if holds(most) else _largest(0, most - 1, lambda steps: steps == 0 or holds(steps))
    return best * CELL_PADDING or None


def what_if(
    model: ModelSpec,
    variant: Variant,
    placement: Placement,
    hardware: HardwareProfile,
    margin_fraction: float,
    *,
    contexts: Iterable[int] = (4096, 8192, 16384, 32768),
    kv_types: Iterable[str] = ("f16", "q8_0"),
) -> tuple[Option, ...]:
    """How many layers fit at other contexts and KV types: "at 32k 21 layers fit, with q8_0 27"."""
    kinds = tuple(kv_types)
    options = []
    for context in contexts:
        for kv_type in kinds if context <= model.n_ctx_train else ():
            asked = dataclasses.replace(placement, context=context, kv_type=kv_type)
            layers = most_gpu_layers(model, variant, asked, hardware, margin_fraction)
            options.append(Option(context=context, kv_type=kv_type, gpu_layers=layers))
    return tuple(options)
