"""How much of a model goes where: the most layers on the GPUs, the longest context, and what else would fit.

Every answer comes from the memory estimate itself, not from a ratio of sizes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass

from planner.core.candidate import Placement, Variant
from planner.core.estimates import DeviceMemory, MemoryEstimate
from planner.core.hardware import HardwareProfile
from planner.core.model import ModelSpec
from planner.estimate.kv_cache import CELL_PADDING
from planner.estimate.memory import memory
from planner.estimate.offload import available_bytes, best_offload, largest, whole


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
    cpu_expert_layers: int = 0
    """Layers on a GPU whose experts stay in RAM."""
    whole: bool = False
    """Nothing but the token table stays in RAM; without a GPU: it fits."""


def shortage(used: MemoryEstimate, margin_fraction: float) -> Shortage | None:
    """What is missing for ``used`` where ``margin_fraction`` of each capacity stays free; ``None`` if it fits.

    A device of unknown capacity is taken to be large enough.
    """
    lacks = [lack for device in (*used.devices, used.host) if (lack := _lack(device, margin_fraction)) is not None]
    return max(lacks, key=lambda lack: lack.lacking_bytes, default=None)


def _lack(device: DeviceMemory, margin_fraction: float) -> Shortage | None:
    available = available_bytes(device, margin_fraction)
    if available is None or device.needed_bytes <= available:
        return None
    return Shortage(device=device.name, needed_bytes=device.needed_bytes, available_bytes=available)


def fits(used: MemoryEstimate, margin_fraction: float) -> bool:
    """Whether ``used`` leaves ``margin_fraction`` of every device's capacity free."""
    return shortage(used, margin_fraction) is None


def most_gpu_layers(
    model: ModelSpec, variant: Variant, placement: Placement, hardware: HardwareProfile, margin_fraction: float
) -> int | None:
    """The largest ``gpu_layers`` (1 … ``n_layer + 1``; 0 if none) that fits, with all that belongs to a layer.

    :func:`planner.estimate.offload.best_offload` also keeps experts in RAM; here a layer goes whole.

    Returns:
        ``None`` if the host has no room for what stays there.
    """
    found = best_offload(model, variant, placement, hardware, margin_fraction, move_experts=False)
    return None if found is None else found.gpu_layers


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
    best = most if holds(most) else largest(0, most - 1, lambda steps: steps == 0 or holds(steps))
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
        for kv_type in kinds:
            asked = dataclasses.replace(placement, context=context, kv_type=kv_type)
            options.append(_option(model, variant, asked, hardware, margin_fraction))
    return tuple(options)


def _option(
    model: ModelSpec, variant: Variant, asked: Placement, hardware: HardwareProfile, margin_fraction: float
) -> Option:
    found = best_offload(model, variant, asked, hardware, margin_fraction)
    return Option(
        context=asked.context,
        kv_type=asked.kv_type,
        gpu_layers=None if found is None else found.gpu_layers,
        cpu_expert_layers=0 if found is None else found.cpu_expert_layers,
        whole=found is not None and (whole(model, found) or not hardware.gpus),
    )
