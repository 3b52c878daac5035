"""Seconds per token and per prompt of a checkpoint under transformers on a CPU, by the kernel of its weights.

Decoding starts some twenty operators a layer from Python, reads the weights, and converts them; a prompt is bounded by
arithmetic, and the kernels that convert weights do so once for all of it. Coefficients are in ``data/torch_cpu.toml``;
a core's rate on other processors follows that of llama.cpp's F16 products, which were fitted on many.
"""

from __future__ import annotations

from functools import cache
from math import log, log2

from planner.core.candidate import Variant
from planner.estimate.speed_model import coefficients
from planner.estimate.speed_site import Site, Timing
from planner.estimate.speed_terms import Case
from planner.estimate.speed_work import Work
from planner.estimate.torch_cpu import Kernel, common_coefficients, kernel_here, kernel_row, width_factor

_MEASURED_CLASS, _MEASURED_THREADS = "avx512", 2.0
"""Of the machine behind the coefficients."""


def decode(work: Work, variant: Variant, where: Site) -> Timing | None:
    """Seconds per generated token; ``None`` where the kernel or the memory bandwidth is not known."""
    known = _known(variant, where)
    if known is None:
        return None
    row, cores, bandwidth = known
    read = work.weight_bytes * width_factor(variant, where.hardware)
    arithmetic, stream = work.params * row.seconds_per_weight / cores, read / bandwidth
    weights = (arithmetic**2 + stream**2) ** 0.5
    # repeat_kv copies the cache out to every query head before it is read (transformers' eager and SDPA paths)
    cache_ = work.kv_bytes * work.query_group / bandwidth
    launches = work.layers * common_coefficients()["layer_seconds"]
    largest = max(weights, cache_, launches)
    names = {cache_: "KV cache reads", launches: "launch overhead"}
    return Timing(
        seconds=weights + cache_ + launches,
        terms=(
            ("weights read per token", read, "B"),
            ("bandwidth reached", bandwidth, "B/s"),
            ("cores at work", cores, ""),
            ("weights", weights, "s"),
            ("KV cache", cache_, "s"),
            ("operators started from Python", launches, "s"),
        ),
        bound_by=names.get(largest, "host bandwidth" if stream > arithmetic else "compute"),
        case=_case(where),
        fit="torch_cpu",
        interval=_interval(where),
    )


def prefill(work: Work, variant: Variant, where: Site) -> Timing | None:
    """Seconds to read the prompt in one pass; ``None`` where the kernel or the memory bandwidth is not known."""
    known = _known(variant, where)
    if known is None:
        return None
    row, cores, bandwidth = known
    rate = row.flops_per_core * cores
    matmul = 2 * (work.params - work.output_params) * work.prompt / rate
    # a kernel that converts weights does so once a pass
    convert = work.params * row.seconds_per_weight / cores + work.streamed_bytes / bandwidth
    attention = 2 * work.attention_operations / rate
    launches = work.layers * common_coefficients()["layer_seconds"]
    return Timing(
        seconds=matmul + convert + attention + launches,
        terms=(
            ("prompt", float(work.prompt), "tokens"),
            ("arithmetic rate", rate, "FLOP/s"),
            ("matrix products", matmul, "s"),
            ("reading and converting weights", convert, "s"),
            ("attention", attention, "s"),
            ("operators started from Python", launches, "s"),
        ),
        bound_by="compute",
        case=_case(where),
        fit="torch_cpu",
        interval=_interval(where),
    )


def _known(variant: Variant, where: Site) -> tuple[Kernel, float, float] | None:
    """The kernel's row, cores' worth of the measured machine, and the bandwidth that is reached."""
    found = kernel_here(variant, where.hardware)
    row = kernel_row(found.id) if found else None
    if row is None or not where.host_bandwidth:
        return None
    common_ = common_coefficients()
    cores = where.host_threads ** common_["thread_scaling"] * _core_rate(where.host_class)
    return row, cores, where.host_bandwidth * common_["bandwidth_share"]


@cache
def _core_rate(host_class: str) -> float:
    """How a core compares with those that were measured, by llama.cpp's F16 products."""
    rates = [
        coefficients("cpu_prefill", Case(backend="cpu", chip=chip, type_class="F16"))["matmul"]
        for chip in (host_class, _MEASURED_CLASS)
    ]
    return rates[0] / rates[1]


def _case(where: Site) -> Case:
    return Case(backend="cpu", chip=where.host_class, type_class="", runtime="transformers")


def _interval(where: Site) -> tuple[float, float]:
    """Ends of the 80 % interval of ln(measured / predicted): wider the further from what was measured."""
    common_ = common_coefficients()
    doublings = abs(log2(max(1, where.host_threads) / _MEASURED_THREADS))
    spread = common_["spread"] + common_["spread_per_thread_doubling"] * doublings
    spread += 0.5 * abs(log(_core_rate(where.host_class)))
    return -spread, spread
