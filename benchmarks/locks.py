"""Write data/locks/: every package of every environment of data/environments.toml, pinned, and the size of the wheels.

A lock holds for all platforms that qplan runs on (uv's universal resolution, Python 3.11 and later; what a platform
does not need has a marker), once with torch's CUDA libraries and once without, for a CPU build of torch from anywhere.
The sizes are those that the index gives of the wheels for Python 3.11 on Linux x86_64.

    python benchmarks/locks.py [ENVIRONMENT…]          needs uv and packaging; seconds
    python benchmarks/locks.py --measured QPLAN_HOME   notes disk and time of the environments installed there
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from pathlib import Path

from packaging.requirements import Requirement
from packaging.tags import compatible_tags, cpython_tags
from packaging.utils import parse_wheel_filename

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from planner.core.codec import decode, read_json
from planner.core.data import data_path, read_table
from planner.execute.environments import MARKER, Environment, Marker, child_requires, rows

# what torch's Linux wheels of the default index ask for and a CPU build does not
CUDA_OF_TORCH = ("cuda-bindings", "cuda-toolkit", "nvidia-cudnn-cu13", "nvidia-cusparselt-cu13", "nvidia-nccl-cu13",
                 "nvidia-nvshmem-cu13", "triton")  # fmt: skip
NEVER = "sys_platform == 'never'"
NOWHERE = (NEVER, "sys_platform == 'emscripten'")
GLIBC = [f"manylinux_2_{minor}_x86_64" for minor in range(36, 4, -1)]
PLATFORMS = [*GLIBC, "manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64", "linux_x86_64"]
UNPACKED = (
    1.82  # bytes on disk per byte of wheel: 15 nvidia wheels, torch 2.14.1 for CUDA, triton 3.8 (5.43 of 2.99 GB)
)
CPU_WHEEL_BYTES = 191_794_682  # torch-2.13.0+cpu, cp311, manylinux_2_28_x86_64
TODAY = datetime.date.today().isoformat()
HERE = {"python_version": "3.11", "python_full_version": "3.11.9", "sys_platform": "linux", "os_name": "posix",
        "platform_machine": "x86_64", "platform_system": "Linux"}  # fmt: skip


def resolved(row: Environment, build: str) -> tuple[list[str], dict]:
    """What uv resolves the row's requirements to: lines of pins, and its own lock with the files of the index."""
    wanted = (*row.requires, *child_requires())
    asked = {Requirement(text).name for text in wanted} | ({"triton"} if row.name == "autoawq" else set())
    dropped = [] if build == "cuda" else [f"{name} ; {NEVER}" for name in CUDA_OF_TORCH if name not in asked]
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "pyproject.toml").write_text(_project(row, wanted, dropped))
        _uv(folder, "lock")
        pins = _uv(folder, "export", "--no-hashes", "--no-annotate", "--no-header", "--no-emit-project")
        lock = tomllib.loads(Path(folder, "uv.lock").read_text())
    return [line for line in pins.splitlines() if line.strip() and not any(part in line for part in NOWHERE)], lock


def _uv(folder: str, *arguments: str) -> str:
    command = ["uv", *arguments, "--project", folder, "--quiet", "--python", sys.executable]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)}: {done.stderr}")
    return done.stdout


def _project(row: Environment, wanted: tuple[str, ...], dropped: list[str]) -> str:
    """The requirements as a project, which may say for which versions of Python they must go together."""
    limits = [part for part in row.python.split(",") if not part.startswith(">=")]
    markers = [f"python_full_version {part.rstrip('0123456789.')} '{part.lstrip('<>=!')}'" for part in limits]
    return f"""[project]
name = "environment"
version = "0"
requires-python = "{row.python}"
dependencies = {json.dumps(list(wanted))}
[tool.uv]
environments = {json.dumps(markers)}
override-dependencies = {json.dumps(dropped)}
"""


