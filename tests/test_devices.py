"""The device table: names resolve as drivers spell them, figures are whole and sourced."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.core import devices
from planner.core.data import read_table
from planner.core.errors import UsageError
from planner.core.units import GIB

MIB = 1 << 20


def test_every_row_is_found_by_its_own_name() -> None:
    assert len(devices.names()) >= 244
    for name in devices.names():
        row = devices.find(name)
        assert row is not None and row.device == name


def test_every_row_has_source_date_and_no_zero() -> None:
    for raw in read_table("devices.csv"):
        assert raw["source"] and raw["date"], raw["device"]
        for column, text in raw.items():
            if column.endswith(("_bytes", "_per_second", "_count", "_watts", "_fraction")) and text:
                assert float(text) > 0, (raw["device"], column)


def test_figures_are_plausible() -> None:
    for name in devices.names():
        row = devices.find(name)
        assert row is not None
        assert row.bandwidth_bytes_per_second is not None and 8e9 <= row.bandwidth_bytes_per_second <= 10e12
        if row.kind.startswith("gpu"):
            assert row.memory_bytes is not None and row.memory_bytes % (1 << 29) == 0
            assert row.fp16_flops_per_second is not None and row.fp16_flops_per_second > 1e12
            assert row.compute_capability or row.vendor == "intel"


@pytest.mark.parametrize(
    ("spelling", "memory", "cores", "expected"),
    [
        ("NVIDIA GeForce RTX 4090", 24564 * MIB, None, "GeForce RTX 4090"),
        ("NVIDIA GeForce RTX 4090 D", None, None, "GeForce RTX 4090 D"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", 16376 * MIB, None, "GeForce RTX 4090 Mobile"),
        ("NVIDIA GeForce RTX 3080 Laptop GPU", 8192 * MIB, None, "GeForce RTX 3080 Mobile"),
        ("NVIDIA GeForce RTX 3080", 10240 * MIB, None, "GeForce RTX 3080"),
        ("NVIDIA GeForce RTX 3080", 12288 * MIB, None, "GeForce RTX 3080 12 GB"),
        ("NVIDIA GeForce RTX 3070 Laptop GPU", 8192 * MIB, None, None),
        ("NVIDIA GeForce RTX 3060", 12288 * MIB, None, "GeForce RTX 3060 12 GB"),
        ("NVIDIA GeForce RTX 3060", 8192 * MIB, None, None),
        ("NVIDIA GeForce RTX 4060 Ti", 16380 * MIB, None, "GeForce RTX 4060 Ti 16 GB"),
        ("NVIDIA GeForce RTX 4060 Ti", 8188 * MIB, None, "GeForce RTX 4060 Ti 8 GB"),
        ("NVIDIA GeForce RTX 4070 Ti SUPER", None, None, "GeForce RTX 4070 Ti SUPER"),
        ("NVIDIA H100 80GB HBM3", 81559 * MIB, None, "H100 SXM5 80 GB"),
        ("NVIDIA H100 PCIe", 81559 * MIB, None, "H100 PCIe 80 GB"),
        ("NVIDIA H100 NVL", 95830 * MIB, None, "H100 NVL 94 GB"),
        ("NVIDIA H200", 143771 * MIB, None, "H200 SXM 141 GB"),
        ("NVIDIA A100-SXM4-80GB", 81920 * MIB, None, "A100 SXM4 80 GB"),
        ("NVIDIA A100-SXM4-40GB", 40960 * MIB, None, "A100 SXM4 40 GB"),
        ("NVIDIA A100 80GB PCIe", None, None, "A100 PCIe 80 GB"),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", 4864 * MIB, None, None),
        ("NVIDIA L4", 23034 * MIB, None, "L4"),
        ("NVIDIA A10", 23028 * MIB, None, "A10 PCIe"),
        ("NVIDIA A10G", 23028 * MIB, None, "A10G"),
        ("Tesla T4", 15360 * MIB, None, "Tesla T4"),
        ("Tesla V100-SXM2-32GB", None, None, "Tesla V100 SXM2 32 GB"),
        ("Quadro RTX 6000", None, None, "Quadro RTX 6000"),
        ("NVIDIA RTX 6000 Ada Generation", None, None, "RTX 6000 Ada Generation"),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", None, None, "RTX PRO 6000 Blackwell"),
        ("NVIDIA GB10", None, None, "DGX Spark (GB10)"),
        ("AMD Radeon RX 7900 XTX", 24 * GIB, None, "Radeon RX 7900 XTX"),
        ("AMD Radeon RX 7900 XT", 20 * GIB, None, "Radeon RX 7900 XT"),
        ("AMD Radeon RX 6700", 10 * GIB, None, None),
        ("Radeon RX 7900 XTX (RADV NAVI31)", None, None, "Radeon RX 7900 XTX"),
        ("Intel(R) Arc(TM) A770 Graphics", None, None, "Arc A770"),
        ("Apple M3 Max", None, 40, "Apple M3 Max 40c GPU"),
        ("Apple M3 Max", None, 30, "Apple M3 Max 30c GPU"),
        ("Apple M3 Max", None, None, "Apple M3 Max 30c GPU"),
        ("AMD Ryzen 9 7950X 16-Core Processor", None, None, "Ryzen 9 7950X"),
        ("AMD Ryzen 9 7950X3D 16-Core Processor", None, None, None),
        ("13th Gen Intel(R) Core(TM) i9-13900K", None, None, "Core i9-13900K"),
        ("Raspberry Pi 5 Model B Rev 1.0", None, None, "Raspberry Pi 5"),
        ("AMD RYZEN AI MAX+ 395 w/ Radeon 8060S", None, None, "Ryzen AI Max+ 395 (Radeon 8060S)"),
        ("Intel(R) Xeon(R) Processor", None, None, None),
        ("NVIDIA GeForce RTX 9999", None, None, None),
    ],
)
def test_names_as_drivers_spell_them(
    spelling: str, memory: int | None, cores: int | None, expected: str | None
) -> None:
    row = devices.find(spelling, memory_bytes=memory, core_count=cores)
    assert (row.device if row else None) == expected


@given(st.text(max_size=80), st.one_of(st.none(), st.integers(-1, 1 << 60)), st.one_of(st.none(), st.integers(-1, 999)))
def test_any_text_is_safe_to_look_up(name: str, memory: int | None, cores: int | None) -> None:
    row = devices.find(name, memory_bytes=memory, core_count=cores)
    assert row is None or row.device in devices.names()
    assert all(near in devices.names() for near in devices.nearest(name))


def test_corrections_of_the_source_hold() -> None:
    pascal, b200, mi300 = (devices.find(n) for n in ("GeForce GTX 1080 Ti", "B200", "Radeon Instinct MI300X"))
    assert pascal and b200 and mi300
    assert pascal.fp16_flops_per_second == pascal.fp32_flops_per_second == 11.34e12
    assert (b200.memory_bytes, b200.bandwidth_bytes_per_second) == (180 * GIB, 8e12)
    assert mi300.bandwidth_bytes_per_second == 5.3e12


def test_pcie_rates() -> None:
    rate = devices.link_bytes_per_second
    assert rate("PCIe 4.0 x16") == pytest.approx(31.508e9, rel=1e-4)
    assert rate("PCIe 3.0 x16") == pytest.approx(15.754e9, rel=1e-4)
    assert rate("PCIe 2.0 x16") == 8e9
    assert rate("PCIe 5.0 x8") == rate("PCIe 4.0 x16")
    assert rate(None) is rate("NVLink") is rate("PCIe 9.0 x16") is rate("PCIe 4.0 x7") is None


def test_apple_working_set_is_what_macos_grants() -> None:
    # recommendedMaxWorkingSetSize of llama.cpp logs: 5461, 10922.67, 21845.34 and 49152 MiB
    for ram, mib in ((8, 5461), (16, 10922), (32, 21845), (64, 49152), (96, 73728)):
        assert devices.apple_working_set_bytes(ram * GIB) >> 20 == mib


def test_simulated_machines() -> None:
    for name in devices.names():
        for backend in (None, "cpu", "vulkan"):
            machine = devices.hardware_from_device(name, backend=backend)
            assert machine.memory.bandwidth_bytes_per_second
            assert not (backend == "cpu" and machine.gpus)
            assert machine.source and machine.date
    pair = devices.hardware_from_device("GeForce RTX 3090", count=2, ram_bytes=64 * GIB)
    assert [gpu.memory_total_bytes for gpu in pair.gpus] == [24 * GIB, 24 * GIB]
    assert pair.memory.total_bytes == 64 * GIB and "assumed" in pair.notes[0]
    alone = devices.hardware_from_device("GeForce RTX 3090")
    assert alone.memory.total_bytes is None, "the RAM of a host that nobody named is unknown"


def test_simulated_unified_memory_is_counted_on_the_gpu() -> None:
    mac = devices.hardware_from_device("Apple M3 Max 40c GPU", ram_bytes=64 * GIB)
    assert mac.gpus[0].unified_memory and mac.gpus[0].usable_bytes() == 48 * GIB
    assert mac.memory.total_bytes == 64 * GIB
    assert mac.cpu.inference_threads() == 12
    spark = devices.hardware_from_device("DGX Spark (GB10)")
    assert spark.gpus[0].unified_memory and spark.gpus[0].link is None
    assert not devices.hardware_from_device("Ryzen 9 7950X").gpus
    assert not devices.hardware_from_device("Raspberry Pi 5").gpus


def test_unknown_device_names_its_neighbours() -> None:
    with pytest.raises(UsageError, match="unknown-device") as caught:
        devices.hardware_from_device("rtx 4099")
    assert "RTX" in caught.value.hint
    with pytest.raises(UsageError, match="unknown-backend"):
        devices.hardware_from_device("L4", backend="opencl")
    with pytest.raises(UsageError, match="bad-count"):
        devices.hardware_from_device("L4", count=0)


@pytest.mark.parametrize(
    ("device", "backend"), [("M3 Max", "cuda"), ("GeForce RTX 4090", "rocm"), ("Radeon RX 7900 XTX", "metal")]
)
def test_a_back_end_of_another_vendor_is_refused(device: str, backend: str) -> None:
    with pytest.raises(UsageError) as caught:
        devices.hardware_from_device(device, backend=backend)
    assert caught.value.code == "backend-mismatch"
    assert caught.value.hint and "vulkan" in caught.value.hint


@pytest.mark.parametrize("backend", ["vulkan", "sycl", "cpu"])
def test_a_back_end_of_several_vendors_is_taken(backend: str) -> None:
    assert devices.hardware_from_device("GeForce RTX 4090", backend=backend).name
