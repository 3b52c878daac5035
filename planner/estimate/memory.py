"""Memory per device: weights, KV cache, compute buffers and what a runtime adds, never summed across devices.

For GGUF the first three are what llama.cpp itself reports (no-alloc load); the overhead is kept apart.
"""

from __future__ import annotations

from bisect import bisect_right
from functools import lru_cache
from itertools import accumulate

from planner.core.candidate import Placement, Variant
from planner.core.estimates import FORMULA, DeviceMemory, MemoryEstimate, Prediction
from planner.core.hardware import Gpu, HardwareProfile
from planner.core.model import ModelSpec, shape_twin
from planner.core.units import MIB, format_bytes
from planner.estimate import kv_cache, served_memory, weights
from planner.estimate.compute_buffers import compute_bytes

CUDA_CONTEXT_BYTES = 450 * MIB
"""CUDA context and kernels on an RTX 4090, https://github.com/ggml-org/llama.cpp/pull/15860 (2025-09)."""
CUBLAS_WORKSPACE_BYTES = 4 * MIB
"""Per stream, https://docs.nvidia.com/cuda/cublas/#cublassetworkspace."""
HOPPER_CONTEXT_BYTES = 600 * MIB
"""What the driver counts for a process beside llama.cpp's buffers on an H100 80GB: 600-603 MiB in 14 runs of quantised
models wholly on the GPU (llama-cpp-python 0.3.36, CUDA 13.0, driver 580, 2026-11-23; benchmarks/gpu_check.py)."""
HOPPER_CUBLAS_BYTES = 100 * MIB
"""What cuBLAS adds to that once it multiplies: 96-104 MiB with F16 weights and with experts (the same runs)."""
RUNTIME_BYTES = 41 * MIB
"""Resident set of Python with llama_cpp and numpy imported, before a model: 41.1 MiB with llama-cpp-python 0.3.36 and
Python 3.11 on Linux x86-64 (2026-11-23)."""
LIBRARY_BYTES = 6 * MIB
"""What a run's resident set exceeds llama.cpp's own buffers by: 5-6 MiB with flash attention, up to 9 without
(llama-cpp-python 0.3.36, Linux x86-64, 2026-11)."""
_SOURCE = "graph allocator, KV cache and tensor padding of llama.cpp as in llama-cpp-python 0.3.36"


def gpu_shares(placement: Placement, gpus: tuple[Gpu, ...]) -> tuple[float, ...]:
    """How llama.cpp splits the offloaded layers between ``gpus``: as told, else in proportion to their free memory."""
    if len(gpus) < 2:
        return (1.0,) * len(gpus)
    if placement.tensor_split and any(placement.tensor_split[: len(gpus)]):
        return (placement.tensor_split + (0.0,) * len(gpus))[: len(gpus)]
    return tuple(float(gpu.usable_bytes() or 1) for gpu in gpus)


def layer_devices(model: ModelSpec, placement: Placement, shares: tuple[float, ...]) -> tuple[int, ...]:
    """Device of each layer and, last, of the output; ``len(shares)`` is the host.

    As ``llama_model_base::load_tensors``: the last ``gpu_layers`` of ``offloadable_count`` go to the GPUs, split in
    proportion to their ``shares``. Blocks between the last layer and the output have a place there and take nothing.
    """
    count = model.offloadable_count
    found = _layer_devices(count, min(placement.gpu_layers, count), shares)
    return found if count == model.n_layer + 1 else (*found[: model.n_layer], found[-1])


@lru_cache(maxsize=4096)
def _layer_devices(count: int, gpu_layers: int, given: tuple[float, ...]) -> tuple[int, ...]:
    host = len(given)
    if not host or gpu_layers <= 0:
        return (host,) * count
    start = count - gpu_layers
    total = sum(given) or 1
    shares = [part / total for part in accumulate(given)]
    return (host,) * start + tuple(min(bisect_right(shares, i / gpu_layers), host - 1) for i in range(gpu_layers))


def used_gpus(placement: Placement, hardware: HardwareProfile) -> tuple[Gpu, ...]:
    """The GPUs that ``placement`` uses, in the profile's order."""
    if not hardware.gpus or (placement.gpu_layers <= 0 and placement.gpu_count <= 0):
        return ()
    return hardware.gpus[: max(1, placement.gpu_count)]


