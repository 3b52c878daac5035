"""What a measuring child process is asked and what it answers; both cross the process boundary as JSON."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from planner.core.candidate import Placement
from planner.core.hardware import STRICT

SPEED = "speed"
QUALITY = "quality"
VLLM = "vllm"
"""The runtime in :attr:`TrialRequest.options` that speed is measured by, in place of transformers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Loading:
    """How transformers loads a checkpoint."""

    dtype: str | None = None
    """What it is computed in: a type of torch, or ``auto`` for the checkpoint's own. ``None``: exactly, so in float32
    on a CPU where the weights are not quantized, else ``auto``."""
    backend: str | None = None
    """GPTQModel's kernel (``AwqBackend`` of transformers); ``None``: the one that it prefers."""


AS_IT_IS = Loading()


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialRequest:
    """One measurement in a child process: speed and memory at a placement, or quality against a reference."""

    __pydantic_config__: ClassVar[dict[str, str]] = STRICT

    kind: str
    """:data:`SPEED` or :data:`QUALITY`."""
    model_path: str
    placement: Placement
    budget_seconds: float = 120.0
    """The child takes fewer samples, or fewer chunks of text, to stay near this; it notes so."""
    repetitions: int = 5
    """Samples wanted of each speed (llama-bench's default)."""
    decode_tokens: int = 32
    """Tokens decoded for one sample."""
    reference_path: str | None = None
    """The 16-bit model that quality is measured against; ``None``: only a perplexity."""
    reference_checkpoint: str | None = None
    """A checkpoint directory to make the 16-bit model of, in place of ``reference_path``."""
    reference_memory_bytes: int | None = None
    """Memory that the 16-bit model may take; beyond it lies in a temporary file beside the artifact."""
    reference_keep: str | None = None
    """A file to keep the 16-bit model in."""
    text_path: str | None = None
    quality_context: int = 512
    """Tokens of one chunk of text, llama-perplexity's default."""
    max_chunks: int | None = None
    repack: bool = True
    """Let llama.cpp hold weights in its CPU-specific layouts (AMX, CPU_REPACK), its default."""
    options: tuple[tuple[str, str], ...] = ()
    """What transformers is told to run a checkpoint, as ``(("dtype", "bfloat16"),)``; else what the checkpoint says."""
    spare_options: tuple[tuple[str, str], ...] | None = None
    """In place of :attr:`options` where the runtime refuses those: a kernel that has to be compiled may fail to be."""
    like_llama_cpp: bool = False
    """Round the reference as the file of ``llama-perplexity --kl-divergence-base`` does."""

    @property
    def loading(self) -> Loading:
        """The part of :attr:`options` that loading a checkpoint takes."""
        told = dict(self.options)
        return Loading(dtype=told.get("dtype"), backend=told.get("backend"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """Repeated timings of one quantity, tokens per second each."""

    __pydantic_config__: ClassVar[dict[str, str]] = STRICT

    samples: tuple[float, ...]
    tokens_per_sample: tuple[int, ...]
    seconds_per_sample: tuple[float, ...]
    cpu_seconds: float = 0.0
    """CPU time of all threads over all samples; below threads × seconds, others had the cores."""
    others_share: float | None = None
    """Share of all cores' time that other programs had meanwhile; ``None`` where the system does not tell."""

    @property
    def median(self) -> float:
        """The middle sample, or the mean of the middle two."""
        ordered = sorted(self.samples)
        half = len(ordered) // 2
        return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Buffer:
    """A line of llama.cpp's own memory report, as ``CPU_REPACK model buffer size = 12.50 MiB``."""

    __pydantic_config__: ClassVar[dict[str, str]] = STRICT

    name: str
    """llama.cpp's name of the buffer type: ``CPU_Mapped``, ``CPU_REPACK``, ``CUDA0``, ``CUDA_Host`` …"""
    kind: str
    """``model``, ``KV``, ``RS``, ``compute`` or ``output``."""
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceUse:
    """Memory that the child took on one GPU."""

    __pydantic_config__: ClassVar[dict[str, str]] = STRICT

    name: str
    used_bytes: int
    basis: str
    """``nvml process``, ``nvml device delta`` (others' changes included) or ``llama.cpp buffers``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryTrial:
    """Peak memory of load, prefill and decode, split from what Python and its modules take."""

    __pydantic_config__: ClassVar[dict[str, str]] = STRICT

    baseline_bytes: int
    """Resident set before the model was opened, with all modules and llama.cpp's library loaded."""
    peak_rss_bytes: int
    peak_bytes: int
    """``peak_rss_bytes - baseline_bytes``: what running the model added on the host."""
    filled_tokens: int
    """Most tokens that lay in the KV cache of one sequence."""
    buffers: tuple[Buffer, ...] = ()
    devices: tuple[DeviceUse, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeedTrial:
    """Speed and memory of one placement, as it was really run."""

    __pydantic_config__: ClassVar[dict[str, str]] = STRICT

    prefill: Samples
    decode: Samples
    memory: MemoryTrial
    load_seconds: float
    threads: int
    context: int
    prompt_tokens: int
    depth: int
    gpu_layers: int
    flash_attention: bool
    repack: bool
    """False: measured with llama.cpp's CPU-specific layouts off, as they crashed here."""
    spare: bool = False
    """Measured with the request's spare options, as the runtime refused the others."""
    runtime: str = "llama.cpp"


@dataclass(frozen=True, slots=True, kw_only=True)
class Perplexity:
    """exp(mean negative log-likelihood) and its standard error."""

    __pydantic_config__: ClassVar[dict[str, str]] = STRICT

    value: float
    standard_error: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """A quantized model against its reference over the same scored tokens."""

    __pydantic_config__: ClassVar[dict[str, str]] = STRICT

    reference: Perplexity
    log_ratio: float
    """ln(perplexity / reference perplexity)."""
    log_ratio_standard_error: float
    """Of the paired differences, so far smaller than those of the perplexities."""
    kl_mean_nats: float
    kl_standard_error_nats: float
    kl_median_nats: float
    kl_quantile_99_nats: float
    kl_maximum_nats: float
    same_top_fraction: float
    same_top_standard_error: float


@dataclass(frozen=True, slots=True, kw_only=True)
class QualityTrial:
    """Perplexity of a model on a text and, with a reference, what quantizing cost."""

    __pydantic_config__: ClassVar[dict[str, str]] = STRICT

    perplexity: Perplexity
    comparison: Comparison | None
    chunk_count: int
    chunk_available_count: int
    context: int
    token_count: int
    """Tokens scored: the second half of each chunk."""
    text_sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialResult:
    """The answer of the child."""

    __pydantic_config__: ClassVar[dict[str, str]] = STRICT

    speed: SpeedTrial | None = None
    quality: QualityTrial | None = None
    tool_version: str
    """As ``llama-cpp-python 0.3.36``."""
    notes: tuple[str, ...] = ()
