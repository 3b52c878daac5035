"""The fits behind data/speed_model.toml: which rows, which formula, which priors."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from speed_rows import LOCALSCORE_PROMPTS, SERVED_SHARE, Rows, before_repack, make_rows

from planner.estimate import speed_terms
from planner.estimate.speed_formula import CPU_LAYER_SECONDS
from planner.estimate.speed_hardware import CLOCK_GHZ, MATRIX_SHARE, OTHER_SHARE
from planner.estimate.speed_terms import Case, Roles

TYPES = ("F16", "BF16", "Q8_0", "Q6_K", "Q5_K", "Q5_0", "Q4_K", "Q4_0", "IQ4", "MXFP4", "Q3_K", "IQ3", "Q2_K", "IQ2")
UBATCH = 512.0  # llama.cpp's default
GPU_BACKENDS = ("cuda", "rocm", "vulkan", "metal", "sycl")
Prior = dict[str, tuple[float, float]]


@dataclass(frozen=True)
class Fit:
    """One fit. ``priors`` maps a pattern of factor names to (mean, sigma of the logarithm); the first match counts."""

    name: str
    select: Callable[[list[dict[str, object]]], Rows]
    roles: Callable[[Case], Roles]
    seconds: Callable[[Rows, dict[str, np.ndarray]], np.ndarray]
    priors: Prior
    always: Callable[[], list[str]] = list
    huber: float = 0.08
    noise: float = 0.15
    offsets: bool = False
    """Whether a device's other models correct a prediction: it helps on GPUs and hurts on CPUs and in served runtimes,
    where what was measured differs more by build and host than by device."""
    launch: bool = False
    """Whether what an old build's launches cost is fitted apart, per layer."""
    split: tuple[float, float, int] | None = None
    """Interval of a model split between GPU and host, set by hand, and the rows with a known split behind it.

    Decode: measured over predicted 1.33, 1.01, 0.97, 0.90, 0.68 and 0.61 on four desktops and laptops whose hosts
    nobody described, and 0.30 to 0.57 in eight runs beside an H100, in a machine of 16 virtual cores instead of a
    whole server (tests/data/gpu_h100.jsonl). Prefill: the eight runs set the copying rate and lie within 13 % of it;
    how fast other hosts copy is a judgement."""

    def prior(self, name: str) -> tuple[float, float]:
        """Mean and sigma of the logarithm of the factor ``name``."""
        for pattern, (mean, sigma) in self.priors.items():
            if re.fullmatch(pattern, name):
                return math.log(mean), sigma
        raise KeyError(f"{self.name} has no prior for {name}")


NUISANCE: Prior = {
    r"nuisance\.kind\.(llama-bench|qplan|server)": (1.0, 1e-3),
    r"nuisance\.launch\..*": (1.5, 0.4),
    r"nuisance\.kind\..*": (1.0, 0.2),
    # https://github.com/ggml-org/llama.cpp/pull/17906: 1.27 on a Blackwell card by FP4 products alone
    r"nuisance\.before_fp4": (1.4, 0.2),
    r"nuisance\.without_graphs": (2.0, 0.5),
    r"nuisance\.early_rdna3\.5": (1.2, 0.3),
    r"nuisance\..*": (1.0, 0.15),
}


def _gpu(rows: list[dict[str, object]]) -> list[dict[str, object]]:
    return [
        r
        for r in rows
        if r["method"] == "gguf"
        and r["stratum"] not in ("cpu", "partial", "gpu_quant")
        and r["backend"] in GPU_BACKENDS
    ]


def _gpu_decode_rows(rows: list[dict[str, object]]) -> Rows:
    return make_rows([r for r in _gpu(rows) if r["decode_tokens_per_second"]], "decode_tokens_per_second")


