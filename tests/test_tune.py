"""``qplan tune``: the search on synthetic timings, the settings that are tried, what is kept, and a real run."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.cli.tune import regret_line
from planner.core import rates as kinds
from planner.core.candidate import Candidate, Placement
from planner.core.errors import Exit, InputError
from planner.core.hardware import Cpu, HardwareProfile, Memory
from planner.core.measurement import DECODE, PREFILL, Calibration
from planner.core.model import shape_sha256
from planner.core.rates import Rate, Rates
from planner.core.tuned import Tuned
from planner.core.units import GIB, MIB
from planner.core.workload import Workload
from planner.decide import decide
from planner.decide import tuning as space_of
from planner.estimate.speed_measured import exact
from planner.methods import gguf
from planner.models import catalog
from planner.probe import load_profile
from planner.store import Store, read_calibration
from planner.verify import alternating, tune_run
from planner.verify.halving import FINALISTS, RUN_SIGMA, Timed, added, regret, rung_count, search, timed
from planner.verify.run import FAULTS
from planner.verify.tuning_trial import FAILED, MEASURED, NOT_REACHED, TuneAnswer, TuneRequest, TuneRow
from planner.workflow import tuning, tuning_result
from planner.workflow.recommend import recommend_for
from planner.workflow.tuning_result import Tried, worth_keeping
from tests.conftest import Qplan

TINY = catalog.lookup("tinyllama-1.1b")
assert TINY is not None
Q4 = gguf.variant("Q4_K_M")


def machine(physical: int = 8, logical: int = 16, ram_gib: int = 64) -> HardwareProfile:
    cpu = Cpu(model="a processor", architecture="x86_64", physical_core_count=physical, logical_core_count=logical)
    memory = Memory(total_bytes=ram_gib * GIB, available_bytes=ram_gib * GIB, bandwidth_bytes_per_second=5e10)
    return HardwareProfile(name="a desk", os="linux", cpu=cpu, memory=memory)


def chosen(hardware: HardwareProfile, calibration: Calibration | None = None, **wish: object) -> Candidate:
    workload = Workload(context=2048, methods=("gguf",), types=("Q4_K_M",), **wish)  # type: ignore[arg-type]
    found = decide(TINY, hardware, workload, calibration).chosen
    assert found is not None
    return found


# the search


@settings(max_examples=200, deadline=None)
@given(costs=st.lists(st.floats(0.01, 100), min_size=1, max_size=40, unique=True))
def test_without_noise_the_search_finds_the_cheapest(costs: list[float]) -> None:
    found = search(len(costs), lambda alive, _: {one: costs[one] for one in alive})
    assert found.best == min(range(len(costs)), key=lambda one: costs[one])
    assert set(found.ranking) == set(range(len(costs)))


@settings(max_examples=200, deadline=None)
@given(
    costs=st.lists(st.floats(0.1, 10), min_size=2, max_size=40),
    noise=st.floats(0, 0.2),
    seed=st.integers(0, 1000),
)
def test_noise_costs_no_more_than_it_can_hide_in_each_rung(costs: list[float], noise: float, seed: int) -> None:
    chooser = random.Random(seed)

    def measure(alive: tuple[int, ...], _: int) -> Mapping[int, float]:
        return {one: costs[one] * (1 + chooser.uniform(-noise, noise)) for one in alive}

    found = search(len(costs), measure, keep={0})
    worst = ((1 + noise) / (1 - noise)) ** rung_count(len(costs))
    assert found.best is not None and costs[found.best] <= worst * min(costs) * 1.000001
    assert found.rungs[0] == max(found.rungs.values()), "what is kept is compared with the best to the end"


@settings(deadline=None)
@given(count=st.integers(1, 64), failing=st.sets(st.integers(0, 63)), keep=st.sets(st.integers(0, 63), max_size=2))
def test_what_fails_is_not_tried_again_and_half_stays(count: int, failing: set[int], keep: set[int]) -> None:
    asked: list[tuple[int, ...]] = []

    def measure(alive: tuple[int, ...], rungs_left: int) -> Mapping[int, float]:
        asked.append(alive)
        assert rungs_left == rung_count(count) - len(asked) + 1
        return {one: float(one + 1) for one in alive if one not in failing}

    found = search(count, measure, keep=keep)
    assert asked[0] == tuple(range(count)) and not failing & set(found.ranking)
    for before, after in itertools.pairwise(asked):
        assert not failing & set(after) and set(after) <= set(before)
        assert len(after) <= max(FINALISTS, (len(before) + 1) // 2) + len(keep)
    good = [one for one in range(count) if one not in failing]
    assert found.best == (good[0] if good else None)


@settings(max_examples=100, deadline=None)
@given(
    middle=st.floats(1e-4, 10),
    slower=st.floats(1.0, 2.0),
    spread=st.floats(0, 0.05),
    count=st.integers(2, 40),
    seed=st.integers(0, 1000),
)
def test_a_regret_has_the_true_one_inside_or_near(
    middle: float, slower: float, spread: float, count: int, seed: int
) -> None:
    chooser = random.Random(seed)
    best = timed([middle * (1 + chooser.uniform(-spread, spread)) for _ in range(count)])
    other = timed([middle * slower * (1 + chooser.uniform(-spread, spread)) for _ in range(count)])
    found = regret(other, best)
    assert found.low <= found.fraction <= found.high
    assert abs(found.fraction - (slower - 1)) <= 2.2 * slower * spread + 1e-9
    if slower > (1 + spread) / (1 - spread) * 1.2:
        assert not found.within_noise
    assert regret(best, best).within_noise and regret(best, best).fraction == 0


def test_more_samples_and_less_spread_make_a_time_surer() -> None:
    steady, shaky = [1.0, 1.001, 0.999, 1.0], [0.9, 1.1, 0.95, 1.05]
    assert timed(steady).sigma < timed(shaky).sigma and timed(steady * 4).sigma < timed(steady).sigma
    assert timed([1.0]).sigma > 2 * RUN_SIGMA, "one sample says little"
    both = added([(2.0, Timed(seconds=1.0, sigma=0.1)), (1.0, Timed(seconds=2.0, sigma=0.0))])
    assert both.seconds == 4.0 and both.sigma == pytest.approx(0.05)


# the settings that are tried


def test_settings_start_at_the_recommended_one_and_move_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(space_of, "usable_core_count", lambda: 16)
    hardware = machine()
    base = chosen(hardware).placement
    found = space_of.space(TINY, Q4, hardware, Workload(context=2048), base, "balanced").settings
    assert found[0] == base and len(set(found)) == len(found)
    assert {one.threads for one in found} == {8, 16, 7, 15, 4}
    assert {(one.flash_attention, one.kv_type) for one in found} == {(True, "f16"), (False, "f16"), (True, "q8_0")}
    assert {one.ubatch for one in found} == {128, 256, 512}, "a prompt of 512 fills no more"
    assert all(one.batch >= one.ubatch for one in found)


def test_decode_does_not_depend_on_the_micro_batch_and_threads_stay_within_the_cores(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(space_of, "usable_core_count", lambda: 8)
    hardware = machine()
    base = chosen(hardware).placement
    found = space_of.space(TINY, Q4, hardware, Workload(context=2048), base, "decode").settings
    assert {one.ubatch for one in found} == {512} and {one.threads for one in found} == {8, 7, 4}
    fixed = space_of.space(TINY, Q4, hardware, Workload(context=2048, threads=3), base, "decode").settings
    assert {one.threads for one in fixed[1:]} == {3}


def test_layers_that_do_not_fit_are_not_tried_and_say_what_they_lack() -> None:
    hardware = load_profile("rtx-3060")
    model = catalog.lookup("llama-2-13b")
    assert model is not None
    variant = gguf.variant("Q8_0")
    workload = Workload(context=4096, methods=("gguf",), types=("Q8_0",))
    best = decide(model, hardware, workload).chosen
    assert best is not None and 0 < best.placement.gpu_layers < model.offloadable_count
    found = space_of.space(model, variant, hardware, workload, best.placement, "decode")
    layers = {one.gpu_layers for one in found.settings if one.kv_type == "f16"}
    assert all(one.gpu_layers < model.offloadable_count for one in found.settings)
    assert (
        max(layers) == best.placement.gpu_layers and {best.placement.gpu_layers - 1, 14} <= layers and 0 not in layers
    )
    refused = {one.setting.gpu_layers: one.reason for one in found.unfit}
    assert "GiB" in refused[model.offloadable_count] and "does not fit on" in refused[model.offloadable_count]


# what is kept of it


def tried(setting: Placement, seconds: float, sigma: float = 0.001) -> Tried:
    return Tried(setting=setting, status=MEASURED, cost=Timed(seconds=seconds, sigma=sigma))


def test_a_difference_within_noise_keeps_the_recommended_setting() -> None:
    usual, other = Placement(context=512, threads=2), Placement(context=512, threads=1)
    assert worth_keeping([tried(other, 1.0, 0.02), tried(usual, 1.01, 0.02)], tried(usual, 1.01, 0.02)).setting == usual
    assert worth_keeping([tried(other, 1.0), tried(usual, 1.1)], tried(usual, 1.1)).setting == other


def test_a_lossy_cache_is_kept_only_for_a_gain_that_shows() -> None:
    usual = Placement(context=512, threads=2)
    exact_one, lossy = replace(usual, threads=1), replace(usual, threads=1, kv_type="q8_0")
    near = [tried(lossy, 1.0, 0.02), tried(exact_one, 1.01, 0.02), tried(usual, 2.0)]
    assert worth_keeping(near, near[2]).setting == exact_one
    far = [tried(lossy, 1.0), tried(exact_one, 1.2), tried(usual, 2.0)]
    assert worth_keeping(far, far[2]).setting == lossy


def kept(**changes: object) -> Tuned:
    base = Tuned(
        model="tinyllama-1.1b",
        model_sha256=shape_sha256(TINY),
        type="Q4_K_M",
        objective="balanced",
        on_gpu=False,
        placement=Placement(context=2048, threads=5, ubatch=256, flash_attention=False),
        gain_fraction=0.1,
        hardware_identity="x",
        measured_at="2026-11-26T12:00:00+00:00",
    )
    return replace(base, **changes)  # type: ignore[arg-type]


def test_the_store_keeps_one_tuning_for_each_model_type_and_device(tmp_path: Path) -> None:
    file = tmp_path / "measurements.sqlite3"
    newer = kept(gain_fraction=0.2, measured_at="2026-11-27T12:00:00+00:00")
    with Store(file) as store:
        for one in (kept(), kept(type="Q8_0"), newer, kept(hardware_identity="other")):
            store.add_tuned(one)
        assert store.tuned("x") == (kept(type="Q8_0"), newer)
    calibration = read_calibration("x", file)
    assert calibration is not None and calibration.tuned == (kept(type="Q8_0"), newer)
    with Store(file) as store:
        assert store.forget_tuned("x", kept().model_sha256) == 2 and store.forget_tuned("x", "other") == 0
        assert store.tuned("x") == () and len(store.tuned("other")) == 1


def decode_rate(threads: int, value: float) -> Rate:
    return Rate(work=kinds.DECODE_WEIGHTS, value=value, low=value, high=value, type="Q4_K", threads=threads)


def test_threads_are_tuned_before_calibrated_before_probed_and_it_is_said() -> None:
    hardware = machine()
    assert chosen(hardware).placement.threads == 8
    assert any("8 threads: the fast physical cores" in reason for reason in chosen(hardware).reasons)
    rates = Rates((decode_rate(8, 2e10), decode_rate(6, 2.5e10), decode_rate(1, 1e10)))
    calibrated = Calibration(hardware_identity="x", rates=rates)
    found = chosen(hardware, calibrated)
    assert found.placement.threads == 6 and any("qplan calibrate" in reason for reason in found.reasons)
    both = replace(calibrated, tuned=(kept(),))
    found = chosen(hardware, both)
    assert (found.placement.threads, found.placement.ubatch, found.placement.flash_attention) == (5, 256, False)
    assert any("`qplan tune` found them here" in reason and "5 threads" in reason for reason in found.reasons)
    assert chosen(hardware, both, threads=3).placement.threads == 3, "what the user says comes first"
    assert chosen(hardware, replace(calibrated, tuned=(kept(model_sha256="00"),))).placement.threads == 6
    other_type = replace(calibrated, tuned=(kept(type="Q8_0"),))
    assert (chosen(hardware, other_type).placement.threads, chosen(hardware, other_type).placement.ubatch) == (5, 512)


def test_a_thread_count_that_is_as_fast_as_the_usual_one_changes_nothing() -> None:
    rates = Rates((decode_rate(8, 2e10), decode_rate(16, 2.04e10), decode_rate(1, 1e10)))
    assert rates.best_threads() == 16 and rates.best_threads(usual=8) == 8
    assert Rates((decode_rate(8, 2e10),)).best_threads(usual=8) is None, "one count is no comparison"


def test_a_tuned_cache_without_flash_attention_still_gets_it_when_it_must_be_quantized() -> None:
    workload = Workload(context=2048, methods=("gguf",), types=("Q4_K_M",), kv_type="q8_0")
    here = Calibration(hardware_identity="x", tuned=(kept(),))
    found = decide(TINY, machine(), workload, here).chosen
    assert found is not None and found.placement.kv_type == "q8_0" and found.placement.flash_attention


def test_tuned_layers_count_for_the_context_they_were_tuned_for() -> None:
    hardware = load_profile("rtx-4090")
    placement = Placement(context=2048, threads=8, gpu_layers=10, gpu_count=1)
    here = Calibration(hardware_identity="x", tuned=(kept(on_gpu=True, placement=placement),))
    assert chosen(hardware, here).placement.gpu_layers == 10
    longer = Workload(context=1024, methods=("gguf",), types=("Q4_K_M",))
    found = decide(TINY, hardware, longer, here).chosen
    assert found is not None and found.placement.gpu_layers == TINY.offloadable_count
    assert chosen(hardware, here, cpu_only=True).placement.gpu_layers == 0


def result(monkeypatch: pytest.MonkeyPatch, layers: int | None = None, **rows: TuneRow) -> tuning_result.TuneResult:
    """Of a search in which the recommended setting takes 0.1 s a token, and ``rows`` what they say."""
    monkeypatch.setattr(tuning, "_layers", lambda *_: layers)
    workload = Workload(context=2048, methods=("gguf",), types=("Q4_K_M",))
    answer = recommend_for(TINY, machine(), workload)
    subject = tuning.subject_of(answer, tuning.TuneOptions(target="tinyllama-1.1b", type="Q4_K_M"))
    slow = TuneRow(status=MEASURED, decode_seconds=(0.1, 0.1, 0.1), prefill_seconds=(5.0, 5.0), rungs=2)
    late = [TuneRow(status=NOT_REACHED)] * (len(subject.request.settings) - 2)
    answered = TuneAnswer(
        rows=(rows.get("first", slow), rows["second"], *late),
        ranking=(1, 0),
        prompt_tokens=512,
        depth=0,
        context=768,
        tool_version="llama-cpp-python 0.3.36",
        seconds=10.0,
    )
    return tuning_result.result_of(subject, answered, notes=(), repacked=True)


FASTER = TuneRow(status=MEASURED, decode_seconds=(0.08, 0.08, 0.08), prefill_seconds=(4.0, 4.0), rungs=2)


def test_what_was_found_is_kept_and_is_measured_here_from_then_on(monkeypatch: pytest.MonkeyPatch) -> None:
    found = tuning_result.keep(result(monkeypatch, second=FASTER))
    assert found.best is found.chosen and found.kept is not None and found.best.setting != found.recommended.setting
    assert found.regret is not None and found.regret.fraction == pytest.approx(0.25) and not found.regret.within_noise
    assert found.kept.gain_fraction == pytest.approx(0.25)
    here = read_calibration(machine().identity())
    assert here is not None and here.tuned == (found.kept,)
    said = {(m.quantity, m.conditions.threads, m.conditions.ubatch): m for m in here.measurements}
    assert len(said) == 4 and sum(m.predicted is not None for m in said.values()) == 2
    as_run = replace(found.best.setting, depth=0, prompt_tokens=512)
    decode, prefill = (exact(TINY, Q4, as_run, here, quantity) for quantity in (DECODE, PREFILL))
    assert decode is not None and decode.value == pytest.approx(12.5)
    assert prefill is not None and prefill.value == pytest.approx(128)
    assert exact(TINY, Q4, replace(as_run, flash_attention=False), here, DECODE) is None
    assert exact(TINY, Q4, replace(as_run, ubatch=64), here, PREFILL) is None
    assert exact(TINY, Q4, replace(as_run, ubatch=64), here, DECODE) is not None, "a token fills no micro-batch"
    written = tuning_result.document(found)
    assert json.loads(json.dumps(written))["best"]["seconds"] == pytest.approx(4 + 128 * 0.08)
    assert any("time did not reach" in note for note in found.notes)


def test_what_was_tuned_can_be_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    tuning_result.keep(result(monkeypatch, second=FASTER))
    monkeypatch.setattr(tuning, "survey", machine)
    assert tuning.forget("llama-2-7b") == 0 and tuning.forget("tinyllama-1.1b") == 1
    here = read_calibration(machine().identity())
    assert here is not None and not here.tuned and here.measurements


def test_slices_leave_settings_but_no_speeds(monkeypatch: pytest.MonkeyPatch) -> None:
    found = tuning_result.keep(result(monkeypatch, layers=4, second=FASTER))
    assert found.kept is not None and "4 of 22 layers" in found.material
    here = read_calibration(machine().identity())
    assert here is not None and here.tuned and not here.measurements


def test_a_search_on_a_busy_machine_keeps_nothing_and_tells_no_regret(monkeypatch: pytest.MonkeyPatch) -> None:
    busy = replace(FASTER, disturbed=("decode",))
    found = tuning_result.keep(result(monkeypatch, second=busy))
    assert found.regret is None and found.kept is None and found.chosen is found.recommended
    assert read_calibration(machine().identity()) is None
    assert "no regret can be told" in regret_line(found)


def test_a_regret_is_said_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "25.0 %" in regret_line(result(monkeypatch, second=FASTER))
    near = replace(FASTER, decode_seconds=(0.0995, 0.1, 0.0999), prefill_seconds=(4.99, 5.0))
    found = result(monkeypatch, second=near)
    assert "within the noise" in regret_line(found) and found.chosen is found.recommended


@pytest.mark.parametrize(("free", "whole"), [(100 * GIB, True), (1 * GIB, False)])
def test_a_model_too_big_for_the_disk_is_stood_in_for_by_some_of_its_layers(
    monkeypatch: pytest.MonkeyPatch, free: int, whole: bool
) -> None:
    monkeypatch.setattr(tuning.shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    layers = tuning._layers(TINY, Q4, machine())
    assert layers is None if whole else layers is not None and 2 < layers < TINY.n_layer
    monkeypatch.setattr(tuning.shutil, "disk_usage", lambda _: SimpleNamespace(free=MIB))
    with pytest.raises(InputError, match="not even 2 layers"):
        tuning._layers(TINY, Q4, machine())


# the child


def request(count: int = 3, **changes: object) -> TuneRequest:
    base = TuneRequest(
        budget_seconds=60,
        settings=tuple(Placement(context=512, threads=n + 1) for n in range(count)),
        objective="balanced",
        prompt_tokens=512,
        answer_tokens=128,
        model="demo",
        type="Q4_K_M",
    )
    return replace(base, **changes)  # type: ignore[arg-type]


def answer_of(asked: TuneRequest) -> TuneAnswer:
    rows = tuple(TuneRow(status=MEASURED, decode_seconds=(1.0,), prefill_seconds=(1.0,)) for _ in asked.settings)
    ranking = tuple(range(len(rows)))
    return TuneAnswer(
        rows=rows, ranking=ranking, prompt_tokens=512, depth=0, context=768, tool_version="x", seconds=1.0
    )


def test_a_setting_that_kills_the_child_is_a_failed_row_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[TuneRequest] = []

    def attempt(one: TuneRequest, progress: tune_run.Progress) -> TuneAnswer:
        asked.append(one)
        for number, setting in enumerate(one.settings):
            progress(f"setting {number}: a line", 0.1)
            if setting.threads == 2:
                raise tune_run.ChildDied("tuning died: signal 9", numbers="", hint="", signal_number=9)
        return answer_of(one)

    monkeypatch.setattr(tune_run, "_attempt", attempt)
    found, repacked = tune_run.run_tuning(request())
    assert repacked and [one.status for one in found.rows] == [MEASURED, FAILED, MEASURED]
    assert "signal 9" in found.rows[1].note and found.ranking == (0, 2)
    assert len(asked) == 2 and asked[1].budget_seconds <= 60


def test_a_fault_of_the_kernels_is_tried_again_without_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def attempt(one: TuneRequest, progress: tune_run.Progress) -> TuneAnswer:
        progress("setting 0: a line", 0.1)
        if one.repack:
            raise tune_run.ChildDied("died", numbers="", hint="", signal_number=FAULTS[0])
        return answer_of(one)

    monkeypatch.setattr(tune_run, "_attempt", attempt)
    found, repacked = tune_run.run_tuning(request())
    assert not repacked and len(found.ranking) == 3


def test_a_piece_that_fails_leaves_the_others_running(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alternating, "others_running", lambda: 0)

    def refuse() -> None:
        raise tune_run.ChildDied("no room", numbers="", hint="", signal_number=None)

    bad = alternating.Piece("bad", refuse, lambda: None)
    good = alternating.Piece("good", lambda: None, lambda: None, wanted=2)
    failed: list[alternating.Piece] = []
    alternating.alternate([bad, good], until=1e18, failed=lambda piece, _: failed.append(piece))
    assert failed == [bad] and bad.done and len(good.samples) == 2


# the command


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("no-such-model",), "unknown-model"),
        (("demo", "--type", "Q9_Z"), "unknown-type"),
        (("demo", "--objective", "everything"), "usage"),
        (("demo", "--budget", "0"), "usage"),
        (("demo", "--type", "Q4_K_M", "--depth", "999999"), "context-too-short"),
        (("llama-3.1-405b", "--type", "BF16", "--context", "131072"), "does-not-fit"),
    ],
)
def test_what_cannot_be_tuned_is_refused_before_it_starts(qplan: Qplan, arguments: tuple[str, ...], code: str) -> None:
    done = qplan("tune", *arguments, "--json")
    assert done.returncode != Exit.DONE and "Traceback" not in done.stderr
    assert json.loads(done.stdout)["error"]["code"] == code, done.stdout


def test_a_damaged_store_is_named_before_minutes_are_spent(qplan: Qplan, tmp_path: Path) -> None:
    (tmp_path / "measurements.sqlite3").write_bytes(b"no database, only words " * 100)
    done = qplan("tune", "demo", "--type", "Q4_K_M", "--json", QPLAN_HOME=str(tmp_path))
    assert done.returncode == Exit.FAILED and json.loads(done.stdout)["error"]["code"] == "store-damaged"


@pytest.mark.slow
def test_a_small_model_is_tuned_and_what_was_found_is_used(qplan: Qplan, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    home = {"QPLAN_HOME": str(tmp_path)}
    done = qplan("tune", "demo", "--type", "Q4_K_M", "--budget", "12", "--json", **home)
    assert done.returncode == Exit.DONE, done.stderr
    found = json.loads(done.stdout)
    assert next(iter(found)) == "format_version" and found["whole_model"] and "random weights" in found["material"]
    measured = [row for row in found["settings"] if row["status"] == MEASURED]
    assert len(measured) >= 2 and found["best"] in measured and found["recommended"] in measured
    for row in measured:
        speed = row["decode_tokens_per_second"]
        assert 0 < speed["low"] <= speed["median"] <= speed["high"]
    assert found["recommended"]["rungs"] == max(row["rungs"] for row in measured)
    if not found["kept"]:  # other programs had the cores all the time
        assert any("nothing is kept" in note for note in found["notes"])
        return
    assert found["regret"]["low"] <= found["regret"]["fraction"] <= found["regret"]["high"]
    answer = json.loads(qplan("recommend", "demo", "--types", "Q4_K_M", "--json", **home).stdout)["chosen"]
    kept_one = found["chosen"]
    assert [answer[name] for name in ("threads", "ubatch", "kv_type")] == [
        kept_one[name] for name in ("threads", "ubatch", "kv_type")
    ]
    assert any("qplan tune" in reason for reason in answer["reasons"])
    stored = json.loads(qplan("measurements", "--json", **home).stdout)["measurements"]
    assert {row["quantity"] for row in stored} <= {DECODE, PREFILL} and stored
