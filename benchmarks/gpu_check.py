"""Predicted beside measured on a CUDA GPU: real shapes, random weights, llama.cpp's own report and NVML.

Run: ``python benchmarks/gpu_check.py [--out rows.jsonl] [--seconds 240] [--folder DIR] [--only TEXT]``.
``--prepare`` only writes the models. Every row is written as soon as it is measured.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from shutil import disk_usage
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from planner.core.candidate import Placement  # noqa: E402
from planner.core.errors import QplanError  # noqa: E402
from planner.core.estimates import Estimate, Prediction  # noqa: E402
from planner.core.hardware import HardwareProfile  # noqa: E402
from planner.core.model import ModelSpec  # noqa: E402
from planner.core.units import GIB, MIB  # noqa: E402
from planner.estimate import estimate  # noqa: E402
from planner.estimate.memory import peak_memory_bytes  # noqa: E402
from planner.execute.random_gguf import write_random_gguf  # noqa: E402
from planner.methods import gguf  # noqa: E402
from planner.models import catalog  # noqa: E402
from planner.verify.run import run_trial  # noqa: E402
from planner.verify.trial import SPEED, Samples, SpeedTrial, TrialRequest  # noqa: E402
from tests.gpu_fixtures import reported  # noqa: E402

KEPT_FREE_BYTES = 6 * GIB
TRIAL_SECONDS = 6.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One model in one type at one placement; ``part`` of its layers are on the GPU."""

    model: str
    type: str
    part: float = 1.0
    context: int = 2048
    depth: int = 0
    kv_type: str = "f16"
    flash_attention: bool = True
    ubatch: int = 512
    cpu_expert_layers: int = 0

    @property
    def file_name(self) -> str:
        """Cases of one model and type share their file."""
        return f"{self.model}-{self.type}.gguf"

    def placement(self, model: ModelSpec, hardware: HardwareProfile) -> Placement:
        """Where it runs."""
        layers = round(self.part * (model.n_layer + 1))
        return Placement(
            context=self.context,
            depth=self.depth,
            kv_type=self.kv_type,
            flash_attention=self.flash_attention,
            ubatch=self.ubatch,
            cpu_expert_layers=self.cpu_expert_layers,
            gpu_layers=layers,
            gpu_count=1 if layers else 0,
            threads=hardware.cpu.inference_threads(),
        )


DEEP: dict[str, Any] = {"context": 8192, "depth": 2048}


def cases() -> Iterator[Case]:
    """The most telling first; all of one file together."""
    for model, types in (
        ("llama-2-7b", ("Q4_K_M", "Q8_0", "F16")),
        ("tinyllama-1.1b", ("Q4_K_M", "Q8_0", "F16")),
        ("llama-3.2-3b", ("Q4_K_M", "Q8_0")),
        ("qwen3-30b-a3b", ("Q4_K_M",)),
        ("gemma-3-4b", ("Q4_K_M",)),
    ):
        for type_ in types:
            yield Case(model=model, type=type_)
            yield Case(model=model, type=type_, **DEEP)
            if type_ == "Q4_K_M":
                yield Case(model=model, type=type_, part=0.5)
            if (model, type_) == ("llama-2-7b", "Q4_K_M"):
                yield Case(model=model, type=type_, kv_type="q8_0", **DEEP)
                yield Case(model=model, type=type_, flash_attention=False, **DEEP)
                yield Case(model=model, type=type_, part=0.75)
            if model == "qwen3-30b-a3b":
                yield Case(model=model, type=type_, cpu_expert_layers=24)
                yield Case(model=model, type=type_, cpu_expert_layers=48)
            if (model, type_) == ("tinyllama-1.1b", "Q4_K_M"):
                yield Case(model=model, type=type_, part=0.0)


class DeviceWatch(threading.Thread):
    """Largest growth of the first GPU's used memory while the block runs, by NVML, polled every 10 ms."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        import pynvml

        pynvml.nvmlInit()
        self._nvml, self._handle = pynvml, pynvml.nvmlDeviceGetHandleByIndex(0)
        self.before = self._used()
        self.peak = self.before
        self._ended = threading.Event()

    def _used(self) -> int:
        return int(self._nvml.nvmlDeviceGetMemoryInfo(self._handle).used)

    def run(self) -> None:
        """Poll until the block ends."""
        while not self._ended.wait(0.01):
            self.peak = max(self.peak, self._used())

    def __enter__(self) -> DeviceWatch:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self.join()


def prepared(case: Case, folder: Path) -> Path | None:
    """The case's file, written if it is missing; ``None`` where the disk has no room."""
    path = folder / case.file_name
    if path.is_file():
        return path
    spec = catalog.lookup(case.model)
    assert spec is not None, case.model
    size = gguf.size(spec, gguf.variant(case.type, imatrix=False)).file_bytes
    if disk_usage(folder).free < size + KEPT_FREE_BYTES:
        return None
    return write_random_gguf(spec, case.type, path.with_suffix(".part")).rename(path)


