"""Verdicts, the report, the arithmetic of perplexity and KL divergence, and the child process, without a model."""

from __future__ import annotations

import dataclasses
import json
import math
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.core.candidate import Placement, Variant
from planner.core.errors import ExecutionFailed, InputError, QplanError
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
from planner.verify.artifact import VerificationResult, verify_artifact
from planner.verify.learned import Subject
from planner.verify.report import report_document, write_report
from planner.verify.run import run_trial
from planner.verify.trial import MemoryTrial, Samples, SpeedTrial, TrialRequest, TrialResult
from planner.verify.verdicts import (
    BETTER,
    INSIDE,
    NOT_MEASURED,
    OUTSIDE,
    Measured,
    all_ok,
    error_notes,
    position,
    verdicts,
)

MACHINE = HardwareProfile(
    name="a desk",
    os="linux",
    cpu=Cpu(model="some CPU", architecture="x86_64", physical_core_count=1, logical_core_count=1),
    memory=Memory(total_bytes=8 << 30, available_bytes=6 << 30),
)
SUBJECT = Subject(
    model="tiny",
    model_sha256="00",
    variant=Variant(method="gguf", format="gguf", runtime="llama.cpp", type="Q8_0"),
)


def expectation(quantity: str, predicted: float, low: float, high: float) -> Expectation:
    return Expectation(quantity=quantity, predicted=predicted, low=low, high=high, basis="formula", source="test")


def measured(value: float) -> Measured:
    return Measured(value=value, low=value, high=value)


@pytest.mark.parametrize(
    ("quantity", "value", "where"),
    [
        (FILE_BYTES, 100, INSIDE),
        (FILE_BYTES, 89, OUTSIDE),
        (FILE_BYTES, 111, OUTSIDE),
        (PEAK_MEMORY, 89, BETTER),
        (PEAK_MEMORY, 111, OUTSIDE),
        (PREFILL, 89, OUTSIDE),
        (PREFILL, 111, BETTER),
        (DECODE, 90, INSIDE),
        (DECODE, 110, INSIDE),
        (DECODE, 89, OUTSIDE),
        (DECODE, 111, BETTER),
        (PERPLEXITY_RATIO, 89, BETTER),
        (PERPLEXITY_RATIO, 111, OUTSIDE),
        (KL_DIVERGENCE, 0, BETTER),
        (KL_DIVERGENCE, 111, OUTSIDE),
        (DECODE, math.nan, OUTSIDE),
    ],
)
def test_where_a_measurement_lies(quantity: str, value: float, where: str) -> None:
    assert position(quantity, 90, 110, value) == where


def test_verdicts_stand_in_the_contracts_order_with_ratios() -> None:
    expected = [expectation(quantity, 100, 90, 110) for quantity in reversed(QUANTITIES)]
    judged = verdicts(expected, {DECODE: measured(50), FILE_BYTES: measured(100)})
    assert [v.quantity for v in judged] == list(QUANTITIES)
    by_name = {v.quantity: v for v in judged}
    assert (by_name[DECODE].ok, by_name[DECODE].ratio) == (False, 0.5)
    assert (by_name[FILE_BYTES].ok, by_name[FILE_BYTES].position) == (True, INSIDE)
    assert (by_name[PREFILL].ok, by_name[PREFILL].measured, by_name[PREFILL].position) == (None, None, NOT_MEASURED)
    assert not all_ok(judged)
    assert all_ok([v for v in judged if v.quantity != DECODE])


def test_a_loss_on_little_text_is_judged_with_its_own_error() -> None:
    expected = [expectation(KL_DIVERGENCE, 0.02, 0.01, 0.04)]
    sure = Measured(value=0.045, low=0.0445, high=0.0455)
    unsure = Measured(value=0.045, low=0.033, high=0.057)
    (told,) = verdicts(expected, {KL_DIVERGENCE: sure})
    (open_,) = verdicts(expected, {KL_DIVERGENCE: unsure})
    assert (told.position, told.within_error, error_notes([told])) == (OUTSIDE, False, ())
    assert (open_.position, open_.ok, open_.within_error) == (INSIDE, True, True)
    assert open_.error == pytest.approx(0.012 * 1.96 / 1.2816) and (open_.low, open_.high) == (0.01, 0.04)
    assert "more text would tell" in error_notes([open_])[0]


