"""Kernels as declared data (``data/kernels.toml``): which one a variant gets on a machine, and which row forbids it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cache, lru_cache

from planner.core.candidate import KernelUse, Rejection, Variant
from planner.core.data import read_rows
from planner.core.hardware import Gpu, HardwareProfile

TABLE = "kernels.toml"
CPU = "cpu"
"""The vendor of a row for machines, or parts of them, without a GPU."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Runtime:
    """A row of the runtime table: which file layouts it reads."""

    name: str
    title: str
    formats: tuple[str, ...]
    version: str
    source: str
    date: str
    without_gpu: str | None = None
    """The runtime that runs the same files on a machine without a GPU, where this one does not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitLimit:
    """A row of the tensor-parallel table: ``divides`` names what the number of GPUs must divide."""

    id: str
    runtime: str
    divides: str
    text: str
    version: str
    source: str
    date: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """A row of the kernel table; the conditions are explained in its file's head."""

    id: str
    runtime: str
    kernel: str
    methods: tuple[str, ...]
    text: str
    speed: str
    version: str
    source: str
    date: str
    vendor: str | None = None
    backend: str | None = None
    min_capability: str | None = None
    only_capability: str | None = None
    architecture: str | None = None
    os: str | None = None
    simd: tuple[str, ...] = ()
    types: tuple[str, ...] = ()
    group_sizes: tuple[int, ...] = ()
    act_order: bool = True
    """False: it takes no act-order."""
    act_order_sharded: bool = True
    symmetric: bool = False
    in_multiple: int = 1
    out_multiple: int = 1
    group_divides_shard: bool = False
    compiled: bool = False
    """Its runtime compiles it with nvcc when it is first used."""
    predicted: bool = True
    on_request: bool = False
    """It is proposed only where its method was asked for by name."""
    fix: str = ""
    arguments: tuple[tuple[str, str], ...] = ()

    def used(self) -> KernelUse:
        """The row as a candidate carries it."""
        return KernelUse(
            id=self.id,
            name=self.kernel,
            speed=self.speed,
            text=self.text,
            fix=self.fix,
            version=self.version,
            source=self.source,
            arguments=self.arguments,
        )


@dataclass(frozen=True, slots=True)
class Matrix:
    """A matrix product as a runtime carries it out: fused projections count as one.

    ``split`` says what tensor parallelism divides: ``inputs`` (output projections) or ``outputs``.
    """

    name: str
    inputs: int
    outputs: int
    split: str

    def shard(self, gpus: int) -> tuple[int, int]:
        """Inputs and outputs on each of ``gpus`` devices."""
        if self.split == "inputs":
            return self.inputs // gpus, self.outputs
        return self.inputs, self.outputs // gpus


@dataclass(frozen=True, slots=True)
class Broken:
    """A row that forbids a variant, and the first of its conditions that does not hold."""

    row: Kernel
    reason: str
    distance: tuple[bool, int]
    """Whether it is for another kind of device, and how many of its conditions do not hold."""


@cache
def runtimes() -> tuple[Runtime, ...]:
    """All runtimes, in the table's order."""
    return read_rows(Runtime, TABLE, "runtime")


@cache
def kernels() -> tuple[Kernel, ...]:
    """All kernels; those of one runtime and method in the order in which it tries them."""
    return read_rows(Kernel, TABLE, "kernel")


def row_of(kernel: KernelUse) -> Kernel | None:
    """The row that a candidate's kernel came from; ``None``: this table has it no more."""
    return next((row for row in kernels() if row.id == kernel.id), None)


@cache
def split_limits() -> tuple[SplitLimit, ...]:
    """Limits of tensor parallelism that no single kernel sets."""
    return read_rows(SplitLimit, TABLE, "tensor_parallel")


@cache
def kernels_of(runtime: str, method: str) -> tuple[Kernel, ...]:
    """The kernels that a runtime has for a method, in the order in which it tries them."""
    return tuple(row for row in kernels() if row.runtime == runtime and method in row.methods)


def fitting(variant: Variant, hardware: HardwareProfile) -> Variant:
    """The variant as it suits the hardware.

    Under the runtime that runs its files there: vLLM's are run by transformers where there is no GPU. bitsandbytes'
    4-bit layers multiply in the type that the hardware is fast in, where nobody asked for another.
    """
    if variant.is_4bit_bitsandbytes and variant.compute_dtype is None:
        variant = replace(variant, compute_dtype=multiplying_dtype(hardware))
    if hardware.gpus:
        return variant
    row = next((row for row in runtimes() if row.name == variant.runtime), None)
    return variant if row is None or row.without_gpu is None else replace(variant, runtime=row.without_gpu)


BFLOAT16_CAPABILITY = (8, 0)
"""https://docs.nvidia.com/cuda/cuda-c-programming-guide/#arithmetic-instructions: bfloat16 from Ampere on."""


