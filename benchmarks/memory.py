"""Error of the memory estimate per family: llama.cpp's own no-alloc reports, published figures, and rivals.

Run: ``python benchmarks/memory.py [truth.csv] [--models]``; the truth is four tables in tests/data, or the first is
replaced by the file given: a sample of six models over all settings, an H100's answers for one model of each
architecture, one to three GPUs for every model of the catalog, and the same on one and two H100s. ``--models`` prints a
row per model, too.
"""

from __future__ import annotations

import csv
import dataclasses
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import published_memory  # noqa: E402
import rivals  # noqa: E402

from planner.core.candidate import Placement  # noqa: E402
from planner.core.estimates import DeviceMemory  # noqa: E402
from planner.core.hardware import Cpu, Gpu, HardwareProfile, Memory  # noqa: E402
from planner.estimate.memory import memory  # noqa: E402
from planner.methods import gguf  # noqa: E402
from planner.models import catalog  # noqa: E402

Row = dict[str, str]
TABLES = ROOT / "tests" / "data"
H100, MODELS = TABLES / "llamacpp_memory_cuda.csv", TABLES / "llamacpp_memory_models.csv"
RANDOM = TABLES / "llamacpp_memory_h100.csv"
PARTS = ("weights", "KV cache", "compute", "total")
# the truth was taken on a machine with AVX-512
CPU = Cpu(model="truth", architecture="x86_64", simd=("avx2", "avx512f"))
GPU = Gpu(name="GPU", vendor="nvidia", backend="cuda")
DEFAULTS = {"swa_full": "0", "op_offload": "1", "offload_kqv": "1", "n_outputs_max": "0", "kv_unified": "0"}


def machine(row: Row) -> HardwareProfile:
    """A machine with a GPU, or without one for rows of the CPU back end."""
    gpus = () if row["backend"] == "cpu" else (GPU,)
    return HardwareProfile(name="truth", os="linux", cpu=CPU, memory=Memory(), gpus=gpus)


def placement(row: Row) -> Placement:
    """The row's settings."""
    sequences, gpus = int(row["n_seq_max"]), int(row["backend"] != "cpu")
    return Placement(
        context=int(row["n_ctx"]) // sequences,
        kv_type=row["type_k"],
        gpu_layers=int(row["n_gpu_layers"]) * gpus,
        ubatch=int(row["n_ubatch"]),
        flash_attention=row["fa_used"] == "1",
        sequences=sequences,
        gpu_count=gpus,
    )


def pairs_of(path: Path) -> Iterator[tuple[str, str, tuple[tuple[int, int], ...]]]:
    """``(model, device, pairs)`` of a table of answers for any number of GPUs, or of the H100's."""
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            shares = tuple(map(float, row.get("tensor_split", "1").split("/")))
            asked = Placement(
                context=int(row["context"]),
                kv_type=row["kv_type"],
                gpu_layers=int(row["gpu_layers"]),
                ubatch=int(row["ubatch"]),
                flash_attention=row["flash_attention"] == "1",
                sequences=int(row["sequences"]),
                cpu_expert_layers=int(row.get("cpu_expert_layers", 0)),
                gpu_count=len(shares),
                tensor_split=shares if len(shares) > 1 else (),
            )
            model = catalog.lookup(row["model"])
            assert model is not None, row["model"]
            hardware = dataclasses.replace(machine({"backend": "cuda"}), gpus=(GPU,) * len(shares))
            made = memory(model, gguf.variant(row["type"]), asked, hardware)
            told = row.get("bytes") or ";".join(
                " ".join(row[f"{place}_{part}"] for part in ("weights", "kv", "compute")) for place in ("gpu", "host")
            )
            answers = [_three(device) for device in told.split(";")]
            for index, (device, answer) in enumerate(zip((*made.devices, made.host), answers, strict=False)):
                yield row["model"], "host" if index == len(made.devices) else "GPU", _pairs(device, answer)


def _three(text: str) -> tuple[int, int, int]:
    weights, cache, compute = map(int, text.split())
    return weights, cache, compute


