"""The formulas beside llama.cpp's own answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from planner.core.candidate import Placement, Variant
from planner.core.errors import InputError, QplanError
from planner.core.estimates import DeviceMemory
from planner.core.hardware import HardwareProfile
from planner.core.model import ModelSpec
from planner.core.units import MIB
from planner.estimate.memory import gpu_shares, memory, used_gpus
from planner.execute.oracle import OracleAnswer, OracleDevice, OracleQuestion, OracleReport, ask
from planner.methods import gguf

LOG_ROUNDING_BYTES = 0.006 * MIB
"""llama.cpp's log has two decimals of a MiB."""
FILE, TENSORS = "file", "tensors"
WEIGHTS, KV_CACHE, COMPUTE, TOTAL = "weights", "KV cache", "compute buffer", "total"


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """One figure of the formulas and of llama.cpp, in bytes."""

    where: str
    """``file``, ``host``, or a GPU's name."""
    part: str
    formula_bytes: int
    oracle_bytes: int
    exact: bool = True
    """False where llama.cpp's figure is rounded."""

    @property
    def bytes(self) -> int:
        """Formula less oracle; 0 within the rounding of a figure that is rounded."""
        found = self.formula_bytes - self.oracle_bytes
        return 0 if not self.exact and abs(found) <= LOG_ROUNDING_BYTES else found

    @property
    def relative(self) -> float:
        """Over llama.cpp's figure; 1 where that is 0 and the formula's is not."""
        return self.bytes / self.oracle_bytes if self.oracle_bytes else float(self.bytes != 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One way to run a model, by the formulas and by llama.cpp."""

    model: ModelSpec
    variant: Variant
    placement: Placement | None
    """What was compared; without GPUs where llama.cpp sees none."""
    answer: OracleAnswer
    differences: tuple[Difference, ...]
    disagreement: str | None = None
    """One of the two refuses what the other answers."""
    notes: tuple[str, ...] = ()


def question(variant: Variant, placement: Placement | None, hardware: HardwareProfile) -> OracleQuestion:
    """The question about ``variant`` at ``placement`` on the GPUs that it uses of ``hardware``."""
    gpus = used_gpus(placement, hardware) if placement else ()
    shares = gpu_shares(placement, gpus) if placement else ()
    return OracleQuestion(variant=variant, placement=placement, gpu_shares=shares)


def compare(
    model: ModelSpec, cases: Sequence[tuple[Variant, Placement | None]], hardware: HardwareProfile
) -> tuple[OracleReport, tuple[Comparison, ...]]:
    """Ask llama.cpp about every case, and compare.

    Raises:
        QplanError: as ``planner.execute.oracle.ask``.
    """
    report = ask(model, [question(variant, placement, hardware) for variant, placement in cases])
    pairs = zip(cases, report.answers, strict=True)
    return report, tuple(_compared(model, *case, hardware, answer, report) for case, answer in pairs)


def _compared(
    model: ModelSpec,
    variant: Variant,
    placement: Placement | None,
    hardware: HardwareProfile,
    answer: OracleAnswer,
    report: OracleReport,
) -> Comparison:
    notes = answer.notes
    if placement is not None and answer.on_cpu_only:
        has = f"sees {len(report.gpus)} GPUs here" if report.gpus else "has no GPU back end or sees no GPU"
        notes += (f"this llama.cpp {has}: compared with all layers in RAM",)
        placement = dataclasses.replace(placement, gpu_layers=0, gpu_count=0, tensor_parallel=1, cpu_expert_layers=0)
    differences, disagreement = _differences(model, variant, placement, hardware, answer)
    return Comparison(
        model=model,
        variant=variant,
        placement=placement,
        answer=answer,
        differences=differences,
        disagreement=disagreement,
        notes=notes,
    )


def _differences(
    model: ModelSpec,
    variant: Variant,
    placement: Placement | None,
    hardware: HardwareProfile,
    answer: OracleAnswer,
) -> tuple[tuple[Difference, ...], str | None]:
    try:
        size = gguf.size(model, variant).tensor_bytes
        made = memory(model, variant, placement, hardware) if placement else None
    except InputError as error:
        return (), None if answer.refused else f"only the formulas refuse: {error.what}"
    if answer.refused:
        return (), f"only llama.cpp refuses: {answer.refused}"
    found = [Difference(where=FILE, part=TENSORS, formula_bytes=size, oracle_bytes=answer.tensor_bytes or 0)]
    if made is not None and answer.host is not None:
        found += _device_differences("host", made.host, answer.host)
        for own, told in zip(made.devices, answer.devices, strict=False):
            found += _device_differences(own.name, own, told)
    return tuple(found), None


def _device_differences(where: str, made: DeviceMemory, told: OracleDevice) -> list[Difference]:
    parts: tuple[tuple[str, int, int | None], ...] = (
        (WEIGHTS, made.weights_bytes, told.weights_bytes),
        (KV_CACHE, made.kv_cache_bytes, told.kv_cache_bytes),
        (COMPUTE, made.compute_bytes, told.compute_bytes),
        (TOTAL, made.total_bytes - made.overhead_bytes, told.total_bytes),
    )
    return [
        Difference(where=where, part=part, formula_bytes=own, oracle_bytes=found, exact=told.exact)
        for part, own, found in parts
        if found is not None
    ]


def oracle_document(report: OracleReport, found: Comparison) -> dict[str, Any]:
    """The ``oracle`` block of ``qplan estimate --json``."""
    answer = found.answer
    return {
        "tool": report.tool,
        "gpu_layers": found.placement.gpu_layers if found.placement else None,
        "tensor_bytes": answer.tensor_bytes,
        "tensor_types": dict(answer.type_counts),
        "devices": [_device_document(device) for device in answer.devices],
        "host": _device_document(answer.host) if answer.host else None,
        "refused": answer.refused,
        "disagreement": found.disagreement,
        "differences": [difference_document(difference) for difference in found.differences],
        "notes": list(found.notes),
    }


def _device_document(device: OracleDevice) -> dict[str, Any]:
    return {
        "name": device.name,
        "weights_bytes": device.weights_bytes,
        "kv_cache_bytes": device.kv_cache_bytes,
        "compute_bytes": device.compute_bytes,
        "output_bytes": device.output_bytes,
        "total_bytes": device.total_bytes,
    }


def difference_document(difference: Difference) -> dict[str, Any]:
    """One figure beside the other."""
    return {
        "where": difference.where,
        "part": difference.part,
        "formula_bytes": difference.formula_bytes,
        "oracle_bytes": difference.oracle_bytes,
        "difference_bytes": difference.bytes,
        "relative": round(difference.relative, 6),
    }


def failed(error: QplanError) -> str:
    """An error in one line."""
    return "; ".join(part for part in (error.what, error.numbers.splitlines()[-1] if error.numbers else "") if part)