def measured(case: Case, path: Path, hardware: HardwareProfile) -> dict[str, Any]:
    """One row: predicted and measured."""
    spec = catalog.lookup(case.model)
    assert spec is not None, case.model
    placement = case.placement(spec, hardware)
    variant = gguf.variant(case.type, imatrix=False)
    predicted = estimate(spec, variant, placement, hardware)
    began = time.perf_counter()
    asked = TrialRequest(kind=SPEED, model_path=str(path), placement=placement, budget_seconds=TRIAL_SECONDS)
    with DeviceWatch() as watch:
        result = run_trial(asked)
    assert result.speed is not None
    return {
        "case": {name: getattr(case, name) for name in Case.__slots__} | {"gpu_layers": placement.gpu_layers},
        "seconds": time.perf_counter() - began,
        "memory": memory_row(predicted, result.speed, watch.peak - watch.before),
        "peak": prediction(peak_memory_bytes(spec, variant, placement, hardware)),
        "decode": prediction(predicted.speed.decode) | samples(result.speed.decode),
        "prefill": prediction(predicted.speed.prefill) | samples(result.speed.prefill),
        "load_seconds": result.speed.load_seconds,
        "filled_tokens": result.speed.memory.filled_tokens,
        "peak_rss_bytes": result.speed.memory.peak_rss_bytes,
        "baseline_bytes": result.speed.memory.baseline_bytes,
        "repack": result.speed.repack,
        "notes": result.notes,
    }


def prediction(made: Prediction | None) -> dict[str, Any]:
    """Value and interval."""
    if made is None:
        return {"predicted": None, "low": None, "high": None}
    return {"predicted": made.value, "low": made.low, "high": made.high, "basis": made.basis}


def samples(taken: Samples) -> dict[str, Any]:
    """Median and all samples."""
    return {"measured": taken.median, "samples": taken.samples}


def memory_row(made: Estimate, trial: SpeedTrial, growth: int) -> dict[str, Any]:
    """Bytes by place and part: predicted and reported; what the driver counts in all."""
    told = reported(trial.memory.buffers)
    places = {"host": made.memory.host} | ({"gpu": made.memory.devices[0]} if made.memory.devices else {})
    parts = {"model": "weights_bytes", "KV": "kv_cache_bytes", "compute": "compute_bytes"}
    row: dict[str, Any] = {
        f"{place} {kind}": [getattr(device, field), told.get((place, kind), 0)]
        for place, device in places.items()
        for kind, field in parts.items()
    }
    buffers = sum(size for (place, _), size in told.items() if place == "gpu")
    return row | {
        "buffers": [(b.name, b.kind, b.size_bytes) for b in trial.memory.buffers],
        "gpu buffers": buffers,
        "nvml": [(use.basis, use.used_bytes) for use in trial.memory.devices],
        "device growth": growth,
        "overhead": [made.memory.devices[0].overhead_bytes if made.memory.devices else 0, growth - buffers],
    }


def line(row: dict[str, Any]) -> str:
    """One line of the table: MiB predicted/reported for the GPU, tokens per second predicted/measured."""
    case, told = row["case"], row["memory"]
    label = f"{case['model']} {case['type']} ngl {case['gpu_layers']} ctx {case['context']} d {case['depth']}"
    label += "" if case["kv_type"] == "f16" else f" kv {case['kv_type']}"
    label += "" if case["flash_attention"] else " fa off"
    label += f" ncmoe {case['cpu_expert_layers']}" if case["cpu_expert_layers"] else ""
    pairs = [told.get(f"gpu {kind}", [0, 0]) for kind in ("model", "KV", "compute")] + [told["overhead"]]
    cells = " ".join(f"{a / MIB:9.2f}/{b / MIB:9.2f}" for a, b in pairs)
    speeds = " ".join(_speed(row[quantity]) for quantity in ("prefill", "decode"))
    return f"{label:50} {cells} {speeds}"


def _speed(row: dict[str, Any]) -> str:
    if row["predicted"] is None:
        return f"       ?/{row['measured']:8.1f}  "
    inside = row["low"] <= row["measured"] <= row["high"]
    return f"{row['predicted']:8.1f}/{row['measured']:8.1f} {'+' if inside else '-'}"


COLUMNS = ("weights MiB", "KV cache", "compute", "outside", "prefill t/s", "decode")
HEADER = f"{'case':50} " + " ".join(f"{name:>19}" for name in COLUMNS)


def main() -> None:
    """Measure every case that time and disk allow."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("gpu_check.jsonl"))
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "gpu_check")
    parser.add_argument("--only", default="", help="only models whose name has this")
    parser.add_argument("--prepare", action="store_true")
    options = parser.parse_args()
    options.folder.mkdir(exist_ok=True)
    chosen = [case for case in cases() if options.only in case.model]
    if options.prepare:
        for case in chosen:
            prepared(case, options.folder)
        return
    run_all(chosen, options.folder, options.out, time.perf_counter() + options.seconds)


def run_all(chosen: list[Case], folder: Path, out: Path, deadline: float) -> None:
    """Print the table and write the rows."""
    from planner.workflow.survey import survey

    hardware = survey(measure=True)
    print(HEADER)
    with out.open("a") as file:
        for i, case in enumerate(chosen):
            if time.perf_counter() > deadline:
                print(f"not run, time is over: {case}")
                continue
            path = prepared(case, folder)
            if path is None:
                print(f"not run, no room on the disk: {case}")
                continue
            try:
                row = measured(case, path, hardware)
            except QplanError as error:
                print(f"{case}: {error.what} ({error.numbers})")
                continue
            file.write(json.dumps(row) + "\n")
            file.flush()
            print(line(row), flush=True)
            if all(later.file_name != case.file_name for later in chosen[i + 1 :]):
                path.unlink()


if __name__ == "__main__":
    main()