@given(st.floats(0.9, 1.5), st.one_of(st.just(0.0), st.floats(1e-6, 0.2)))
def test_only_a_sampled_quantity_has_an_error_and_it_only_widens(value: float, half: float) -> None:
    spread = Measured(value=value, low=value - half, high=value + half)
    for quantity in QUANTITIES:
        planned = expectation(quantity, 1.1, 1.0, 1.2)
        (judged,) = verdicts([planned], {quantity: spread})
        sampled = quantity in (PERPLEXITY_RATIO, KL_DIVERGENCE)
        assert (judged.error is not None) == (sampled and half > 0)
        alone = position(quantity, 1.0, 1.2, value)
        assert judged.position == alone or (sampled and judged.position == INSIDE)


def test_a_prediction_of_zero_has_no_ratio() -> None:
    (judged,) = verdicts([expectation(KL_DIVERGENCE, 0, 0, 0.01)], {KL_DIVERGENCE: measured(0.002)})
    assert judged.ratio is None and judged.ok


@given(st.floats(0.1, 10), st.floats(0, 10), st.floats(0, 10), st.floats(0, 100))
def test_inside_means_inside(predicted: float, below: float, above: float, value: float) -> None:
    low, high = predicted - below, predicted + above
    for quantity in QUANTITIES:
        assert (position(quantity, low, high, value) == INSIDE) == (low <= value <= high)


def test_median_of_samples() -> None:
    def median(*samples: float) -> float:
        return Samples(samples=samples, tokens_per_sample=(1,), seconds_per_sample=(1.0,)).median

    assert (median(3, 1, 2), median(4, 1, 2, 3), median(7)) == (2, 2.5, 7)


def speed_trial(*, cpu_seconds: float, gpu_layers: int = 0) -> SpeedTrial:
    taken = Samples(samples=(10.0,), tokens_per_sample=(10,), seconds_per_sample=(1.0,), cpu_seconds=cpu_seconds)
    memory = MemoryTrial(baseline_bytes=50, peak_rss_bytes=150, peak_bytes=100, filled_tokens=256)
    return SpeedTrial(
        prefill=dataclasses.replace(taken, cpu_seconds=2.0),
        decode=taken,
        memory=memory,
        load_seconds=0.1,
        threads=2,
        context=256,
        prompt_tokens=64,
        depth=0,
        gpu_layers=gpu_layers,
        flash_attention=True,
        repack=True,
    )


@pytest.mark.parametrize(
    ("cpu_seconds", "gpu_layers", "noted", "remembered"),
    [(2.0, 0, False, True), (1.6, 0, True, True), (0.6, 0, True, False), (0.6, 33, False, True)],
)
def test_a_speed_taken_on_busy_cores_is_told_and_not_learned_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cpu_seconds: float, gpu_layers: int, noted: bool, remembered: bool
) -> None:
    trial = TrialResult(
        speed=speed_trial(cpu_seconds=cpu_seconds, gpu_layers=gpu_layers), tool_version="llama-cpp-python 0.3.36"
    )
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 0) + bytes(64))
    monkeypatch.setattr("planner.verify.artifact.gguf_files", lambda artifact: (artifact,))
    monkeypatch.setattr("planner.verify.artifact.run_trial", lambda request, **_: trial)
    found = verify_artifact(path, subject=SUBJECT, placement=Placement(context=256), hardware=MACHINE)
    assert found.measured[DECODE].value == 10
    assert any("busy" in note for note in found.notes) == noted
    assert (DECODE in {m.quantity for m in found.measurements}) == remembered
    assert PREFILL in {m.quantity for m in found.measurements}


def result() -> VerificationResult:
    expected = [expectation(FILE_BYTES, 100, 90, 110), expectation(DECODE, 50, 40, 60)]
    values = {FILE_BYTES: measured(100)}
    return VerificationResult(
        artifact="model.gguf",
        measured=values,
        measurements=(),
        verdicts=verdicts(expected, values),
        ok=True,
        speed=None,
        quality=None,
        tool_version="llama-cpp-python 0.3.36",
        measured_at="2026-01-02T03:04:05+00:00",
        notes=("quality was not measured",),
    )


