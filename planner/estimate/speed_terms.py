"""The arithmetic of speed: what one token, or one prompt, costs on a GPU, on a CPU and in a GPU serving runtime.

Every formula takes plain numbers (or arrays of equal length, which is how ``benchmarks/fit_speed.py`` fits them)
and coefficients that are products of named factors. ``*_roles`` say which names apply to a case, so that fitting
and predicting can never use different ones; the factors are in ``data/speed_model.toml``.

Decoding streams every weight once per token, so it costs bytes over the bandwidth reached, unless unpacking the
weights takes longer (Apple, Pascal and old CPUs), plus a fixed cost per layer (kernel launches and their tails),
plus the KV cache read at the depth. Prefill multiplies the prompt with the weights: two operations per weight and
token, at least the time to stream the weights once per micro-batch, plus attention over the cache.
"""

from __future__ import annotations

from dataclasses import dataclass

Roles = dict[str, tuple[str, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What decides the coefficients of a prediction."""

    backend: str
    """``cuda``, ``rocm``, ``vulkan``, ``metal``, ``sycl`` or ``cpu``."""
    chip: str
    """Generation of the processor, see :mod:`planner.estimate.speed_hardware`."""
    type_class: str
    """Weights with kernels of equal cost: ``Q4_K`` stands for Q4_K_S and Q4_K_M."""
    moe: bool = False
    hybrid: bool = False
    """Has recurrent layers: more and smaller kernels per layer."""
    gemma: bool = False
    """Gemma: four norms and soft-capping per layer, so more kernels."""
    ultra: bool = False
    """Two dies that share memory (Apple Ultra)."""
    flash: bool = True
    """Flash attention: the cache is read in one kernel."""
    runtime: str = "llama.cpp"
    method: str = "gguf"


THREADS = 8.0
"""Threads for which the rate of a CPU's matrix products is fitted."""
SCORE_BYTES = 16.0
"""A score without flash attention: written, read and written by the softmax, and read, in FP32."""
_LEAST_ROWS = 1e-9
"""Keeps the division defined where there are no experts."""
_WIDE = ("ga100", "hopper")
"""Chips whose matrix units are 16 times as wide as their FP32 ones: cuBLAS fills them, unpacking kernels do not."""
_SERVERS = ("volta", "ga100", "hopper", "gb100", "cdna")
"""Chips in servers, whose many cores have a lower clock than a desktop's and start kernels later."""
_ARM = ("apple", "i8mm", "dotprod", "neon", "inorder")
_UNPACKED = ("Q2_K", "Q3_K", "Q5_K", "Q6_K", "IQ2", "IQ3")
"""Types that take many instructions to unpack, more so with vectors of 128 bits, and have no interleaved kernel there:
a third to a half of an AVX-512 core's rate on an M2 Max, the others 0.5 to 0.8 (ik_llama.cpp's README, 2024-07)."""
_TYPE_CLASSES = {
    "Q4_K_M": "Q4_K",
    "Q4_K_S": "Q4_K",
    "Q5_K_M": "Q5_K",
    "Q5_K_S": "Q5_K",
    "Q3_K_L": "Q3_K",
    "Q3_K_M": "Q3_K",
    "Q3_K_S": "Q3_K",
    "Q2_K_S": "Q2_K",
    "Q4_1": "Q4_0",
    "Q5_1": "Q5_0",
    "MXFP4_MOE": "MXFP4",
    "NVFP4": "MXFP4",
    "F32": "F16",
    "INT8": "Q8_0",
    "INT4": "Q4_0",
}


def type_class(name: str) -> str:
    """The kernel class of a GGUF type: ``Q4_K`` for ``Q4_K_M``, ``IQ3`` for ``IQ3_XXS``."""
    upper = name.upper()
    if upper.startswith(("IQ1", "IQ2", "TQ")):
        return "IQ2"
    if upper.startswith("IQ3"):
        return "IQ3"
    if upper.startswith("IQ4"):
        return "IQ4"
    return _TYPE_CLASSES.get(upper, upper)


def cpu_type_class(name: str) -> str:
    """The kernel class on a CPU, where Q4_1 has no interleaved kernel and is as slow as Q5_0."""
    return "Q5_0" if name.upper() == "Q4_1" else type_class(name)


def _flags(case: Case, prefix: str) -> tuple[str, ...]:
    named = (("moe", case.moe), ("hybrid", case.hybrid), ("gemma", case.gemma), ("ultra", case.ultra))
    return tuple(f"{prefix}.{name}" for name, set_ in named if set_)


def gpu_decode_roles(case: Case) -> Roles:
    """Names of the factors behind each coefficient of :func:`gpu_decode_seconds`."""
    b, c, t = case.backend, case.chip, case.type_class
    return {
        "efficiency": (
            f"efficiency.{b}",
            f"efficiency.chip.{c}",
            f"efficiency.{b}.{c}",
            f"efficiency.type.{t}",
            *((f"efficiency.{b}.type.{t}",) if t in ("MXFP4", "BF16", "F16") else ()),
            *(("efficiency.moe", f"efficiency.moe.{b}") if case.moe else ()),
            *(("efficiency.ultra",) if case.ultra else ()),
        ),
        "compute": (f"compute.{b}", f"compute.chip.{c}", f"compute.type.{t}"),
        "sharpness": ("sharpness",),
        "layer_seconds": (
            f"layer_seconds.{b}",
            f"layer_seconds.chip.{c}",
            f"layer_seconds.{b}.{c}",
            *_flags(case, "layer_seconds"),
        ),
        "token_seconds": (f"token_seconds.{b}",),
        "kv_efficiency": (f"kv_efficiency.{b}", *(() if case.flash else ("kv_efficiency.plain",))),
    }


def gpu_decode_seconds(
    *,
    weight_bytes: float,
    params: float,
    layers: float,
    kv_bytes: float,
    bandwidth: float,
    unpack: float,
    k: dict[str, float],
) -> tuple[float, float, float]:
    """Seconds of one token on a GPU: (weights, launches, KV cache).

    Args:
        weight_bytes: bytes of weights read per token.
        params: weights multiplied per token.
        layers: blocks.
        kv_bytes: bytes of the cache read at this depth.
        bandwidth: nominal bytes per second of the device.
        unpack: 1 / (nominal FP32 operations per second), 0 where unknown.
        k: coefficients by role.
    """
    stream = weight_bytes / (bandwidth * k["efficiency"])
    convert = params * unpack / k["compute"]
    p = 1 + k["sharpness"]
    weights = (stream**p + convert**p) ** (1 / p)
    launches = layers * k["layer_seconds"] + k["token_seconds"]
    return weights, launches, kv_bytes / (bandwidth * k["kv_efficiency"])


def gpu_prefill_roles(case: Case) -> Roles:
    """Names of the factors behind each coefficient of :func:`gpu_prefill_seconds`."""
    b, c = case.backend, case.chip
    return {
        "matmul": (
            f"matmul.{b}",
            f"matmul.chip.{c}",
            f"matmul.{b}.{c}",
            f"matmul.type.{case.type_class}",
            f"matmul.{b}.type.{case.type_class}",
            *((f"matmul.wide.{c}",) if c in _WIDE and case.type_class in ("F16", "BF16") else ()),
            *((f"matmul.moe.{b}",) if case.moe else ()),
            *_flags(case, "matmul"),
        ),
        "expert_rows": (f"expert_rows.{b}",),
        "power": ("power",),
        "stream": (f"stream.{b}",),
        "attention": (f"attention.{b}", f"matmul.chip.{c}"),
        "scores": (f"scores.{b}",),
        "pass_seconds": (f"pass_seconds.{b}",),
        "layer_seconds": (f"layer_seconds.{b}", *_flags(case, "layer_seconds")),
    }


def gpu_prefill_seconds(
    *,
    tokens: float,
    params: float,
    expert_params: float,
    expert_rows: float,
    layers: float,
    streamed_bytes: float,
    passes: float,
    attention_operations: float,
    attention_scores: float,
    bandwidth: float,
    compute: float,
    power: float,
    k: dict[str, float],
) -> tuple[float, float, float]:
    """Seconds to read a prompt on a GPU: (matrix products, attention, launches).

    An expert gets a few rows of each micro-batch, which fill the tiles of its matrix product badly: n rows take as
    long as n + ``k["expert_rows"]`` would at the full rate.

    Args:
        tokens: length of the prompt.
        params: weights multiplied per token, without the output matrix.
        expert_params: those of ``params`` in routed experts.
        expert_rows: tokens of a micro-batch that each expert gets.
        layers: blocks.
        streamed_bytes: weights read per pass; all experts of a mixture.
        passes: micro-batches.
        attention_operations: multiply-adds (counted as two) over the cache, all layers.
        attention_scores: scores that go through memory, all heads and layers: 0 with flash attention.
        bandwidth: nominal bytes per second.
        compute: nominal FP32 operations per second.
        power: watts per operation, see :func:`planner.estimate.speed_hardware.power_ratio`.
        k: coefficients by role.
    """
    rate = matrix_rate(compute, power, k)
    filling = expert_params * k["expert_rows"] / (expert_rows + _LEAST_ROWS)
    matmul = 2 * (params + filling) * tokens / rate
    stream = passes * streamed_bytes / (bandwidth * k["stream"])
    attention = attention_operations / (compute * power ** k["power"] * k["attention"])
    attention = attention + attention_scores * SCORE_BYTES / (bandwidth * k["scores"])
    launches = passes * (layers * k["layer_seconds"] + k["pass_seconds"])
    return (matmul**2 + stream**2) ** 0.5, attention, launches


def matrix_rate(compute: float, power: float, k: dict[str, float]) -> float:
    """Operations per second that matrix products reach."""
    held_back: float = power ** k["power"]
    return compute * k["matmul"] * held_back


def cpu_roles(case: Case) -> Roles:
    """Names of the factors of :func:`cpu_decode_seconds` and :func:`cpu_prefill_seconds`."""
    c, t = case.chip, case.type_class
    return {
        "efficiency": ("efficiency", f"efficiency.{c}", *(("efficiency.moe",) if case.moe else ())),
        "core_bandwidth": (f"core_bandwidth.{c}",),
        "unpack": ("unpack", f"unpack.{c}", f"unpack.type.{t}", f"unpack.{c}.type.{t}"),
        "sharpness": ("sharpness",),
        "matmul": (
            "matmul",
            f"matmul.{c}",
            f"matmul.type.{t}",
            f"matmul.{c}.type.{t}",
            *(("matmul.unpacked.arm",) if c in _ARM and t in _UNPACKED else ()),
            *(("matmul.moe",) if case.moe else ()),
        ),
        "row_seconds": ("row_seconds",),
        "scaling": ("scaling",),
        "stream": ("stream",),
    }


def cpu_decode_seconds(
    *, weight_bytes: float, params: float, kv_bytes: float, bandwidth: float, threads: float, k: dict[str, float]
) -> tuple[float, float]:
    """Seconds of one token on a CPU: (weights, KV cache).

    The memory bus, the cores' own share of it and the arithmetic each set a floor; the largest decides, smoothly.
    """
    bus, cores = 1 / (bandwidth * k["efficiency"]), 1 / (threads * k["core_bandwidth"])
    p = 1 + k["sharpness"]
    byte_seconds = (bus**p + cores**p) ** (1 / p)
    arithmetic = params / (threads * k["unpack"])
    weights = ((weight_bytes * byte_seconds) ** p + arithmetic**p) ** (1 / p)
    return weights, kv_bytes * byte_seconds


def cpu_prefill_seconds(
    *,
    tokens: float,
    params: float,
    row_elements: float,
    attention_operations: float,
    threads: float,
    streamed_bytes: float,
    passes: float,
    bandwidth: float,
    k: dict[str, float],
) -> tuple[float, float, float]:
    """Seconds to read a prompt on a CPU: (matrix products, rows beside them, attention).

    More threads help less and less: barriers, shared caches and a lower clock. Beside the products each row is
    normalized, rotated, gated and quantized, which weighs more the narrower the matrices are.
    """
    cores = THREADS * (threads / THREADS) ** k["scaling"]
    rate = k["matmul"] * cores
    matmul = 2 * params * tokens / rate
    stream = passes * streamed_bytes / (bandwidth * k["stream"])
    rows = tokens * row_elements * k["row_seconds"] / cores
    # attention runs in FP16/FP32 without the packed kernels: taken at half the rate of the matrix products
    return (matmul**2 + stream**2) ** 0.5, rows, 2 * attention_operations / rate


def served_method(method: str, type_: str) -> str:
    """The method as its kernels tell it apart: LLM.int8() splits every product and is far slower than NF4."""
    return f"{method}-int8" if method == "bitsandbytes" and type_ == "int8" else method


def serving_roles(case: Case) -> Roles:
    """Names of the factors of :func:`serving_decode_seconds` and of prefill in a GPU serving runtime."""
    r, m, c = case.runtime, case.method, case.chip
    return {
        "efficiency": (
            "efficiency",
            f"efficiency.{r}",
            f"efficiency.method.{m}",
            f"efficiency.{r}.{m}",
            f"efficiency.chip.{c}",
        ),
        "layer_seconds": (
            f"layer_seconds.{r}",
            f"layer_seconds.{r}.{m}",
            f"layer_seconds.chip.{c}",
            *(("layer_seconds.server",) if c in _SERVERS else ()),
            *(("layer_seconds.moe",) if case.moe else ()),
        ),
        "token_seconds": (f"token_seconds.{r}",),
        "overlap": (f"overlap.{r}",),
        "kv_efficiency": (f"kv_efficiency.{r}",),
        "matmul": ("matmul", f"matmul.{r}", f"matmul.method.{m}"),
    }


def serving_decode_seconds(
    *, weight_bytes: float, layers: float, kv_bytes: float, bandwidth: float, k: dict[str, float]
) -> tuple[float, float, float]:
    """Seconds of one token in vLLM, transformers, ExLlama …: (weights, what launches add, KV cache).

    Where Python launches every kernel (transformers) the GPU works behind it, so the longer of the two decides;
    with CUDA graphs (vLLM) the cost per layer adds to the weights. ``kv_bytes`` is what the attention reads: in
    transformers the cache is copied out to every query head first.
    """
    weights = weight_bytes / (bandwidth * k["efficiency"])
    cache = kv_bytes / (bandwidth * k["kv_efficiency"])
    launches = layers * k["layer_seconds"] + k["token_seconds"]
    q = k["overlap"]
    both = ((weights + cache) ** q + launches**q) ** (1 / q)
    return weights, both - weights - cache, cache


def copies_cache(runtime: str) -> bool:
    """Whether ``runtime`` copies the cache out to every query head (``repeat_kv`` in transformers)."""
    return runtime == "transformers"


def serving_prefill_seconds(
    *,
    tokens: float,
    params: float,
    weight_bytes: float,
    layers: float,
    attention_operations: float,
    bandwidth: float,
    matrix: float,
    k: dict[str, float],
) -> tuple[float, float, float]:
    """Seconds to read a prompt in a GPU serving runtime: (matrix products, attention, launches).

    ``matrix`` is the FP16 rate that matrix units can reach, operations per second.
    """
    matmul = 2 * params * tokens / (matrix * k["matmul"])
    stream = weight_bytes / (bandwidth * k["efficiency"])
    launches = layers * k["layer_seconds"]
    return (matmul**2 + stream**2) ** 0.5, attention_operations / (matrix * k["matmul"]), launches
