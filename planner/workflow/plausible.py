"""Whether a submission can be true: named complaints with the numbers. It cannot tell whether it is."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta

from planner.core import device_table
from planner.core.candidate import Placement, Variant
from planner.core.measurement import (
    DECODE,
    FILE_BYTES,
    KL_DIVERGENCE,
    PEAK_MEMORY,
    PERPLEXITY_RATIO,
    PREFILL,
    QUANTITIES,
)
from planner.core.model import ModelSpec, shape_sha256
from planner.core.submission import FORMAT, KIND, Complaint, SharedHardware, SharedMeasurement, Submission
from planner.core.units import GIB, MIB, format_bytes, format_count, format_rate
from planner.core.workload import KV_TYPES

_FIRST_DAY = date(2023, 3, 10)
"""First commit of llama.cpp, https://github.com/ggml-org/llama.cpp/commit/26c084662903ddaca19bef982831bfb0856e8257."""
_CPU_CACHE_BYTES = 1152 * MIB
"""Weights below this may stay in a processor's caches: the L3 of an EPYC 9684X (AMD's product page), the largest."""
_GPU_CACHE_BYTES = 256 * MIB
"""The same of a GPU: the Infinity Cache of an MI300X (AMD's data sheet)."""
_TOLERANCE = 1.1
"""A measured or published bandwidth may be this much too low."""
_LEAST_RESIDENT = 0.9
"""Share of its weights that a running model has touched at least."""
_FILE_TOLERANCE = 0.1
_FLOPS_PER_FP16 = 4.0
"""Most operations for one dense FP16 operation that a GPU's units do in a narrower type."""
_LEAST_PERPLEXITY_RATIO = 0.9
"""A quantized model that is better than its original by more was compared with another."""
_OTHER_TYPES = {
    "awq": ("4bit",),
    "gptq": ("2bit", "3bit", "4bit", "8bit"),
    "bitsandbytes": ("nf4", "fp4", "int8"),
    "none": ("f16", "bf16", "f32"),
}
_LONGEST_NAME = 200
_MIXTURE = re.compile(r"\d{1,2}\.\d\dbpw")
"""Type of a mixture that was made to a size."""


@dataclass(frozen=True, slots=True)
class _Case:
    """A row with what is known about it."""

    where: str
    row: SharedMeasurement
    hardware: SharedHardware
    model: ModelSpec | None

    def complaint(self, code: str, what: str, numbers: str) -> Complaint:
        return Complaint(where=self.where, code=code, what=what, numbers=numbers)

    @property
    def variant(self) -> Variant:
        r = self.row
        format_ = "gguf" if r.method == "gguf" else "safetensors"
        return Variant(method=r.method, format=format_, runtime="llama.cpp", type=r.type, imatrix=r.imatrix)


def complaints(submission: Submission, today: date | None = None) -> tuple[Complaint, ...]:
    """Everything that cannot be; empty where all of it might."""
    day = today or datetime.now(UTC).date()
    found = list(_document(submission))
    for number, row in enumerate(submission.measurements):
        case = _Case(f"measurements[{number}]", row, submission.hardware, _known(row))
        broken = [*_names(case), *_numbers(case)]
        found += [*broken, *_date(case, day)]
        if not broken:
            found += [*_speed(case), *_memory(case), *_file(case)]
    return tuple(found)


def _document(submission: Submission) -> Iterator[Complaint]:
    made = submission.format_version
    if made.split(".")[0] != FORMAT.split(".")[0]:
        yield Complaint(
            where="format_version", code="format", what="of another format", numbers=f"{made}, not {FORMAT}"
        )
    if submission.kind != KIND:
        yield Complaint(where="kind", code="kind", what="no measurements of qplan", numbers=f"{submission.kind!r}")
    if not submission.measurements:
        yield Complaint(where="measurements", code="empty", what="nothing was measured", numbers="0 rows")
    machine = submission.hardware
    for where, text in (("cpu", machine.cpu), *((f"gpus[{n}]", g.name) for n, g in enumerate(machine.gpus))):
        if _is_path(text) or not text.strip():
            yield Complaint(where=f"hardware.{where}", code="name", what="no name of a device", numbers=repr(text[:60]))


def _is_path(text: str) -> bool:
    return len(text) > _LONGEST_NAME or "\\" in text or text.startswith(("/", "~", "."))


