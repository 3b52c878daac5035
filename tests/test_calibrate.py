"""``qplan calibrate``: real slices through real llama.cpp, what is kept, and what is left alone when it fails."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from planner.cli import calibrate as calibrate_cli
from planner.core import rates as kinds
from planner.core.errors import Exit, InputError
from planner.core.rates import Rate
from planner.estimate import slices
from planner.execute.random_gguf import writable_types, write_random_tensors
from planner.store import Store, read_calibration
from planner.store.schema import APPLICATION_ID, MIGRATIONS
from planner.verify import alternating
from planner.verify.alternating import Piece, alternate, quantile
from planner.verify.calibrating import Calibrating
from planner.verify.calibration_trial import CalibrationRequest
from tests.catalog_fixtures import load_errors
from tests.conftest import Qplan, hear_ctrl_c

MACHINE = "0123456789abcdef"
SMALL = ("--scale", "0.25", "--threads", "1", "--cpu-only")


def rate(**changes: object) -> Rate:
    base = Rate(
        work=kinds.DECODE_WEIGHTS,
        value=2e10,
        low=1.9e10,
        high=2.1e10,
        type="Q4_K",
        threads=2,
        hardware_identity=MACHINE,
        hardware_name="a desk",
        tool_version="llama-cpp-python 0.3.36",
        measured_at="2026-11-26T12:00:00+00:00",
    )
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "home" / "measurements.sqlite3"


def test_rates_come_back_and_replace_those_of_the_same_case(file: Path) -> None:
    with Store(file) as store:
        assert store.add_rates([rate(), rate(threads=1, value=1e10), rate(hardware_identity="other")]) == 3
        assert store.add_rates([rate(value=2.2e10)]) == 1
        assert set(store.rates(MACHINE)) == {rate(value=2.2e10), rate(threads=1, value=1e10)}
    calibration = read_calibration(MACHINE, file)
    assert calibration is not None and len(calibration.rates.entries) == 2
    with Store(file) as store:
        assert store.forget_rates(MACHINE) == 2
        assert store.rates(MACHINE) == () and len(store.rates()) == 1


def old_store(file: Path) -> None:
    """As the first version of qplan made it."""
    file.parent.mkdir(parents=True)
    connection = sqlite3.connect(file)
    connection.executescript(MIGRATIONS[0])
    connection.execute("PRAGMA user_version = 1")
    connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    connection.close()


def test_an_older_store_is_read_as_it_is_and_grows_when_written(file: Path) -> None:
    old_store(file)
    before = file.read_bytes()
    calibration = read_calibration(MACHINE, file)
    assert calibration is not None and not calibration.rates
    assert file.read_bytes() == before
    with Store(file) as store:
        store.add_rates([rate()])
    calibration = read_calibration(MACHINE, file)
    assert calibration is not None and calibration.rates.entries == (rate(),)


def test_a_rate_that_makes_no_sense_is_damage(file: Path) -> None:
    with Store(file) as store:
        store.add_rates([rate()])
    with sqlite3.connect(file) as connection:
        connection.execute("UPDATE rate SET value = 'fast'")
    connection.close()
    with pytest.raises(InputError) as caught:
        read_calibration(MACHINE, file)
    assert caught.value.code == "store-damaged"


def test_nothing_calibrated_is_said_and_is_an_empty_list(qplan: Qplan) -> None:
    shown = qplan("calibrate", "--show")
    assert shown.returncode == Exit.DONE and "nothing is calibrated" in shown.stderr
    listed = json.loads(qplan("calibrate", "--show", "--json").stdout)
    assert listed["rates"] == [] and next(iter(listed)) == "format_version"
    assert json.loads(qplan("calibrate", "--forget", "--json").stdout)["forgotten"] == 0


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("--quick", "--thorough"), Exit.USAGE),
        (("--show", "--forget"), Exit.USAGE),
        (("--type", "Q9_Z"), Exit.USAGE),
        (("llama-2-7b", "--type", "Q9_Z"), Exit.USAGE),
        (("no-such-model",), Exit.FAILED),
        (("--seconds", "0"), Exit.USAGE),
    ],
)
def test_what_cannot_be_measured_is_refused_before_it_starts(
    qplan: Qplan, arguments: tuple[str, ...], code: int
) -> None:
    done = qplan("calibrate", *arguments, "--json")
    assert done.returncode == code, done.stderr
    assert json.loads(done.stdout)["error"]["code"]
    assert "Traceback" not in done.stderr


def test_a_damaged_store_is_named_before_a_minute_is_spent(qplan: Qplan, tmp_path: Path) -> None:
    (tmp_path / "measurements.sqlite3").write_bytes(b"no database, only words " * 100)
    before = (tmp_path / "measurements.sqlite3").read_bytes()
    done = qplan("calibrate", "--quick", "--json", QPLAN_HOME=str(tmp_path))
    assert done.returncode == Exit.FAILED
    assert json.loads(done.stdout)["error"]["code"] == "store-damaged"
    assert (tmp_path / "measurements.sqlite3").read_bytes() == before


def test_pieces_are_timed_by_turns_until_the_time_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alternating, "others_running", lambda: 0)
    order: list[str] = []

    def piece(name: str) -> Piece:
        work = lambda: (order.append(name), time.sleep(alternating.SHORTEST_SAMPLE_SECONDS))[0]  # noqa: E731
        return Piece(name=name, work=work, before=lambda: None, wanted=3)

    pieces = [piece("a"), piece("b")]
    alternate(pieces, until=time.perf_counter() + 60)
    assert order == ["a", "b"] * 3
    for made in pieces:
        assert made.done
        middle, low, high = made.result
        assert alternating.SHORTEST_SAMPLE_SECONDS <= low <= middle <= high
    late = [piece("c"), piece("d")]
    alternate(late, until=time.perf_counter() - 1)
    assert [made.taken for made in late] == [1, 1]


def test_a_piece_is_told_by_its_median() -> None:
    timed = Piece(name="piece", work=lambda: None, before=lambda: None)
    timed.samples = [1.0, 2.0, 3.0, 4.0, 50.0]
    middle, low, high = timed.result
    assert middle == 3 and low == pytest.approx(1.4) and high == pytest.approx(31.6)


@pytest.mark.parametrize("cache_mib", [0, 32, 512])
def test_slices_differ_by_enough_layers_for_a_slope(cache_mib: int) -> None:
    request = CalibrationRequest(budget_seconds=60, threads=(2, 1), types=("Q4_K",), cache_bytes=cache_mib << 20)
    few, many = Calibrating(request=request, progress=lambda *_: None).pair(25e6)
    assert many >= 2 * few and many - few >= 6
    assert few == {0: 2, 32: 3, 512: 8}[cache_mib]


def test_a_piece_without_its_cores_is_disturbed() -> None:
    asleep = Piece(name="asleep", work=lambda: time.sleep(0.02), before=lambda: None, threads=1)
    asleep.sample()
    assert not asleep.good and len(asleep.disturbed) == 1
    assert asleep.result[0] > 0


def test_quantiles() -> None:
    assert [quantile([1.0, 2.0, 3.0], share) for share in (0, 0.25, 0.5, 1)] == [1.0, 1.5, 2.0, 3.0]


@pytest.mark.slow
def test_every_type_can_be_written_with_random_weights_and_loaded(tmp_path: Path) -> None:
    spec = slices.plain(slices.THIN, 1)
    for type_ in writable_types():
        path = write_random_tensors(spec, slices.pure_types(spec, type_), tmp_path / f"{type_}.gguf")
        assert load_errors(path) == [], type_
        if type_ in ("Q4_K", "Q6_K", "IQ1_M", "IQ3_S", "MXFP4", "TQ1_0", "BF16", "Q5_1"):
            values = dequantized(path, type_)
            assert 0.001 < values.std() < 0.2 and abs(values.mean()) < 0.05, type_


def dequantized(path: Path, type_: str):  # type: ignore[no-untyped-def]
    import gguf

    tensor = next(t for t in gguf.GGUFReader(path).tensors if t.name == "blk.0.attn_q.weight")
    return gguf.quants.dequantize(tensor.data, gguf.GGMLQuantizationType[type_])


def calibrated(qplan: Qplan, *arguments: str) -> dict[str, Any]:
    """The answer of a real calibration; a machine whose cores others hold all the time has none to give."""
    done = qplan("calibrate", *arguments, "--json")
    answer: dict[str, Any] = json.loads(done.stdout)
    if answer.get("error", {}).get("code") == "nothing-measured":
        pytest.skip("other programs took the cores in every sample")
    assert done.returncode == Exit.DONE, done.stderr
    return answer


@pytest.mark.slow
def test_a_calibration_is_kept_and_used(qplan: Qplan) -> None:
    answer = calibrated(qplan, "--seconds", "8", "--type", "Q4_0", "--type", "Q8_0", *SMALL)
    assert answer["rates"] and answer["hardware_identity"]
    works = {made["work"] for made in answer["rates"] if made["device"] == "cpu"}
    assert {kinds.DECODE_WEIGHTS, kinds.PREFILL_WEIGHTS} <= works
    assert all(made["low"] <= made["value"] <= made["high"] for made in answer["rates"])
    estimate = json.loads(qplan("estimate", "llama-2-7b", "--type", "Q8_0", "--threads", "1", "--json").stdout)["speed"]
    assert estimate["basis"] == "calibrated" and "rates of this machine" in estimate["source"]
    assert 0 < estimate["decode_low"] < estimate["decode_tokens_per_second"] < estimate["decode_high"]
    explained = qplan("explain", "llama-2-7b", "--type", "Q8_0", "--threads", "1").stdout
    assert "weights in Q8_0" in explained
    shown = qplan("calibrate", "--show")
    assert "Q8_0" in shown.stdout and "GB/s" in shown.stdout
    elsewhere = json.loads(qplan("estimate", "llama-2-7b", "--profile", "rtx-4090", "--json").stdout)["speed"]
    assert elsewhere["basis"] != "calibrated"


@pytest.mark.slow
def test_slices_of_a_model_before_it_is_there(qplan: Qplan) -> None:
    answer = calibrated(qplan, "smollm2-135m", "--type", "q4_k_m", "--seconds", "8", "--threads", "1", "--cpu-only")
    made = [found for found in answer["rates"] if found["model"]]
    if kinds.MODEL_DECODE_REST not in {found["work"] for found in made}:
        pytest.skip("other programs took the cores in the samples of decode")
    speed = json.loads(qplan("estimate", "smollm2-135m", "--type", "Q4_K_M", "--threads", "1", "--json").stdout)[
        "speed"
    ]
    assert "slices of this model" in speed["source"]
    other = json.loads(qplan("estimate", "smollm2-135m", "--type", "Q8_0", "--threads", "1", "--json").stdout)["speed"]
    assert "slices of this model" not in other["source"]


@pytest.mark.slow
def test_an_interrupted_calibration_leaves_the_store_as_it_was(tmp_path: Path) -> None:
    with Store(tmp_path / "measurements.sqlite3") as store:
        store.add_rates([rate()])
    environment = {
        **os.environ,
        "QPLAN_HOME": str(tmp_path),
        "TMPDIR": str(tmp_path),
        "PYTHONPATH": str(Path(__file__).parent.parent),
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "planner.cli", "calibrate", "--seconds", "120", *SMALL],
        env=environment,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        preexec_fn=hear_ctrl_c,
    )
    end = time.monotonic() + 60
    while not list(tmp_path.glob("qplan-*/qplan-slice-*")) and time.monotonic() < end:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == Exit.INTERRUPTED, errors.decode()
    with Store(tmp_path / "measurements.sqlite3") as store:
        assert store.rates() == (rate(),)
    assert not list(tmp_path.glob("qplan-*"))


def test_every_kind_of_rate_can_be_shown(capsys: pytest.CaptureFixture[str]) -> None:
    works = [value for name, value in vars(kinds).items() if name.isupper() and isinstance(value, str) and "_" in value]
    assert kinds.DECODE_SCORES in works and kinds.MODEL_PREFILL_MASK in works
    calibrate_cli._show(tuple(Rate(work=work, value=2e9, low=1e9, high=3e9, type="Q4_K", threads=2) for work in works))
    shown = capsys.readouterr().out
    assert "decode scores" in shown and "GB/s" in shown
