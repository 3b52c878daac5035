"""Real measurements of a tiny GGUF model with random weights, in real child processes."""

from __future__ import annotations

import dataclasses
import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("llama_cpp")
pytest.importorskip("gguf")

from planner.core.candidate import Placement, Variant
from planner.core.errors import ExecutionFailed, InputError, UsageError
from planner.core.hardware import Cpu, HardwareProfile, Memory
from planner.core.measurement import (
    DECODE,
    FILE_BYTES,
    KL_DIVERGENCE,
    PEAK_MEMORY,
    PERPLEXITY_RATIO,
    PREFILL,
    QUANTITIES,
)
from planner.core.plan import Expectation
from planner.execute import process
from planner.verify import run
from planner.verify.artifact import verify_artifact
from planner.verify.learned import Subject
from planner.verify.run import run_trial
from planner.verify.trial import QualityTrial, TrialRequest
from tests import verify_fixtures as fixtures

pytestmark = pytest.mark.slow

MACHINE = HardwareProfile(
    name="a desk",
    os="linux",
    cpu=Cpu(model="some CPU", architecture="x86_64", physical_core_count=1, logical_core_count=1),
    memory=Memory(total_bytes=8 << 30, available_bytes=6 << 30),
)
PLACEMENT = Placement(context=1024, threads=1, prompt_tokens=128)


@dataclasses.dataclass(frozen=True)
class Files:
    f16: Path
    q8: Path
    q4: Path
    spoiled: Path
    text: Path


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = tmp_path_factory.mktemp("verify")
    f16 = fixtures.write_tiny_llama(folder / "f16.gguf")
    spoiled = fixtures.write_tiny_llama(folder / "spoiled.gguf", spoil=True)
    text = folder / "text.txt"
    text.write_text(fixtures.sample_text())
    return Files(
        f16=f16,
        q8=fixtures.quantize(f16, folder / "q8.gguf", "Q8_0"),
        q4=fixtures.quantize(f16, folder / "q4.gguf", "Q4_0"),
        spoiled=spoiled,
        text=text,
    )


def quality(files: Files, model: Path, reference: Path | None = None, **changes: object) -> QualityTrial:
    asked = TrialRequest(
        kind="quality",
        model_path=str(model),
        reference_path=None if reference is None else str(reference),
        text_path=str(files.text),
        placement=PLACEMENT,
        repack=False,
        max_chunks=6,
    )
    found = run_trial(dataclasses.replace(asked, **changes)).quality
    assert found is not None
    return found


def test_a_model_against_itself_loses_nothing(files: Files) -> None:
    found = quality(files, files.q8, files.q8)
    assert found.comparison is not None
    assert found.comparison.kl_mean_nats == 0
    assert found.comparison.log_ratio == 0
    assert found.comparison.same_top_fraction == 1
    assert (found.chunk_count, found.token_count) == (6, 6 * 255)


def test_fewer_bits_diverge_more_and_runs_agree(files: Files) -> None:
    q8, q4 = quality(files, files.q8, files.f16), quality(files, files.q4, files.f16)
    assert q8.comparison is not None and q4.comparison is not None
    assert 0 < q8.comparison.kl_mean_nats < q4.comparison.kl_mean_nats / 10
    assert q4.comparison.kl_median_nats < q4.comparison.kl_quantile_99_nats <= q4.comparison.kl_maximum_nats
    assert q4.comparison.same_top_fraction < q8.comparison.same_top_fraction < 1
    assert abs(q8.comparison.log_ratio) < 4 * q8.comparison.log_ratio_standard_error + 1e-3
    assert quality(files, files.q4, files.f16) == q4


