"""What a killed measurement leaves: rows and sums that come back to the last bit, and the same bytes in the end."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.core.data import data_path
from planner.verify.kept import EVERY_CHUNKS, KeptRows, KeptSums, kept_path, key_of

NUMBERS = st.floats(allow_nan=False, allow_infinity=False)


@settings(max_examples=40)
@given(st.dictionaries(st.text(max_size=20), NUMBERS, max_size=6), st.integers(0, 40))
def test_rows_come_back_to_the_last_bit_and_a_torn_line_is_left_out(
    tmp_path_factory: pytest.TempPathFactory, values: dict[str, float], torn: int
) -> None:
    path = tmp_path_factory.mktemp("kept") / "rows"
    rows = KeptRows(path, "k")
    for name, value in values.items():
        rows.put(name, {"value": value})
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"name": "half", "value": {"value": 0.1234567890123456789}}'[:torn])
    again = KeptRows(path, "k")
    assert again.resumed == bool(values)
    assert {name: again.get(name) for name in values} == {name: {"value": v} for name, v in values.items()}
    assert again.get("half") is None and path.read_bytes() == whole


def test_rows_of_another_measurement_and_damaged_ones_are_worth_nothing(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    KeptRows(path, "one").put("a", 1.0)
    other = KeptRows(path, "other")
    assert not other.resumed and other.get("a") is None
    for junk in (b"", b"\xff\xfe\n", b"[]\n", b'{"key": "other"}\n{"name": 3}\n'):
        path.write_bytes(junk)
        assert not KeptRows(path, "other").resumed
    other.forget()
    assert not path.exists()


def test_sums_come_back_and_damaged_or_foreign_ones_do_not(tmp_path: Path) -> None:
    sums = {"blk.0.x.weight": np.array([[0.1, 1e300]]), "output.weight": np.array([[2.0, 3.0]])}
    counts = {name: np.array([7]) for name in sums}
    kept = KeptSums(tmp_path / "sums", "k")
    kept.offer(EVERY_CHUNKS - 1, sums, counts)
    assert not kept.path.exists()
    kept.offer(EVERY_CHUNKS, sums, counts)
    back: dict[str, np.ndarray] = {}
    rows: dict[str, np.ndarray] = {}
    again = KeptSums(kept.path, "k")
    assert again.restore(back, rows) == EVERY_CHUNKS and again.resumed
    assert all(np.array_equal(back[name], sums[name]) and np.array_equal(rows[name], counts[name]) for name in sums)
    whole = kept.path.read_bytes()
    assert KeptSums(kept.path, "other").restore({}, {}) == 0
    for damaged in (whole[: len(whole) // 2], b"", b"PK\x03\x04 no archive"):
        kept.path.write_bytes(damaged)
        nothing: dict[str, np.ndarray] = {}
        assert KeptSums(kept.path, "k").restore(nothing, {}) == 0 and not nothing
    kept.forget()
    assert not list(tmp_path.iterdir())


def test_the_key_is_of_model_text_and_settings(tmp_path: Path) -> None:
    model = tmp_path / "m.gguf"
    model.write_bytes(bytes(200_000))
    key = key_of(model, "text", chunks=4, seed=0)
    assert key == key_of(model, "text", chunks=4, seed=0)
    others = [key_of(model, "texts", chunks=4, seed=0), key_of(model, "text", chunks=None, seed=0)]
    model.write_bytes(bytes(199_999) + b"1")
    others.append(key_of(model, "text", chunks=4, seed=0))
    assert key not in others and len(set(others)) == 3


@pytest.fixture(scope="module")
def demo_f16(tmp_path_factory: pytest.TempPathFactory, demo_checkpoint: Path) -> Path:
    """The demo model in 16 bits."""
    pytest.importorskip("llama_cpp")
    from planner.convert.write import convert_checkpoint

    path = tmp_path_factory.mktemp("demo") / "f16.gguf"
    convert_checkpoint(demo_checkpoint, path, out_type="f16")
    return path


SCRIPT = """
import json, os, signal, sys
from planner.verify import step_child
at, kept = float(sys.argv[2]), sys.argv[3]
def progress(done, total):
    if done / total >= at and os.path.exists(kept) and os.path.getsize(kept) > 200:
        os.kill(os.getpid(), signal.SIGKILL)
with open(sys.argv[1]) as file:
    request = json.load(file)
print(json.dumps(step_child.work(request, progress)))
"""


def carried_out(job: Path, kill_at: float = 2.0) -> subprocess.CompletedProcess[str]:
    kept = kept_path(job.with_name(job.parent.name.split("-")[-1]))
    command = [sys.executable, "-c", SCRIPT, str(job), str(kill_at), str(kept)]
    root = Path(__file__).parent.parent
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, cwd=root)


def asked(folder: Path, kind: str, source: Path, imatrix: Path | None = None) -> tuple[Path, Path]:
    """A job's file and its output."""
    from planner.core.codec import canonical_json
    from planner.core.job import Job
    from planner.core.plan import Step
    from planner.execute import calibration

    folder.mkdir()
    few = 20 if kind == "imatrix" else 1
    text = calibration.from_text(data_path("calibration/prose.txt"), few, 0)
    step = Step(name=kind, kind=kind, method="gguf", calibration=text, probes=12 if kind == "sensitivity" else None)
    output = folder / kind
    job = Job(step=step, source=str(source), output=str(output), threads=2, imatrix=str(imatrix) if imatrix else None)
    (folder / "job.json").write_text(canonical_json(job))
    return folder / "job.json", output


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "kills"), [("imatrix", (0.8,)), ("sensitivity", (0.2, 0.7))])
def test_killed_and_rerun_makes_the_same_bytes(
    tmp_path: Path, demo_f16: Path, kind: str, kills: tuple[float, ...]
) -> None:
    whole, expected = asked(tmp_path / f"whole-{kind}", kind, demo_f16)
    done = carried_out(whole)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["resumed"] is False
    job, output = asked(tmp_path / f"killed-{kind}", kind, demo_f16)
    for at in kills:
        assert carried_out(job, at).returncode == -signal.SIGKILL
        assert kept_path(output).stat().st_size and not output.exists()
    done = carried_out(job)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["resumed"] is True
    assert output.read_bytes() == expected.read_bytes()
    assert sorted(path.name for path in output.parent.iterdir()) == sorted([output.name, "job.json"])
