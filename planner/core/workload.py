"""What the user wants to do with the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from planner.core.finetuning import FinetuneWish
from planner.core.strict import STRICT

OBJECTIVES = ("balanced", "quality", "speed", "memory", "finetune")
KV_TYPES = ("f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl", "f32")


LAYOUTS = ("gemm", "gemv")
"""Of AWQ: how its weights lie for a kernel."""
COMPUTE_DTYPES = ("bfloat16", "float16", "float32")
"""Of bitsandbytes' 4-bit layers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantizing:
    """What a person wants of AWQ, GPTQ and bitsandbytes; ``None``: what the method does unasked."""

    __pydantic_config__: ClassVar[dict[str, str]] = STRICT

    quantizer: str | None = None
    """The program: a name in ``data/quantizers.toml``."""
    group_size: int | None = None
    layout: str | None = None
    """``gemm`` or ``gemv``."""
    act_order: bool | None = None
    symmetric: bool | None = None
    double_quantization: bool | None = None
    compute_dtype: str | None = None


_NO_WISH = FinetuneWish()


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Context, users, limits and objective of one recommendation."""

    __pydantic_config__: ClassVar[dict[str, str]] = STRICT

    context: int = 8192
    """Tokens of context per sequence."""
    context_fixed: bool = True
    """False: nobody asked for this context; a recommendation may take what the model was trained with, or less."""
    objective: str = "balanced"
    concurrency: int = 1
    """Sequences served at once."""
    prompt_tokens: int = 512
    """Tokens of the prompt whose prefill is predicted."""
    depth: int = 0
    """Tokens already in the KV cache when decode is predicted."""
    min_decode_tokens_per_second: float | None = None
    max_memory_bytes: int | None = None
    """Limit over one device (the GPU where one is used, else the host)."""
    methods: tuple[str, ...] | None = None
    types: tuple[str, ...] | None = None
    kv_type: str | None = None
    """``None``: qplan picks among f16 and q8_0."""
    gpu_layers: int | None = None
    """``None``: qplan searches the most that fits."""
    ubatch: int = 512
    flash_attention: bool = True
    threads: int | None = None
    cpu_only: bool = False
    quantizing: Quantizing = Quantizing()
    imatrix: str = "auto"
    """Of GGUF types: ``auto`` where one is demanded or pays, ``on`` for all, ``off`` for none."""
    finetuning: FinetuneWish = _NO_WISH
    """Of the objective ``finetune``."""
    memory_margin_fraction: float = 0.06
    """Share of each device's usable memory that is left free."""
