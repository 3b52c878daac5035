"""The processor and RAM from captured text of real machines, and from text that is no such thing."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.probe.cpu import linux_cpu, parse_cpuinfo, simd_of
from planner.probe.ram import control_group, linux_memory, memory_groups, parse_meminfo
from planner.probe.reader import Reader, cpu_list, whole

CAPTURES = Path(__file__).parent / "captures"
AVX2 = {"avx", "avx2", "f16c", "fma", "sse4_2"}
GIB = 1 << 30


def machine(root: Path, files: dict[str, str]) -> Reader:
    """A machine with these files and no tools."""
    for path, content in files.items():
        target = root / path.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(content, encoding="utf-8")
    return Reader(str(root), tools=())


def captured(name: str) -> str:
    return (CAPTURES / name).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("file", "architecture", "model", "cores", "threads", "simd", "device"),
    [
        ("cpuinfo-raspberry-pi-5.txt", "aarch64", "Cortex-A76", None, 4, {"neon", "dotprod"}, "Raspberry Pi 5"),
        ("cpuinfo-raspberry-pi-4.txt", "aarch64", "Cortex-A72", None, 4, {"neon"}, "Raspberry Pi 4"),
        ("cpuinfo-graviton3.txt", "aarch64", "Neoverse-V1", None, 1, {"neon", "dotprod", "sve"}, None),
        (
            "cpuinfo-dimensity-8400.txt",
            "aarch64",
            "Cortex-A725",
            None,
            8,
            {"neon", "dotprod", "i8mm", "bf16", "sve", "sve2"},
            None,
        ),
        (
            "cpuinfo-i9-13980hx.txt",
            "x86_64",
            "13th Gen Intel(R) Core(TM) i9-13980HX",
            24,
            32,
            AVX2 | {"avx_vnni"},
            None,
        ),
        (
            "cpuinfo-zen4.txt",
            "x86_64",
            "AMD Ryzen 7 7840HS w/ Radeon 780M Graphics",
            8,
            16,
            AVX2 | {"avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_vbmi", "avx512_bf16"},
            "Ryzen 7 7840HS (Radeon 780M)",
        ),
        (
            "cpuinfo-h100-host.txt",
            "x86_64",
            "Intel(R) Xeon(R) Processor",
            16,
            16,
            AVX2
            | {"avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_vbmi", "avx512_bf16", "avx512_fp16"}
            | {"avx_vnni", "amx_tile", "amx_int8", "amx_bf16"},
            None,
        ),
    ],
)
def test_captured_processors(
    tmp_path: Path,
    file: str,
    architecture: str,
    model: str,
    cores: int | None,
    threads: int,
    simd: set[str],
    device: str | None,
) -> None:
    cpu, notes = linux_cpu(machine(tmp_path, {"/proc/cpuinfo": captured(file)}), architecture)
    assert (cpu.model, cpu.architecture, cpu.device) == (model, architecture, device)
    assert (cpu.physical_core_count, cpu.logical_core_count) == (cores, threads)
    assert set(cpu.simd) == simd and list(cpu.simd) == sorted(cpu.simd)
    assert notes == []


def test_hybrid_processor_counts_its_fast_cores(tmp_path: Path) -> None:
    reader = machine(
        tmp_path,
        {
            "/proc/cpuinfo": captured("cpuinfo-i9-13980hx.txt"),
            "/sys/devices/cpu_core/cpus": "0-15\n",
            "/sys/devices/cpu_atom/cpus": "16-31\n",
            "/sys/devices/system/node/online": "0\n",
        },
    )
    cpu, _ = linux_cpu(reader, "x86_64")
    assert (cpu.performance_core_count, cpu.physical_core_count, cpu.logical_core_count) == (8, 24, 32)
    assert cpu.inference_threads() == 8 and cpu.numa_node_count == 1


def test_arm_cores_of_two_kinds(tmp_path: Path) -> None:
    block = "processor : {}\nFeatures : fp asimd asimddp\nCPU implementer : 0x41\nCPU part : {}\n\n"
    files = {"/proc/cpuinfo": "".join(block.format(i, "0xd87" if i < 10 else "0xd85") for i in range(20))}
    for i in range(20):
        folder = f"/sys/devices/system/cpu/cpu{i}"
        files[f"{folder}/cpu_capacity"] = "718\n" if i < 10 else "1024\n"
        files[f"{folder}/topology/thread_siblings_list"] = f"{i}\n"
    cpu, _ = linux_cpu(machine(tmp_path, files), "aarch64")
    assert cpu.model == "Cortex-A725 + Cortex-X925"
    assert (cpu.physical_core_count, cpu.performance_core_count) == (20, 10)


def test_two_sockets_are_not_one(tmp_path: Path) -> None:
    block = "processor : {}\nmodel name : Xeon\nphysical id : {}\ncore id : {}\nflags : avx2\n\n"
    text = "".join(block.format(i, i // 4, i % 2) for i in range(8))
    reader = machine(tmp_path, {"/proc/cpuinfo": text, "/sys/devices/system/node/online": "0-1\n"})
    cpu, _ = linux_cpu(reader, "x86_64")
    assert (cpu.physical_core_count, cpu.logical_core_count, cpu.numa_node_count) == (4, 8, 2)


def test_a_machine_that_says_nothing_gives_notes(tmp_path: Path) -> None:
    cpu, notes = linux_cpu(Reader(str(tmp_path), tools=()), "riscv64")
    assert cpu.model == "unknown riscv64 processor" and cpu.logical_core_count is None and len(notes) == 2
    assert cpu.inference_threads() == 1


@pytest.mark.parametrize(
    "text",
    [
        "",
        "\x00\x01\x02\xff" * 50,
        "processor",
        "processor : zero\nmodel name : x\n",
        f"processor : 0\nmodel name : \ufffd\ufffd\ncpu cores : 0\nphysical id : -1\ncore id : {10**40}\n",
        captured("cpuinfo-zen4.txt")[:700],
        "processor : 0\n" * 3,
    ],
)
def test_malformed_cpuinfo_is_unknown_not_zero(text: str) -> None:
    info = parse_cpuinfo(text)
    assert info.logical_count is None or info.logical_count > 0
    assert info.model is None or info.model.isprintable()


@given(
    st.one_of(
        st.text(max_size=400),
        st.lists(
            st.sampled_from(
                [
                    "processor : 0",
                    "processor:1",
                    "model name :",
                    "model name : X",
                    "flags : avx2 f16c",
                    "Features\t: asimd",
                    "",
                    "physical id : 0",
                    "core id : 1",
                    "core id : -1",
                    "CPU implementer : 0x41",
                    "CPU part : 0xffffffffff",
                    ":",
                    "Model : ?",
                ]
            )
        ).map("\n".join),
    )
)
def test_any_cpuinfo_parses(text: str) -> None:
    info = parse_cpuinfo(text)
    assert info.logical_count is None or info.logical_count > 0
    assert info.model != "" and info.vendor != ""
    assert simd_of("x86_64", info.flags) == tuple(sorted(simd_of("x86_64", info.flags)))


def test_kernel_lists_and_whole_numbers() -> None:
    assert cpu_list("0-3,8\n") == (0, 1, 2, 3, 8)
    assert cpu_list("") == cpu_list("3-1") == cpu_list("x") == cpu_list("0-99999999999") == ()
    assert whole("0x744c") == 0x744C and whole(" 12 ") == 12
    assert whole("0") is whole("-1") is whole("N/A") is whole(None) is whole(True) is whole("9" * 40) is None


@given(st.text(max_size=60))
def test_whole_never_gives_zero(text: str) -> None:
    assert whole(text) != 0


def test_meminfo() -> None:
    assert parse_meminfo(captured("meminfo-h100-host.txt")) == (131981020 << 10, 131455660 << 10)
    assert parse_meminfo(captured("meminfo-gb10.txt")) == (127600748 << 10, 118566368 << 10)
    total, available = parse_meminfo(captured("meminfo-kernel-3.10.txt"))
    assert (total, available) == (8010408 << 10, (5203504 + 206120 + 1310344) << 10)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "MemTotal: 0 kB\nMemAvailable: 0 kB\n",
        "MemTotal: -5 kB\n",
        "MemTotal: lots\n",
        "MemTotal: 8 MB\n",
        "MemTotal",
    ],
)
def test_meminfo_that_lies_is_unknown(text: str) -> None:
    assert parse_meminfo(text) == (None, None)


def test_more_available_than_there_is_is_a_lie() -> None:
    assert parse_meminfo("MemTotal: 8 kB\nMemAvailable: 9 kB\n") == (8192, None)


@given(
    st.one_of(
        st.text(max_size=200),
        st.builds(
            lambda a, b: f"MemTotal: {a} kB\nMemAvailable: {b} kB\n", st.integers(-9, 1 << 70), st.integers(-9, 1 << 70)
        ),
    )
)
def test_any_meminfo_parses(text: str) -> None:
    total, available = parse_meminfo(text)
    assert total is None or total > 0
    assert available is None or 0 < available <= (total or 0)


MEMINFO = "MemTotal:       65536000 kB\nMemAvailable:   60000000 kB\n"


def test_container_with_cgroup_v2(tmp_path: Path) -> None:
    reader = machine(
        tmp_path,
        {
            "/proc/meminfo": MEMINFO,
            "/proc/self/cgroup": "0::/\n",
            "/sys/fs/cgroup/memory.max": f"{8 * GIB}\n",
            "/sys/fs/cgroup/memory.current": f"{3 * GIB}\n",
            "/sys/fs/cgroup/memory.stat": f"anon 123\ninactive_file {GIB}\n",
        },
    )
    memory, notes = linux_memory(reader)
    assert memory.limit_bytes == 8 * GIB and memory.available_bytes == memory.usable_bytes() == 6 * GIB
    assert "8192 MiB" in notes[0]


def test_nested_groups_take_the_tightest(tmp_path: Path) -> None:
    reader = machine(
        tmp_path,
        {
            "/proc/self/cgroup": "0::/user.slice/user-1000.slice/app.scope\n",
            "/sys/fs/cgroup/user.slice/memory.max": f"{4 * GIB}\n",
            "/sys/fs/cgroup/user.slice/user-1000.slice/memory.max": "max\n",
            "/sys/fs/cgroup/user.slice/user-1000.slice/app.scope/memory.max": f"{16 * GIB}\n",
        },
    )
    assert control_group(reader).limit_bytes == 4 * GIB


def test_container_with_cgroup_v1_sees_its_own_group_at_the_root(tmp_path: Path) -> None:
    reader = machine(
        tmp_path,
        {
            "/proc/meminfo": MEMINFO,
            "/proc/self/cgroup": "11:cpu,cpuacct:/docker/0a1b\n4:memory:/docker/0a1b\n",
            "/sys/fs/cgroup/memory/memory.limit_in_bytes": f"{2 * GIB}\n",
            "/sys/fs/cgroup/memory/memory.usage_in_bytes": f"{GIB}\n",
        },
    )
    memory, _ = linux_memory(reader)
    assert (memory.limit_bytes, memory.available_bytes) == (2 * GIB, GIB)


@pytest.mark.parametrize("text", ["9223372036854771712", "max", "", "0", "-1", "garbage"])
def test_no_limit_is_none(tmp_path: Path, text: str) -> None:
    reader = machine(
        tmp_path,
        {
            "/proc/meminfo": MEMINFO,
            "/proc/self/cgroup": "4:memory:/\n",
            "/sys/fs/cgroup/memory/memory.limit_in_bytes": text,
        },
    )
    memory, notes = linux_memory(reader)
    assert memory.limit_bytes is None and memory.available_bytes == 60000000 << 10 and notes == []


def test_a_full_group_has_nothing_available(tmp_path: Path) -> None:
    reader = machine(
        tmp_path,
        {"/proc/meminfo": MEMINFO, "/sys/fs/cgroup/memory.max": "100", "/sys/fs/cgroup/memory.current": "100"},
    )
    memory, _ = linux_memory(reader)
    assert memory.available_bytes is None and memory.usable_bytes() == 100


@given(st.text(max_size=120))
def test_any_cgroup_text_parses(text: str) -> None:
    for path in memory_groups(text):
        assert path is None or (path.startswith("/") and ".." not in path)
