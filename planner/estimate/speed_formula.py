"""Seconds per token and per prompt from the fitted model, on GPUs, on the CPU, and split between them.

llama.cpp's are computed here, those of other runtimes in :mod:`planner.estimate.speed_serving`.
"""

from __future__ import annotations

from dataclasses import replace

from planner.core.candidate import Variant
from planner.core.hardware import Gpu
from planner.estimate import speed_serving, speed_terms
from planner.estimate.speed_hardware import compute_rate, power_ratio
from planner.estimate.speed_model import coefficients
from planner.estimate.speed_site import Site, Terms, Timing, cpu_case, gpu_case
from planner.estimate.speed_work import Work

CROSSING_SECONDS = 6e-5
"""Handing the hidden state from GPU to CPU and back once per token. An assumption, no published row shows it alone;
it is 0.1-1 % of the token's time in a split model."""
PAGEABLE_BYTES_PER_SECOND = 6.7e9
"""Copying a dense model's mapped weights to a GPU: 6.0-7.7 GB/s on an H100 with PCIe 5.0 x16, as the pages are not
pinned and the driver copies them first. From the five partly offloaded dense runs of tests/data/gpu_h100.jsonl
(benchmarks/gpu_check.py, 2026-11-23), less the time of the same prompt wholly on the GPU."""
PAGEABLE_EXPERT_BYTES_PER_SECOND = 15.4e9
"""The same for experts, whose tensors are larger: 13.7-16.9 GB/s in the three runs of a mixture."""
PIPELINE_SHARE = 0.8
"""Share of a perfect pipeline's saving that several GPUs reach with llama.cpp: prompts of 8192 tokens of Llama 3 8B on
two, four and six RTX 3090 took 0.77, 0.46 and 0.33 times what the formula gives for one, the perfect pipeline 0.53,
0.30 and 0.21, and one GPU of those builds (2024-05, without flash attention) about 1.1 times what it gives
(https://github.com/XiongjieDai/GPU-Benchmarks-on-LLM-Inference)."""
CPU_LAYER_SECONDS = 39e-6
"""Threads meet at a barrier after every node of the graph: what one layer costs beside its weights. From decoding the
demo model (6 layers, weights in the L2 cache) as Q8_0 and Q4_K_M with 2 threads of a Xeon (llama-cpp-python 0.3.36,
2026-11-23). It decides models of a few million parameters; of a token of a 1B model it is 5 % on a laptop, where
reading the weights takes longest, and a third on a server of 12 memory channels."""
SMALL_WORK_SPREAD = 2.0
"""What the terms of :data:`SMALL_WORK` may be off by: they are the scheduler's on a shared machine, and few measured
models are small enough to show them. Of the demo model 2,060 to 2,430 decoded tokens/s and 14,400 of a prompt were
predicted; three 2-core virtual machines gave 1,120 to 2,410 and 5,300 to 9,200, one of them within two hours
(2026-11-27). Chosen after those misses, on that one model, and checked on no other."""
WAITING, ROWS = "waiting at barriers", "host rows beside matrix products"
SMALL_WORK = (WAITING, ROWS)
"""Terms of a CPU's :class:`Timing` that decide small models and weigh less in larger ones, most where memory is fast:
of a 7B model 1 % of a token and 4 % of a prompt on a laptop, 10 % and 6 % on a server of 12 memory channels."""


def decode(work: Work, variant: Variant, where: Site) -> Timing | None:
    """Seconds per generated token; ``None`` where a bandwidth that is needed is unknown."""
    if variant.method != "gguf":
        return speed_serving.decode(work, variant, where)
    if not where.gpus:
        return _cpu_decode(work, variant, where, share=1.0)
    parts = [_gpu_decode(work, variant, gpu, share) for gpu, share in where.shared()]
    in_place = where.gpus[0].unified_memory and work.gpu_layers >= work.layers and work.crossings < 2
    if not work.host_bytes or in_place:
        return _joined(parts, None)
    host = _cpu_decode(work, variant, where, share=1 - work.gpu_share)
    return None if host is None else _joined(parts, host, work.crossings)


def prefill(work: Work, variant: Variant, where: Site) -> Timing | None:
    """Seconds to read the prompt; ``None`` where a figure that is needed is unknown."""
    if variant.method != "gguf":
        return speed_serving.prefill(work, variant, where)
    if not where.gpus:
        return _cpu_prefill(work, variant, where, share=1.0)
    parts = [_gpu_prefill(work, variant, gpu, share) for gpu, share in where.shared()]
    if not work.host_bytes:
        return _pipelined(_joined(parts, None), parts, work.passes)
    return _split_prefill(work, variant, where, parts)


