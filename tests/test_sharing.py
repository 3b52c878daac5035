"""Measurements that people share: what is in a submission and believed, what import keeps apart, what compare says."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from datetime import date
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.core.codec import decode, encode
from planner.core.errors import Exit, UsageError
from planner.core.hardware import Cpu, Gpu, HardwareProfile, Memory
from planner.core.measurement import (
    DECODE,
    FILE_BYTES,
    ONE_PASS_RATE,
    PEAK_MEMORY,
    PREFILL,
    Conditions,
    Measurement,
)
from planner.core.model import shape_sha256
from planner.core.submission import Imported, SharedMeasurement, Submission
from planner.core.units import GIB
from planner.models import catalog
from planner.store import Store, read_calibration
from planner.workflow import analysis, sharing
from planner.workflow.plausible import complaints
from tests.conftest import Qplan

TODAY = date(2026, 11, 26)
SEVEN = catalog.lookup("llama-2-7b")
assert SEVEN is not None


def machine(*gpus: Gpu) -> HardwareProfile:
    cpu = Cpu(model="AMD Ryzen 9 7950X", architecture="x86_64", physical_core_count=16, logical_core_count=32)
    memory = Memory(total_bytes=64 * GIB, bandwidth_bytes_per_second=6e10, bandwidth_basis="measured with 16 threads")
    return HardwareProfile(name="mary's desk", os="linux", cpu=cpu, memory=memory, gpus=gpus)


RTX = Gpu(
    name="NVIDIA GeForce RTX 4090",
    vendor="nvidia",
    backend="cuda",
    memory_total_bytes=24 * GIB,
    device="GeForce RTX 4090",
)


def measurement(hardware: HardwareProfile, **changes: object) -> Measurement:
    base = Measurement(
        quantity=DECODE,
        value=11.0,
        low=10.5,
        high=11.5,
        samples=(10.5, 11.0, 11.5),
        model="llama-2-7b",
        model_sha256=shape_sha256(SEVEN),
        method="gguf",
        runtime="llama.cpp",
        type="Q4_K_M",
        conditions=Conditions(context=4096, threads=16, prompt_tokens=512),
        predicted=10.0,
        hardware_identity=hardware.identity(),
        hardware_name=hardware.name,
        tool_version="llama-cpp-python 0.3.36",
        measured_at="2026-11-20T03:04:05+00:00",
    )
    return replace(base, **changes)  # type: ignore[arg-type]


def submission(*changes: dict[str, object], gpus: tuple[Gpu, ...] = ()) -> Submission:
    here = machine(*gpus)
    return sharing.submission_of([measurement(here, **one) for one in changes or ({},)], here)


def write(path: Path, made: Submission) -> Path:
    path.write_text(json.dumps(encode(made)))
    return path


# what is in a submission


def test_a_submission_holds_no_name_of_host_or_user_and_no_path() -> None:
    here = machine(RTX)
    rows = [
        measurement(here, model="/home/mary/secret/llama.gguf"),
        measurement(here, model="C:\\Users\\mary\\llama.gguf"),
        measurement(here, quantity=ONE_PASS_RATE),
        measurement(here, hardware_identity="another machine"),
    ]
    made = sharing.submission_of(rows, here)
    text = json.dumps(encode(made))
    assert "mary" not in text and "home" not in text and "03:04" not in text
    assert [row.model for row in made.measurements] == ["llama.gguf", "llama.gguf"]
    assert made.hardware.device == "NVIDIA GeForce RTX 4090" and made.hardware.ram_gib == 64


@settings(max_examples=50, deadline=None)
@given(value=st.floats(1e-3, 1e6), threads=st.none() | st.integers(1, 64), text=st.text(max_size=20))
def test_a_submission_survives_its_file(value: float, threads: int | None, text: str) -> None:
    made = submission({"value": value, "conditions": Conditions(threads=threads), "tool_version": text})
    assert decode(Submission, json.loads(json.dumps(encode(made))), what="it") == made


def test_the_schema_is_that_of_what_is_written() -> None:
    found = sharing.schema()
    assert set(found["required"]) == set(encode(submission()))  # type: ignore[call-overload]
    rows = found["$defs"]["SharedMeasurement"]  # type: ignore[index]
    assert set(rows["properties"]) == set(encode(submission().measurements[0])) and not rows["additionalProperties"]


# what is believed


def codes(made: Submission) -> list[str]:
    return [complaint.code for complaint in complaints(made, TODAY)]


def test_what_can_be_true_draws_no_complaint() -> None:
    assert codes(submission({}, {"quantity": PREFILL, "value": 11.0, "weights_bytes": 6.6e9})) == []
    size = 4.08e9
    assert codes(submission({"quantity": FILE_BYTES, "value": size, "low": size, "high": size, "samples": ()})) == []
    fast = {"value": 150.0, "low": 140.0, "high": 160.0, "samples": (), "conditions": Conditions(gpu_layers=33)}
    assert codes(submission(fast, gpus=(RTX,))) == []


@pytest.mark.parametrize(
    ("changes", "code", "numbers"),
    [
        ({"value": 30.0, "high": 30.0, "samples": ()}, "too-fast", "GB/s"),
        ({"quantity": PEAK_MEMORY, "value": 1e9, "low": 1e9, "high": 1e9, "samples": ()}, "too-small", "GiB"),
        ({"quantity": FILE_BYTES, "value": 9e9, "low": 9e9, "high": 9e9, "samples": ()}, "file-size", "GiB"),
        ({"type": "Q9_Z"}, "type", "Q4_K_M"),
        ({"method": "magic"}, "method", "gguf"),
        ({"measured_at": "2027-11-20T00:00:00"}, "future", "2026-11-26"),
        ({"measured_at": "2021-01-01T00:00:00"}, "too-early", "2023-03-10"),
        ({"measured_at": "yesterday"}, "date", "yesterday"),
        ({"value": 99.0}, "range", "10.5"),
        ({"samples": (1.0, 2.0)}, "samples", "1-2"),
        ({"value": float("inf"), "high": float("inf")}, "value", "inf"),
        ({"value": -1.0, "low": -2.0, "samples": ()}, "value", "-1"),
        ({"model_sha256": "short"}, "model-shape", "short"),
        ({"conditions": Conditions(gpu_layers=5)}, "no-gpu", "5 layers"),
        ({"conditions": Conditions(kv_type="q9")}, "kv-type", "q8_0"),
        ({"weights_bytes": 1e8}, "weights", "MiB"),
    ],
)
def test_what_cannot_be_true_is_named_with_its_numbers(changes: dict[str, object], code: str, numbers: str) -> None:
    found = complaints(submission(changes), TODAY)
    assert code in [one.code for one in found]
    assert any(numbers in one.numbers + one.what for one in found if one.code == code), found
    assert all(one.where == "measurements[0]" for one in found)


def test_a_gpu_is_held_to_its_own_bandwidth_and_arithmetic() -> None:
    whole = Conditions(gpu_layers=33, prompt_tokens=512)
    fast = {"value": 400.0, "low": 400.0, "high": 400.0, "samples": (), "conditions": whole}
    assert codes(submission(fast, gpus=(RTX,))) == ["too-fast"]
    assert codes(submission({**fast, "conditions": replace(whole, gpu_layers=33)}, gpus=(RTX, RTX))) == []
    assert codes(submission({**fast, "quantity": PREFILL, "value": 9e5, "high": 9e5}, gpus=(RTX,))) == ["too-fast"]


def test_another_format_and_an_empty_file_are_no_submission() -> None:
    made = submission()
    assert codes(replace(made, format_version="2.0")) == ["format"]
    assert codes(replace(made, kind="cake")) == ["kind"]
    assert codes(replace(made, measurements=())) == ["empty"]
    assert codes(replace(made, hardware=replace(made.hardware, cpu="/home/mary"))) == ["name"]


def test_a_quantity_that_qplan_does_not_know_is_no_measurement() -> None:
    made = submission()
    smell = replace(made.measurements[0], quantity="smell")
    (found,) = complaints(replace(made, measurements=(smell,)), TODAY)
    assert found.code == "quantity" and DECODE in found.numbers


@settings(max_examples=100, deadline=None)
@given(
    value=st.floats(allow_nan=True, allow_infinity=True),
    text=st.text(max_size=30),
    layers=st.integers(-5, 10**9),
    sha256=st.text(max_size=70),
)
def test_the_validator_takes_anything(value: float, text: str, layers: int, sha256: str) -> None:
    row = SharedMeasurement(
        quantity=DECODE,
        value=value,
        low=value,
        high=value,
        model=text,
        model_sha256=sha256,
        method=text,
        runtime=text,
        type=text,
        conditions=Conditions(gpu_layers=layers),
        tool_version=text,
        date=text,
        weights_bytes=value,
    )
    assert complaints(replace(submission(), measurements=(row,)), TODAY)


# the command line


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"kind": 1}', "\x00\x01", '{"a":' * 5000, "NaN"])
def test_a_file_that_is_no_submission_is_refused_without_a_traceback(
    qplan: Qplan, tmp_path: Path, content: str
) -> None:
    file = tmp_path / "bad.json"
    file.write_text(content)
    checked = qplan("measurements", "check", str(file), "--json")
    assert checked.returncode == Exit.FAILED and not json.loads(checked.stdout)["ok"]
    taken = qplan("measurements", "import", str(file), "--json")
    assert taken.returncode == Exit.FAILED and json.loads(taken.stdout)["error"]["code"]
    assert "Traceback" not in checked.stderr + taken.stderr


def test_check_says_what_is_wrong_and_import_then_refuses(qplan: Qplan, tmp_path: Path) -> None:
    good = write(tmp_path / "good.json", submission())
    bad = write(tmp_path / "bad.json", submission({"value": 30.0, "high": 30.0, "samples": ()}))
    checked = qplan("measurements", "check", str(good), str(bad))
    assert checked.returncode == Exit.FAILED and "fine" in checked.stdout and "[too-fast]" in checked.stdout
    home = {"QPLAN_HOME": str(tmp_path / "home")}
    taken = qplan("measurements", "import", str(good), str(bad), "--json", **home)
    assert taken.returncode == Exit.FAILED and json.loads(taken.stdout)["error"]["code"] == "implausible"
    assert "imported" not in json.loads(qplan("measurements", "list", "--imported", "--json", **home).stdout)


def test_what_was_imported_is_never_measured_here(qplan: Qplan, tmp_path: Path) -> None:
    file, home = write(tmp_path / "marys.json", submission()), {"QPLAN_HOME": str(tmp_path / "home")}
    first = json.loads(qplan("measurements", "import", str(file), "--json", **home).stdout)["imported"][0]
    assert (first["measurements"], first["new"]) == (1, True)
    again = json.loads(qplan("measurements", "import", str(file), "--json", **home).stdout)["imported"][0]
    assert not again["new"]
    assert json.loads(qplan("measurements", "--json", "--all-machines", **home).stdout)["measurements"] == []
    calibration = read_calibration(machine().identity(), tmp_path / "home" / "measurements.sqlite3")
    assert calibration is not None and not calibration.measurements
    listed = qplan("measurements", "list", "--imported", **home)
    assert "marys.json" in listed.stdout and "7950X" in listed.stdout


def test_nothing_to_export_and_unknown_endings_are_said(qplan: Qplan, tmp_path: Path) -> None:
    for arguments, code in (
        (("export", "x.json"), Exit.FAILED),
        (("export", "x.xlsx"), Exit.USAGE),
        (("export", "--share", "x.json"), Exit.FAILED),
        (("export", "--share", "x.csv"), Exit.USAGE),
        (("--csv", "export", "x.csv"), Exit.USAGE),
    ):
        done = qplan("measurements", *arguments, cwd=tmp_path)
        assert done.returncode == code and "hint" in done.stderr + "hint" and "Traceback" not in done.stderr
    assert not list(tmp_path.glob("x.*"))


def test_without_pandas_the_hint_names_the_extra(tmp_path: Path) -> None:
    (tmp_path / "pandas.py").write_text("raise ImportError('not here')")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from planner.cli import main; main(sys.argv[1:])"
    done = subprocess.run(
        [sys.executable, "-c", code, "measurements", "compare", "--json"], capture_output=True, text=True, check=False
    )
    error = json.loads(done.stdout)["error"]
    assert error["code"] == "missing-dependency" and "qplan[analysis]" in error["hint"]
    listed = subprocess.run([sys.executable, "-c", code, "measurements"], capture_output=True, text=True, check=False)
    assert listed.returncode == Exit.DONE


# with pandas


@pytest.fixture
def measured_here(monkeypatch: pytest.MonkeyPatch) -> HardwareProfile:
    pytest.importorskip("pandas")
    here = machine()
    rows = (
        measurement(here),
        measurement(here, type="Q8_0", value=8.0, low=8.0, high=8.0, samples=(), predicted=4.0),
        measurement(here, type="Q8_0", value=8.0, low=8.0, high=8.0, samples=(), predicted=16.0),
        measurement(here, quantity=PREFILL, value=50.0, predicted=None, tool_version="llama-cpp-python 0.3.30"),
        measurement(here, quantity=PREFILL, value=60.0, low=60.0, high=60.0, samples=(), predicted=40.0),
    )
    monkeypatch.setattr(analysis, "survey", lambda: here)
    monkeypatch.setattr(analysis, "measurements", lambda all_machines=False: rows)
    monkeypatch.setattr(sharing, "measurements", lambda all_machines=False: rows)
    monkeypatch.setattr(sharing, "survey", lambda: here)
    return here


def test_errors_are_of_the_ratio_by_group(measured_here: HardwareProfile) -> None:
    (found,) = analysis.compare(())
    by_type = {(row["quantity"], row["type"]): row for row in found.rows}
    assert by_type[DECODE, "Q4_K_M"]["ratio"] == pytest.approx(1.1)
    assert by_type[DECODE, "Q4_K_M"]["device"] == measured_here.cpu.model
    both = by_type[DECODE, "Q8_0"]
    assert both["count"] == 2 and both["ratio"] == pytest.approx(1.0)
    assert both["median_error"] == pytest.approx(1.0), "twice and half are as far"
    assert by_type[PREFILL, "Q4_K_M"]["count"] == 1, "what was not predicted has no error"
    (other,) = analysis.compare((), by=("quantity",))
    assert [row["count"] for row in other.rows] == [3, 1]
    with pytest.raises(UsageError, match="nothing to group by"):
        analysis.compare((), by=("smell",))


def test_tool_versions_and_machines_are_put_side_by_side(measured_here: HardwareProfile, tmp_path: Path) -> None:
    (found,) = analysis.compare(("0.3.30", "0.3.36"))
    assert [(row["quantity"], row["ratio"]) for row in found.rows] == [(PREFILL, pytest.approx(1.2))]
    other = Conditions(context=4096, threads=8, gpu_layers=33, prompt_tokens=512)
    fast = {"value": 110.0, "low": 110.0, "high": 110.0, "samples": (), "conditions": other}
    file = write(tmp_path / "rtx.json", submission(fast, gpus=(RTX,)))
    _, against = analysis.compare((str(file),))
    assert [(row["type"], row["ratio"]) for row in against.rows] == [("Q4_K_M", pytest.approx(10.0))]
    with pytest.raises(UsageError) as caught:
        analysis.compare(("nothing such",))
    assert caught.value.code == "unknown-source" and "llama-cpp-python 0.3.30" in caught.value.hint
    with pytest.raises(UsageError, match="only two"):
        analysis.compare(("here", "here", "here"))


def test_this_machine_is_compared_with_all_that_was_imported(measured_here: HardwareProfile) -> None:
    made = submission({"value": 22.0, "high": 22.0, "samples": (), "predicted": None})
    other = replace(made, hardware=replace(made.hardware, identity="other"))
    with Store() as store:
        row = Imported(sha256="ab" * 32, source="marys.json", imported_at="2026-11-26", submission=other)
        assert store.add_submission(row) and not store.add_submission(row)
    errors, machines = analysis.compare(())
    assert len(errors.rows) == 3
    assert [(row["quantity"], row["ratio"]) for row in machines.rows] == [(DECODE, pytest.approx(2.0))]
    (swapped,) = analysis.compare(("abababab", "here"))
    assert swapped.rows[0]["ratio"] == pytest.approx(0.5)


def test_exports_hold_every_measurement(measured_here: HardwareProfile, tmp_path: Path) -> None:
    import pandas

    assert analysis.export(tmp_path / "all.csv") == 5
    frame = pandas.read_csv(tmp_path / "all.csv")
    assert len(frame) == 5 and {"value", "threads", "kv_type", "samples", "predicted"} <= set(frame.columns)
    assert analysis.export(tmp_path / "all.json") == 5
    assert len(json.loads((tmp_path / "all.json").read_text())["measurements"]) == 5
    pytest.importorskip("pyarrow")
    assert analysis.export(tmp_path / "all.parquet") == 5
    back = pandas.read_parquet(tmp_path / "all.parquet")
    assert back["value"].tolist() == frame["value"].tolist()
    assert len(sharing.share(tmp_path / "mine.json").measurements) == 5
    assert sharing.check([tmp_path / "mine.json"])[0].submission is not None