def multiplying_dtype(hardware: HardwareProfile) -> str:
    """torch's name of the 16-bit type that the first GPU, or without one the CPU, is to multiply in.

    bfloat16 from compute capability 8.0 and on AMD, float16 below and where it is not known. bfloat16 on a CPU, with
    the instructions for it or without: in float32, NF4 on a Xeon without them read prompts 2.5 times as fast and
    decoded half as fast (2 cores, 264 million weights, 2026-11-27).
    """
    if not hardware.gpus:
        return "bfloat16"
    gpu = hardware.gpus[0]
    if gpu.backend == "rocm":
        return "bfloat16"
    known = capability(gpu.compute_capability) if gpu.compute_capability else (0, 0)
    return "bfloat16" if known >= BFLOAT16_CAPABILITY else "float16"


def unasked(variant: Variant, kernel: KernelUse, asked: tuple[str, ...] | None) -> Rejection | None:
    """Why a variant is not proposed although ``kernel`` would run it: better is at hand, and nobody named the method.

    Args:
        asked: the methods that a person named; ``None``: none.
    """
    row = row_of(kernel)
    if row is None or not row.on_request or variant.method in (asked or ()):
        return None
    reason = f"{row.text}; {row.fix}; `--methods {variant.method}` takes it all the same"
    return _rejection(variant, row, reason, rule=row.id)


@lru_cache(maxsize=64)
def takes_act_order(runtime: str, method: str, type_: str) -> bool:
    """Whether the kernels of a runtime for a type read weights in activation order; the first that has the type rules.

    vLLM refuses act-order since it dropped the group index (0.33), so nothing should be quantized with it for vLLM.
    """
    having = [row for row in kernels_of(runtime, method) if not row.types or type_ in row.types]
    return any(row.act_order for row in having)


def reading(variant: Variant) -> KernelUse | None:
    """The first kernel of the variant's runtime that reads such weights, whatever the machine: what must be said to it.

    ``None`` for GGUF files, where the device decides.
    """
    if variant.format == "gguf":
        return None
    rows = kernels_of(variant.runtime, variant.method)
    return next((row.used() for row in rows if not _weight_reasons(row, variant, 1)), None)


def validate(
    variant: Variant,
    matrices: Iterable[Matrix],
    hardware: HardwareProfile,
    *,
    gpus_used: bool = True,
    tensor_parallel: int = 1,
    compiler: bool = True,
) -> KernelUse | Rejection:
    """The kernel that ``variant`` gets on ``hardware``, or the row that forbids it.

    Args:
        matrices: the quantized matrix products of the model; their shapes decide.
        gpus_used: False: all layers on the CPU, whatever GPUs there are.
        tensor_parallel: GPUs that each matrix is split over.
        compiler: False: there is no nvcc, so that no kernel is compiled at its first use.
    """
    refusal = _format_refusal(variant)
    if refusal is not None:
        return refusal
    rows = [row for row in kernels_of(variant.runtime, variant.method) if compiler or not row.compiled]
    shapes = tuple(matrices)
    machine = hardware.gpus if gpus_used else ()
    broken = [_broken(row, variant, shapes, hardware, machine, tensor_parallel) for row in rows]
    for row, why in zip(rows, broken, strict=True):
        if why is None:
            return row.used() if row.predicted else _unpredicted(variant, row)
    near = [b for b in reversed(broken) if b is not None]  # of equals the least demanding, which is tried last
    return _rejected(variant, min(near, key=lambda b: b.distance, default=None))


def _format_refusal(variant: Variant) -> Rejection | None:
    """Why the runtime cannot read the variant's file layout."""
    row = next((row for row in runtimes() if row.name == variant.runtime), None)
    if row is None or variant.format in row.formats:
        return None
    reason = f"{row.title} does not read {variant.format}; it reads {', '.join(row.formats)}"
    return _rejection(variant, row, reason, rule=f"{row.name}-formats")


def _unpredicted(variant: Variant, row: Kernel) -> Rejection:
    reason = f"{row.text}; qplan has no estimate for it, {row.fix or 'so it is not recommended'}"
    return _rejection(variant, row, reason, rule=row.id)


def _rejected(variant: Variant, nearest: Broken | None) -> Rejection:
    if nearest is None:
        reason = f"no kernel of {variant.runtime} for {variant.method} is known"
        return Rejection(method=variant.method, type=variant.type, reason=reason, rule="no-kernel")
    return _rejection(variant, nearest.row, f"{nearest.row.text}; {nearest.reason}", rule=nearest.row.id)


def _rejection(variant: Variant, row: Kernel | Runtime | SplitLimit, reason: str, rule: str) -> Rejection:
    source = f"{row.source} ({row.version}, {row.date})"
    return Rejection(method=variant.method, type=variant.type, reason=reason, rule=rule, source=source)


def _broken(
    row: Kernel,
    variant: Variant,
    matrices: tuple[Matrix, ...],
    hardware: HardwareProfile,
    gpus: tuple[Gpu, ...],
    tensor_parallel: int,
) -> Broken | None:
    """The conditions of a row that do not hold: the machine's first, then the weights', then the split's."""
    reasons = [
        *_machine_reasons(row, hardware, gpus),
        *_weight_reasons(row, variant, tensor_parallel),
        *_shape_reasons(row, variant, matrices, tensor_parallel),
    ]
    return Broken(row, reasons[0], (_for_another_device(row, gpus), len(reasons))) if reasons else None