def _gpu_decode(rows: Rows, k: dict[str, np.ndarray]) -> np.ndarray:
    x = rows.x
    unpack = np.where(np.isfinite(x["compute"]), 1 / x["compute"], 0.0)
    args = {n: x[n] for n in ("weight_bytes", "params", "layers", "kv_bytes", "bandwidth")}
    return sum(speed_terms.gpu_decode_seconds(**args, unpack=unpack, k=k))


def _gpu_always(each: tuple[str, ...], *alone: str) -> Callable[[], list[str]]:
    def names() -> list[str]:
        found = [
            f"{e}.{c}" for e in each for c in (CLOCK_GHZ if "chip" in e else TYPES if "type" in e else GPU_BACKENDS)
        ]
        return [*found, *alone]

    return names


GPU_DECODE = Fit(
    name="gpu_decode",
    select=_gpu_decode_rows,
    roles=speed_terms.gpu_decode_roles,
    seconds=_gpu_decode,
    always=_gpu_always(
        (
            "efficiency",
            "layer_seconds",
            "token_seconds",
            "kv_efficiency",
            "compute",
            "efficiency.chip",
            "compute.chip",
            "layer_seconds.chip",
            "efficiency.type",
            "compute.type",
        )
    ),
    priors={
        r"efficiency\.(moe)(\..*)?": (1.0, 0.12),
        r"efficiency\.ultra": (1.0, 0.2),
        r"efficiency\.chip\..*": (1.0, 0.08),
        r"efficiency\.type\..*": (1.0, 0.08),
        r"efficiency\.\w+\.type\..*": (1.0, 0.15),
        r"efficiency\.\w+": (0.75, 0.3),
        r"efficiency\.\w+\..*": (1.0, 0.08),
        # nominal FP32 operations per weight unpacked: 1 / factor; Apple and Pascal unpack with many instructions
        r"compute\.chip\.m\d": (0.045, 0.4),
        r"compute\.chip\.(pascal|maxwell|gp100)": (0.035, 0.4),
        r"compute\.chip\.(xe|xe-lp)": (0.03, 0.4),
        r"compute\.chip\.xe2": (0.05, 0.4),
        r"compute\.chip\.pvc": (0.01, 0.4),
        r"compute\.chip\.(orin)": (0.06, 0.4),
        r"compute\.chip\..*": (0.12, 0.4),
        r"compute\.type\.(F16|BF16)": (1.6, 0.4),
        r"compute\.type\..*": (1.0, 0.4),
        r"compute\.\w+": (1.0, 0.2),
        r"sharpness": (3.0, 0.5),
        r"layer_seconds\.(moe|hybrid|gemma)": (1.3, 0.4),
        r"layer_seconds\.ultra": (1.0, 0.4),
        r"layer_seconds\.chip\..*": (1.0, 0.25),
        r"layer_seconds\.metal": (9e-5, 0.6),
        r"layer_seconds\.\w+": (4e-5, 0.6),
        r"layer_seconds\.\w+\..*": (1.0, 0.25),
        r"token_seconds\..*": (1e-4, 1.0),
        r"kv_efficiency\.plain": (0.6, 0.4),
        r"kv_efficiency\..*": (0.7, 0.3),
        **NUISANCE,
    },
    offsets=True,
    launch=True,
    huber=0.05,
    noise=0.25,
    split=(-0.95, 0.35, 14),
)


def _gpu_prefill_rows(rows: list[dict[str, object]]) -> Rows:
    long = [
        r for r in _gpu(rows) if r["prefill_tokens_per_second"] and r["prompt"] == r["prompt"] and r["prompt"] >= 64
    ]
    # several GPUs read a long prompt as a pipeline of micro-batches: see planner/estimate/speed_formula.py
    alone = [r for r in long if r["compute"] and r["gpu_count"] in ("", "1")]
    return make_rows(alone, "prefill_tokens_per_second")