def test_report_has_the_contracts_keys(tmp_path: Path) -> None:
    document = report_document(result(), plan_sha256="ff", steps=[{"name": "quantize"}], hardware=MACHINE)
    path = tmp_path / "out" / "report.json"
    write_report(path, document)
    read = json.loads(path.read_text())
    assert read["format_version"] == "1.0"
    assert read["plan_sha256"] == "ff"
    assert read["artifact"] == "model.gguf"
    assert read["steps"] == [{"name": "quantize"}]
    assert read["predicted"] == {FILE_BYTES: 100, DECODE: 50}
    assert read["measured"] == {FILE_BYTES: 100}
    assert read["ok"] is True
    first, second = read["verdicts"]
    assert {"quantity", "predicted", "low", "high", "measured", "ok"} <= set(first)
    assert (second["measured"], second["ok"]) == (None, None)
    assert read["machine"]["identity"] == MACHINE.identity()
    assert read["notes"] == ["quality was not measured"]
    assert list(path.parent.iterdir()) == [path]


def test_report_refuses_numbers_json_has_not(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text("old")
    with pytest.raises(ValueError, match="JSON compliant"):
        write_report(path, {"measured": {DECODE: math.nan}})
    assert path.read_text() == "old"


# --- perplexity and KL divergence -------------------------------------------------------------------------------

logits_pair = st.integers(2, 12).flatmap(
    lambda vocab: st.lists(
        st.tuples(
            st.lists(st.floats(-30, 30, width=32), min_size=vocab, max_size=vocab),
            st.lists(st.floats(-30, 30, width=32), min_size=vocab, max_size=vocab),
            st.integers(0, vocab - 1),
        ),
        min_size=2,
        max_size=30,
    )
)


def naive_log_softmax(row: list[float]) -> list[float]:
    top = max(row)
    total = math.log(math.fsum(math.exp(value - top) for value in row))
    return [value - top - total for value in row]


@given(logits_pair)
@settings(max_examples=60, deadline=None)
def test_scores_equal_a_naive_implementation(rows: list[tuple[list[float], list[float], int]]) -> None:
    import numpy as np

    from planner.verify.perplexity import Scores

    scores = Scores()
    model, base, targets = (list(column) for column in zip(*rows, strict=True))
    half = len(rows) // 2
    for part in (slice(0, half), slice(half, None)):  # two chunks, as a text would come
        if rows[part]:
            scores.add(
                np.array(model[part], np.float32),
                np.array(targets[part]),
                np.array(base[part], np.float32),
                stored=False,
            )
    log_q, log_p = [naive_log_softmax(row) for row in model], [naive_log_softmax(row) for row in base]
    nll = [-row[target] for row, target in zip(log_q, targets, strict=True)]
    base_nll = [-row[target] for row, target in zip(log_p, targets, strict=True)]
    kl = [
        math.fsum(math.exp(p) * (p - q) for p, q in zip(row_p, row_q, strict=True))
        for row_p, row_q in zip(log_p, log_q, strict=True)
    ]
    count = len(rows)
    differences = [a - b for a, b in zip(nll, base_nll, strict=True)]
    mean = math.fsum(differences) / count
    error = math.sqrt(math.fsum((d - mean) ** 2 for d in differences) / count / (count - 1))
    compared = scores.comparison()
    assert compared is not None
    assert math.log(scores.perplexity().value) == pytest.approx(math.fsum(nll) / count, rel=1e-5, abs=1e-5)
    assert math.log(compared.reference.value) == pytest.approx(math.fsum(base_nll) / count, rel=1e-5, abs=1e-5)
    assert compared.log_ratio == pytest.approx(mean, rel=1e-4, abs=2e-5)
    assert compared.log_ratio_standard_error == pytest.approx(error, rel=1e-4, abs=2e-5)
    assert compared.kl_mean_nats == pytest.approx(math.fsum(kl) / count, rel=1e-4, abs=2e-5)
    assert compared.kl_maximum_nats == pytest.approx(max(kl), rel=1e-4, abs=2e-5)
    assert compared.kl_mean_nats >= -1e-5


@given(logits_pair)
@settings(max_examples=30, deadline=None)
def test_equal_logits_lose_nothing_at_all(rows: list[tuple[list[float], list[float], int]]) -> None:
    import numpy as np

    from planner.verify.perplexity import Scores

    scores, logits = Scores(), np.array([row for row, _, _ in rows], np.float32)
    scores.add(logits, np.array([target for _, _, target in rows]), logits.copy(), stored=False)
    compared = scores.comparison()
    assert compared is not None
    assert (compared.kl_mean_nats, compared.kl_maximum_nats, compared.log_ratio) == (0, 0, 0)
    assert compared.same_top_fraction == 1


def test_blocks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    import numpy as np

    from planner.verify import perplexity

    rng = np.random.default_rng(5)
    model, base = (rng.standard_normal((64, 100)).astype(np.float32) for _ in range(2))
    targets = rng.integers(0, 100, 64)

    def compared() -> object:
        scores = perplexity.Scores()
        scores.add(model, targets, base, stored=False)
        return scores.perplexity(), scores.comparison()

    whole = compared()
    monkeypatch.setattr(perplexity, "_BLOCK_ELEMENTS", 700)
    assert compared() == whole


def test_rounding_as_the_logits_file_of_llama_perplexity_moves_little() -> None:
    import numpy as np

    from planner.verify.perplexity import Scores, log_softmax, stored_log_softmax

    rng = np.random.default_rng(6)
    logits = (rng.standard_normal((50, 1000)) * 4).astype(np.float32)
    shifted, log_sum = log_softmax(logits)
    stored, zero = stored_log_softmax(logits)
    exact = shifted - log_sum[:, None]
    kept = exact > -16 + log_sum.min()
    assert np.all(zero == 0)
    assert np.abs(stored - exact)[kept & (shifted > -16)].max() < 16 / 65535
    noisy = logits + (rng.standard_normal(logits.shape) * 0.1).astype(np.float32)
    results = []
    for as_stored in (False, True):
        scores = Scores()
        scores.add(noisy, np.zeros(50, int), logits, stored=as_stored)
        results.append(scores.comparison())
    assert results[0].kl_mean_nats == pytest.approx(results[1].kl_mean_nats, abs=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("whose", ["model", "reference"])
def test_logits_that_are_not_finite_are_an_error(bad: float, whose: str) -> None:
    import numpy as np

    from planner.verify.perplexity import Scores

    good, spoiled = np.zeros((3, 8), np.float32), np.zeros((3, 8), np.float32)
    spoiled[1, 4] = bad
    pair = (spoiled, good) if whose == "model" else (good, spoiled)
    with pytest.raises(ExecutionFailed, match="not finite") as caught:
        Scores().add(pair[0], np.zeros(3, int), pair[1], stored=False)
    assert caught.value.code == "not-finite"


# --- the child process and bad files ----------------------------------------------------------------------------


def request(path: Path, **changes: object) -> TrialRequest:
    values = {"kind": "speed", "model_path": str(path), "placement": Placement(context=256, threads=1)}
    return TrialRequest(**{**values, **changes})  # type: ignore[arg-type]


def test_an_unknown_kind_of_trial_is_refused_by_the_child(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    with pytest.raises(InputError, match="no kind of trial"):
        run_trial(request(tmp_path / "x", kind="dance"))


def start_child() -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "planner.verify.child"]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize(("line", "code"), [('{"kind": 3}', "bad-document"), ("no JSON", "bad-document")])
def test_the_child_refuses_a_request_that_is_none(line: str, code: str) -> None:
    with start_child() as child:
        assert child.stdin and child.stdout and child.stderr
        child.stdin.write(line + "\n")
        child.stdin.flush()
        answer = json.loads(child.stdout.readline())
        assert child.wait(30) == 1
        assert answer["error"]["code"] == code
        assert "Traceback" not in child.stderr.read()


def test_the_child_ends_with_its_parent() -> None:
    with start_child() as child:
        child.communicate('{"kind": "speed"', timeout=30)
        assert child.returncode != 0


def test_bad_files_are_found_before_a_child_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "text.gguf").write_text("hello, this is no model " * 10)
    (tmp_path / "empty.gguf").touch()
    (tmp_path / "counts.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 2**63, 2**63))
    (tmp_path / "folder").mkdir()
    (tmp_path / "m-00001-of-00002.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr("planner.verify.artifact.run_trial", None)
    for name in ("missing.gguf", "text.gguf", "empty.gguf", "counts.gguf", "folder", "m-00001-of-00002.gguf"):
        with pytest.raises(InputError) as caught:
            verify_artifact(
                tmp_path / name, subject=SUBJECT, placement=Placement(context=256, threads=1), hardware=MACHINE
            )
        assert name.split("-")[0] in str(caught.value)


def test_a_gguf_of_garbage_is_a_clear_error(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    path = tmp_path / "garbage.gguf"
    path.write_bytes(b"GGUF" + bytes([3, 0, 0, 0]) + b"\xff" * 64)
    with pytest.raises(QplanError) as caught:
        run_trial(request(path))
    assert caught.value.code == "model-refused"
    assert "Traceback" not in str(caught.value)