def _joined(parts: list[Timing | None], host: Timing | None, crossings: int = 1) -> Timing | None:
    known = [part for part in parts if part is not None]
    if len(known) < len(parts) or not known:
        return None
    seconds = sum(part.seconds for part in known)
    terms: Terms = known[0].terms if len(known) == 1 else _numbered(known)
    if host is None:
        return Timing(seconds=seconds, terms=terms, bound_by=known[0].bound_by, case=known[0].case, fit=known[0].fit)
    crossing = CROSSING_SECONDS * max(1, crossings)
    return Timing(
        seconds=seconds + host.seconds + crossing,
        terms=(*terms, *host.terms, ("handing over", crossing, "s")),
        bound_by=known[0].bound_by if seconds > host.seconds else host.bound_by,
        case=known[0].case,
        fit=known[0].fit,
        split=True,
    )


def _pipelined(total: Timing | None, parts: list[Timing | None], passes: int) -> Timing | None:
    """Several GPUs read a prompt of several micro-batches as a pipeline: the first goes through all, then each further
    one takes as long as the slowest GPU needs for its layers."""
    if total is None or len(parts) < 2 or passes < 2:
        return total
    slowest = max(part.seconds for part in parts if part is not None)
    saved = PIPELINE_SHARE * (passes - 1) / passes * (total.seconds - slowest)
    return replace(
        total, seconds=total.seconds - saved, terms=(*total.terms, ("saved by working at the same time", -saved, "s"))
    )


def _numbered(parts: list[Timing]) -> Terms:
    return tuple((f"GPU {i}: {name}", value, unit) for i, part in enumerate(parts) for name, value, unit in part.terms)


def _gpu_decode(work: Work, variant: Variant, gpu: Gpu, share: float) -> Timing | None:
    bandwidth = gpu.bandwidth_bytes_per_second
    if not bandwidth:
        return None
    case = gpu_case(work, variant, gpu)
    k = coefficients("gpu_decode", case)
    compute = compute_rate(gpu, case.chip)
    layers = work.gpu_layers * share
    on_gpu = work.gpu_share
    weights, launches, cache = speed_terms.gpu_decode_seconds(
        weight_bytes=work.gpu_bytes * share,
        params=work.params * on_gpu * share,
        layers=layers,
        kv_bytes=work.kv_bytes * layers / work.layers,
        bandwidth=bandwidth,
        unpack=1 / compute if compute else 0.0,
        k=k,
    )
    streaming = work.gpu_bytes * share / (bandwidth * k["efficiency"])
    terms = (
        ("weights read per token", work.gpu_bytes * share, "B"),
        ("bandwidth", bandwidth, "B/s"),
        ("share of the bandwidth reached", k["efficiency"], ""),
        ("weights", weights, "s"),
        ("kernel launches", launches, "s"),
        ("KV cache", cache, "s"),
    )
    largest = max((weights, launches, cache))
    names = {weights: "GPU bandwidth" if streaming > 0.8 * weights else "GPU compute", launches: "launch overhead"}
    return Timing(
        seconds=weights + launches + cache,
        terms=terms,
        bound_by=names.get(largest, "KV cache reads"),
        case=case,
        fit="gpu_decode",
    )


def _cpu_decode(work: Work, variant: Variant, where: Site, share: float) -> Timing | None:
    if not where.host_bandwidth:
        return None
    case = cpu_case(work, variant, where)
    k = coefficients("cpu_decode", case)
    read = work.weight_bytes * share
    weights, cache = speed_terms.cpu_decode_seconds(
        weight_bytes=read,
        params=work.params * share,
        kv_bytes=work.kv_bytes * (1.0 if share == 1.0 else 1 - work.gpu_layers / work.layers),
        bandwidth=where.host_bandwidth,
        threads=where.host_threads,
        k=k,
    )
    arithmetic = work.params * share / (where.host_threads * k["unpack"])
    barriers = work.layers * share * CPU_LAYER_SECONDS
    largest = max(arithmetic if arithmetic > 0.8 * weights else weights, barriers)
    return Timing(
        seconds=weights + cache + barriers,
        terms=(
            ("weights read per token by the host", read, "B"),
            ("host bandwidth", where.host_bandwidth, "B/s"),
            ("threads", float(where.host_threads), ""),
            ("host weights", weights, "s"),
            ("host KV cache", cache, "s"),
            (WAITING, barriers, "s"),
        ),
        bound_by={barriers: "thread barriers", weights: "host bandwidth"}.get(largest, "compute"),
        case=case,
        fit="cpu_decode",
    )


