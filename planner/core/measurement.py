"""What was measured on a machine, and the value the estimates take from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from planner.core.hardware import STRICT
from planner.core.rates import NO_RATES, Rates
from planner.core.tuned import Tuned

DECODE = "decode_tokens_per_second"
PREFILL = "prefill_tokens_per_second"
PEAK_MEMORY = "peak_memory_bytes"
FILE_BYTES = "file_bytes"
PERPLEXITY_RATIO = "perplexity_ratio"
KL_DIVERGENCE = "kl_divergence_nats"
STEP_SECONDS = "seconds"
"""What a step of a plan took; in the report's steps only."""
QUANTIZE_RATE = "quantize_weights_per_second"
CONVERT_RATE = "convert_weights_per_second"
ONE_PASS_RATE = "one_pass_weights_per_second"
"""Weights of the model over the whole time of a step. ``predicted`` is the formula's rate without corrections, so that
corrections do not compound; ``weights_bytes`` holds the number of weights."""
TRAINABLE_PARAMETERS = "trainable_parameters"
TRAINING_RATE = "training_tokens_per_second"
LOSS_RATIO = "loss_ratio"
"""Of a fine-tuning: loss on held-back text after it over the loss before."""
QUANTITIES = (FILE_BYTES, PEAK_MEMORY, PREFILL, DECODE, PERPLEXITY_RATIO, KL_DIVERGENCE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditions:
    """What else decides a measured number."""

    __pydantic_config__: ClassVar[dict[str, str]] = STRICT

    context: int = 0
    depth: int = 0
    prompt_tokens: int = 0
    gpu_layers: int = 0
    threads: int | None = None
    kv_type: str = "f16"
    ubatch: int = 512
    flash_attention: bool = True
    cpu_expert_layers: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """One measured quantity of one variant of one model on one machine."""

    __pydantic_config__: ClassVar[dict[str, str]] = STRICT

    quantity: str
    """One of :data:`QUANTITIES`."""
    value: float
    low: float
    high: float
    """Spread of the samples (minimum and maximum), or the standard error's 80 % interval."""
    samples: tuple[float, ...] = ()
    model: str
    model_sha256: str
    """Fingerprint of the model's shape: measurements carry over to any file of the same shape."""
    method: str
    runtime: str
    type: str
    group_size: int | None = None
    imatrix: bool = False
    conditions: Conditions = Conditions()
    predicted: float | None = None
    """What qplan had said before."""
    hardware_identity: str = ""
    hardware_name: str = ""
    tool_version: str = ""
    """The runtime and its version, as ``llama-cpp-python 0.3.36``."""
    measured_at: str = ""
    """UTC, ISO 8601."""
    weights_bytes: float | None = None
    """Bytes of weights one token reads (decode) or parameters it multiplies: what speed scales by."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """Everything measured on one machine: what ``estimate`` may use, as a value and without I/O."""

    hardware_identity: str
    measurements: tuple[Measurement, ...] = ()
    rates: Rates = NO_RATES
    """What ``qplan calibrate`` found."""
    tuned: tuple[Tuned, ...] = ()
    """What ``qplan tune`` found, newest last."""

    def of(self, quantity: str) -> tuple[Measurement, ...]:
        """Measurements of one quantity, newest last."""
        return tuple(m for m in self.measurements if m.quantity == quantity)
