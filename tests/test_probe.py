"""The probe on the machine that runs the tests."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from planner import probe
from planner.core.codec import canonical_json, decode
from planner.core.data import home
from planner.core.hardware import Cpu, HardwareProfile, Memory
from planner.probe import bandwidth
from planner.probe.machine import with_bandwidth
from planner.probe.memory_read import read_bandwidth
from planner.probe.reader import Reader, run_tool

MACHINE = Cpu(model="test", architecture="x86_64", physical_core_count=2, logical_core_count=2)


def test_this_machine_is_probed_and_its_json_round_trips(tmp_path: Path) -> None:
    machine = probe.probe(output=tmp_path / "not" / "there", measure_bandwidth=False)
    assert machine.cpu.logical_core_count and machine.memory.total_bytes and machine.memory.available_bytes
    assert machine.disk and machine.disk.path == str(tmp_path) and machine.disk.free_bytes
    assert decode(HardwareProfile, json.loads(canonical_json(machine)), what="probe") == machine
    saved = probe.save_profile(machine, tmp_path / "mine.toml")
    assert probe.load_profile(saved) == machine


def test_two_probes_are_the_same_machine() -> None:
    first, second = (probe.probe(measure_bandwidth=False) for _ in range(2))
    assert first.identity() == second.identity()


@pytest.mark.skipif(sys.platform != "linux", reason="the sources of other systems differ")
def test_an_empty_machine_is_all_notes(tmp_path: Path) -> None:
    machine = probe.probe(measure_bandwidth=False, runner=Reader(str(tmp_path), tools=()))
    assert machine.gpus == () and machine.cpu.logical_core_count is None
    assert machine.memory.bandwidth_bytes_per_second is None
    assert len(machine.notes) >= 3


def test_bandwidth_is_measured_once_and_remembered() -> None:
    memory = Memory(total_bytes=1 << 34, available_bytes=1 << 30)
    assert bandwidth.cached(MACHINE, memory) is None
    unknown, notes = with_bandwidth(Reader(tools=()), MACHINE, memory, measure=False)
    assert unknown.bandwidth_bytes_per_second is None and "never measured" in notes[0]
    value = bandwidth.measure(Reader(tools=()), MACHINE, memory, seconds=0.01)
    assert value is not None and 1e9 < value.bytes_per_second < 5e12
    assert bandwidth.cached(MACHINE, memory) == value
    known, notes = with_bandwidth(Reader(tools=()), MACHINE, memory, measure=False)
    assert known.bandwidth_bytes_per_second == value.bytes_per_second and notes == []
    assert known.bandwidth_basis is not None and known.bandwidth_basis.startswith("measured 20")
    assert bandwidth.cached(MACHINE, Memory(total_bytes=1 << 33)) is None, "another amount of RAM is another machine"


@pytest.mark.parametrize("content", ["", "{", "[]", '{"KEY": {}}', '{"KEY": {"bytes_per_second": 0}}', '{"KEY": 3}'])
def test_a_broken_cache_is_ignored_and_replaced(content: str) -> None:
    memory = Memory(total_bytes=1 << 34, available_bytes=1 << 30)
    path = home() / "cache" / "bandwidth.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content.replace("KEY", bandwidth.identity(MACHINE, memory)))
    assert bandwidth.cached(MACHINE, memory) is None
    assert bandwidth.measure(Reader(tools=()), MACHINE, memory, seconds=0.001) == bandwidth.cached(MACHINE, memory)


def test_published_bandwidth_stands_in_for_a_measured_one() -> None:
    cpu = Cpu(model="x", architecture="x86_64", device="Ryzen 9 7950X")
    memory, notes = with_bandwidth(Reader(tools=()), cpu, Memory(), measure=False)
    assert (memory.bandwidth_bytes_per_second, memory.bandwidth_basis, notes) == (83.2e9, "published", [])


def test_buffer_sizes() -> None:
    size = bandwidth.buffer_bytes
    assert size(None, None) == 256 << 20
    assert size(480 << 20, 20 << 30) == 960 << 20
    assert size(2 << 30, 20 << 30) == 1 << 30
    assert size(32 << 20, 400 << 20) == 100 << 20
    assert read_bandwidth(threads=1, size=0) is None


@pytest.mark.slow
def test_bandwidth_is_that_of_another_reader() -> None:
    numpy = pytest.importorskip("numpy")
    import time

    size = 512 << 20
    numbers = numpy.ones(size // 8, dtype=numpy.int64)
    best = 0.0
    for _ in range(5):
        start = time.perf_counter()
        numbers.max()
        best = max(best, size / (time.perf_counter() - start))
    measured = read_bandwidth(threads=1, size=size)
    assert measured is not None and 0.4 * best < measured < 2.5 * best


def test_probing_imports_nothing_heavy() -> None:
    code = (
        "import sys; from planner import probe; probe.load_profile('rtx-4090');"
        "probe.probe(measure_bandwidth=False);"
        "heavy = ('numpy', 'torch', 'pydantic', 'psutil', 'cpuinfo', 'gguf', 'llama_cpp');"
        "print([m for m in heavy if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_tools_that_fail_print_nothing() -> None:
    assert run_tool(("/does/not/exist",)) == "" == run_tool((sys.executable, "-c", "import sys; print(1); sys.exit(3)"))
    assert run_tool((sys.executable, "-c", "print(1)")).strip() == "1"
    assert Reader(tools=()).tool("ls") == ""