def _gpu_prefill(rows: Rows, k: dict[str, np.ndarray]) -> np.ndarray:
    seconds = _prompt_seconds(rows.x, rows.x["tokens"], k)
    mixed = rows.x["mixed"]
    if mixed.any():  # LocalScore's figure is the mean of the rates of its prompts
        x = {name: values[mixed] for name, values in rows.x.items()}
        part = {role: values[mixed] for role, values in k.items()}
        rates = [1 / _prompt_seconds(x, np.full(len(x["tokens"]), float(n)), part) for n in LOCALSCORE_PROMPTS]
        seconds[mixed] = 1 / np.mean(rates, axis=0)
    return seconds


def _prompt_seconds(x: dict[str, np.ndarray], tokens: np.ndarray, k: dict[str, np.ndarray]) -> np.ndarray:
    """Seconds per token of prompts of ``tokens``, which may be others than those the rows were loaded with."""
    ratio = tokens / x["tokens"]
    passes = np.ceil(tokens / UBATCH)
    filled = np.minimum(tokens, UBATCH) / np.minimum(x["tokens"], UBATCH)
    same = ratio == 1
    seconds = speed_terms.gpu_prefill_seconds(
        tokens=tokens,
        params=x["params"] - x["output_params"],
        expert_params=x["expert_params"],
        expert_rows=x["expert_rows"] * np.where(same, 1.0, filled),
        layers=x["layers"],
        streamed_bytes=x["streamed"],
        passes=np.where(same, x["passes"], passes),
        attention_operations=x["attention"] * ratio**2,
        attention_scores=x["scores"] * ratio**2,
        bandwidth=x["bandwidth"],
        compute=x["compute"],
        power=x["power"],
        k=k,
    )
    return sum(seconds) / tokens


_PREFILL_EACH = (
    "matmul",
    "stream",
    "attention",
    "scores",
    "pass_seconds",
    "layer_seconds",
    "expert_rows",
    "matmul.chip",
    "matmul.type",
)

GPU_PREFILL = Fit(
    name="gpu_prefill",
    select=_gpu_prefill_rows,
    roles=speed_terms.gpu_prefill_roles,
    seconds=_gpu_prefill,
    always=_gpu_always(_PREFILL_EACH, "matmul.wide.ga100", "matmul.wide.hopper"),
    priors={
        **{rf"matmul\.chip\.{re.escape(chip)}": (share, 0.3) for chip, share in MATRIX_SHARE.items()},
        r"matmul\.chip\..*": (OTHER_SHARE, 0.4),
        r"matmul\.type\..*": (1.0, 0.15),
        r"matmul\.wide\.ga100": (1.5, 0.3),
        r"matmul\.wide\.hopper": (2.4, 0.3),  # cuBLAS uses the units that mma.sync leaves idle
        r"matmul\.moe": (0.8, 0.3),
        r"matmul\.moe\..*": (1.0, 0.2),
        r"expert_rows\..*": (32, 0.6),
        r"power": (0.4, 0.5),
        r"matmul\.(hybrid|gemma|ultra)": (0.9, 0.2),
        r"matmul\.vulkan": (0.8, 0.15),
        r"matmul\.\w+": (1.0, 0.15),
        r"matmul\.\w+\..*": (1.0, 0.2),
        r"stream\..*": (0.6, 0.3),
        r"scores\..*": (0.6, 0.4),
        r"attention\..*": (0.8, 0.5),
        r"layer_seconds\.(moe|hybrid|gemma|ultra)": (1.5, 0.8),
        r"layer_seconds\..*": (1e-4, 0.8),
        r"pass_seconds\..*": (5e-4, 0.8),
        r"nuisance\.old_build": (1.3, 0.3),
        **NUISANCE,
    },
    huber=0.08,
    noise=0.25,
    offsets=True,
    launch=True,
    split=(-0.7, 0.5, 8),
)


def _cpu(rows: list[dict[str, object]], rate: str) -> Rows:
    """Rows of llama.cpp; ik_llama.cpp, which multiplies most types faster, is another program."""
    known = [r for r in rows if r["stratum"] == "cpu" and r[rate] and r["bandwidth"]]
    return make_rows([r for r in known if r["kind"] != "ik_llama.cpp"], rate)


