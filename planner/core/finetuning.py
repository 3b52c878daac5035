"""Fine-tuning as values: what is wanted, what was decided, and what it should take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from planner.core.candidate import Rejection
from planner.core.estimates import Prediction
from planner.core.strict import STRICT

NF4, SIXTEEN_BIT = "nf4", "16bit"
BASES = (NF4, SIXTEEN_BIT)
"""What the frozen weights are: 4 bits with double quantization (QLoRA), or as published (LoRA)."""
OPTIMIZERS = ("paged_adamw_8bit", "adamw_8bit", "paged_adamw_32bit", "adamw_torch")
"""By the names that transformers gives them."""
COMPUTE_DTYPES = ("bfloat16", "float16", "float32")
DEVICES = ("cuda", "cpu")
ALL_LINEAR = "all-linear"
"""Every linear layer but the output: what it takes to match full fine-tuning, Dettmers et al. 2023, section 4."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FinetuneWish:
    """What a person wants of a fine-tuning; ``None``: qplan chooses."""

    __pydantic_config__: ClassVar[dict[str, str]] = STRICT

    base: str | None = None
    """One of :data:`BASES`."""
    rank: int | None = None
    sequence_length: int | None = None
    batch: int | None = None
    """Sequences per optimizer step."""
    micro_batch: int | None = None
    """Sequences at once; ``None``: the most that fit."""
    optimizer: str | None = None
    learning_rate: float | None = None
    steps: int | None = None
    """``None``: once over the data, or a smoke test of a few steps where there is none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FinetuneSettings:
    """Everything that decides what a fine-tuning does, besides model and data."""

    __pydantic_config__: ClassVar[dict[str, str]] = STRICT

    base: str
    device: str
    compute_dtype: str
    rank: int
    alpha: int
    target_modules: str = ALL_LINEAR
    sequence_length: int
    micro_batch: int
    accumulation: int
    """Micro-batches per optimizer step."""
    gradient_checkpointing: bool
    optimizer: str
    learning_rate: float
    max_gradient_norm: float
    steps: int = 0
    """0: once over the data."""
    seed: int = 0

    @property
    def batch(self) -> int:
        """Sequences per optimizer step."""
        return self.micro_batch * self.accumulation

    def fault(self) -> str:
        """What no fine-tuning can have; empty: nothing. A plan may come from a stranger."""
        named = (
            ("base", self.base, BASES),
            ("device", self.device, DEVICES),
            ("compute type", self.compute_dtype, COMPUTE_DTYPES),
            ("optimizer", self.optimizer, OPTIMIZERS),
            ("target", self.target_modules, (ALL_LINEAR,)),
        )
        for what, value, known in named:
            if value not in known:
                return f"{value!r} is no {what} of a fine-tuning"
        counts = (self.rank, self.alpha, self.sequence_length, self.micro_batch, self.accumulation)
        if min(counts) < 1 or self.steps < 0 or self.learning_rate <= 0 or self.max_gradient_norm <= 0:
            return "a count of the fine-tuning is less than one"
        return ""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryTerm:
    """One part of the memory of training."""

    __pydantic_config__: ClassVar[dict[str, str]] = STRICT

    name: str
    bytes: int
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class FinetuneEstimate:
    """What a fine-tuning should take on one device."""

    __pydantic_config__: ClassVar[dict[str, str]] = STRICT

    device: str
    terms: tuple[MemoryTerm, ...]
    peak_memory: Prediction
    """Bytes: of the GPU without its context, or resident over the bare process."""
    overhead_bytes: int
    """What the runtime takes besides: CUDA's context, or the process with its libraries."""
    capacity_bytes: int | None
    trainable_parameter_count: int
    adapter_bytes: int
    seconds_per_step: Prediction | None = None
    """Of the optimizer: all its micro-batches."""
    notes: tuple[str, ...] = ()

    @property
    def needed_bytes(self) -> int:
        """What must fit."""
        return round(self.peak_memory.value) + self.overhead_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class FinetuneChoice:
    """One way to fine-tune a model on a machine."""

    settings: FinetuneSettings
    estimate: FinetuneEstimate
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class FinetuneDecision:
    """How to fine-tune; ``chosen`` is ``None`` where not even one sequence at once fits."""

    chosen: FinetuneChoice | None
    alternatives: tuple[FinetuneChoice, ...] = ()
    rejected: tuple[Rejection, ...] = ()
    hint: str = ""
    """What would fit, where nothing does."""
