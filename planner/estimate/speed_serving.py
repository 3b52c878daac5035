"""Seconds per token and per prompt in GPU serving runtimes: vLLM, transformers, ExLlama and their like."""

from __future__ import annotations

from dataclasses import replace

from planner.core.candidate import Variant
from planner.core.hardware import Gpu
from planner.estimate import speed_terms, speed_torch_cpu
from planner.estimate.speed_hardware import served_matrix_rate
from planner.estimate.speed_model import coefficients, document
from planner.estimate.speed_site import Site, Timing, gpu_case
from planner.estimate.speed_terms import Case
from planner.estimate.speed_work import Work

_EAGER = ("gptqmodel", "autogptq", "bitsandbytes", "peft")
"""Runtimes that run transformers' own model code, kernel by kernel."""
TENSOR_PARALLEL_EFFICIENCY = 0.8
"""Share of the ideal speed-up of prefill over several GPUs. An assumption, not yet fitted."""
NVLINK_LAYER_SECONDS, PCIE_LAYER_SECONDS = 4e-5, 5e-4
"""What the two sums over all GPUs cost per layer and token with tensor parallelism. NVLink: Llama-2-70B in gpt-fast on
2, 4 and 8 A100 took 46.9, 26.3 and 16.0 ms, which is 82.4 ms over their number and 5.7 ms, or 71 us a layer, 30 of
them launches (gpt-fast README). PCIe: CodeLlama-34B in vLLM on 4 and 8 A10G took 60.0 and 42.6 ms in 16 bits, on 2 and
4 of them 42.2 and 33.5 ms with AWQ: 525 and 517 us a layer (https://github.com/mlc-ai/llm-perf-bench, 2023-10)."""
_NVLINK_CHIPS = frozenset({"volta", "ga100", "hopper", "gb100"})


def decode(work: Work, variant: Variant, where: Site) -> Timing | None:
    """Seconds per generated token; ``None`` where a bandwidth is unknown, or nothing runs it without a GPU."""
    if not where.gpus and variant.runtime == "transformers":
        return speed_torch_cpu.decode(work, variant, where)
    gpu = where.gpus[0] if where.gpus else None
    if gpu is None or not gpu.bandwidth_bytes_per_second:
        return None
    case = _case(work, variant, gpu)
    k = coefficients("serving_decode", case)
    weights, launches, cache = speed_terms.serving_decode_seconds(
        weight_bytes=work.weight_bytes,
        layers=work.layers,
        kv_bytes=work.kv_bytes * (work.query_group if speed_terms.copies_cache(case.runtime) else 1.0),
        bandwidth=gpu.bandwidth_bytes_per_second,
        k=k,
    )
    ways = float(min(where.tensor_parallel, len(where.gpus)))
    link = NVLINK_LAYER_SECONDS if case.chip in _NVLINK_CHIPS else PCIE_LAYER_SECONDS
    sums = work.layers * link if ways > 1 else 0.0
    return Timing(
        seconds=(weights + cache) / ways + launches + sums,
        terms=(
            ("weights read per token", work.weight_bytes, "B"),
            ("bandwidth", gpu.bandwidth_bytes_per_second, "B/s"),
            ("share of the bandwidth reached", k["efficiency"], ""),
            ("weights", weights / ways, "s"),
            ("kernel launches", launches, "s"),
            ("KV cache", cache / ways, "s"),
            *((("sums over the GPUs", sums, "s"),) if sums else ()),
        ),
        bound_by=_bound_by(weights / ways, cache / ways, launches, sums),
        case=case,
        fit="serving_decode",
    )


def prefill(work: Work, variant: Variant, where: Site) -> Timing | None:
    """Seconds to read the prompt; ``None`` where a figure is unknown, or nothing runs it without a GPU."""
    if not where.gpus and variant.runtime == "transformers":
        return speed_torch_cpu.prefill(work, variant, where)
    gpu = where.gpus[0] if where.gpus else None
    matrix = served_matrix_rate(gpu) if gpu else None
    if gpu is None or not gpu.bandwidth_bytes_per_second or not matrix:
        return None
    case = _case(work, variant, gpu)
    k = coefficients("serving_prefill", case)
    matmul, attention, launches = speed_terms.serving_prefill_seconds(
        tokens=work.prompt,
        params=work.params,
        weight_bytes=work.streamed_bytes,
        layers=work.layers,
        attention_operations=work.attention_operations,
        bandwidth=gpu.bandwidth_bytes_per_second,
        matrix=matrix,
        k=k,
    )
    ways = _parallel(where)
    return Timing(
        seconds=(matmul + attention) / ways + launches,
        terms=(
            ("prompt", float(work.prompt), "tokens"),
            ("arithmetic rate", matrix * k["matmul"], "FLOP/s"),
            ("matrix products", matmul / ways, "s"),
            ("attention", attention / ways, "s"),
            ("kernel launches", launches, "s"),
        ),
        bound_by="compute",
        case=case,
        fit="serving_prefill",
    )


def _case(work: Work, variant: Variant, gpu: Gpu) -> Case:
    """The coefficients' case; a runtime that has none of its own takes those of one that works like it."""
    runtime = "exllama" if variant.runtime.startswith("exllama") else variant.runtime
    if f"layer_seconds.{runtime}" not in document()["serving_decode"]["factors"]:
        runtime = "transformers" if runtime in _EAGER else "vllm"
    method = speed_terms.served_method(variant.method, variant.type)
    made = gpu_case(work, variant, gpu)
    return replace(made, runtime=runtime, method=method, type_class="", hybrid=False, gemma=False, ultra=False)


def _bound_by(weights: float, cache: float, launches: float, sums: float) -> str:
    """What takes longest of a token."""
    names = {sums: "link", launches: "launch overhead", cache: "KV cache reads", weights: "GPU bandwidth"}
    return names[max(names)]


def _parallel(where: Site) -> float:
    """Speed-up by tensor parallelism over the devices used."""
    ways = min(where.tensor_parallel, len(where.gpus))
    return 1.0 if ways <= 1 else max(1.0, ways * TENSOR_PARALLEL_EFFICIENCY)
