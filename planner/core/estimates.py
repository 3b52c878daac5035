"""Predictions: a number is never bare, it has a range, a basis and a source."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from planner.core.hardware import STRICT

Z80 = 1.2816
"""Half-width of a normal distribution's 80 % interval, in standard deviations."""
TO_95 = 1.96 / Z80
"""Times it makes an 80 % interval one of 95 %."""
MEASURED = "measured"
"""Measured on this machine, for this model and variant."""
CALIBRATED = "calibrated"
"""Derived from what was measured on this machine for other models or types."""
PUBLISHED = "published"
"""A published measurement for this device and variant."""
FORMULA = "formula"
"""A fitted or exact formula."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """A value with its 80 % interval: the truth should lie inside four times in five."""

    __pydantic_config__: ClassVar[dict[str, str]] = STRICT

    value: float
    low: float
    high: float
    basis: str
    source: str
    terms: tuple[tuple[str, float, str], ...] = ()
    """The arithmetic: (name, value, unit) of each term, for ``explain``."""

    def scaled(self, factor: float) -> Prediction:
        """The same prediction in another unit."""
        return Prediction(
            value=self.value * factor,
            low=self.low * factor,
            high=self.high * factor,
            basis=self.basis,
            source=self.source,
            terms=self.terms,
        )

    def contains(self, measured: float) -> bool:
        """Whether ``measured`` lies in the interval."""
        return self.low <= measured <= self.high


@dataclass(frozen=True, slots=True, kw_only=True)
class SizeEstimate:
    """Bytes on disk. ``bits_per_weight`` counts tensor bytes over all weights."""

    __pydantic_config__: ClassVar[dict[str, str]] = STRICT

    tensor_bytes: int
    metadata_bytes: int
    file_bytes: int
    bits_per_weight: float


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceMemory:
    """Memory of one device, or of the host. ``overhead_bytes`` is what a runtime adds outside its own buffers."""

    __pydantic_config__: ClassVar[dict[str, str]] = STRICT

    name: str
    weights_bytes: int = 0
    kv_cache_bytes: int = 0
    compute_bytes: int = 0
    overhead_bytes: int = 0
    capacity_bytes: int | None = None
    """What may be used: free memory (and never more than the working set), before the margin."""
    reclaimable_bytes: int = 0
    """Pages of the mapped file that the system may drop: resident while there is room, not needed to fit."""

    @property
    def needed_bytes(self) -> int:
        """What must fit: everything but the reclaimable pages."""
        return self.total_bytes - self.reclaimable_bytes

    @property
    def needed_overhead_bytes(self) -> int:
        """The overhead that adds up to :attr:`needed_bytes`: copies of weights stand in for their droppable pages."""
        return self.overhead_bytes - self.reclaimable_bytes

    @property
    def total_bytes(self) -> int:
        """Everything on this device."""
        return self.weights_bytes + self.kv_cache_bytes + self.compute_bytes + self.overhead_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryEstimate:
    """Memory per device, never summed across devices."""

    __pydantic_config__: ClassVar[dict[str, str]] = STRICT

    devices: tuple[DeviceMemory, ...]
    host: DeviceMemory
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeedEstimate:
    """Tokens per second of one sequence; ``None`` where nothing sourced is known."""

    __pydantic_config__: ClassVar[dict[str, str]] = STRICT

    decode: Prediction | None
    prefill: Prediction | None
    bound_by: str | None = None
    """What limits decode: ``GPU bandwidth``, ``host bandwidth``, ``compute``, ``launch overhead`` …"""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class QualityEstimate:
    """``perplexity_ratio`` is perplexity(quantized) / perplexity(16-bit); KL divergence in nats per token."""

    __pydantic_config__: ClassVar[dict[str, str]] = STRICT

    perplexity_ratio: Prediction | None
    kl_divergence_nats: Prediction | None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """All predictions for one way to run a model."""

    __pydantic_config__: ClassVar[dict[str, str]] = STRICT

    size: SizeEstimate
    memory: MemoryEstimate
    speed: SpeedEstimate
    quality: QualityEstimate
