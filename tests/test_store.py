"""The store keeps measurements, survives several writers, and never harms a file that is not its own."""

from __future__ import annotations

import dataclasses
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from planner.core.errors import InputError
from planner.core.measurement import DECODE, PREFILL, Conditions, Measurement
from planner.store import Store, default_path, read_calibration
from planner.store.schema import VERSION

MACHINE = "0123456789abcdef"


def measurement(**changes: object) -> Measurement:
    base = Measurement(
        quantity=DECODE,
        value=42.5,
        low=40.0,
        high=44.0,
        samples=(40.0, 42.5, 44.0),
        model="llama-2-7b",
        model_sha256="ab" * 32,
        method="gguf",
        runtime="llama.cpp",
        type="Q4_K_M",
        conditions=Conditions(context=4096, threads=8, gpu_layers=33),
        predicted=45.0,
        hardware_identity=MACHINE,
        hardware_name="a desk",
        tool_version="llama-cpp-python 0.3.36",
        measured_at="2026-01-02T03:04:05+00:00",
        weights_bytes=4.1e9,
    )
    return dataclasses.replace(base, **changes)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "home" / "measurements.sqlite3"


def test_measurements_come_back_as_they_were(file: Path) -> None:
    given_ones = (measurement(), measurement(quantity=PREFILL, value=900.0, predicted=None, group_size=128))
    with Store(file) as store:
        assert store.add(given_ones) == 2
    with Store(file, read_only=True) as store:
        assert store.list() == given_ones


floats = st.floats(allow_nan=False, allow_infinity=False)


@given(
    value=floats,
    samples=st.lists(floats, max_size=4),
    text=st.text(),
    imatrix=st.booleans(),
    threads=st.none() | st.integers(1, 256),
)
@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_any_value_survives(
    file: Path, value: float, samples: list[float], text: str, imatrix: bool, threads: int | None
) -> None:
    one = measurement(
        value=value,
        samples=tuple(samples),
        hardware_name=text.encode("utf-8", "replace").decode(),
        imatrix=imatrix,
        conditions=Conditions(threads=threads, kv_type="q8_0"),
    )
    with Store(file) as store:
        store.add([one])
        assert store.list(limit=1) == (one,)


def test_calibration_is_of_one_machine_newest_last(file: Path) -> None:
    with Store(file) as store:
        store.add([measurement(value=1.0), measurement(value=2.0, hardware_identity="other"), measurement(value=3.0)])
    calibration = read_calibration(MACHINE, file)
    assert calibration is not None
    assert [m.value for m in calibration.of(DECODE)] == [1.0, 3.0]
    assert calibration.of(PREFILL) == ()


def test_filters_and_limit(file: Path) -> None:
    with Store(file) as store:
        store.add([measurement(value=float(i), type="Q8_0" if i % 2 else "Q4_K_M") for i in range(6)])
        assert [m.value for m in store.list(type="Q8_0", limit=2)] == [3.0, 5.0]
        assert store.list(type="Q8_0", model="other") == ()
        with pytest.raises(TypeError, match="no filter colour"):
            store.list(colour="blue")


def test_reading_creates_nothing(file: Path) -> None:
    assert read_calibration(MACHINE, file) is None
    assert not file.parent.exists()


def test_start_up_without_a_store_does_not_import_sqlite(tmp_path: Path) -> None:
    code = "import sys; from planner.store import read_calibration as r; r('x'); print('sqlite3' in sys.modules)"
    environment = {**os.environ, "QPLAN_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_home_moves_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QPLAN_HOME", str(tmp_path / "elsewhere"))
    assert default_path() == tmp_path / "elsewhere" / "measurements.sqlite3"


WRITER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from test_store import measurement
from planner.store import Store
for i in range(25):
    with Store(Path(sys.argv[1])) as store:
        store.add([measurement(value=float(i), model=sys.argv[2]), measurement(value=-1.0, model=sys.argv[2])])