def _cpu_decode(rows: Rows, k: dict[str, np.ndarray]) -> np.ndarray:
    args = {n: rows.x[n] for n in ("weight_bytes", "params", "kv_bytes", "bandwidth", "threads")}
    return sum(speed_terms.cpu_decode_seconds(**args, k=k)) + rows.x["layers"] * CPU_LAYER_SECONDS


def _cpu_prefill_rows(rows: list[dict[str, object]]) -> Rows:
    """Each prompt once: tables that time tokens with fewer threads repeat the prompt's rate, which had all of them.

    Rates of builds before the kernels for interleaved weights are fitted, and are no measure of today's builds.
    """
    known: dict[tuple[object, ...], dict[str, object]] = {}
    for r in rows:
        if r["prompt"] == r["prompt"] and (r["eligible"] == "1" or r["kind"] == "llama-bench"):
            eligible = "0" if before_repack(r) else "1"  # type: ignore[arg-type]
            key = (r["device"], r["model"], r["type"], r["prompt"], r["prefill_tokens_per_second"])
            known.setdefault(key, r | {"eligible": eligible, "threads_used": r["all_threads"]})
    return _cpu(list(known.values()), "prefill_tokens_per_second")


def _cpu_prefill(rows: Rows, k: dict[str, np.ndarray]) -> np.ndarray:
    x = rows.x
    parts = speed_terms.cpu_prefill_seconds(
        tokens=x["tokens"],
        params=x["params"] - x["output_params"],
        row_elements=x["row_elements"],
        attention_operations=x["attention"],
        threads=x["threads"],
        streamed_bytes=x["streamed"],
        passes=x["passes"],
        bandwidth=x["bandwidth"],
        k=k,
    )
    return (sum(parts) + x["passes"] * x["layers"] * CPU_LAYER_SECONDS) / x["tokens"]


CPU_CLASSES = ("avx512", "avx2", "x86", "apple", "i8mm", "dotprod", "neon", "inorder", "riscv")


_PREFILL_ALONE = ("row_seconds", "scaling", "stream")


def _cpu_always() -> list[str]:
    per_class = [f"{n}.{c}" for n in ("efficiency", "core_bandwidth", "unpack", "matmul") for c in CPU_CLASSES]
    per_type = [f"{n}.type.{t}" for n in ("unpack", "matmul") for t in TYPES]
    return [
        *per_class,
        *per_type,
        "efficiency",
        "unpack",
        "matmul",
        "sharpness",
        "efficiency.moe",
        "matmul.moe",
        "matmul.unpacked.arm",
        *_PREFILL_ALONE,
    ]