def test_perplexity_equals_an_independent_computation(files: Files) -> None:
    """One sequence a batch and Python floats; four sequences a batch move the fifth digit."""
    import ctypes

    import llama_cpp

    parameters = llama_cpp.llama_model_default_params()
    parameters.use_extra_bufts = False
    model = llama_cpp.llama_model_load_from_file(str(files.q8).encode(), parameters)
    vocabulary = llama_cpp.llama_model_get_vocab(model)
    size = llama_cpp.llama_vocab_n_tokens(vocabulary)
    options = llama_cpp.llama_context_default_params()
    options.n_ctx = options.n_batch = options.n_ubatch = 512
    options.n_threads = options.n_threads_batch = 1
    context = llama_cpp.llama_init_from_model(model, options)
    data = files.text.read_bytes().removesuffix(b"\n")
    buffer = (ctypes.c_int32 * (len(data) + 2))()
    count = llama_cpp.llama_tokenize(vocabulary, data, len(data), buffer, len(buffer), True, False)
    tokens, losses = list(buffer[:count]), []
    batch = llama_cpp.llama_batch_init(512, 0, 1)
    for chunk in range(2):
        part = tokens[chunk * 512 : chunk * 512 + 512]
        part[0] = llama_cpp.llama_vocab_bos(vocabulary)
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        batch.n_tokens = 512
        for i, token in enumerate(part):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = token, i, 1, 0
            batch.logits[i] = i >= 256
        assert llama_cpp.llama_decode(context, batch) == 0
        for position in range(256, 511):
            row = llama_cpp.llama_get_logits_ith(context, position)[:size]
            top = max(row)
            losses.append(top + math.log(math.fsum(math.exp(x - top) for x in row)) - row[part[position + 1]])
    llama_cpp.llama_batch_free(batch)
    llama_cpp.llama_free(context)
    llama_cpp.llama_model_free(model)
    found = quality(files, files.q8, max_chunks=2)
    assert found.comparison is None
    assert found.perplexity.value == pytest.approx(math.exp(math.fsum(losses) / len(losses)), rel=5e-5)