def memory(model: ModelSpec, variant: Variant, placement: Placement, hardware: HardwareProfile) -> MemoryEstimate:
    """Memory of ``variant`` of ``model`` on each device of ``hardware`` that ``placement`` uses, and on the host.

    The host's overhead is the process itself, the logits of one token per sequence, and, without a GPU, the interleaved
    copy of mapped weights (with one they stay in the driver's pinned memory and are not interleaved).

    Raises:
        InputError: the type or the KV type cannot hold a row of this model (``row-not-divisible``).
    """
    gpus = used_gpus(placement, hardware)
    if variant.format != "gguf":
        return served_memory.memory(model, variant, placement, hardware, gpus)
    model = shape_twin(model)
    devices = layer_devices(model, placement, gpu_shares(placement, gpus))
    compute = compute_bytes(model, variant, placement, devices, len(gpus))
    experts = weights.expert_layers(model, placement)
    on_gpus = tuple(
        DeviceMemory(
            name=gpu.name,
            weights_bytes=device_weights(model, variant, devices, index, on_gpu=True, expert_layers=experts),
            kv_cache_bytes=_device_cache(model, placement, devices, index, on_gpu=True),
            compute_bytes=compute[index],
            overhead_bytes=overhead_bytes(gpu, uses_cublas(model, variant)),
            capacity_bytes=gpu.usable_bytes(),
        )
        for index, gpu in enumerate(gpus)
    )
    host = len(gpus)
    copied = 0 if host else weights.repacked_bytes(model, variant, model.n_layer, True, hardware.cpu.simd)
    mapped = device_weights(model, variant, devices, host, on_gpu=False, expert_layers=experts)
    in_ram = DeviceMemory(
        name="host",
        weights_bytes=mapped,
        kv_cache_bytes=_device_cache(model, placement, devices, host, on_gpu=False),
        compute_bytes=compute[host],
        overhead_bytes=RUNTIME_BYTES + 4 * model.n_vocab * placement.sequences + copied,
        capacity_bytes=host_capacity_bytes(hardware, gpus, on_gpus),
        reclaimable_bytes=min(copied, mapped),
    )
    return MemoryEstimate(devices=on_gpus, host=in_ram, notes=_notes(gpus, copied))


def host_capacity_bytes(
    hardware: HardwareProfile, gpus: tuple[Gpu, ...], on_gpus: tuple[DeviceMemory, ...]
) -> int | None:
    """RAM that is left for the host: what GPUs with unified memory take of it is gone."""
    usable = hardware.memory.usable_bytes()
    if usable is None:
        return None
    taken = sum(device.total_bytes for gpu, device in zip(gpus, on_gpus, strict=True) if gpu.unified_memory)
    return max(0, usable - taken)


def device_weights(
    model: ModelSpec, variant: Variant, devices: tuple[int, ...], device: int, *, on_gpu: bool, expert_layers: int = 0
) -> int:
    """Bytes of weights on ``device``: its layers, the output, the frequencies, and on the host the token table.

    Routed experts of the first ``expert_layers`` layers are on the host.
    """
    sums, expert_sums = weights.layer_sums(model, variant, on_gpu)
    tables, shared = weights.global_bytes(model, variant, on_gpu)
    start, end = layer_range(devices, device)
    total = sums[end] - sums[start]
    if start < min(end, model.n_layer):
        total += shared
    if on_gpu:
        return total - (expert_sums[max(start, min(end, expert_layers))] - expert_sums[start])
    return total + tables + expert_sums[max(end, expert_layers)] - expert_sums[min(end, model.n_layer)]


def layer_range(devices: tuple[int, ...], device: int) -> tuple[int, int]:
    """First layer on ``device`` and the one after its last: llama.cpp gives each device neighbours."""
    count = devices.count(device)
    start = devices.index(device) if count else 0
    return start, start + count


def _device_cache(
    model: ModelSpec, placement: Placement, devices: tuple[int, ...], device: int, *, on_gpu: bool
) -> int:
    start, end = layer_range(devices, device)
    sums = kv_cache.layer_sums(model, placement, on_gpu=on_gpu)
    return sums[min(end, model.n_layer)] - sums[min(start, model.n_layer)]


