"""llama.cpp on a CUDA GPU: what it reports and what the driver counts, against what qplan predicted."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from planner.core import rates as kinds
from planner.core.candidate import Placement
from planner.core.estimates import DeviceMemory
from planner.core.hardware import HardwareProfile
from planner.core.measurement import DECODE, PREFILL, QUANTITIES
from planner.core.model import ModelSpec
from planner.core.rates import Rates
from planner.core.units import MIB
from planner.estimate.memory import memory
from planner.estimate.speed_calibrated import predict
from planner.execute.random_gguf import write_random_gguf
from planner.methods import gguf
from planner.models import catalog
from planner.verify.run import run_trial
from planner.verify.trial import SPEED, SpeedTrial, TrialRequest
from tests.conftest import Qplan
from tests.gpu_fixtures import reported

pytestmark = pytest.mark.gpu

MODELS = (("tinyllama-1.1b", "Q4_K_M"), ("llama-3.2-1b", "Q8_0"), ("qwen3-0.6b", "F16"), ("gemma-3-1b", "Q8_0"))
ROUNDING = 0.006 * MIB
"""llama.cpp prints MiB with two digits."""
# a child, so that the test process itself takes no memory of the GPU
SUPPORTED = "import llama_cpp, sys; sys.exit(0 if llama_cpp.llama_supports_gpu_offload() else 3)"


@cache
def why_not() -> str | None:
    """Why this machine cannot run llama.cpp on a CUDA GPU; ``None`` when it can."""
    done = subprocess.run([sys.executable, "-c", SUPPORTED], capture_output=True, text=True, check=False)
    if done.returncode:
        return "llama-cpp-python is not installed, or built without CUDA"
    from planner.probe import probe

    gpus = probe(measure_bandwidth=False).gpus
    return None if any(gpu.backend == "cuda" for gpu in gpus) else "no CUDA GPU"


@pytest.fixture(autouse=True)
def _needs_a_gpu() -> None:
    if reason := why_not():
        pytest.skip(reason)


@pytest.fixture(scope="module")
def machine() -> HardwareProfile:
    from planner.probe import probe

    return probe(measure_bandwidth=False)


@pytest.fixture(scope="module", params=MODELS, ids=lambda pair: "-".join(pair))
def model(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[ModelSpec, str, Path]]:
    name, type_ = request.param
    spec = catalog.lookup(name)
    assert spec is not None
    path = tmp_path_factory.mktemp("gpu") / f"{name}-{type_}.gguf"
    write_random_gguf(spec, type_, path)
    yield spec, type_, path
    path.unlink()


def run(path: Path, placement: Placement) -> SpeedTrial:
    asked = TrialRequest(
        kind=SPEED, model_path=str(path), placement=placement, budget_seconds=10, repetitions=2, decode_tokens=8
    )
    speed = run_trial(asked).speed
    assert speed is not None
    return speed


def test_probe_tells_the_gpu(machine: HardwareProfile) -> None:
    gpu = machine.gpus[0]
    assert gpu.vendor == "nvidia"
    assert gpu.memory_total_bytes is not None
    assert gpu.memory_free_bytes is not None
    assert 0 < gpu.memory_free_bytes <= gpu.memory_total_bytes
    assert gpu.compute_capability is not None
    assert gpu.driver


@pytest.mark.parametrize(
    ("context", "kv_type", "flash", "part"),
    [(2048, "f16", True, 1.0), (8192, "q8_0", True, 1.0), (4096, "f16", False, 1.0), (2048, "f16", True, 0.5)],
)
def test_buffers_are_as_predicted(
    model: tuple[ModelSpec, str, Path],
    machine: HardwareProfile,
    context: int,
    kv_type: str,
    flash: bool,
    part: float,
) -> None:
    spec, type_, path = model
    layers = round(part * (spec.n_layer + 1))
    placement = Placement(
        context=context, kv_type=kv_type, flash_attention=flash, gpu_layers=layers, gpu_count=1, threads=4
    )
    trial = run(path, placement)
    told = reported(trial.memory.buffers)
    predicted = memory(spec, gguf.variant(type_, imatrix=False), placement, machine)
    _same(predicted.devices[0], told, "gpu")
    assert predicted.host.compute_bytes == pytest.approx(told["host", "compute"], rel=0.05, abs=MIB)
    if part < 1:
        assert predicted.host.kv_cache_bytes == pytest.approx(told["host", "KV"], abs=2 * ROUNDING)
    used = trial.memory.devices[0]
    assert used.basis.startswith("nvml")
    buffers = sum(size for (place, _), size in told.items() if place == "gpu")
    assert buffers < used.used_bytes < buffers + 4 * predicted.devices[0].overhead_bytes + 0.1 * buffers
    assert trial.decode.median > 0
    assert trial.prefill.median > trial.decode.median


def _same(predicted: DeviceMemory, told: dict[tuple[str, str], int], place: str) -> None:
    assert predicted.weights_bytes == pytest.approx(told[place, "model"], abs=ROUNDING)
    # layers with and without a window report apart
    assert predicted.kv_cache_bytes == pytest.approx(told[place, "KV"], abs=2 * ROUNDING)
    assert predicted.compute_bytes == pytest.approx(told[place, "compute"], rel=0.05)


def test_more_layers_on_the_gpu_take_more_of_it_and_are_faster(tmp_path: Path) -> None:
    spec = catalog.lookup("tinyllama-1.1b")
    assert spec is not None
    path = write_random_gguf(spec, "Q8_0", tmp_path / "model.gguf")
    placement = Placement(context=1024, gpu_count=1, threads=4)
    half, whole = (run(path, replace(placement, gpu_layers=n)) for n in (spec.n_layer // 2, spec.n_layer + 1))
    assert half.memory.devices[0].used_bytes < whole.memory.devices[0].used_bytes
    assert half.decode.median < whole.decode.median


def test_plan_apply_verify_on_the_gpu(qplan: Qplan, demo_checkpoint: Path, tmp_path: Path) -> None:
    planned = qplan("plan", str(demo_checkpoint), "--types", "Q4_K_M", "--context", "512", "-o", "p.json", cwd=tmp_path)
    assert planned.returncode == 0, planned.stderr
    plan = json.loads((tmp_path / "p.json").read_text())
    assert plan["placement"]["gpu_layers"] > 0
    done = qplan("apply", "p.json", "--output", "out", "--seconds", "60", "--json", cwd=tmp_path)
    assert done.returncode in {0, 5}, done.stderr
    report = json.loads(done.stdout)
    assert set(report["measured"]) == set(QUANTITIES)
    verdicts = {verdict["quantity"]: verdict for verdict in report["verdicts"]}
    assert verdicts["file_bytes"]["ok"]
    assert verdicts["peak_memory_bytes"]["ok"], verdicts["peak_memory_bytes"]
    verified = qplan("verify", "p.json", "--output", "out", "--seconds", "20", "--json", cwd=tmp_path)
    assert verified.returncode in {0, 5}, verified.stderr


@pytest.fixture(scope="module")
def rates(tmp_path_factory: pytest.TempPathFactory) -> Rates:
    from planner.workflow.calibrating import CalibrateOptions, calibrate

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QPLAN_HOME", str(tmp_path_factory.mktemp("calibrated")))
        return Rates(calibrate(CalibrateOptions(budget_seconds=60)).rates)


def test_a_gpu_calibrates_all_that_a_prediction_needs(rates: Rates, machine: HardwareProfile) -> None:
    key = kinds.gpu_key(next(gpu for gpu in machine.gpus if gpu.backend == "cuda"))
    for work in (kinds.DECODE_WEIGHTS, kinds.PREFILL_WEIGHTS, kinds.PREFILL_ATTENTION, kinds.LINK):
        assert rates.of(work, key), work
    on_gpu, on_cpu = (rates.with_type(kinds.DECODE_WEIGHTS, "Q4_K", device)[-1].value for device in (key, kinds.CPU))
    assert on_gpu > on_cpu
    assert len({rate.tokens for rate in rates.with_type(kinds.PREFILL_WEIGHTS, "Q4_K", key)}) == 3


@pytest.mark.parametrize("name", ["tinyllama-1.1b", "llama-3.1-8b"])
def test_a_calibrated_gpu_predicts_whole_models(
    name: str, rates: Rates, machine: HardwareProfile, tmp_path: Path
) -> None:
    spec = catalog.lookup(name)
    assert spec is not None
    path, variant = write_random_gguf(spec, "Q4_K_M", tmp_path / "model.gguf"), gguf.variant("Q4_K_M", imatrix=False)
    for depth in (0, 2048):
        placement = Placement(
            context=4096, gpu_layers=spec.n_layer + 1, gpu_count=1, threads=4, depth=depth, prompt_tokens=512
        )
        trial = run(path, placement)
        for quantity, measured in ((DECODE, trial.decode.median), (PREFILL, trial.prefill.median)):
            predicted = predict(spec, variant, placement, machine, rates, quantity)
            assert predicted is not None and predicted.basis == "calibrated"
            # one measurement in five may lie outside the 80 % interval; none should lie far outside
            assert predicted.low / 1.15 < measured < predicted.high * 1.15, (name, depth, quantity, predicted)


def test_the_search_tries_layers_that_fit_and_finds_that_the_gpu_is_faster(qplan: Qplan, tmp_path: Path) -> None:
    home = {"QPLAN_HOME": str(tmp_path)}
    spec = catalog.lookup("tinyllama-1.1b")
    assert spec is not None
    asked = ("tinyllama-1.1b", "--type", "Q4_K_M", "--budget", "45", "--json")
    found = json.loads(qplan("tune", *asked, **home).stdout)
    measured = [row for row in found["settings"] if row["status"] == "measured"]
    layers = {row["gpu_layers"] for row in measured}
    assert layers == {spec.offloadable_count, spec.offloadable_count - 1}, "all that fits, and one less"
    assert found["best"]["gpu_layers"] == spec.offloadable_count
    on_cpu = json.loads(qplan("tune", *asked, "--cpu-only", **home).stdout)
    slow, fast = (one["best"]["decode_tokens_per_second"]["median"] for one in (on_cpu, found))
    assert slow < fast
    answer = json.loads(qplan("recommend", "tinyllama-1.1b", "--types", "Q4_K_M", "--json", **home).stdout)["chosen"]
    assert not found["kept"] or answer["gpu_layers"] == found["chosen"]["gpu_layers"]