def write_lock(row: Environment, build: str, pins: list[str]) -> None:
    """One file of pins."""
    uv = subprocess.run(["uv", "--version"], check=True, capture_output=True, text=True).stdout.split()[1]
    head = f"# {row.title}, torch for {build}: made by `python benchmarks/locks.py` with uv {uv} on {TODAY}\n"
    path = data_path(f"locks/{row.name}-{build}.txt")
    path.parent.mkdir(exist_ok=True)
    path.write_text(head + "\n".join(pins) + "\n", encoding="utf-8")
    print(f"{path.name}: {len(pins)} packages")


def downloads(build: str, pins: list[str], lock: dict) -> int:
    """Bytes of the files that pip takes for Python 3.11 on Linux x86_64."""
    files = {(package["name"], package["version"]): package for package in lock["package"]}
    total = 0
    for line in pins:
        pin = Requirement(line)
        if pin.marker is None or pin.marker.evaluate(HERE):
            version = str(pin.specifier).removeprefix("==")
            total += CPU_WHEEL_BYTES if (pin.name, build) == ("torch", "cpu") else _file_bytes(files[pin.name, version])
    return total


def _file_bytes(package: dict) -> int:
    ranks = {tag: rank for rank, tag in enumerate(_tags())}
    best, size = len(ranks), package.get("sdist", {}).get("size", 0)
    for wheel in package.get("wheels", []):
        name = wheel.get("name") or wheel["url"].rsplit("/", 1)[-1].split("#")[0].replace("%2B", "+")
        rank = min((ranks[tag] for tag in parse_wheel_filename(name)[3] if tag in ranks), default=len(ranks))
        if rank < best:
            best, size = rank, wheel.get("size", 0)
    if not size:
        print(f"  no size of {package['name']}", file=sys.stderr)
    return int(size)


def _tags() -> Iterator:
    yield from cpython_tags((3, 11), platforms=PLATFORMS)
    yield from compatible_tags((3, 11), interpreter="cp311", platforms=PLATFORMS)


def note(cpu: dict, cuda: dict, marker: Marker | None) -> None:
    """Disk and time of an environment that was made here, and the disk of the one for CUDA that follows."""
    if marker is not None:
        cpu |= {"disk_bytes": marker.size_bytes, "seconds": round(marker.seconds), "installer": marker.installer}
        cpu["source"] = f"wheels: package index; disk, time: made on 2 busy cores, Python {marker.python_version}"
    if cpu.get("disk_bytes"):
        more = int(cuda["download_bytes"]) - int(cpu["download_bytes"])
        cuda["disk_bytes"] = int(cpu["disk_bytes"]) + round(UNPACKED * more)
        cuda["seconds"] = round(float(cpu["seconds"]) * cuda["disk_bytes"] / int(cpu["disk_bytes"]))
        cuda["source"] = (
            f"wheels: package index; disk: {UNPACKED} times the wheels that CPU lacks; time: by disk; not run"
        )


def measured(home: Path) -> dict[str, Marker]:
    """Markers of the environments installed under ``home``."""
    found = [decode(Marker, read_json(path), what=str(path)) for path in home.glob(f"environments/*/{MARKER}")]
    return {marker.name: marker for marker in found if marker.build == "cpu"}


def main() -> None:
    """Write what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--measured", type=Path)
    options = parser.parse_args()
    path = data_path("environment_sizes.csv")
    known = {(row["environment"], row["build"]): row for row in read_table(path.name)} if path.exists() else {}
    seen = measured(options.measured) if options.measured else {}
    for row in rows():
        for build in ("cpu", "cuda"):
            if not options.measured and (not options.names or row.name in options.names):
                pins, lock = resolved(row, build)
                write_lock(row, build, pins)
                size = {"environment": row.name, "build": build, "download_bytes": downloads(build, pins, lock)}
                known[row.name, build] = {**known.get((row.name, build), {}), **size, "date": TODAY}
        note(known[row.name, "cpu"], known[row.name, "cuda"], seen.get(row.name))
    fields = ["environment", "build", "download_bytes", "disk_bytes", "seconds", "installer", "source", "date"]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fields)
        writer.writeheader()
        writer.writerows(known.values())


if __name__ == "__main__":
    main()
