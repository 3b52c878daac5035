"""Published sizes and buffers: each row of the table agrees with the estimate or says why it does not."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent
MEDIAN_ERROR = {"file_size": 0.001, "llama_log": 0.0005, "gpu_total": 0.03, "rss": 0.01}
"""Most that the median of the rows without an explanation may err."""


@pytest.fixture(scope="module")
def published() -> ModuleType:
    spec = importlib.util.spec_from_file_location("published_memory", ROOT / "benchmarks" / "published_memory.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_every_row_has_a_source_and_a_date(published: ModuleType) -> None:
    rows = published.rows()
    assert len(rows) > 400
    assert [row for row in rows if not (row["source"].startswith("http") and row["date"])] == []


def test_each_row_agrees_or_is_explained(published: ModuleType) -> None:
    wrong, stale = [], []
    for row in published.rows():
        fits = published.agrees(row, published.estimated_mib(row))
        if not fits and not row["explanation"]:
            wrong.append(row)
        if fits and row["explanation"]:
            stale.append(row)
    assert wrong == []
    assert stale == [], "these agree now: their explanation can go"


def test_medians_per_kind(published: ModuleType) -> None:
    for kind, found in published.errors().items():
        plain = sorted(error for error, explained in found if not explained)
        assert len(plain) >= 30, kind
        assert plain[len(plain) // 2] <= MEDIAN_ERROR[kind], kind


def test_most_file_sizes_need_no_explanation(published: ModuleType) -> None:
    found = published.errors()["file_size"]
    assert sum(explained for _, explained in found) < 0.2 * len(found)
