"""A way to run a model: the variant (what is written) and the placement (where and how it runs)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from planner.core.estimates import Estimate
from planner.core.hardware import STRICT


def method_and_type(method: str, type_: str) -> str:
    """``GGUF Q4_K_M``, ``bitsandbytes nf4``, and a type alone where nothing is quantized."""
    return {"none": "", "bitsandbytes": "bitsandbytes "}.get(method, f"{method.upper()} ") + type_


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """What a quantizer would write. METHOD, FORMAT and RUNTIME are three different things."""

    __pydantic_config__: ClassVar[dict[str, str]] = STRICT

    method: str
    """``gguf``, ``awq``, ``gptq``, ``bitsandbytes`` or ``none``."""
    format: str
    """``gguf``, ``awq-gemm``, ``gptq``, ``compressed-tensors``, ``safetensors`` …"""
    runtime: str
    """``llama.cpp``, ``vllm``, ``transformers`` …"""
    type: str
    """``Q4_K_M``; ``4bit``; ``nf4``; ``int8``; ``bf16``."""
    group_size: int | None = None
    """Weights per scale; -1 is a whole row; ``None`` where the type fixes it."""
    imatrix: bool = False
    act_order: bool = False
    symmetric: bool = True
    """AWQ, GPTQ: whole numbers around zero; False: each group has a zero point of its own."""
    double_quantization: bool = False
    """bitsandbytes: the scales of 4-bit blocks are quantized too."""
    compute_dtype: str | None = None
    """bitsandbytes: what its 4-bit layers multiply in; ``None``: nobody asked, and no hardware has decided yet."""
    quantizer: str | None = None
    """The program that makes it (``data/quantizers.toml``); ``None`` where the format has one only."""
    recipe: tuple[tuple[str, str], ...] = ()
    """Tensor and ggml type of each, for a mixture made to a size; empty: the type's own mix."""

    @property
    def main_type(self) -> str:
        """The type whose kernels do most of the work: of a mixture, the ggml type of most of its tensors."""
        types = [type_ for _, type_ in self.recipe]
        return max(sorted(set(types)), key=types.count) if types else self.type

    @property
    def is_4bit_bitsandbytes(self) -> bool:
        """Whether double quantization and a compute type mean something."""
        return self.type in ("nf4", "fp4")

    def label(self) -> str:
        """Short name for a table: ``GGUF Q4_K_M``, ``AWQ 4bit g128``."""
        group = "" if self.group_size is None else f" g{self.group_size}" if self.group_size > 0 else " per-row"
        return f"{method_and_type(self.method, self.type)}{group}{' +imatrix' if self.imatrix else ''}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Where the weights lie and how the runtime is set."""

    __pydantic_config__: ClassVar[dict[str, str]] = STRICT

    context: int
    kv_type: str = "f16"
    gpu_layers: int = 0
    """As llama.cpp counts: ``ModelSpec.offloadable_count`` (mostly ``n_layer + 1``) includes the output layer."""
    tensor_parallel: int = 1
    ubatch: int = 512
    batch: int = 2048
    flash_attention: bool = True
    sequences: int = 1
    threads: int | None = None
    depth: int = 0
    prompt_tokens: int = 512
    gpu_count: int = 0
    """Devices used, in the profile's order."""
    cpu_expert_layers: int = 0
    """Routed experts of the first so many layers stay in RAM, whatever lies on a GPU (llama.cpp's ``--n-cpu-moe``)."""
    tensor_split: tuple[float, ...] = ()
    """Shares of the GPUs in the offloaded layers (llama.cpp's ``--tensor-split``); empty: by their free memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelUse:
    """The kernel that a candidate's matrix products get: a row of ``data/kernels.toml``."""

    __pydantic_config__: ClassVar[dict[str, str]] = STRICT

    id: str
    name: str
    speed: str
    """``fast`` or ``slow``."""
    text: str
    fix: str = ""
    """What would get a faster one; of a slow kernel."""
    version: str = ""
    """Of the runtime that the row is about."""
    source: str = ""
    arguments: tuple[tuple[str, str], ...] = ()
    """What the runtime must be told to take it, as ``(("quantization", "humming"),)``."""

    @property
    def note(self) -> str:
        """What a person should know of a slow kernel, with the fix; empty for a fast one."""
        if self.speed == "fast":
            return ""
        return f"slow kernel {self.name}: {self.text}; {self.fix} [{self.id}]"


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A variant and a placement with their predictions and the reasons for them."""

    __pydantic_config__: ClassVar[dict[str, str]] = STRICT

    variant: Variant
    placement: Placement
    estimate: Estimate
    kernel: KernelUse | None = None
    reasons: tuple[str, ...] = ()
    score: float | None = None
    """Rank value under the objective, larger is better; comparable only within one recommendation."""
    pareto: bool = False
    """No other fitting candidate is at least as good in memory, speed and quality and better in one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rejection:
    """A candidate that was left out, and the number that decided it."""

    __pydantic_config__: ClassVar[dict[str, str]] = STRICT

    method: str
    type: str
    reason: str
    needed: float | None = None
    available: float | None = None
    unit: str | None = None
    rule: str | None = None
    """Id of the row, or name of the check, that decided."""
    source: str | None = None
    """Of the row, where it is one of a table."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceEntry:
    """A rule of the decision matrix that spoke."""

    __pydantic_config__: ClassVar[dict[str, str]] = STRICT

    rule: str
    effect: str
    source: str