def _known(row: SharedMeasurement) -> ModelSpec | None:
    """The catalog's model, where the row is of its very shape."""
    from planner.models import catalog

    found = catalog.lookup(row.model) if not _is_path(row.model) else None
    return found if found is not None and shape_sha256(found) == row.model_sha256 else None


def _names(case: _Case) -> Iterator[Complaint]:
    row = case.row
    if row.quantity not in QUANTITIES:
        yield case.complaint("quantity", f"{row.quantity!r} is no quantity", f"one of {', '.join(QUANTITIES)}")
    if _is_path(row.model) or not row.model.strip():
        yield case.complaint("model-name", "the model's name is empty or a path", repr(row.model[:60]))
    if len(row.model_sha256) != 64 or set(row.model_sha256) - set("0123456789abcdef"):
        yield case.complaint("model-shape", "no fingerprint of a model's shape", repr(row.model_sha256[:60]))
    known = _types(row.method)
    if known is None:
        yield case.complaint("method", f"{row.method!r} is no method", f"one of gguf, {', '.join(_OTHER_TYPES)}")
    elif row.type not in known and not _is_mixture(row):
        yield case.complaint("type", f"{row.type!r} is no type of {row.method}", f"one of {', '.join(known)}")
    if row.conditions.kv_type not in KV_TYPES:
        yield case.complaint("kv-type", f"{row.conditions.kv_type!r} is no KV cache type", ", ".join(KV_TYPES))
    if row.conditions.gpu_layers > 0 and not case.hardware.gpus:
        yield case.complaint(
            "no-gpu", "layers on a GPU that is not there", f"{row.conditions.gpu_layers} layers, 0 GPUs"
        )


def _is_mixture(row: SharedMeasurement) -> bool:
    return row.method == "gguf" and _MIXTURE.fullmatch(row.type) is not None


def _types(method: str) -> tuple[str, ...] | None:
    if method == "gguf":
        from planner.methods.gguf_mix import file_types

        return tuple(file_types())
    return _OTHER_TYPES.get(method)


def _numbers(case: _Case) -> Iterator[Complaint]:
    row = case.row
    values = (row.value, row.low, row.high, *row.samples)
    least = 0.0 if row.quantity != KL_DIVERGENCE else -math.inf
    if not all(math.isfinite(value) for value in values) or row.value < 0 or (row.value <= least):
        yield case.complaint("value", "no possible value", f"{row.value:g}, from {row.low:g} to {row.high:g}")
        return
    if not row.low <= row.value <= row.high:
        yield case.complaint(
            "range", "the value lies outside of its own range", f"{row.value:g}: {row.low:g}-{row.high:g}"
        )
    if row.samples and not min(row.samples) <= row.value <= max(row.samples):
        numbers = f"{row.value:g}: {min(row.samples):g}-{max(row.samples):g}"
        yield case.complaint("samples", "the value lies outside of its samples", numbers)
    if row.quantity == PERPLEXITY_RATIO and row.value < _LEAST_PERPLEXITY_RATIO:
        numbers = f"{row.value:g}, below {_LEAST_PERPLEXITY_RATIO:g}"
        yield case.complaint("quality", "quantized, it predicts far better than its original", numbers)


def _date(case: _Case, today: date) -> Iterator[Complaint]:
    try:
        day = date.fromisoformat(case.row.date)
    except ValueError:
        yield case.complaint("date", "no date", f"{case.row.date[:40]!r}, as in {today.isoformat()}")
        return
    if day > today + timedelta(days=1):  # a clock in another time zone
        yield case.complaint("future", "measured in the future", f"{day}, today is {today}")
    if day < _FIRST_DAY:
        yield case.complaint("too-early", "measured before llama.cpp existed", f"{day}, before {_FIRST_DAY}")


def _speed(case: _Case) -> Iterator[Complaint]:
    row = case.row
    if row.quantity == DECODE:
        yield from _decode(case)
    elif row.quantity == PREFILL and row.conditions.gpu_layers and len(case.hardware.gpus) == 1:
        device = _device(case.hardware, 0)
        weights = float(case.model.active_parameter_count) if case.model else row.weights_bytes
        most = (device.fp16_flops_per_second or 0) * _FLOPS_PER_FP16 if device else 0
        if weights and most and 2 * weights * row.value > most:
            rate, limit = format_rate(row.value), format_rate(most / 2 / weights)
            numbers = f"{rate} tokens/s of {format_count(weights)} weights, at most {limit}"
            yield case.complaint("too-fast", "reads a prompt faster than the GPU can multiply", numbers)