def _for_another_device(row: Kernel, gpus: tuple[Gpu, ...]) -> bool:
    if row.vendor is None:
        return False
    return row.vendor not in ({gpu.vendor for gpu in gpus} or {CPU})


def _machine_reasons(row: Kernel, hardware: HardwareProfile, gpus: tuple[Gpu, ...]) -> list[str]:
    if row.os is not None and hardware.os != row.os:
        return [f"this is {hardware.os}"]
    if row.vendor == CPU:
        return _cpu_reasons(row, hardware, gpus)
    if row.vendor is None and row.backend is None:
        return []
    if not gpus:
        return ["this machine has no GPU, or may not use it"]
    asked = gpus[:1] if row.backend is not None else gpus  # llama.cpp drives each GPU with its own back end
    return [reason for gpu in asked if (reason := _gpu_reason(row, gpu))][:1]


def _cpu_reasons(row: Kernel, hardware: HardwareProfile, gpus: tuple[Gpu, ...]) -> list[str]:
    cpu = hardware.cpu
    if gpus:
        return ["the GPU is used"]
    if row.architecture is not None and cpu.architecture != row.architecture:
        return [f"this CPU is {cpu.architecture}"]
    if row.simd and cpu.simd and not set(row.simd) & set(cpu.simd):
        return [f"{cpu.model} has none of {', '.join(row.simd)}"]
    return []


def _gpu_reason(row: Kernel, gpu: Gpu) -> str:
    """Why a GPU does not satisfy a row; empty where it does or its capability is unknown."""
    if row.vendor is not None and gpu.vendor != row.vendor:
        return f"{gpu.name} is of vendor {gpu.vendor}"
    if row.backend is not None and gpu.backend != row.backend:
        return f"{gpu.name} is driven by {gpu.backend}"
    if gpu.vendor != "nvidia" or gpu.compute_capability is None:
        return ""
    has = capability(gpu.compute_capability)
    lacking = row.min_capability is not None and has < capability(row.min_capability)
    other = row.only_capability is not None and has != capability(row.only_capability)
    return f"{gpu.name} has compute capability {gpu.compute_capability}" if lacking or other else ""


def capability(text: str) -> tuple[int, int]:
    """A compute capability as numbers that compare: ``8.9`` → (8, 9)."""
    major, _, minor = text.partition(".")
    return int(major), int(minor or 0)


def _weight_reasons(row: Kernel, variant: Variant, tensor_parallel: int) -> list[str]:
    reasons = []
    if row.types and not any(fnmatchcase(variant.type, pattern) for pattern in row.types):
        reasons.append(f"{variant.type} is none of its types ({', '.join(row.types)})")
    if row.group_sizes and variant.group_size is not None and variant.group_size not in row.group_sizes:
        reasons.append(f"group size {variant.group_size} is none of {', '.join(map(str, row.group_sizes))}")
    if variant.method == "gptq" and row.symmetric and not variant.symmetric:
        reasons.append("the weights have zero points")
    if variant.act_order and not row.act_order:
        reasons.append("the weights are in activation order")
    if variant.act_order and tensor_parallel > 1 and not row.act_order_sharded:
        reasons.append(f"activation order over {tensor_parallel} GPUs")
    return reasons


def _shape_reasons(row: Kernel, variant: Variant, matrices: tuple[Matrix, ...], gpus: int) -> list[str]:
    """The first matrix whose share of a GPU the kernel does not take."""
    group = variant.group_size if variant.group_size and variant.group_size > 0 else 1
    for matrix in matrices:
        whole = matrix.inputs if matrix.split == "inputs" else matrix.outputs
        if whole % gpus:
            return [f"{matrix.name} has {whole} {matrix.split}, no multiple of {gpus} GPUs"]
        inputs, outputs = matrix.shard(gpus)
        share = "" if gpus == 1 else f" on each of {gpus} GPUs"
        if row.group_divides_shard and inputs % group:
            return [f"{matrix.name} has {inputs} inputs{share}, no multiple of group size {group}"]
        if inputs % row.in_multiple:
            return [f"{matrix.name} has {inputs} inputs{share}, no multiple of {row.in_multiple}"]
        if outputs % row.out_multiple:
            return [f"{matrix.name} has {outputs} outputs{share}, no multiple of {row.out_multiple}"]
    return []


def split_refusal(variant: Variant, heads: int, gpus: int) -> Rejection | None:
    """Why a model of so many attention heads cannot be split over so many GPUs, naming the row."""
    for row in split_limits():
        if row.runtime == variant.runtime and row.divides == "heads" and heads % gpus:
            reason = f"{row.text}; the model has {heads} heads for {gpus} GPUs"
            return _rejection(variant, row, reason, rule=row.id)
    return None
