"""The memory estimate against one real CUDA GPU, recorded by benchmarks/gpu_check.py; needs no GPU."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from planner.core.candidate import Placement
from planner.core.estimates import MemoryEstimate
from planner.core.units import MIB
from planner.estimate import speed_formula, speed_site
from planner.estimate.memory import memory, peak_memory_bytes
from planner.estimate.speed_work import work
from planner.methods import gguf
from planner.models import catalog
from planner.probe import load_profile

RECORD = Path(__file__).parent / "data" / "gpu_h100.jsonl"
ROWS: list[dict[str, Any]] = [json.loads(line) for line in RECORD.read_text().splitlines()[1:]]
ON_GPU = [row for row in ROWS if row["case"]["gpu_layers"]]
SPLIT = [row for row in ON_GPU if row["case"]["cpu_expert_layers"] or row["case"]["part"] < 1]
ROUNDING = 0.006 * MIB
"""llama.cpp prints MiB with two digits."""


def label(row: dict[str, Any]) -> str:
    case = row["case"]
    return "-".join(str(case[name]) for name in ("model", "type", "gpu_layers", "context", "kv_type", "depth"))


def placement(row: dict[str, Any]) -> Placement:
    names = ("context", "depth", "kv_type", "flash_attention", "ubatch", "gpu_layers", "cpu_expert_layers")
    return Placement(gpu_count=1, threads=16, **{name: row["case"][name] for name in names})


def estimated(row: dict[str, Any]) -> MemoryEstimate:
    spec = catalog.lookup(row["case"]["model"])
    assert spec is not None
    variant = gguf.variant(row["case"]["type"], imatrix=False)
    return memory(spec, variant, placement(row), load_profile("h100-80gb"))


@pytest.mark.parametrize("row", ON_GPU, ids=label)
def test_weights_and_cache_are_exact_and_compute_close(row: dict[str, Any]) -> None:
    gpu, told = estimated(row).devices[0], row["told"]
    assert gpu.weights_bytes == pytest.approx(told["gpu model"], abs=ROUNDING)
    assert gpu.kv_cache_bytes == pytest.approx(told["gpu KV"], abs=2 * ROUNDING)
    # the CUDA back end orders the graph of a mixture of experts its own way before it is allocated
    mixture = row["case"]["model"] == "qwen3-30b-a3b"
    assert gpu.compute_bytes == pytest.approx(told["gpu compute"], rel=0.13 if mixture else 1e-4)


@pytest.mark.parametrize("row", ON_GPU, ids=label)
def test_the_host_buffers(row: dict[str, Any]) -> None:
    host, told = estimated(row).host, row["told"]
    assert host.kv_cache_bytes == pytest.approx(told["host KV"], abs=2 * ROUNDING)
    assert host.compute_bytes == pytest.approx(told["host compute"], rel=0.01)
    # the mapping of a partly offloaded file spans tensors that went to the GPU
    assert host.weights_bytes <= told["host model"] + ROUNDING


@pytest.mark.parametrize("row", ON_GPU, ids=label)
def test_what_the_driver_counts_lies_in_the_interval(row: dict[str, Any]) -> None:
    spec = catalog.lookup(row["case"]["model"])
    assert spec is not None
    variant = gguf.variant(row["case"]["type"], imatrix=False)
    peak = peak_memory_bytes(spec, variant, placement(row), load_profile("h100-80gb"))
    assert peak is not None
    assert peak.contains(row["process_bytes"])


@pytest.mark.parametrize("row", ON_GPU, ids=label)
def test_what_the_driver_takes_beside_the_buffers(row: dict[str, Any]) -> None:
    told, case = row["told"], row["case"]
    beside = row["process_bytes"] - sum(told[f"gpu {part}"] for part in ("model", "KV", "compute"))
    if case["flash_attention"]:  # without it, temporary pools come on top
        assert estimated(row).devices[0].overhead_bytes == pytest.approx(beside, abs=40 * MIB)


@pytest.mark.parametrize("row", SPLIT, ids=label)
def test_a_prompt_waits_for_the_weights_it_copies(row: dict[str, Any]) -> None:
    spec, hardware = catalog.lookup(row["case"]["model"]), load_profile("h100-80gb")
    assert spec is not None
    variant, placed = gguf.variant(row["case"]["type"], imatrix=False), placement(row)
    found = speed_formula.prefill(work(spec, variant, placed), variant, speed_site.site(placed, hardware))
    assert found is not None and found.split and found.bound_by == "link"
    assert placed.prompt_tokens / found.seconds == pytest.approx(median(row["prefill"]), rel=0.35)
