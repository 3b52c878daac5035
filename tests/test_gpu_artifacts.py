"""AWQ, GPTQ, bitsandbytes and FP8 carried out on a CUDA GPU: the artifacts and what the receipt tells of the GPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from planner.core.data import data_path
from planner.core.workload import Quantizing
from planner.execute import environments
from planner.workflow.survey import survey
from planner.workflow.verifying import kernel_options, runnable
from tests.artifact_fixtures import carry_out, environments_home, plan_for, reloaded, use_environment

pytestmark = pytest.mark.gpu

CASES = {
    "gptq-4bit": ("gptq", "4bit", Quantizing()),
    "gptq-3bit": ("gptq", "3bit", Quantizing()),
    "gptq-8bit-asymmetric": ("gptq", "8bit", Quantizing(symmetric=False, act_order=True, group_size=32)),
    "gptq-4bit-llm-compressor": ("gptq", "4bit", Quantizing(quantizer="llm-compressor")),
    "awq": ("awq", "4bit", Quantizing()),
    "awq-llm-compressor": ("awq", "4bit", Quantizing(quantizer="llm-compressor")),
    "awq-autoawq": ("awq", "4bit", Quantizing(quantizer="autoawq")),
    "nf4": ("bitsandbytes", "nf4", Quantizing()),
    "fp4-plain": ("bitsandbytes", "fp4", Quantizing(double_quantization=False, compute_dtype="float16")),
    "int8": ("bitsandbytes", "int8", Quantizing()),
    "fp8": ("none", "fp8", Quantizing()),
}


@pytest.fixture(scope="module", autouse=True)
def _needs_a_gpu() -> None:
    from planner.probe import probe

    if not any(gpu.backend == "cuda" for gpu in probe(measure_bandwidth=False).gpus):
        pytest.skip("no CUDA GPU")


@pytest.fixture(autouse=True)
def _one_home(_own_home: None, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QPLAN_HOME", str(environments_home(tmp_path_factory)))


@pytest.mark.parametrize("name", CASES)
def test_made_and_loaded_on_the_gpu(name: str, tmp_path: Path) -> None:
    method, type_, wish = CASES[name]
    plan = plan_for("demo", method, type_, wish, gpu=True)
    step = plan.artifact_step()
    environment = environments.of_step(step)
    assert environment is not None and step.gpu_layers > 0
    python = use_environment(environment)
    made = carry_out(plan, tmp_path, data_path("demo/model"))
    assert made.receipt.details["device"] == "cuda"
    assert int(made.receipt.details["gpu_peak_bytes"]) > 0
    assert made.receipt.size_bytes == pytest.approx(step.predicted_bytes, rel=0.005)
    if environment == "autoawq":
        python = use_environment("gptqmodel")
    text = data_path("demo/heldout.txt").read_text("utf-8")[:2000]
    told = kernel_options(runnable(plan.variant), survey(), model=None, on_gpu=True)
    kernel = dict(told.arguments).get("backend")
    found = reloaded(python, made.folder, data_path("demo/model"), text, "float16", "cuda", kernel)
    assert found["finite"] and found["kl"] < (0.35 if type_ == "3bit" else 0.08), found
