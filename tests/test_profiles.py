"""Captured machines: every shipped profile is valid, and a saved one comes back equal."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner import probe
from planner.core import devices
from planner.core.data import profiles_path
from planner.core.errors import InputError, UsageError
from planner.core.hardware import Cpu, Disk, Gpu, HardwareProfile, Memory
from planner.core.units import GIB

WANTED = {
    *("rtx-3060", "rtx-4060-ti-16gb", "rtx-4060-laptop", "rtx-4070", "rtx-4070-ti", "rtx-4080", "rtx-4090"),
    *("rtx-5070-ti", "rtx-5090", "rtx-3090", "2x-rtx-3090", "rtx-3080-10gb", "gtx-1080-ti", "a100-80gb"),
    *("4x-a100-80gb", "h100-80gb", "h200", "l4", "t4", "rx-7900-xtx", "rx-7800-xt", "arc-a770", "arc-b580"),
    *("m1-8gb", "m2-pro-16gb", "m3-max-64gb", "m4-16gb", "m4-max-128gb", "m2-ultra-192gb", "ryzen-ai-max-395"),
    *("dgx-spark", "laptop-16gb", "laptop-8gb", "raspberry-pi-5-8gb", "epyc-9654", "ryzen-7950x-64gb"),
}


def test_the_machines_people_own_are_there() -> None:
    assert set(probe.profile_names()) >= WANTED


@pytest.mark.parametrize("name", probe.profile_names())
def test_shipped_profile_is_strictly_valid(name: str) -> None:
    fast, strict = probe.load_profile(name), probe.load_profile(profiles_path() / f"{name}.toml")
    assert fast == strict
    assert fast.source.startswith(("http", "GPU ", "host http", "data/devices.csv")) and fast.date
    assert fast.memory.total_bytes and fast.memory.bandwidth_bytes_per_second
    assert fast.cpu.physical_core_count and fast.cpu.inference_threads() <= fast.cpu.physical_core_count
    for gpu in fast.gpus:
        row = devices.find(gpu.device or "")
        assert row is not None and gpu.bandwidth_bytes_per_second == row.bandwidth_bytes_per_second
        assert gpu.usable_bytes() and gpu.fp16_flops_per_second
        assert devices.find(gpu.name, memory_bytes=gpu.memory_total_bytes, core_count=gpu.core_count) in (row, None)
        if gpu.unified_memory:
            assert gpu.memory_total_bytes == fast.memory.total_bytes


def test_summaries_name_gpus_and_memory() -> None:
    found = {summary.name: summary for summary in probe.profile_summaries()}
    assert found["2x-rtx-3090"].gpus == ("NVIDIA GeForce RTX 3090, 24.0 GiB",) * 2
    assert found["laptop-16gb"].ram_bytes == 16 * GIB


def test_unknown_name_gets_the_nearest() -> None:
    with pytest.raises(UsageError, match="unknown-profile") as caught:
        probe.load_profile("rtx4090")
    assert "rtx-4090" in caught.value.hint


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"name = ", "bad-toml"),
        (b"\xff\xfe\x00binary", "bad-toml"),
        (b"", "bad-document"),
        (b'name = "x"\nos = "linux"\nvram = 3\n[cpu]\nmodel = "x"\narchitecture = "x"\n[memory]\n', "bad-document"),
        (
            b'name = "x"\nos = "linux"\n[cpu]\nmodel = "x"\narchitecture = "x"\n[memory]\ntotal_bytes = "a"\n',
            "bad-document",
        ),
    ],
)
def test_a_bad_file_is_a_clear_error(tmp_path: Path, content: bytes, code: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        probe.load_profile(path)
    assert caught.value.code == code


def test_a_missing_file_and_one_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="missing-file"):
        probe.load_profile(str(tmp_path / "none.toml"))
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="unwritable-file"):
        probe.save_profile(probe.load_profile("t4"), tmp_path / "file" / "mine.toml")


sizes = st.one_of(st.none(), st.integers(1, 1 << 50))
rates = st.one_of(st.none(), st.floats(1e3, 1e15))
texts = st.text(st.characters(codec="utf-8"), min_size=1, max_size=30)
maybe = st.one_of(st.none(), texts)
gpus = st.builds(
    Gpu,
    name=texts,
    vendor=texts,
    backend=texts,
    memory_total_bytes=sizes,
    memory_free_bytes=sizes,
    unified_memory=st.booleans(),
    link=maybe,
    bandwidth_bytes_per_second=rates,
)
machines = st.builds(
    HardwareProfile,
    name=texts,
    os=texts,
    cpu=st.builds(Cpu, model=texts, architecture=texts, vendor=maybe, simd=st.tuples(texts, texts)),
    memory=st.builds(Memory, total_bytes=sizes, bandwidth_bytes_per_second=rates, bandwidth_basis=maybe),
    gpus=st.lists(gpus, max_size=2).map(tuple),
    disk=st.one_of(st.none(), st.builds(Disk, path=texts, free_bytes=sizes)),
    notes=st.lists(texts, max_size=2).map(tuple),
)


@given(machine=machines)
def test_any_profile_round_trips(tmp_path_factory: pytest.TempPathFactory, machine: HardwareProfile) -> None:
    path = tmp_path_factory.mktemp("profile") / "mine.toml"
    assert probe.save_profile(machine, path) == path
    assert probe.load_profile(path) == machine


def test_planning_copy_has_no_free_memory() -> None:
    gpu = Gpu(name="x", vendor="nvidia", backend="cuda", memory_total_bytes=8, memory_free_bytes=3)
    machine = HardwareProfile(
        name="x", os="linux", cpu=Cpu(model="x", architecture="x"), memory=Memory(available_bytes=1), gpus=(gpu,)
    )
    copy = probe.without_free_memory(machine)
    assert copy.gpus[0].usable_bytes() == 8 and copy.memory.available_bytes is None