def test_the_text_must_have_two_chunks(files: Files, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("too short")
    with pytest.raises(InputError) as caught:
        quality(files, files.q8, files.f16, text_path=str(short))
    assert caught.value.code == "text-too-short"
    (tmp_path / "latin.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError) as caught:
        quality(files, files.q8, files.f16, text_path=str(tmp_path / "latin.txt"))
    assert caught.value.code == "bad-text"


def test_not_finite_logits_are_told(files: Files) -> None:
    with pytest.raises(ExecutionFailed) as caught:
        quality(files, files.spoiled, files.f16)
    assert caught.value.code == "not-finite"


@pytest.mark.parametrize(("kv_type", "flash"), [("f16", True), ("f16", False), ("q8_0", True)])
def test_speed_and_memory(files: Files, kv_type: str, flash: bool) -> None:
    placement = dataclasses.replace(PLACEMENT, kv_type=kv_type, flash_attention=flash, depth=64)
    seen: list[str] = []
    asked = TrialRequest(kind="speed", model_path=str(files.q8), placement=placement, repack=False, budget_seconds=5)
    found = run_trial(asked, progress=lambda what, fraction: seen.append(what)).speed
    assert found is not None
    for rate in (found.prefill, found.decode):
        assert 1 <= len(rate.samples) <= 5
        assert all(sample > 0 for sample in rate.samples)
        assert min(rate.seconds_per_sample) >= 0.2
    assert (found.depth, found.prompt_tokens, found.threads) == (64, 128, 1)
    memory = found.memory
    assert memory.filled_tokens == 1024
    assert memory.peak_bytes == memory.peak_rss_bytes - memory.baseline_bytes
    buffers = {(b.kind, b.name): b.size_bytes for b in memory.buffers}
    kv = sum(size for (kind, _), size in buffers.items() if kind == "KV")
    per_row = 128 * 34 // 32 if kv_type == "q8_0" else 128 * 2  # two KV heads of 64
    assert kv == pytest.approx(2 * 2 * 1024 * per_row, abs=0.01 * 2**20)  # layers, K and V, cells; to 0.01 MiB
    assert memory.peak_bytes > kv + files.q8.stat().st_size // 2
    assert {"prefill", "decode"} <= set(seen)


def test_a_larger_context_takes_more_memory(files: Files) -> None:
    def peak(context: int) -> int:
        placement = dataclasses.replace(PLACEMENT, context=context, prompt_tokens=64)
        asked = TrialRequest(kind="speed", model_path=str(files.q8), placement=placement, budget_seconds=2)
        found = run_trial(dataclasses.replace(asked, repack=False, repetitions=1)).speed
        assert found is not None
        return found.memory.peak_bytes

    more = 16384 - 1024
    assert peak(16384) - peak(1024) == pytest.approx(2 * 2 * more * 256, rel=0.5)


def test_what_llama_cpp_refuses_is_an_error(files: Files) -> None:
    def speed(**changes: object) -> None:
        placement = dataclasses.replace(PLACEMENT, **changes)  # type: ignore[arg-type]
        run_trial(TrialRequest(kind="speed", model_path=str(files.q8), placement=placement, repack=False))

    with pytest.raises(ExecutionFailed) as caught:
        speed(kv_type="q8_0", flash_attention=False)
    assert caught.value.code == "context-refused"
    with pytest.raises(UsageError):
        speed(kv_type="q3_9")
    with pytest.raises(UsageError):
        speed(context=16)


@pytest.fixture
def killer(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Kills the child when it says that it decodes."""
    children: list[int] = []
    start = process.subprocess.Popen

    def popen(*arguments: object, **named: object) -> object:
        child = start(*arguments, **named)
        children.append(child.pid)
        return child

    monkeypatch.setattr(process.subprocess, "Popen", popen)
    yield children
    for pid in children:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_a_killed_child_is_an_execution_that_failed(files: Files, killer: list[int]) -> None:
    def kill(what: str, fraction: float) -> None:
        if what == "decode":
            os.kill(killer[0], signal.SIGKILL)

    asked = TrialRequest(kind="speed", model_path=str(files.q8), placement=PLACEMENT, repack=False)
    with pytest.raises(ExecutionFailed, match="SIGKILL") as caught:
        run_trial(asked, progress=kill)
    assert caught.value.code == "child-died"
    assert "memory" in caught.value.hint
    assert len(killer) == 1


def test_a_fault_in_the_special_kernels_is_followed_by_a_run_without_them(files: Files, killer: list[int]) -> None:
    def kill(what: str, fraction: float) -> None:
        if what == "prefill" and len(killer) == 1:
            os.kill(killer[0], signal.SIGSEGV)

    asked = TrialRequest(kind="speed", model_path=str(files.f16), placement=PLACEMENT, budget_seconds=2)
    found = run_trial(asked, progress=kill)
    assert found.speed is not None and not found.speed.repack
    assert any("--no-repack" in note for note in found.notes)
    assert len(killer) == 2


def test_ctrl_c_ends_the_child(files: Files, killer: list[int]) -> None:
    def interrupt(what: str, fraction: float) -> None:
        if what == "prefill":
            raise KeyboardInterrupt

    asked = TrialRequest(kind="speed", model_path=str(files.q8), placement=PLACEMENT, repack=False)
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_trial(asked, progress=interrupt)
    assert time.monotonic() - began < run._STARTUP_SECONDS
    assert len(killer) == 1


def test_a_child_that_takes_too_long_is_ended(files: Files, killer: list[int]) -> None:
    asked = TrialRequest(kind="speed", model_path=str(files.q8), placement=PLACEMENT, repack=False)
    with pytest.raises(ExecutionFailed) as caught:
        run_trial(asked, timeout_seconds=0.05)
    assert caught.value.code == "timeout"
    assert threading.active_count() < 20


def subject(type_name: str) -> Subject:
    variant = Variant(method="gguf", format="gguf", runtime="llama.cpp", type=type_name)
    return Subject(model="tiny", model_sha256="00", variant=variant, decode_weights_bytes=1e6)


def test_verify_artifact_measures_everything(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("planner.verify.crowding.REMEMBER_SHARE", 0)  # the tests may run on a busy machine
    size = files.q4.stat().st_size
    expected = [
        Expectation(quantity=FILE_BYTES, predicted=size, low=size, high=size, basis="formula", source="test"),
        Expectation(quantity=DECODE, predicted=1e9, low=9e8, high=2e9, basis="formula", source="test"),
    ]
    found = verify_artifact(
        files.q4,
        subject=subject("Q4_0"),
        placement=PLACEMENT,
        hardware=MACHINE,
        reference=files.f16,
        text=files.text,
        expectations=expected,
        budget_seconds=10,
        max_chunks=4,
    )
    assert set(found.measured) == set(QUANTITIES)
    by_name = {m.quantity: m for m in found.measurements}
    assert by_name[FILE_BYTES].value == size
    assert by_name[DECODE].low <= by_name[DECODE].value <= by_name[DECODE].high
    assert by_name[DECODE].predicted == 1e9 and by_name[DECODE].weights_bytes == 1e6
    assert by_name[PREFILL].conditions.prompt_tokens == 128
    assert by_name[PEAK_MEMORY].value > size
    assert by_name[KL_DIVERGENCE].low <= by_name[KL_DIVERGENCE].value <= by_name[KL_DIVERGENCE].high
    assert by_name[PERPLEXITY_RATIO].value == pytest.approx(1, abs=0.2)
    assert by_name[DECODE].hardware_identity == MACHINE.identity()
    assert [v.ok for v in found.verdicts] == [True, False]
    assert not found.ok
    assert any("4 of " in note for note in found.notes)


def test_without_a_reference_quality_is_a_note(files: Files) -> None:
    found = verify_artifact(files.q4, subject=subject("Q4_0"), placement=PLACEMENT, hardware=MACHINE, budget_seconds=3)
    assert set(found.measured) == {FILE_BYTES, PEAK_MEMORY, PREFILL, DECODE}
    assert found.ok
    assert any("no 16-bit model" in note for note in found.notes)


def test_a_plan_for_a_gpu_is_not_measured_on_a_cpu_build(files: Files) -> None:
    import llama_cpp

    if llama_cpp.llama_supports_gpu_offload():
        pytest.skip("this llama.cpp has GPU support")
    found = verify_artifact(
        files.q4,
        subject=subject("Q4_0"),
        placement=dataclasses.replace(PLACEMENT, gpu_layers=3, gpu_count=1),
        hardware=MACHINE,
        reference=files.f16,
        text=files.text,
        budget_seconds=6,
        max_chunks=4,
    )
    assert set(found.measured) == {FILE_BYTES, PERPLEXITY_RATIO, KL_DIVERGENCE}
    assert any("without GPU support" in note for note in found.notes)


def test_models_too_large_for_the_memory_are_not_compared(files: Files) -> None:
    small = dataclasses.replace(MACHINE, memory=Memory(total_bytes=1 << 20, available_bytes=1 << 20))
    found = verify_artifact(
        files.q4,
        subject=subject("Q4_0"),
        placement=PLACEMENT,
        hardware=small,
        reference=files.f16,
        text=files.text,
        budget_seconds=4,
    )
    assert KL_DIVERGENCE not in found.measured
    assert any("of RAM is free" in note for note in found.notes)


def test_the_demo_model_loses_more_with_fewer_bits(tmp_path: Path) -> None:
    from planner.convert import convert_checkpoint
    from planner.core.data import data_path

    f16 = tmp_path / "f16.gguf"
    convert_checkpoint(data_path("demo/model"), f16, out_type="f16")
    found = {}
    for name in ("Q8_0", "Q4_K_M", "Q2_K"):
        model = fixtures.quantize(f16, tmp_path / f"{name}.gguf", name)
        asked = TrialRequest(
            kind="quality",
            model_path=str(model),
            reference_path=str(f16),
            text_path=str(data_path("demo/heldout.txt")),
            placement=PLACEMENT,
            repack=False,
            max_chunks=12,
        )
        trial = run_trial(asked).quality
        assert trial is not None and trial.comparison is not None
        found[name] = trial.comparison
    assert found["Q8_0"].kl_mean_nats < found["Q4_K_M"].kl_mean_nats / 5 < found["Q2_K"].kl_mean_nats / 25
    assert found["Q2_K"].log_ratio > 3 * found["Q2_K"].log_ratio_standard_error
    assert found["Q8_0"].same_top_fraction > found["Q4_K_M"].same_top_fraction > found["Q2_K"].same_top_fraction
