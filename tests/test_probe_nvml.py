"""NVIDIA GPUs from NVML's answers on real cards, and from drivers that lie."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.core.hardware import Memory
from planner.probe.nvml import NvmlCapture, NvmlDevice, capture, parse, visible

MIB = 1 << 20
RAM = Memory(total_bytes=127600748 << 10, available_bytes=118566368 << 10)

# An H100 read by this project on 2026-11-23, driver 580.159.04.
H100 = NvmlDevice(
    name="NVIDIA H100 80GB HBM3",
    memory_total=85520809984,
    memory_free=85017493504,
    compute_capability=(9, 0),
    pcie_generation=5,
    pcie_width=16,
    memory_clock_mhz=2619,
    memory_bus_bits=5120,
    core_count=16896,
    mig_mode=[0, 0],
)
# Idle desktop card: the link is slow at rest, the maximum is what counts.
RTX_4090 = NvmlDevice(
    name="NVIDIA GeForce RTX 4090",
    memory_total=24564 * MIB,
    memory_free=23600 * MIB,
    compute_capability=(8, 9),
    pcie_generation=4,
    pcie_width=16,
    memory_clock_mhz=10501,
    memory_bus_bits=384,
    core_count=16384,
)
# https://github.com/XuehaiPan/nvitop/pull/208: memory "not supported"; nvtop#426: link reported as gen 1 x1
GB10 = NvmlDevice(name="NVIDIA GB10", compute_capability=(12, 1), pcie_generation=1, pcie_width=1)


def test_an_h100_as_read() -> None:
    (gpu,), notes = parse(NvmlCapture(driver="580.159.04", gpus=(H100,)), RAM)
    assert gpu.device == "H100 SXM5 80 GB" and gpu.compute_capability == "9.0" and gpu.driver == "580.159.04"
    assert (gpu.memory_total_bytes, gpu.memory_free_bytes) == (85520809984, 85017493504)
    assert gpu.link == "PCIe 5.0 x16" and gpu.link_bytes_per_second == pytest.approx(63.0e9, rel=1e-3)
    assert gpu.bandwidth_bytes_per_second == 3350e9 and not gpu.unified_memory and notes == []


def test_several_gpus_stay_apart() -> None:
    gpus, _ = parse(NvmlCapture(gpus=(RTX_4090, H100)), RAM)
    assert [gpu.device for gpu in gpus] == ["GeForce RTX 4090", "H100 SXM5 80 GB"]
    assert [gpu.usable_bytes() for gpu in gpus] == [23600 * MIB, 85017493504]


def test_unified_memory_is_the_machines_ram() -> None:
    (gpu,), notes = parse(NvmlCapture(gpus=(GB10,)), RAM)
    assert gpu.unified_memory and gpu.device == "DGX Spark (GB10)" and gpu.link is None
    assert (gpu.memory_total_bytes, gpu.memory_free_bytes) == (RAM.total_bytes, RAM.available_bytes)
    assert gpu.bandwidth_bytes_per_second == 273e9 and "RAM" in notes[0]


def test_a_driver_that_reports_zero_memory_is_not_believed() -> None:
    liar = NvmlDevice(name="NVIDIA GeForce RTX 4090", memory_total=0, memory_free=0, compute_capability=(0, 0))
    (gpu,), notes = parse(NvmlCapture(gpus=(liar,)), RAM)
    assert gpu.memory_total_bytes is None and gpu.memory_free_bytes is None and gpu.compute_capability == "8.9"
    assert "does not report its memory" in notes[0]


def test_a_card_outside_the_table_gets_its_bandwidth_from_its_clock() -> None:
    strange = NvmlDevice(
        name="NVIDIA GeForce RTX 9999", memory_total=24564 * MIB, memory_clock_mhz=10501, memory_bus_bits=384
    )
    (gpu,), notes = parse(NvmlCapture(gpus=(strange,)), RAM)
    assert gpu.device is None and gpu.bandwidth_bytes_per_second == pytest.approx(1008e9, rel=1e-3)
    assert any("device table" in note for note in notes)


def test_a_split_gpu_says_so() -> None:
    piece = NvmlDevice(
        name="NVIDIA A100-SXM4-40GB MIG 1g.5gb", memory_total=4864 * MIB, memory_free=4800 * MIB, mig_mode=(1, 1)
    )
    (gpu,), notes = parse(NvmlCapture(gpus=(piece,)), RAM)
    assert gpu.device is None and gpu.memory_total_bytes == 4864 * MIB and gpu.bandwidth_bytes_per_second is None
    assert any("MIG" in note for note in notes)


def test_a_failure_is_a_note() -> None:
    assert parse(NvmlCapture(failure="NVML does not start: Driver Not Loaded"), RAM) == (
        (),
        ["NVML does not start: Driver Not Loaded"],
    )


class FakeError(Exception):
    """Stands in for ``pynvml.NVMLError``."""


def fake_nvml(**functions: Callable[..., Any]) -> SimpleNamespace:
    """A pynvml with these functions; everything else is not supported."""
    base: dict[str, Any] = {"NVMLError": FakeError, "NVML_CLOCK_MEM": 2, "nvmlInit": lambda: None}
    return SimpleNamespace(**(base | functions))


def not_supported(*_: object) -> None:
    raise FakeError("Not Supported")


def test_every_call_may_fail() -> None:
    nvml = fake_nvml(
        nvmlDeviceGetCount=lambda: 1,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetName=lambda handle: b"NVIDIA GB10",
        nvmlDeviceGetMemoryInfo=not_supported,
        nvmlDeviceGetCudaComputeCapability=not_supported,
        nvmlDeviceGetMigMode=not_supported,
    )
    (gpu,), _ = parse(capture(nvml), RAM)
    assert gpu.name == "NVIDIA GB10" and gpu.unified_memory and gpu.compute_capability == "12.1"


def test_a_driver_that_does_not_start_and_one_without_gpus() -> None:
    assert "does not start: Not Supported" in (capture(fake_nvml(nvmlInit=not_supported)).failure or "")
    assert capture(fake_nvml(nvmlDeviceGetCount=not_supported)).failure
    assert capture(fake_nvml(nvmlDeviceGetCount=lambda: 0)).gpus == ()


def test_mig_instances_take_the_place_of_their_gpu() -> None:
    nvml = fake_nvml(
        nvmlDeviceGetCount=lambda: 1,
        nvmlDeviceGetHandleByIndex=lambda index: "parent",
        nvmlDeviceGetMigMode=lambda handle: [1, 1] if handle == "parent" else not_supported(),
        nvmlDeviceGetMaxMigDeviceCount=lambda handle: 7,
        nvmlDeviceGetMigDeviceHandleByIndex=lambda handle, index: f"mig{index}" if index < 2 else not_supported(),
        nvmlDeviceGetName=lambda handle: f"NVIDIA A100-SXM4-80GB MIG {handle}",
        nvmlDeviceGetMemoryInfo=lambda handle: SimpleNamespace(total=19968 * MIB, free=5602 * MIB),
    )
    gpus, _ = parse(capture(nvml), RAM)
    assert [gpu.memory_total_bytes for gpu in gpus] == [19968 * MIB] * 2


anything = st.one_of(st.none(), st.integers(), st.floats(), st.text(max_size=20), st.binary(max_size=8), st.booleans())
raw_devices = st.builds(
    NvmlDevice,
    name=anything,
    memory_total=anything,
    memory_free=anything,
    compute_capability=st.one_of(anything, st.tuples(anything, anything)),
    pcie_generation=anything,
    pcie_width=anything,
    memory_clock_mhz=anything,
    memory_bus_bits=anything,
    core_count=anything,
    mig_mode=st.one_of(anything, st.lists(anything, max_size=2)),
)


@given(raw_devices, anything)
def test_any_answer_gives_a_gpu_without_zeros(raw: NvmlDevice, driver: Any) -> None:
    (gpu,), _ = parse(NvmlCapture(driver=driver, gpus=(raw,)), RAM)
    numbers = (gpu.memory_total_bytes, gpu.memory_free_bytes, gpu.bandwidth_bytes_per_second, gpu.core_count)
    assert all(number is None or number > 0 for number in numbers)
    assert gpu.name and gpu.driver != ""


def test_cuda_visible_devices() -> None:
    gpus, _ = parse(NvmlCapture(gpus=(RTX_4090, H100)), RAM)
    assert visible(gpus, None) == (gpus, [])
    assert visible(gpus, "1")[0] == gpus[1:]
    assert visible(gpus, "0,1") == (gpus, [])
    assert visible(gpus, "")[0] == visible(gpus, "-1")[0] == visible(gpus, "7,0")[0] == ()
    same, notes = visible(gpus, "GPU-7cc6648e")
    assert same == gpus and notes
