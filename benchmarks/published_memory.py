"""Estimates beside published sizes: GGUF files, buffers in llama.cpp's logs, GPU totals, resident sets.

Run: ``python benchmarks/published_memory.py``; ``--rows`` prints every row. The table, tests/data/published_memory.csv,
holds every published row whose model and type we know. ``explanation`` says why a figure differs from the estimate.
"""

from __future__ import annotations

import csv
import sys
from collections import defaultdict
from functools import cache
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from planner import methods  # noqa: E402
from planner.core.candidate import Placement, Variant  # noqa: E402
from planner.core.hardware import Cpu, Gpu, HardwareProfile, Memory  # noqa: E402
from planner.core.model import ModelSpec  # noqa: E402
from planner.core.units import MIB  # noqa: E402
from planner.estimate.memory import RUNTIME_BYTES, memory  # noqa: E402
from planner.methods import gguf  # noqa: E402
from planner.models import catalog  # noqa: E402

Row = dict[str, str]
TABLE = ROOT / "tests" / "data" / "published_memory.csv"
CPU = Cpu(model="published", architecture="x86_64", simd=("avx2",))
GPU = Gpu(name="GPU", vendor="nvidia", backend="cuda")
TOLERANCE = {"file_size": 0.002, "llama_log": 0.001, "gpu_total": 0.10, "rss": 0.06}
"""Relative error that needs no explanation, beside the rounding of the published figure."""


@cache
def rows() -> tuple[Row, ...]:
    """The published figures."""
    with TABLE.open(newline="", encoding="utf-8") as file:
        return tuple(csv.DictReader(file))


def subject(row: Row) -> tuple[ModelSpec, Variant]:
    """The row's model and variant."""
    model = catalog.lookup(row["model"])
    assert model is not None, row["model"]
    if row["method"] == "gguf":
        return model, gguf.variant(row["type"], None, (bool(row["imatrix"]) and row["imatrix"] == "1") or None)
    group = {"group_size": int(row["group_size"])} if row["group_size"] else {}
    made: Variant = methods.get(row["method"]).variant(row["type"], **group)  # type: ignore[attr-defined]
    return model, made


def estimated_mib(row: Row) -> float:
    """Our figure for what the row reports, in MiB."""
    model, variant = subject(row)
    what = row["component"]
    if row["kind"] == "file_size" or what in ("weights_total", "weights_token_table"):
        return _weights(model, variant, what) / MIB
    made = memory(model, variant, _placement(row, model), _machine(row))
    device = made.devices[0] if made.devices else made.host
    if what == "kv_cache_total":
        return device.kv_cache_bytes / MIB
    if what in ("compute_CUDA0", "compute_CPU"):
        return device.compute_bytes / MIB
    if what == "compute_CUDA_Host":
        return made.host.compute_bytes / MIB
    if row["kind"] == "rss":  # Metal: the mapped file, the cache and the process; pages of the buffers as they are used
        return (methods.get("gguf").size(model, variant).file_bytes + device.kv_cache_bytes + RUNTIME_BYTES) / MIB
    total = device.total_bytes
    return (total - device.overhead_bytes if what == "allocated" else total) / MIB


def _weights(model: ModelSpec, variant: Variant, what: str) -> int:
    if what == "checkpoint":
        return methods.get(variant.method).size(model, variant).file_bytes
    sizes = gguf.tensor_bytes(model, variant)
    if what != "weights_token_table":
        return sum(sizes)
    return next(size for size, t in zip(sizes, model.tensors, strict=True) if t.name == "token_embd.weight")


def _placement(row: Row, model: ModelSpec) -> Placement:
    everything = model.n_layer + 1
    layers = min(int(row["gpu_layers"]), everything) if row["gpu_layers"] else everything
    on_gpu = row["component"] != "compute_CPU"
    return Placement(
        context=int(row["context"] or 512),
        kv_type=row["kv_type"] or "f16",
        gpu_layers=layers if on_gpu else 0,
        gpu_count=int(on_gpu),
        ubatch=int(row["ubatch"] or 512),
    )


def _machine(row: Row) -> HardwareProfile:
    gpus = () if row["component"] == "compute_CPU" else (GPU,)
    return HardwareProfile(name="published", os="linux", cpu=CPU, memory=Memory(), gpus=gpus)


def agrees(row: Row, estimate_mib: float) -> bool:
    """Whether the estimate is the published figure within its rounding and the kind's tolerance."""
    told = float(row["value_mib"])
    return abs(estimate_mib - told) <= float(row["half_step_mib"] or 0) + TOLERANCE[row["kind"]] * told


def errors() -> dict[str, list[tuple[float, bool]]]:
    """Per kind (relative error, whether it has an explanation) of every row."""
    found = defaultdict(list)
    for row in rows():
        told = float(row["value_mib"])
        found[row["kind"]].append((abs(estimated_mib(row) - told) / told, bool(row["explanation"])))
    return found


def table() -> list[str]:
    """Lines of a table: rows, median and 95th percentile of the error, per kind."""
    lines = [f"{'published figures':22} {'rows':>5} {'median':>8} {'p95':>8} {'explained':>10} {'median':>8}"]
    for kind, found in sorted(errors().items()):
        plain = sorted(error for error, explained in found if not explained)
        other = [error for error, explained in found if explained]
        tail = plain[min(len(plain) - 1, int(0.95 * len(plain)))]
        beside = f"{median(other):8.2%}" if other else f"{'-':>8}"
        lines.append(f"{kind:22} {len(plain):5} {median(plain):8.3%} {tail:8.3%} {len(other):10} {beside}")
    return lines


def by_engine() -> list[str]:
    """Lines of a table: the error of GPU totals by engine, with its sign; explained rows are only counted."""
    found: dict[str, list[float]] = defaultdict(list)
    explained: dict[str, int] = defaultdict(int)
    for row in rows():
        engine = row["engine"].split(" (")[0][:44]
        if row["kind"] == "gpu_total" and row["explanation"]:
            explained[engine] += 1
        elif row["kind"] == "gpu_total":
            found[engine].append(estimated_mib(row) / float(row["value_mib"]) - 1)
    lines = [
        f"{'GPU totals by engine':44} {'rows':>5} {'median':>8} {'mean size':>10} {'largest':>8} {'explained':>10}"
    ]
    for engine, own in sorted(found.items(), key=lambda pair: -len(pair[1])):
        size = sum(map(abs, own)) / len(own)
        largest = max(own, key=abs)
        lines.append(
            f"{engine:44} {len(own):5} {median(own):+8.1%} {size:10.1%} {largest:+8.1%} {explained[engine]:10}"
        )
    return lines


def main() -> None:
    """Print the tables, and with ``--rows`` every row that needed an explanation."""
    print("\n".join([*table(), "", *by_engine()]))
    if "--rows" not in sys.argv:
        return
    for row in rows():
        made = estimated_mib(row)
        ratio = made / float(row["value_mib"]) - 1
        print(
            f"{row['kind']:9} {row['component']:20} {row['model']:24} {row['type']:8} {row['context']:>6} "
            f"{float(row['value_mib']):11.2f} {ratio:+8.2%} {row['explanation']}"
        )


if __name__ == "__main__":
    main()