# Weights per second and thread that each class unpacks and multiplies (start of the search), and the bandwidth one
# core can draw: about 20 GB/s on a desktop x86, 14 on Apple (an M2 draws 56 with 4 threads, an M2 Max 118 with 8), 5 on
# a small ARM core. Rates of matrix products: of builds that interleave weights for their kernels (2025 and later).
_CPU_PRIORS: Prior = {
    r"efficiency": (0.75, 0.2),
    r"efficiency\.moe": (0.8, 0.2),
    r"efficiency\.apple": (0.85, 0.15),
    r"efficiency\..*": (1.0, 0.15),
    r"core_bandwidth\.apple": (1.45e10, 0.15),
    r"core_bandwidth\.i8mm": (1.2e10, 0.4),
    r"core_bandwidth\.inorder": (1.5e9, 0.4),
    r"core_bandwidth\.(avx512|avx2)": (2e10, 0.3),
    r"core_bandwidth\.x86": (4e9, 0.4),
    r"core_bandwidth\..*": (5e9, 0.5),
    r"unpack": (1.0, 0.1),
    r"unpack\.type\.IQ[23]": (0.5, 0.4),
    r"unpack\.type\.(F16|BF16)": (1.0, 0.4),
    r"unpack\.type\..*": (1.0, 0.3),
    r"unpack\.\w+\.type\..*": (1.0, 0.3),
    r"unpack\.avx512": (2e10, 0.5),
    r"unpack\.avx2": (1.4e10, 0.5),
    r"unpack\.apple": (2.4e10, 0.3),
    r"unpack\.x86": (1.5e9, 0.5),
    r"unpack\.i8mm": (1e10, 0.4),
    r"unpack\.dotprod": (4e9, 0.3),
    r"unpack\.inorder": (5e8, 0.5),
    r"unpack\..*": (1e9, 0.5),
    r"sharpness": (3.0, 0.4),
    r"matmul": (1.0, 0.1),
    r"matmul\.moe": (0.8, 0.3),
    r"matmul\.unpacked\.arm": (0.6, 0.3),
    r"matmul\.type\..*": (1.0, 0.8),
    r"matmul\.\w+\.type\..*": (1.0, 0.2),
    r"matmul\.avx512": (1.1e11, 0.4),
    r"matmul\.avx2": (6e10, 0.3),
    r"matmul\.apple": (8e10, 0.3),
    r"matmul\.i8mm": (1e11, 0.4),
    r"matmul\.dotprod": (1.5e10, 0.4),
    r"matmul\.inorder": (2e9, 0.5),
    r"row_seconds": (5e-8, 0.8),
    r"scaling": (0.85, 0.1),
    r"stream": (0.6, 0.2),
    r"matmul\.x86": (3e9, 0.5),
    r"matmul\..*": (3e9, 0.5),
    r"nuisance\.before_repack": (1.5, 0.3),
    **NUISANCE,
}

CPU_DECODE = Fit(
    name="cpu_decode",
    select=lambda rows: _cpu(rows, "decode_tokens_per_second"),
    roles=lambda case: {k: v for k, v in speed_terms.cpu_roles(case).items() if k not in ("matmul", *_PREFILL_ALONE)},
    seconds=_cpu_decode,
    always=lambda: [n for n in _cpu_always() if not n.startswith("matmul") and n not in _PREFILL_ALONE],
    priors=_CPU_PRIORS,
)
CPU_PREFILL = Fit(
    name="cpu_prefill",
    select=_cpu_prefill_rows,
    roles=lambda case: {k: v for k, v in speed_terms.cpu_roles(case).items() if k in ("matmul", *_PREFILL_ALONE)},
    seconds=_cpu_prefill,
    always=lambda: [n for n in _cpu_always() if n.startswith("matmul") or n in _PREFILL_ALONE],
    priors=_CPU_PRIORS,
    huber=0.2,
    noise=0.25,
)

RUNTIMES = ("vllm", "sglang", "transformers", "exllama", "autoawq", "tinychat", "tensorrt-llm")
METHODS = ("awq", "gptq", "none", "bitsandbytes", "exl2", "fp8")
TABLES = (*METHODS, "bitsandbytes-int8")


def _serving(rows: list[dict[str, object]], rate: str) -> Rows:
    chosen = [
        r
        for r in rows
        if r["stratum"] == "gpu_quant" and r[rate] and r["method"] in METHODS and r["runtime"] in RUNTIMES
    ]
    return make_rows(chosen, rate)


def _serving_decode(rows: Rows, k: dict[str, np.ndarray]) -> np.ndarray:
    args = {n: rows.x[n] for n in ("weight_bytes", "layers", "bandwidth")}
    copied = np.array([speed_terms.copies_cache(case.runtime) for case in rows.cases])
    kv_bytes = rows.x["kv_bytes"] * np.where(copied, rows.x["query_group"], 1.0)
    return sum(speed_terms.serving_decode_seconds(**args, kv_bytes=kv_bytes, k=k)) + rows.x["prompt_seconds"]


