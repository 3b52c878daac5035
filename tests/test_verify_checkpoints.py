"""Checkpoint directories measured under transformers: what is asked of the child, what comes back, what it becomes."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import struct
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from planner import models
from planner.core.candidate import Placement
from planner.core.errors import MODEL_REFUSED, InputError, MissingDependency, QplanError
from planner.core.hardware import Cpu, HardwareProfile, Memory
from planner.core.measurement import DECODE, FILE_BYTES, KL_DIVERGENCE, PEAK_MEMORY, PERPLEXITY_RATIO, PREFILL
from planner.core.units import GIB
from planner.execute import environments
from planner.execute.process import ChildDied, Stopped
from planner.methods import none
from planner.models.directory import quantized_spec
from planner.report.bits_checkpoint import bits_of_checkpoint
from planner.verify import crowding, run
from planner.verify.artifact import artifact_files, verify_artifact
from planner.verify.learned import Subject
from planner.verify.run import run_trial
from planner.verify.trial import SPEED, MemoryTrial, Samples, SpeedTrial, TrialRequest, TrialResult
from planner.workflow import verifying
from planner.workflow.quality import checkpoint_variant
from tests.artifact_fixtures import environments_home, use_environment
from tests.conftest import Qplan

MACHINE = HardwareProfile(
    name="test",
    os="linux",
    cpu=Cpu(model="cpu", architecture="x86_64", physical_core_count=2),
    memory=Memory(total_bytes=8 * GIB, available_bytes=8 * GIB),
)
SUBJECT = Subject(model="demo", model_sha256="0" * 64, variant=verifying.runnable(none.variant("bf16")))
GPTQ: dict[str, Any] = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True}


def write_safetensors(path: Path, tensors: dict[str, tuple[str, tuple[int, ...]]]) -> None:
    """A file of zeros with these tensors."""
    widths = {"F16": 2, "BF16": 2, "F32": 4, "I32": 4, "I8": 1, "U8": 1}
    header: dict[str, Any] = {}
    at = 0
    for name, (dtype, shape) in tensors.items():
        size = widths[dtype]
        for length in shape:
            size *= length
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(at))


@pytest.fixture
def packed(tmp_path: Path, demo_checkpoint: Path) -> Path:
    """The demo model's configuration with one layer as GPTQ packs it."""
    folder = tmp_path / "demo-gptq-4bit"
    folder.mkdir()
    config = json.loads((demo_checkpoint / "config.json").read_text()) | {"quantization_config": GPTQ}
    (folder / "config.json").write_text(json.dumps(config))
    base = "model.layers.0.mlp.up_proj"
    write_safetensors(
        folder / "model.safetensors",
        {
            f"{base}.qweight": ("I32", (256 * 4 // 32, 768)),
            f"{base}.qzeros": ("I32", (2, 768 * 4 // 32)),
            f"{base}.scales": ("F16", (2, 768)),
            f"{base}.g_idx": ("I32", (256,)),
            "model.layers.0.input_layernorm.weight": ("BF16", (256,)),
            "lm_head.weight": ("BF16", (2048, 256)),
        },
    )
    return folder


def test_bits_of_packed_weights_count_the_weights_and_not_the_words(packed: Path) -> None:
    bits = bits_of_checkpoint(packed)
    assert bits is not None and bits.layer_count == 1
    kinds = {kind.name: kind for kind in bits.kinds}
    assert kinds["up_proj"].weight_count == 256 * 768
    stored = 4 * 32 * 768 + 4 * 2 * 96 + 2 * 2 * 768 + 4 * 256
    assert kinds["up_proj"].size_bytes == stored
    assert kinds["up_proj"].cells == ((0, "gptq 4 bits", 8 * stored / (256 * 768)),)
    assert kinds["lm_head"].bits_per_weight == 16 and kinds["lm_head"].cells == ()


@pytest.mark.parametrize(
    ("tensors", "quantization", "weights", "type_"),
    [
        (
            {"w.weight": ("U8", (512, 1)), "w.weight.absmax": ("U8", (16,)), "w.weight.quant_map": ("F32", (16,))},
            {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
            1024,
            "nf4",
        ),
        ({"w.weight": ("I8", (32, 32)), "w.SCB": ("F32", (32,))}, {"quant_method": "bitsandbytes"}, 1024, "int8"),
        (
            {"w.weight_packed": ("I32", (32, 4)), "w.weight_scale": ("BF16", (32, 1))},
            {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": {"num_bits": 4}}}},
            1024,
            "compressed-tensors 4 bits",
        ),
    ],
)
def test_bits_of_other_layouts(
    tmp_path: Path,
    demo_checkpoint: Path,
    tensors: dict[str, tuple[str, tuple[int, ...]]],
    quantization: dict[str, Any],
    weights: int,
    type_: str,
) -> None:
    config = json.loads((demo_checkpoint / "config.json").read_text()) | {"quantization_config": quantization}
    (tmp_path / "config.json").write_text(json.dumps(config))
    write_safetensors(tmp_path / "model.safetensors", tensors)
    bits = bits_of_checkpoint(tmp_path)
    assert bits is not None and [kind.weight_count for kind in bits.kinds] == [weights]
    assert bits.kinds[0].types == ((type_, 1),)
    assert bits.size_bytes == sum(part.stat().st_size for part in artifact_files(tmp_path)) - _header(tmp_path)


def _header(folder: Path) -> int:
    return 8 + int(struct.unpack("<Q", (folder / "model.safetensors").read_bytes()[:8])[0])


def test_a_quantized_checkpoint_has_the_shapes_of_what_it_was_made_from(packed: Path, demo_checkpoint: Path) -> None:
    from planner import models
    from planner.core.model import shape_sha256

    made = quantized_spec(packed)
    assert shape_sha256(made) == shape_sha256(models.resolve(str(demo_checkpoint)))
    with pytest.raises(InputError):
        models.resolve(str(packed))  # to quantize it again is refused as ever
    assert checkpoint_variant(packed).label() == "GPTQ 4bit g128"


def test_the_type_that_a_kernel_asks_for_reaches_the_child(packed: Path) -> None:
    variant = verifying.runnable(checkpoint_variant(packed))
    assert variant.runtime == "transformers"
    told = verifying.kernel_options(variant, MACHINE, model=None, on_gpu=False)
    assert told == verifying.KernelOptions(arguments=(("dtype", "bfloat16"),))


@pytest.mark.parametrize(
    ("nvcc", "type_", "told", "noted"),
    [
        (True, "4bit", {"backend": "marlin"}, "is compiled the first time"),
        (False, "4bit", {"backend": "triton"}, "measured with GPTQModel Triton"),
        (False, "8bit", {"backend": "triton"}, "measured with GPTQModel Triton"),
        (True, "2bit", {"backend": "triton"}, ""),
    ],
)
def test_a_kernel_that_has_to_be_compiled_is_asked_for_where_that_can_be_done(
    monkeypatch: pytest.MonkeyPatch, nvcc: bool, type_: str, told: dict[str, str], noted: str
) -> None:
    """On Hopper too: what GPTQModel prefers there is fetched from the network at its first use."""
    from planner.methods import gptq
    from planner.workflow.survey import survey

    monkeypatch.setattr(verifying, "nvcc_is_here", lambda: nvcc)
    variant = verifying.runnable(gptq.variant(type_))
    model = models.resolve("tinyllama-1.1b")
    for machine in ("rtx-4090", "h100-80gb"):
        found = verifying.kernel_options(variant, survey(machine), model=model, on_gpu=True)
        assert dict(found.arguments) == told
        assert noted in " ".join(found.notes) and bool(found.notes) == bool(noted)
        compiled = told == {"backend": "marlin"}
        assert (found.spare and dict(found.spare)) == ({"backend": "triton"} if compiled else None)


@pytest.mark.parametrize(
    ("error", "second"),
    [
        (MissingDependency("no", numbers="Marlin kernels are not properly installed\nError: nvcc failed"), True),
        (InputError("no", numbers="Marlin sources are incomplete", code=MODEL_REFUSED), True),
        (ChildDied("died", numbers="Traceback\nRuntimeError: no nvcc", hint="", signal_number=None), True),
        (ChildDied("killed", numbers="", hint="", signal_number=signal.SIGKILL), False),
        (Stopped("stopped", numbers="", hint="", signal_number=None), False),
        (InputError("the text is too short", code="bad-text"), False),
    ],
)
def test_a_kernel_that_cannot_be_used_gives_way_to_the_next(
    monkeypatch: pytest.MonkeyPatch, packed: Path, error: QplanError, second: bool
) -> None:
    seen: list[dict[str, str]] = []

    def attempt(_: Any, __: str, request: TrialRequest, **___: Any) -> TrialResult:
        seen.append(dict(request.options))
        if len(seen) == 1:
            raise error
        assert request.spare_options is None
        return TrialResult(speed=_trial(None), tool_version="GPTQModel")

    monkeypatch.setattr(run, "ask_child", attempt)
    request = TrialRequest(
        kind=SPEED,
        model_path=str(packed),
        placement=Placement(context=64),
        options=(("backend", "marlin"),),
        spare_options=(("backend", "triton"),),
    )
    if not second:
        with pytest.raises(type(error)):
            run.run_trial(request)
        return
    result = run.run_trial(request)
    assert seen == [{"backend": "marlin"}, {"backend": "triton"}]
    assert result.speed is not None and result.speed.spare
    (note,) = result.notes
    assert "marlin could not be used" in note and "with triton" in note and "Traceback" not in note
    seen.clear()
    monkeypatch.setattr(run, "ask_child", lambda *_, **__: (_ for _ in ()).throw(error))
    with pytest.raises(type(error)):
        run.run_trial(request)


def test_nvcc_is_looked_for_where_gptqmodel_looks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    if not Path("/usr/local/cuda/bin/nvcc").is_file():
        assert not verifying.nvcc_is_here()
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").touch()
    assert verifying.nvcc_is_here()


def test_the_kernel_asked_for_reaches_what_transformers_loads(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers")
    from planner.verify import torch_engine
    from planner.verify.trial import Loading

    seen: list[Any] = []

    def load(path: Path, *, config: Any, **_: Any) -> Any:
        seen.append(config.quantization_config)
        raise ValueError("far enough")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", load)
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: object() if name == "optimum" else found(name, *a)
    )
    for loading in (Loading(backend="marlin"), Loading()):
        with pytest.raises(InputError):
            torch_engine.open_checkpoint(packed, on_gpu=False, threads=1, progress=lambda *_: None, loading=loading)
    assert seen[0] == GPTQ | {"backend": "marlin"} and seen[1] == GPTQ


def _trial(others: float | None, gpu_layers: int = 0) -> SpeedTrial:
    rates = Samples(samples=(10.0,), tokens_per_sample=(10,), seconds_per_sample=(1.0,), others_share=others)
    return SpeedTrial(
        prefill=rates,
        decode=rates,
        memory=MemoryTrial(baseline_bytes=1, peak_rss_bytes=2, peak_bytes=1, filled_tokens=256),
        load_seconds=0.1,
        threads=os.cpu_count() or 1,
        context=256,
        prompt_tokens=64,
        depth=0,
        gpu_layers=gpu_layers,
        flash_attention=True,
        repack=True,
        runtime="transformers",
    )


@pytest.mark.parametrize(
    ("others", "gpu_layers", "noted", "remembered"),
    [(0.0, 0, False, True), (0.2, 0, True, True), (0.6, 0, True, False), (0.6, 7, False, True), (None, 0, False, True)],
)
def test_a_speed_under_torch_is_judged_by_what_other_programs_left(
    packed: Path, monkeypatch: pytest.MonkeyPatch, others: float | None, gpu_layers: int, noted: bool, remembered: bool
) -> None:
    trial = TrialResult(speed=_trial(others, gpu_layers), tool_version="transformers 5.23.0")
    asked: list[TrialRequest] = []

    def fake(request: TrialRequest, **_: Any) -> TrialResult:
        asked.append(request)
        return trial

    monkeypatch.setattr("planner.verify.artifact.run_trial", fake)
    options = (("dtype", "bfloat16"),)
    place = Placement(context=256)
    found = verify_artifact(packed, subject=SUBJECT, placement=place, hardware=MACHINE, options=options)
    assert asked[0].model_path == str(packed) and asked[0].options == options
    assert found.measured[FILE_BYTES].value == (packed / "model.safetensors").stat().st_size
    assert any("busy" in note for note in found.notes) == noted
    assert (DECODE in {m.quantity for m in found.measurements}) == remembered
    assert crowding.core_shares(_trial(None)) == {}


def test_without_its_environment_a_quantized_checkpoint_is_not_measured_by_chance(
    packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lacking(name: str) -> Path:
        raise MissingDependency(f"{name} is not installed", hint=f"`qplan methods install {name}`")

    monkeypatch.setattr(environments, "python_for", lacking)
    with pytest.raises(MissingDependency) as caught:
        verifying.python_of(packed, checkpoint_variant(packed), None)
    assert "gptqmodel" in caught.value.hint
    assert verifying.python_of(packed.parent / "model.gguf", None, None) is None
    assert verifying.python_of(packed, checkpoint_variant(packed), packed.parent / "f16.gguf") is None


def test_no_directory_that_is_no_checkpoint_starts_a_child(tmp_path: Path, qplan: Qplan) -> None:
    run = qplan("verify", str(tmp_path))
    assert run.returncode == 1 and "config.json" in run.stderr and "Traceback" not in run.stderr
    (tmp_path / "config.json").write_text("{}")
    run = qplan("verify", str(tmp_path))
    assert run.returncode == 1 and "Traceback" not in run.stderr


@pytest.mark.slow
def test_a_checkpoint_is_measured_with_a_cache_at_a_depth(demo_checkpoint: Path) -> None:
    pytest.importorskip("transformers")
    place = Placement(context=256, prompt_tokens=64, depth=100, threads=2)
    found = run_trial(
        TrialRequest(kind="speed", model_path=str(demo_checkpoint), placement=place, budget_seconds=3, decode_tokens=8)
    )
    speed = found.speed
    assert speed is not None and speed.runtime == "transformers" and speed.depth == 100
    assert speed.decode.median > 0 and speed.prefill.median > speed.decode.median
    assert all(count % 8 == 0 for count in speed.decode.tokens_per_sample)
    assert speed.memory.peak_bytes > 11e6  # the weights, in 16 bits
    assert "transformers" in found.tool_version and "torch" in found.tool_version


@pytest.fixture(scope="session")
def measured_runs(tmp_path_factory: pytest.TempPathFactory, demo_checkpoint: Path) -> Path:
    """A folder of runs: every method planned, applied and verified."""
    pytest.importorskip("transformers")
    pytest.importorskip("llama_cpp")
    return tmp_path_factory.mktemp("runs")


CASES = (
    ("none", "bf16", "bitsandbytes"),
    ("bitsandbytes", "nf4", "bitsandbytes"),
    ("bitsandbytes", "int8", "bitsandbytes"),
    ("gptq", "4bit", "gptqmodel"),
    ("gptq", "3bit", "gptqmodel"),
    ("awq", "4bit", "gptqmodel"),
    ("gguf", "Q4_K_M", None),
)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_method_is_planned_applied_verified_and_compared(
    measured_runs: Path, qplan: Qplan, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = str(environments_home(tmp_path_factory))
    monkeypatch.setenv("QPLAN_HOME", home)
    settings, runs = {"QPLAN_HOME": home}, []
    for method, type_, environment in CASES:
        text = ("--calibration-chunks", "8", "--calibration-tokens", "256") if environment == "gptqmodel" else ()
        if environment is not None:
            use_environment(environment)
        folder = measured_runs / f"{method}-{type_}"
        folder.mkdir()
        plan = folder / "plan.json"
        planned = ("plan", "demo", "--methods", method, "--types", type_, "--context", "512", *text, "-o", str(plan))
        made = qplan(*planned, **settings)
        assert made.returncode == 0, made.stderr
        applied = qplan("apply", str(plan), "--output", str(folder), "--seconds", "20", "--json", **settings)
        assert applied.returncode in (0, 5), applied.stderr
        report = json.loads(applied.stdout)
        assert {FILE_BYTES, PEAK_MEMORY, PREFILL, DECODE, PERPLEXITY_RATIO, KL_DIVERGENCE} <= set(report["measured"])
        size = next(v for v in report["verdicts"] if v["quantity"] == FILE_BYTES)
        assert size["ok"], size
        assert (folder / "report.html").is_file()
        runs.append(folder)
    compared = qplan("compare", *map(str, runs), "-o", str(measured_runs / "compare.html"), "--json", **settings)
    assert compared.returncode == 0, compared.stderr
    rows = json.loads(compared.stdout)["runs"]
    assert len(rows) == len(runs)
    for row in rows:
        assert row["runtime"] == ("llama.cpp" if row["method"] == "gguf" else "transformers")
        assert row["bits_per_weight"] and 0.5 < row["same_top_fraction"] <= 1
        assert 0.9 < row["measured"][PERPLEXITY_RATIO] < 2 and row["measured"][KL_DIVERGENCE] >= 0
    page = (measured_runs / "compare.html").read_text("utf-8")
    assert "same top token" in page and "llama.cpp" in page


@pytest.mark.gpu
def test_a_gpu_tells_what_a_checkpoint_takes_of_it(tmp_path: Path, demo_checkpoint: Path) -> None:
    """VRAM by NVML and by torch's own account, and speeds, on a machine with a CUDA build of torch."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    if not torch.cuda.is_available():
        pytest.skip("torch sees no GPU")
    copied = shutil.copytree(demo_checkpoint, tmp_path / "model")
    place = Placement(context=512, prompt_tokens=256, gpu_layers=7, gpu_count=1)
    found = run_trial(TrialRequest(kind="speed", model_path=str(copied), placement=place, budget_seconds=10)).speed
    assert found is not None and found.memory.devices
    allocated = sum(b.size_bytes for b in found.memory.buffers if b.kind == "allocated")
    reserved = sum(b.size_bytes for b in found.memory.buffers if b.kind == "reserved")
    weights = sum(file.stat().st_size for file in artifact_files(copied))
    assert 0.9 * weights < allocated <= reserved
    assert max(device.used_bytes for device in found.memory.devices) >= reserved
    assert found.prefill.median > found.decode.median > 0


class _Clock:
    """A vLLM whose time is arithmetic: 1 ms for each token of a prompt, 20 ms for each generated one."""

    def __init__(self) -> None:
        self.now = 0.0
        self.opened: dict[str, Any] = {}

    def module(self) -> types.ModuleType:
        clock, made = self, types.ModuleType("vllm")

        class LLM:
            def __init__(self, **arguments: Any) -> None:
                clock.opened = arguments

            def get_tokenizer(self) -> types.SimpleNamespace:
                return types.SimpleNamespace(vocab_size=2048)

            def generate(self, prompts: list[dict[str, list[int]]], how: dict[str, Any], use_tqdm: bool) -> None:
                clock.now += 0.001 * len(prompts[0]["prompt_token_ids"]) + 0.02 * how["max_tokens"]

        made.LLM, made.SamplingParams = LLM, dict  # type: ignore[attr-defined]
        return made


def test_vllm_is_timed_by_what_a_longer_answer_takes_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from planner.verify import vllm_speed

    clock = _Clock()
    monkeypatch.setitem(sys.modules, "vllm", clock.module())
    monkeypatch.setattr("time.perf_counter", lambda: clock.now)
    place = Placement(context=1024, prompt_tokens=480, depth=300, sequences=2, gpu_layers=7, gpu_count=1)
    found = vllm_speed.measure_speed(
        tmp_path, place, threads=2, cache_bytes=1000, budget_seconds=60, progress=lambda *_: None
    )
    assert found.runtime == "vllm" and found.decode.median == pytest.approx(50)
    assert found.prefill.median == pytest.approx(480 / 0.5)  # the one token at the end of a prompt is part of it
    assert clock.opened["max_model_len"] == 1024 and clock.opened["max_num_seqs"] == 2
    assert clock.opened["kv_cache_memory_bytes"] == 1050 and not clock.opened["enable_prefix_caching"]


def test_vllm_measures_only_where_it_is_installed_and_a_cuda_gpu_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    from planner.methods import awq
    from planner.workflow.survey import survey

    variant = awq.variant("4bit")
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert verifying.runnable(variant, survey("rtx-4090")).runtime == "transformers"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert verifying.runnable(variant, survey("rtx-4090")).runtime == "vllm"
    assert verifying.runnable(variant, survey("rx-7900-xtx")).runtime == "transformers"
    assert verifying.runnable(variant, None).runtime == "transformers"


@pytest.mark.gpu
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("method", "type_", "environment"),
    [
        ("none", "bf16", "bitsandbytes"),
        ("bitsandbytes", "nf4", "bitsandbytes"),
        ("bitsandbytes", "int8", "bitsandbytes"),
        ("gptq", "4bit", "gptqmodel"),
        ("awq", "4bit", "gptqmodel"),
    ],
)
def test_a_plan_for_a_gpu_is_applied_and_measured_there(
    tmp_path: Path, qplan: Qplan, method: str, type_: str, environment: str
) -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("torch sees no GPU")
    if environments.status(environment).python is None:
        pytest.skip(f"{environment} is not installed")
    plan = tmp_path / "plan.json"
    made = qplan("plan", "demo", "--methods", method, "--types", type_, "--context", "512", "-o", str(plan))
    assert made.returncode == 0, made.stderr
    applied = qplan("apply", str(plan), "--output", str(tmp_path), "--seconds", "60", "--json")
    assert applied.returncode in (0, 5), applied.stderr
    report = json.loads(applied.stdout)
    assert {FILE_BYTES, PEAK_MEMORY, PREFILL, DECODE, PERPLEXITY_RATIO, KL_DIVERGENCE} <= set(report["measured"])
    assert report["speed"]["gpu_layers"] > 0 and report["speed"]["memory"]["devices"]
    assert report["variant"]["runtime"] in ("transformers", "vllm")
    planned = json.loads(plan.read_text("utf-8"))["variant"]["runtime"]
    told = any("predictions beside it" in note for note in report["notes"])
    assert told == (planned != report["variant"]["runtime"])
    assert {m["quantity"] for m in report["measurements"]} >= {DECODE, PREFILL}  # later estimates say "measured"