def _decode(case: _Case) -> Iterator[Complaint]:
    row = case.row
    gpu, host = _weights(case)
    if row.weights_bytes and case.model is not None and abs(row.weights_bytes / (gpu + host) - 1) > _FILE_TOLERANCE:
        numbers = f"{format_bytes(row.weights_bytes)} given, {format_bytes(gpu + host)} by the model's shape"
        yield case.complaint("weights", "not what a token reads of this model", numbers)
    for read, rate, cache, name in (
        (gpu, _gpu_bandwidth(case.hardware), _GPU_CACHE_BYTES, "GPU"),
        (host, _host_bandwidth(case.hardware), _CPU_CACHE_BYTES, "processor"),
    ):
        if read > cache and rate is not None and row.value * read > _TOLERANCE * rate:
            numbers = (
                f"{format_rate(row.value)} tokens/s × {read / 1e9:.2f} GB = {row.value * read / 1e9:,.0f} GB/s; "
                f"the memory gives {rate / 1e9:,.0f} GB/s, {format_rate(rate / read)} tokens/s"
            )
            yield case.complaint("too-fast", f"decodes faster than the {name}'s memory can be read", numbers)


def _weights(case: _Case) -> tuple[float, float]:
    """Bytes that a token reads on GPUs and host: by the model's shape where it is known, else as given."""
    row, layers = case.row, case.row.conditions.gpu_layers
    if case.model is not None and row.method == "gguf" and not _is_mixture(row):
        from planner.estimate.weights import bytes_read_per_token

        place = Placement(
            context=max(1, row.conditions.context),
            gpu_layers=layers,
            gpu_count=len(case.hardware.gpus) if layers else 0,
            cpu_expert_layers=row.conditions.cpu_expert_layers,
        )
        gpu, host = bytes_read_per_token(case.model, case.variant, place)
        return float(gpu), float(host)
    given = row.weights_bytes or 0.0
    if row.quantity != DECODE:
        return 0.0, 0.0
    return (given, 0.0) if layers and case.hardware.gpus else (0.0, given)


def _device(hardware: SharedHardware, number: int) -> device_table.DeviceRow | None:
    gpu = hardware.gpus[number]
    size = gpu.memory_gib * GIB if gpu.memory_gib else None
    return device_table.find(gpu.device or gpu.name, memory_bytes=size)


def _gpu_bandwidth(hardware: SharedHardware) -> float | None:
    """Of all GPUs together, as tensors can be split over them."""
    rows = [_device(hardware, number) for number in range(len(hardware.gpus))]
    rates = [row.bandwidth_bytes_per_second for row in rows if row is not None and row.bandwidth_bytes_per_second]
    return sum(rates) if rates and len(rates) == len(hardware.gpus) else None


def _host_bandwidth(hardware: SharedHardware) -> float | None:
    row = device_table.find(hardware.cpu)
    published = row.bandwidth_bytes_per_second if row is not None else None
    known = [rate for rate in (hardware.bandwidth_bytes_per_second, published) if rate]
    return max(known, default=None)


def _memory(case: _Case) -> Iterator[Complaint]:
    if case.row.quantity != PEAK_MEMORY:
        return
    gpu, host = _weights(case)
    count = max(1, len(case.hardware.gpus))
    least = gpu / count if gpu else host
    ram = (case.hardware.ram_gib or 0) * GIB
    if least and case.row.value < _LEAST_RESIDENT * least and (gpu or not ram or least < ram):
        numbers = f"{format_bytes(case.row.value, 2)} of {format_bytes(least, 2)} of weights that a token reads"
        yield case.complaint("too-small", "less memory than the weights take", numbers)


def _file(case: _Case) -> Iterator[Complaint]:
    row = case.row
    if row.quantity != FILE_BYTES or case.model is None or row.method != "gguf" or _is_mixture(row):
        return
    from planner.methods import gguf

    size = gguf.size(case.model, case.variant).file_bytes
    if abs(row.value / size - 1) > _FILE_TOLERANCE:
        numbers = f"{format_bytes(row.value, 2)}, {row.type} of this shape takes {format_bytes(size, 2)}"
        yield case.complaint("file-size", "not the size of such a file", numbers)