def _serving_always() -> list[str]:
    names = [
        f"{e}.{r}"
        for e in ("efficiency", "layer_seconds", "token_seconds", "overlap", "kv_efficiency", "matmul")
        for r in RUNTIMES
    ]
    bits = [f"layer_seconds.transformers.bitsandbytes{kind}" for kind in ("", "-int8")]
    methods = [f"{e}.method.{m}" for e in ("efficiency", "matmul") for m in TABLES]
    return [*names, *bits, *methods, "efficiency", "matmul", "layer_seconds.moe", "layer_seconds.server"]


SERVING_DECODE = Fit(
    name="serving_decode",
    select=lambda rows: _serving(rows, "decode_tokens_per_second"),
    roles=lambda case: {k: v for k, v in speed_terms.serving_roles(case).items() if k != "matmul"},
    seconds=_serving_decode,
    noise=0.2,
    always=lambda: [n for n in _serving_always() if not n.startswith("matmul")],
    priors={
        r"efficiency": (0.75, 0.2),
        r"efficiency\.method\.none": (1.0, 0.05),
        r"efficiency\.method\.bitsandbytes(-int8)?": (0.5, 0.3),
        r"efficiency\.method\..*": (0.8, 0.2),
        r"efficiency\.chip\..*": (1.0, 0.1),
        r"efficiency\.[\w-]+": (1.0, 0.15),
        r"efficiency\.[\w-]+\..*": (1.0, 0.2),
        r"layer_seconds\.moe": (1.5, 0.4),
        r"layer_seconds\.server": (1.3, 0.3),
        r"layer_seconds\.chip\..*": (1.0, 0.2),
        r"layer_seconds\.transformers": (8e-4, 0.5),
        r"layer_seconds\.[\w-]+": (6e-5, 0.6),
        r"layer_seconds\.transformers\.bitsandbytes": (2.0, 0.4),  # unpacks each matrix in kernels of its own
        r"layer_seconds\.transformers\.bitsandbytes-int8": (5.0, 0.4),  # and splits off the outliers
        r"layer_seconds\.[\w-]+\..*": (1.0, 0.3),
        r"token_seconds\.(vllm|sglang)": (1e-3, 0.6),  # the scheduler in Python, once per token
        r"token_seconds\..*": (1e-4, 0.6),
        r"overlap\.transformers": (4.0, 0.01),
        r"overlap\..*": (1.0, 0.01),
        r"kv_efficiency\.transformers": (0.15, 0.4),
        r"kv_efficiency\..*": (0.35, 0.4),
        **NUISANCE,
    },
)


def _serving_prefill_rows(rows: list[dict[str, object]]) -> Rows:
    return _serving([r for r in rows if r["prompt"] == r["prompt"] and r["matrix"]], "prefill_tokens_per_second")


def _serving_prefill(rows: Rows, k: dict[str, np.ndarray]) -> np.ndarray:
    x = rows.x
    args = {n: x[n] for n in ("tokens", "params", "weight_bytes", "layers", "bandwidth", "matrix")}
    return sum(speed_terms.serving_prefill_seconds(**args, attention_operations=x["attention"], k=k)) / x["tokens"]


SERVING_PREFILL = Fit(
    name="serving_prefill",
    select=_serving_prefill_rows,
    roles=speed_terms.serving_roles,
    seconds=_serving_prefill,
    always=_serving_always,
    priors={
        r"matmul": (SERVED_SHARE, 0.3),
        r"matmul\.method\.none": (1.0 / SERVED_SHARE, 0.2),  # nothing to unpack: what 16 bits reach in llama.cpp
        r"matmul\.method\..*": (1.0, 0.2),
        r"matmul\..*": (1.0, 0.2),
        **SERVING_DECODE.priors,
    },
    huber=0.3,
    noise=0.3,
)

FITS = (GPU_DECODE, GPU_PREFILL, CPU_DECODE, CPU_PREFILL, SERVING_DECODE, SERVING_PREFILL)
