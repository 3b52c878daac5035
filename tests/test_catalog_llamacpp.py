"""llama.cpp loads a weightless file of every catalog model: no tensor missing, none too many, none misshapen."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from planner.execute.stub import write_stub
from planner.models import catalog
from tests.catalog_fixtures import load_errors

pytest.importorskip("llama_cpp")


@pytest.mark.parametrize("name", catalog.names())
def test_llamacpp_accepts_every_tensor(name: str, tmp_path: Path) -> None:
    spec = catalog.lookup(name)
    assert spec is not None
    path = tmp_path / "stub.gguf"
    write_stub(spec, path)
    assert load_errors(path) == []
    path.unlink()


@pytest.mark.parametrize("change", ["missing", "misshapen", "extra"])
def test_llamacpp_refuses_a_wrong_tensor_list(change: str, tmp_path: Path) -> None:
    spec = catalog.lookup("tinyllama-1.1b")
    assert spec is not None
    last = spec.tensors[-1]
    wrong = {
        "missing": spec.tensors[:-1],
        "misshapen": (*spec.tensors[:-1], replace(last, shape=(last.shape[0] + 32, last.shape[1]))),
        "extra": (*spec.tensors, replace(last, name="blk.0.attn_q_norm.weight")),
    }
    path = tmp_path / "stub.gguf"
    write_stub(replace(spec, tensors=wrong[change]), path)
    assert load_errors(path)