def uses_cublas(model: ModelSpec, variant: Variant) -> bool:
    """Whether llama.cpp's CUDA back end calls cuBLAS: for unquantised weights, and beside the experts of a mixture."""
    return model.mixture is not None or variant.type in ("F32", "F16", "BF16")


def overhead_bytes(gpu: Gpu, cublas: bool = False) -> int:
    """What the driver and its libraries take on a GPU beside llama.cpp's buffers; 0 where no source says."""
    if gpu.backend != "cuda":
        return 0
    if gpu.compute_capability is not None and float(gpu.compute_capability) >= 9.0:
        return HOPPER_CONTEXT_BYTES + (HOPPER_CUBLAS_BYTES if cublas else 0)
    return CUDA_CONTEXT_BYTES + CUBLAS_WORKSPACE_BYTES


def _notes(gpus: tuple[Gpu, ...], copied: int) -> tuple[str, ...]:
    backends = sorted({gpu.backend for gpu in gpus if gpu.backend != "cuda"})
    notes = [f"what the {backend} runtime takes besides these buffers is not known" for backend in backends]
    if copied:
        notes.append(
            f"llama.cpp interleaves {format_bytes(copied)} of the weights for this CPU; "
            "the file's own pages of them stay only while there is room"
        )
    return tuple(notes)


def peak_memory_bytes(
    model: ModelSpec, variant: Variant, placement: Placement, hardware: HardwareProfile
) -> Prediction | None:
    """Most memory a run takes: on the first GPU where one is used, else the resident set without the bare process."""
    made = memory(model, variant, placement, hardware)
    if made.devices:
        return _gpu_peak(made.devices[0])
    if variant.format != "gguf":
        return served_memory.cpu_peak_memory_bytes(model, variant, placement, hardware)
    return cpu_peak_memory_bytes(model, variant, placement, hardware)


def _gpu_peak(device: DeviceMemory) -> Prediction:
    buffers = device.total_bytes - device.overhead_bytes
    # the context takes a quarter to twice as much on other cards; temporary pools come on top
    return Prediction(
        value=float(device.total_bytes),
        low=buffers + 0.25 * device.overhead_bytes,
        high=1.02 * buffers + 2.0 * device.overhead_bytes,
        basis=FORMULA,
        source=_SOURCE,
        terms=_terms(device),
    )


def cpu_peak_memory_bytes(
    model: ModelSpec, variant: Variant, placement: Placement, hardware: HardwareProfile
) -> Prediction:
    """Peak resident set that a run on the CPU adds to its process.

    That is the mapped file, its interleaved copy, the cache, the buffers, and what the libraries allocate on the way.

    The bare process (:data:`RUNTIME_BYTES`) is left out, as it depends on the program around llama.cpp: a server in
    C++ takes a few MiB, Python with numpy forty. The interval's low end leaves out what the kernel need not keep: pages
    of the mapping that were interleaved, the unread rows of the token table, and compute and cache pages that a short
    run never touches.
    """
    made = memory(model, variant, placement, hardware).host
    copy = weights.repacked_bytes(model, variant, model.n_layer, True, hardware.cpu.simd)
    tables = weights.global_bytes(model, variant)[0] if not model.tied_embeddings else 0
    idle = copy + tables + 0.9 * made.compute_bytes + 0.5 * made.kv_cache_bytes
    total = made.total_bytes - RUNTIME_BYTES + LIBRARY_BYTES
    return Prediction(
        value=float(total),
        low=max(total - idle, 0.3 * total),
        high=1.05 * total + 2 * LIBRARY_BYTES,
        basis=FORMULA,
        source=f"{_SOURCE}; mapped file and interleaved copy both resident",
        terms=_terms(made),
    )


def numpy_logits_bytes(model: ModelSpec, placement: Placement, *, logits_all: bool = False) -> int:
    """What ``llama_cpp.Llama`` reserves besides: a float per vocabulary entry and row of the batch (or context)."""
    rows = placement.context if logits_all else min(placement.batch, placement.context)
    return 4 * model.n_vocab * rows


def _terms(device: DeviceMemory) -> tuple[tuple[str, float, str], ...]:
    return (
        ("weights", float(device.weights_bytes), "B"),
        ("KV cache", float(device.kv_cache_bytes), "B"),
        ("compute buffer", float(device.compute_bytes), "B"),
        ("outside the buffers", float(device.overhead_bytes), "B"),
    )