def compared(row: Row) -> dict[str, tuple[tuple[int, int], ...]]:
    """Per device the pairs (estimated, reported) of weights, KV cache, compute buffer and their total."""
    model = catalog.lookup(row["model"])
    assert model is not None, row["model"]
    made = memory(model, gguf.variant(row["weights"]), placement(row), machine(row))
    weights = int(row["host_model_bytes"]) + int(row["host_repack_bytes"])
    pairs = {"host": _pairs(made.host, (weights, int(row["host_kv_bytes"]), int(row["host_compute_bytes"])))}
    if made.devices:
        told = (int(row["gpu_model_bytes"]), int(row["gpu_kv_bytes"]), int(row["gpu_compute_bytes"]))
        pairs["GPU"] = _pairs(made.devices[0], told)
    return pairs


def _pairs(made: DeviceMemory, told: tuple[int, int, int]) -> tuple[tuple[int, int], ...]:
    own = (made.weights_bytes, made.kv_cache_bytes, made.compute_bytes)
    return (*zip(own, told, strict=True), (sum(own), sum(told)))


def error(estimated: int, reported: int) -> float:
    """Relative error; 0 where both are 0."""
    return abs(estimated - reported) / reported if reported else float(estimated != 0)


def rows(path: Path) -> list[Row]:
    """Rows of the truth table with llama.cpp's default settings otherwise."""
    with path.open(newline="", encoding="utf-8") as file:
        return [r for r in csv.DictReader(file) if all(r.get(k, v) == v for k, v in DEFAULTS.items())]


def line(label: str, errors: Iterable[float]) -> str:
    """Mean, 95th and 99th percentile, maximum, and the share that is exact."""
    found = sorted(errors)
    count = len(found)
    at = [found[min(count - 1, int(share * count))] for share in (0.95, 0.99)]
    exact = found.count(0.0) / count
    mean = sum(found) / count
    return f"{label:46} {count:6} {mean:9.4%} {at[0]:9.3%} {at[1]:9.3%} {found[-1]:9.3%} {exact:8.1%}"


def main(path: Path, by_model: bool) -> None:
    """Print the error tables."""
    started, count = time.perf_counter(), 0
    told = rows(path)
    of_settings = ((row["model"], d, pairs) for row in told for d, pairs in compared(row).items())
    tables: list[tuple[str, Iterable[tuple[str, str, tuple[tuple[int, int], ...]]]]] = [
        (f"six models, {path.name}", of_settings),
        (f"an H100's answers, {H100.name}", pairs_of(H100)),
        (f"every model, one to three GPUs, {MODELS.name}", pairs_of(MODELS)),
        (f"every model at random settings on one and two H100s, {RANDOM.name}", pairs_of(RANDOM)),
    ]
    for title, found in tables:
        errors: dict[tuple[str, str, str], list[float]] = defaultdict(list)
        for name, device, pairs in found:
            count += 1
            model = catalog.lookup(name)
            assert model is not None
            labels = [f" {model.architecture}", "all"] + ([name] if by_model else [])
            for part, pair in zip(PARTS, pairs, strict=True):
                for label in labels if part == "total" or by_model else ["all"]:
                    errors[label, device, part].append(error(*pair))
        print(f"{title:46} {'rows':>6} {'mean':>9} {'p95':>9} {'p99':>9} {'max':>9} {'exact':>8}")
        for (label, device, part), own in sorted(errors.items()):
            print(line(f"{label} {device} {part}", own))
        print()
    print(f"{count} devices' estimates in {time.perf_counter() - started:.2f} s\n")
    print("\n".join(published_memory.table()), end="\n\n")
    print("\n".join(rivals.lines(on_gpu(told))))


def on_gpu(told: list[Row]) -> list[rivals.Case]:
    """Rows with all layers on the GPU and one sequence, at most one of each model, context, type and KV type."""
    cases: dict[tuple[str, int, str, str], rivals.Case] = {}
    for row in told:
        model = catalog.lookup(row["model"])
        plain = row["n_seq_max"] == "1" and row["n_ubatch"] == "512" and row["fa_used"] == "1"
        if model is None or row["backend"] == "cpu" or not plain or int(row["n_gpu_layers"]) <= model.n_layer:
            continue
        estimated, reported = compared(row)["GPU"][-1]
        key = (row["model"], int(row["n_ctx"]), row["weights"], row["type_k"])
        cases.setdefault(key, (*key, reported, estimated))
    return sorted(cases.values())


if __name__ == "__main__":
    given = [argument for argument in sys.argv[1:] if not argument.startswith("-")]
    main(Path(given[0]) if given else TABLES / "llamacpp_memory.csv", "--models" in sys.argv)
