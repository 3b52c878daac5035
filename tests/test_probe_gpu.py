"""AMD and Intel GPUs from sysfs trees, Apple Silicon from its tools' output."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.core.hardware import Cpu, Memory
from planner.probe.amd import amd_gpus, gfx_name
from planner.probe.apple import parse_gpu_cores, parse_machine, parse_sysctl, parse_vm_stat
from planner.probe.intel import intel_gpus, parse_xpu_smi
from planner.probe.machine import linux_machine
from planner.probe.reader import Reader
from planner.probe.sysfs_gpu import pci_ids_name

CAPTURES = Path(__file__).parent / "captures"
GIB = 1 << 30
RAM = Memory(total_bytes=60 * GIB, available_bytes=50 * GIB)
DESKTOP = Cpu(model="AMD Ryzen 9 7950X 16-Core Processor", architecture="x86_64", device="Ryzen 9 7950X")
PHOENIX = Cpu(
    model="AMD Ryzen 7 7840HS w/ Radeon 780M Graphics", architecture="x86_64", device="Ryzen 7 7840HS (Radeon 780M)"
)


def captured(name: str) -> str:
    return (CAPTURES / name).read_text(encoding="utf-8")


def card(root: Path, index: int, **files: str) -> None:
    """A display controller in a sysfs tree."""
    folder = root / "sys" / "class" / "drm" / f"card{index}" / "device"
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_text(content + "\n")
    (root / "sys" / "class" / "drm" / f"card{index}-DP-1").mkdir()


RX_7900_XTX = {
    "vendor": "0x1002",
    "device": "0x744c",
    "revision": "0xc8",
    "mem_info_vram_total": str(24560 << 20),
    "mem_info_vram_used": str(1200 << 20),
    "max_link_speed": "16.0 GT/s PCIe",
    "max_link_width": "16",
}
IGPU = {"vendor": "0x1002", "device": "0x164e", "revision": "0xc6", "mem_info_vram_total": "67108864"}


def test_amd_card(tmp_path: Path) -> None:
    card(tmp_path, 0, **RX_7900_XTX)
    node = tmp_path / "sys/class/kfd/kfd/topology/nodes/1"
    node.mkdir(parents=True)
    (node / "properties").write_text("cpu_cores_count 0\nsimd_count 192\ngfx_target_version 110000\ndevice_id 29772\n")
    (gpu,), notes = amd_gpus(Reader(str(tmp_path), tools=()), RAM, DESKTOP)
    assert (gpu.name, gpu.device, gpu.compute_capability) == ("AMD Radeon RX 7900 XTX", "Radeon RX 7900 XTX", "gfx1100")
    assert gpu.memory_total_bytes == 24560 << 20 and gpu.memory_free_bytes == 23360 << 20
    assert gpu.link == "PCIe 4.0 x16" and gpu.bandwidth_bytes_per_second == 960e9 and gpu.core_count == 6144
    assert gpu.backend == "vulkan", "no ROCm is installed in this tree"
    assert notes == []


def test_rocm_is_used_where_it_is_installed(tmp_path: Path) -> None:
    card(tmp_path, 0, **RX_7900_XTX)
    node = tmp_path / "sys/class/kfd/kfd/topology/nodes/1"
    node.mkdir(parents=True)
    (node / "properties").write_text("gfx_target_version 110000\ndevice_id 29772\n")
    (tmp_path / "opt/rocm").mkdir(parents=True)
    (gpu,), _ = amd_gpus(Reader(str(tmp_path), tools=()), RAM, DESKTOP)
    assert gpu.backend == "rocm"


def test_a_desktop_processors_display_output_is_no_gpu_to_plan_for(tmp_path: Path) -> None:
    card(tmp_path, 0, **RX_7900_XTX)
    card(tmp_path, 1, **IGPU)
    gpus, notes = amd_gpus(Reader(str(tmp_path), tools=()), RAM, DESKTOP)
    assert [gpu.device for gpu in gpus] == ["Radeon RX 7900 XTX"] and "left out" in notes[0]


def test_amd_apu_shares_the_ram(tmp_path: Path) -> None:
    card(
        tmp_path,
        1,
        vendor="0x1002",
        device="0x1900",
        revision="0xd0",
        mem_info_vram_total=str(4 * GIB),
        mem_info_vram_used=str(GIB),
        mem_info_gtt_total=str(30 * GIB),
    )
    (gpu,), notes = amd_gpus(Reader(str(tmp_path), tools=()), RAM, PHOENIX)
    assert gpu.unified_memory and gpu.device == "Ryzen 7 7840HS (Radeon 780M)"
    assert gpu.memory_total_bytes == 64 * GIB and gpu.working_set_bytes == 34 * GIB == gpu.usable_bytes()
    assert "34816 MiB" in notes[0]


def test_libdrms_table_names_what_ours_does_not(tmp_path: Path) -> None:
    card(tmp_path, 0, **(RX_7900_XTX | {"device": "0x7489", "revision": "0x00", "mem_info_vram_total": str(8 * GIB)}))
    (tmp_path / "usr/share/libdrm").mkdir(parents=True)
    (tmp_path / "usr/share/libdrm/amdgpu.ids").write_text(captured("amdgpu.ids"))
    (gpu,), notes = amd_gpus(Reader(str(tmp_path), tools=()), RAM, DESKTOP)
    assert gpu.name == "AMD Radeon Pro W7500" and gpu.device is None and "device table" in notes[0]


@pytest.mark.parametrize("total", ["0", "", "-1", "N/A", "99999999999999999999"])
def test_vram_that_lies_is_unknown_or_published(tmp_path: Path, total: str) -> None:
    card(tmp_path, 0, **(RX_7900_XTX | {"mem_info_vram_total": total}))
    (gpu,), notes = amd_gpus(Reader(str(tmp_path), tools=()), RAM, DESKTOP)
    assert gpu.memory_total_bytes == 24 * GIB and gpu.memory_free_bytes is None
    assert "unknown" in notes[0]


def test_gfx_names() -> None:
    versions = {
        110000: "gfx1100",
        90402: "gfx942",
        90010: "gfx90a",
        110501: "gfx1151",
        120001: "gfx1201",
        90006: "gfx906",
    }
    assert {gfx_name(number) for number in versions} == set(versions.values())


def test_pci_ids_file() -> None:
    name = "Navi 21 [Radeon RX 6800/6800 XT / 6900 XT]"
    text = f"# x\n1002  Advanced Micro Devices, Inc. [AMD/ATI]\n\t73bf  {name}\n8086  Intel\n"
    assert pci_ids_name(text, "1002", "73bf") == "Radeon RX 6800/6800 XT / 6900 XT"
    assert (
        pci_ids_name(text, "1002", "73be")
        is pci_ids_name(text, "10de", "73bf")
        is pci_ids_name("", "1002", "1")
        is None
    )


def test_intel_card_by_its_number_and_xpu_smi(tmp_path: Path) -> None:
    card(tmp_path, 0, vendor="0x8086", device="0xe211", revision="0x00")
    reader = Reader(str(tmp_path), run=lambda argv: captured("xpu-smi-arc-pro-b60.json"), tools=("xpu-smi",))
    (gpu,), _ = intel_gpus(reader, RAM, DESKTOP)
    assert gpu.device == "Arc Pro B60" and gpu.memory_total_bytes == 25669140480
    assert gpu.memory_free_bytes == 25447600128 and gpu.bandwidth_bytes_per_second == 456e9


def test_intel_card_without_tools_has_its_published_size(tmp_path: Path) -> None:
    card(tmp_path, 0, vendor="0x8086", device="0x56a0", revision="0x08")
    (gpu,), notes = intel_gpus(Reader(str(tmp_path), tools=()), RAM, DESKTOP)
    assert gpu.device == "Arc A770" and gpu.memory_total_bytes == 16 * GIB and "published" in notes[0]


def test_old_integrated_graphics_are_left_out(tmp_path: Path) -> None:
    card(tmp_path, 0, vendor="0x8086", device="0x3e92", revision="0x00")
    gpus, notes = intel_gpus(Reader(str(tmp_path), tools=()), RAM, DESKTOP)
    assert gpus == () and "left out" in notes[0]


def test_a_discrete_gpu_is_not_mixed_with_an_integrated_one(tmp_path: Path) -> None:
    card(tmp_path, 0, **RX_7900_XTX)
    card(tmp_path, 1, vendor="0x8086", device="0x46a6", revision="0x00")
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 33554432 kB\nMemAvailable: 20000000 kB\n")
    _, _, gpus, notes = linux_machine(Reader(str(tmp_path), tools=()), "x86_64")
    assert [gpu.device for gpu in gpus] == ["Radeon RX 7900 XTX"]
    assert any("beside a discrete GPU" in note for note in notes)


@given(st.text(max_size=100))
def test_any_xpu_smi_output_parses(text: str) -> None:
    assert isinstance(parse_xpu_smi(text), tuple)


@pytest.mark.parametrize(
    "text", ["[]", "{}", '{"device_list": 3}', '[{"memory_physical_size_byte": "0"}]', "[[1]]", "null"]
)
def test_odd_json_from_xpu_smi(text: str) -> None:
    assert all(device.memory_total_bytes is None for device in parse_xpu_smi(text))


def test_m1_with_8_gib() -> None:
    cpu, memory, (gpu,), notes = parse_machine(captured("sysctl-m1.txt"))
    assert (cpu.model, cpu.physical_core_count, cpu.performance_core_count) == ("Apple M1", 8, 4)
    assert cpu.simd == ("dotprod", "neon")
    assert memory.total_bytes == 8 * GIB and gpu.working_set_bytes == 8 * GIB * 2 // 3
    assert gpu.device == "Apple M1 7c GPU" and any("smallest" in note for note in notes)


def test_m4_pro() -> None:
    cpu, _, (gpu,), notes = parse_machine(captured("sysctl-m4-pro.txt"), '"gpu-core-count" = 16')
    assert cpu.simd == ("bf16", "dotprod", "i8mm", "neon", "sme") and cpu.inference_threads() == 8
    assert gpu.device == "Apple M4 Pro 16c GPU" and gpu.usable_bytes() == 16 * GIB
    assert gpu.bandwidth_bytes_per_second == 273e9 and gpu.unified_memory and notes == []


def test_m3_max_with_a_limit_of_its_owner() -> None:
    text, vm_stat = captured("sysctl-m3-max-wired-limit.txt"), captured("vm-stat-16k.txt")
    _, memory, (gpu,), _ = parse_machine(text, captured("ioreg-m3-max.txt"), "", vm_stat)
    assert gpu.working_set_bytes == 56 * GIB and gpu.core_count == 40 and gpu.device == "Apple M3 Max 40c GPU"
    assert memory.available_bytes == 16384 * (152839 + 835110 + 6082 + 10415)
    assert gpu.usable_bytes() == memory.available_bytes


def test_gpu_cores_from_system_profiler() -> None:
    assert parse_gpu_cores("", captured("system-profiler-m3-pro.json")) == 18
    assert (
        parse_gpu_cores("", "{")
        is parse_gpu_cores("", "[]")
        is parse_gpu_cores("", '{"SPDisplaysDataType": 1}')
        is None
    )


@given(st.text(max_size=200), st.text(max_size=80), st.text(max_size=80), st.text(max_size=80))
def test_any_output_of_a_macs_tools_parses(sysctl: str, ioreg: str, profiler: str, vm_stat: str) -> None:
    cpu, memory, (gpu,), notes = parse_machine(sysctl, ioreg, profiler, vm_stat)
    assert cpu.model and memory.total_bytes != 0 and gpu.usable_bytes() != 0
    assert notes


@given(st.sampled_from(["hw.memsize", "hw.physicalcpu", "iogpu.wired_limit_mb"]), st.text(max_size=20))
def test_a_lying_sysctl_gives_no_zero(key: str, value: str) -> None:
    text = captured("sysctl-m1.txt") + f"{key}: {value}\n"
    cpu, memory, (gpu,), _ = parse_machine(text)
    assert memory.total_bytes != 0 and gpu.working_set_bytes != 0 and cpu.physical_core_count != 0


def test_sysctl_and_vm_stat_without_content() -> None:
    assert parse_sysctl("no colon\n:\n") == {}
    assert parse_vm_stat("") is parse_vm_stat("page size of 16384 bytes") is parse_vm_stat("Pages free: 3.") is None