"""


def test_two_processes_write_at_once(file: Path) -> None:
    here = str(Path(__file__).parent)
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(file), name, here]) for name in ("a", "b")]
    assert [writer.wait(60) for writer in writers] == [0, 0]
    with Store(file) as store:
        assert len(store.list(model="a")) == len(store.list(model="b")) == 50


def test_a_failed_add_adds_nothing(file: Path) -> None:
    with Store(file) as store:
        with pytest.raises(InputError):
            store.add([measurement(), measurement(model=None)])
        assert store.list() == ()


@pytest.mark.parametrize(
    "content", [b"not a database at all, only some words " * 50, b"SQLite format 3\0" + b"\xff" * 4096]
)
def test_a_damaged_file_is_named_and_kept(file: Path, content: bytes) -> None:
    file.parent.mkdir()
    file.write_bytes(content)
    for read_only in (True, False):
        with pytest.raises(InputError) as caught:
            Store(file, read_only=read_only)
        assert caught.value.code == "store-damaged"
        assert str(file) in caught.value.what
    assert file.read_bytes() == content


def test_damage_in_the_middle_is_an_error_not_a_traceback(file: Path) -> None:
    with Store(file) as store:
        store.add([measurement(hardware_name=f"machine {i}" * 20) for i in range(200)])
    content = bytearray(file.read_bytes())
    content[8192:20000] = b"\xa5" * (20000 - 8192)
    file.write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_calibration(MACHINE, file)
    assert caught.value.code == "store-damaged"


def test_a_row_that_makes_no_sense_is_damage(file: Path) -> None:
    with Store(file) as store:
        store.add([measurement()])
    with sqlite3.connect(file) as connection:
        connection.execute("UPDATE measurement SET conditions = '{\"color\": 1}'")
    connection.close()
    with pytest.raises(InputError, match="damaged"):
        read_calibration(MACHINE, file)


def test_another_programs_file_is_refused_and_kept(file: Path) -> None:
    file.parent.mkdir()
    connection = sqlite3.connect(file)
    connection.execute("CREATE TABLE bookmarks (url TEXT)")
    connection.commit()
    connection.close()
    before = file.read_bytes()
    for read_only in (True, False):
        with pytest.raises(InputError) as caught:
            Store(file, read_only=read_only)
        assert caught.value.code == "store-foreign"
    assert file.read_bytes() == before


def test_a_newer_schema_asks_for_an_upgrade(file: Path) -> None:
    Store(file).close()
    connection = sqlite3.connect(file)
    connection.execute(f"PRAGMA user_version = {VERSION + 1}")
    connection.close()
    with pytest.raises(InputError) as caught:
        read_calibration(MACHINE, file)
    assert caught.value.code == "store-newer"
    assert str(VERSION + 1) in caught.value.numbers


def test_an_empty_file_is_an_empty_store(file: Path) -> None:
    file.parent.mkdir()
    file.touch()
    calibration = read_calibration(MACHINE, file)
    assert calibration is not None and calibration.measurements == ()
    with Store(file) as store:
        assert store.add([measurement()]) == 1


def test_a_home_that_cannot_be_written_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError) as caught:
        Store(tmp_path / "file" / "measurements.sqlite3")
    assert caught.value.code == "store-unwritable"
    assert "QPLAN_HOME" in caught.value.hint


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_can_be_read(file: Path) -> None:
    with Store(file) as store:
        store.add([measurement()])
    file.parent.chmod(0o555)
    try:
        calibration = read_calibration(MACHINE, file)
        assert calibration is not None and len(calibration.measurements) == 1
        with pytest.raises(InputError), Store(file) as store:
            store.add([measurement()])
    finally:
        file.parent.chmod(0o755)


def test_a_locked_file_says_who_must_finish(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("planner.store.database._BUSY_SECONDS", 0.05)
    with Store(file) as store:
        other = sqlite3.connect(file, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(InputError) as caught:
            store.add([measurement()])
        other.close()
    assert caught.value.code == "store-busy"
