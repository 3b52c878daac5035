"""Many cases at once: in the order of the lines, the same as one at a time."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

from planner.workflow import batch
from planner.workflow.estimates import estimate_batch


@pytest.fixture(scope="module")
def benchmark_module() -> ModuleType:
    path = Path(__file__).parent.parent / "benchmarks" / "batch.py"
    spec = importlib.util.spec_from_file_location("batch_benchmark", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_answer_as_one_does(
    benchmark_module: ModuleType, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    monkeypatch.setattr(batch, "PARALLEL_FROM", 100)
    monkeypatch.setattr(batch, "usable_core_count", lambda: workers)
    lines = [json.dumps(case) for case in benchmark_module.cases(150)]
    lines[17:17] = ["no json", "", '{"model": "nonesuch"}']
    found = [json.loads(text) for text in batch.answered(lines)]
    assert found == [json.loads(json.dumps(answer)) for answer in estimate_batch(lines)]
    assert found[17]["error"]["code"] == "bad-json" and found[18]["error"]["code"] == "unknown-model"


def test_the_benchmarks_cases_all_differ(benchmark_module: ModuleType) -> None:
    made = [{k: v for k, v in case.items() if k != "id"} for case in benchmark_module.cases(500)]
    assert len({json.dumps(case, sort_keys=True) for case in made}) == 500


def test_pieces_keep_a_model_together() -> None:
    lines = [json.dumps({"model": name, "context": i + 1}) for i in range(40) for name in ("llama-2-7b", "gemma-2-9b")]
    pieces = batch._pieces(lines, 4)
    assert sorted(at for piece in pieces for at in piece) == list(range(80))
    assert len(pieces) == 2