def _gpu_prefill(work: Work, variant: Variant, gpu: Gpu, share: float) -> Timing | None:
    case = gpu_case(work, variant, gpu)
    compute, bandwidth = compute_rate(gpu, case.chip), gpu.bandwidth_bytes_per_second
    if not compute or not bandwidth:
        return None
    k = coefficients("gpu_prefill", case)
    layers = work.gpu_layers * share
    matmul, attention, launches = speed_terms.gpu_prefill_seconds(
        tokens=work.prompt,
        params=(work.params - work.output_params) * work.gpu_share * share,
        expert_params=work.expert_params * work.gpu_share * share,
        expert_rows=work.expert_rows,
        layers=layers,
        streamed_bytes=max(0.0, work.streamed_bytes - work.host_streamed_bytes) * share,
        passes=work.passes,
        attention_operations=work.attention_operations * layers / work.layers,
        attention_scores=work.attention_scores * layers / work.layers,
        bandwidth=bandwidth,
        compute=compute,
        power=(power := power_ratio(gpu, compute)),
        k=k,
    )
    return Timing(
        seconds=matmul + attention + launches,
        terms=(
            ("prompt", float(work.prompt), "tokens"),
            ("weights multiplied per token", (work.params - work.output_params) * work.gpu_share * share, ""),
            *_expert_terms(work, k),
            ("what the power limit leaves", power ** k["power"], "x"),
            ("arithmetic rate", speed_terms.matrix_rate(compute, power, k), "FLOP/s"),
            ("matrix products", matmul, "s"),
            ("attention", attention, "s"),
            ("kernel launches", launches, "s"),
        ),
        bound_by="compute",
        case=case,
        fit="gpu_prefill",
    )


def _expert_terms(work: Work, k: dict[str, float]) -> Terms:
    """How badly a few rows each fill the matrix products of experts."""
    if not work.expert_rows:
        return ()
    return (
        ("of them in experts", work.expert_params, ""),
        ("rows of each expert", work.expert_rows, ""),
        ("rows that go unused beside them", k["expert_rows"], ""),
    )


def _cpu_prefill(work: Work, variant: Variant, where: Site, share: float) -> Timing | None:
    if not where.host_bandwidth:
        return None
    case = cpu_case(work, variant, where)
    k = coefficients("cpu_prefill", case)
    matmul, rows, attention = speed_terms.cpu_prefill_seconds(
        tokens=work.prompt,
        params=(work.params - work.output_params) * share,
        row_elements=work.row_elements * share,
        attention_operations=work.attention_operations * share,
        threads=where.host_threads,
        streamed_bytes=work.streamed_bytes * share,
        passes=work.passes,
        bandwidth=where.host_bandwidth,
        k=k,
    )
    barriers = work.passes * work.layers * share * CPU_LAYER_SECONDS
    return Timing(
        seconds=matmul + rows + attention + barriers,
        terms=(
            ("prompt", float(work.prompt), "tokens"),
            ("threads", float(where.host_threads), ""),
            ("host arithmetic rate of 8 threads", speed_terms.THREADS * k["matmul"], "FLOP/s"),
            ("host matrix products", matmul, "s"),
            (ROWS, rows, "s"),
            ("host attention", attention, "s"),
            (WAITING, barriers, "s"),
        ),
        bound_by="compute",
        case=case,
        fit="cpu_prefill",
    )


def _split_prefill(work: Work, variant: Variant, where: Site, parts: list[Timing | None]) -> Timing | None:
    """A prompt of 32 tokens or more: the host's weights travel to the GPU once per micro-batch (op offload).

    llama.cpp does so whether or not its own cores would be faster.
    """
    whole = [_gpu_prefill(_all_on_gpu(work), variant, gpu, share) for gpu, share in where.shared()]
    computed = _joined(whole, None)
    link = where.gpus[0].link_bytes_per_second
    if computed is None or link is None or work.prompt < 32:
        on_cpu = _cpu_prefill(work, variant, where, share=1 - work.gpu_share)
        return _joined(parts, on_cpu) if on_cpu else None
    rate = min(link, PAGEABLE_EXPERT_BYTES_PER_SECOND if work.moe else PAGEABLE_BYTES_PER_SECOND)
    moved = work.passes * work.host_streamed_bytes / rate
    return Timing(
        seconds=computed.seconds + moved,
        terms=(*computed.terms, ("copying rate", rate, "B/s"), ("host weights copied to the GPU", moved, "s")),
        bound_by="link" if moved > computed.seconds else computed.bound_by,
        case=computed.case,
        fit=computed.fit,
        split=True,
    )


def _all_on_gpu(work: Work) -> Work:
    return replace(work, gpu_bytes=work.weight_bytes, host_bytes=0.0, host_streamed_bytes=0.0, gpu_layers=work.layers)
