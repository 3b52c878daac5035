"""One pass against two steps: wall time, processor time, peak memory, bytes written and peak disk.

Run: ``python benchmarks/quantize.py --shape tinyllama-1.1b --types Q8_0,Q4_0,Q4_K_M --work DIR [--llama-cpp DIR]``.

A checkpoint with random weights of the shape is made in DIR (and kept for the next run). Then, by turns:

- ``one``: qplan's one pass. Its time includes hashing the checkpoint, syncing the result and checking the tokenizer.
- ``two``: qplan's converter to a 16-bit file, then ``llama_model_quantize`` of it, each synced, as a plan's steps are.
- ``script``: llama.cpp's own ``convert_hf_to_gguf.py``, then ``llama_model_quantize``; with ``--llama-cpp``. Unsynced.

Each step runs in a process of its own; ``floor`` is ``ggml_quantize_chunk`` alone on all threads on as many weights.
The files of ``one`` and ``two`` are compared byte by byte. ``--cold`` drops the checkpoint from the page cache first.
"""

from __future__ import annotations

import argparse
import ctypes
import filecmp
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from checkpoints import random_checkpoint  # noqa: E402


def child_one(directory: Path, output: Path, types: str, threads: int) -> dict[str, Any]:
    """One pass over the checkpoint."""
    from planner import models
    from planner.methods import gguf_mix
    from planner.quantize import Target, quantize_checkpoint

    model = models.resolve(str(directory))
    names = [tensor.name for tensor in model.tensors]
    targets = tuple(
        Target(
            output=output.with_name(f"{output.name}-{type_}"),
            file_type=gguf_mix.file_type(type_).id,
            types=dict(zip(names, gguf_mix.tensor_types(model, type_), strict=True)),
        )
        for type_ in types.split(",")
    )
    made = quantize_checkpoint(directory, targets, threads=threads)
    return {"stages": {name: round(value, 2) for name, value in made.cpu_seconds.items()}, "read": made.read_bytes}


def child_convert(directory: Path, output: Path, types: str, threads: int) -> dict[str, Any]:
    """The checkpoint in 16 bits, by qplan's converter."""
    from planner.convert import convert_checkpoint

    convert_checkpoint(directory, output)
    return {}


def child_script(directory: Path, output: Path, types: str, threads: int) -> dict[str, Any]:
    """The checkpoint in 16 bits, by llama.cpp's converter."""
    import runpy

    script = Path(os.environ["LLAMA_CPP_DIR"]) / "convert_hf_to_gguf.py"
    sys.path.insert(0, str(script.parent))
    import conversion.base  # type: ignore[import-not-found]

    # a tokenizer that was padded has a hash that the script does not know
    conversion.base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "default"
    sys.argv = [str(script), str(directory), "--outfile", str(output), "--outtype", "auto"]
    runpy.run_path(str(script), run_name="__main__")
    return {}


def child_quantize(directory: Path, output: Path, types: str, threads: int) -> dict[str, Any]:
    """The 16-bit file ``directory`` quantized by llama.cpp."""
    import llama_cpp

    from planner.convert.write import sync
    from planner.methods import gguf_mix

    quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(quiet, None)
    for type_ in types.split(","):
        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype, params.nthread = gguf_mix.file_type(type_).id, threads
        target = os.fsencode(output.with_name(f"{output.name}-{type_}"))
        assert llama_cpp.llama_model_quantize(os.fsencode(directory), target, ctypes.byref(params)) == 0
        if output.name == "two":
            sync(Path(os.fsdecode(target)))
    return {}


def child_floor(directory: Path, output: Path, types: str, threads: int) -> dict[str, Any]:
    """The kernels alone: as many weights of each type as the model has, out of one slab that stays in the cache."""
    import numpy as np

    from planner import models
    from planner.formats import ggml
    from planner.methods import gguf_mix
    from planner.quantize import kernels

    library = kernels.load()
    model = models.resolve(str(directory))
    values = np.random.default_rng(0).standard_normal((64, 4096), dtype=np.float32) * np.float32(0.02)
    work: list[str] = []
    for type_ in types.split(","):
        for tensor, made in zip(model.tensors, gguf_mix.tensor_types(model, type_), strict=True):
            work += [made] * (tensor.element_count // values.size if made not in ("F32",) else 0)

    def run(mine: list[str]) -> None:
        for made in mine:
            out = np.empty(64 * ggml.row_bytes(made, 4096), dtype=np.uint8)
            library.quantize(values, made, out, None, name="floor")

    began = time.perf_counter()
    workers = [threading.Thread(target=run, args=(work[i::threads],)) for i in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return {"seconds": time.perf_counter() - began}


CHILDREN = {
    "one": child_one,
    "convert": child_convert,
    "script": child_script,
    "quantize": child_quantize,
    "floor": child_floor,
}


def step(name: str, directory: Path, output: Path, types: str, threads: int) -> dict[str, Any]:
    """One child: its wall and processor time, peak memory, bytes written, and what it tells."""
    command = [sys.executable, __file__, "--child", name, str(directory), str(output), types, str(threads)]
    began = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        told = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{name} failed: {' '.join(command)}")
    return {
        "wall": time.perf_counter() - began,
        "cpu": usage.ru_utime + usage.ru_stime,
        "rss": usage.ru_maxrss * 1024,
        **json.loads(told.splitlines()[-1]),
    }


class Disk:
    """The most bytes that lay in a folder at any time."""

    def __init__(self, folder: Path) -> None:
        self.peak, self._folder, self._stop = 0, folder, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._stop.wait(0.1):
            used = 0
            for path in self._folder.iterdir():
                try:
                    used += path.stat().st_size
                except OSError:
                    continue
            self.peak = max(self.peak, used)

    def stop(self) -> int:
        """Stop watching; the peak."""
        self._stop.set()
        self._thread.join()
        return self.peak


def way(name: str, checkpoint: Path, work: Path, types: str, threads: int, cold: bool) -> dict[str, Any]:
    """One way from the checkpoint to the files, measured as a whole."""
    if cold:
        for path in checkpoint.glob("*.safetensors"):
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)
    disk, between = Disk(work), work / f"{name}.16bit"
    if name == "one":
        steps = [step("one", checkpoint, work / name, types, threads)]
    else:
        steps = [step({"two": "convert", "script": "script"}[name], checkpoint, between, types, threads)]
        steps.append(step("quantize", between, work / name, types, threads))
    between.unlink(missing_ok=True)
    return {
        "wall": sum(s["wall"] for s in steps),
        "cpu": sum(s["cpu"] for s in steps),
        "rss": max(s["rss"] for s in steps),
        "written": sum(s["written"] for s in steps),
        "disk": disk.stop(),
        "steps": [round(s["wall"], 2) for s in steps],
        "stages": steps[0].get("stages"),
        "read": steps[0].get("read"),
    }


def table(results: dict[str, list[dict[str, Any]]], floor: float, types: str) -> None:
    """Medians, each also as a share of the two steps'."""
    base = {key: median(run[key] for run in results["two"]) for key in ("wall", "cpu", "rss", "written", "disk")}
    print(f"\n{types}: ggml_quantize_chunk alone {floor:.1f} s")
    print(
        f"{'way':8}{'wall s':>16}{'cpu s':>16}{'peak MiB':>16}{'written MiB':>18}{'peak disk MiB':>18}  steps, stages"
    )
    for name, runs in results.items():
        cells = f"{name:8}"
        for key, width in (("wall", 16), ("cpu", 16), ("rss", 16), ("written", 18), ("disk", 18)):
            value, scale = median(run[key] for run in runs), 1 if key in ("wall", "cpu") else 1 << 20
            cells += f"{f'{value / scale:.1f} ({value / base[key]:.2f}x)':>{width}}"
        print(f"{cells}  {[run['steps'] for run in runs]} {runs[-1]['stages'] or ''}")


def main() -> None:
    """Parse, make the checkpoint, run the ways by turns."""
    if sys.argv[1:2] == ["--child"]:
        _, _, name, directory, output, types, threads = sys.argv
        told = CHILDREN[name](Path(directory), Path(output), types, int(threads))
        lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
        print("\n" + json.dumps({**told, "written": int(lines["wchar"])}))
        return
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", default="tinyllama-1.1b")
    parser.add_argument("--types", default="Q8_0,Q4_0,Q4_K_M", help="measured one after the other; + joins: Q8_0+Q4_0")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--llama-cpp", metavar="DIR")
    parser.add_argument("--cold", action="store_true")
    asked = parser.parse_args()
    checkpoint, work = random_checkpoint(asked.shape, asked.work), asked.work / "out"
    work.mkdir(exist_ok=True)
    ways = ["one", "two"]
    if asked.llama_cpp:
        os.environ["LLAMA_CPP_DIR"] = asked.llama_cpp
        ways.append("script")
    for joined in asked.types.split(","):
        types = joined.replace("+", ",")
        results: dict[str, list[dict[str, Any]]] = {name: [] for name in ways}
        for _ in range(asked.rounds):
            for name in ways:
                results[name].append(way(name, checkpoint, work, types, asked.threads, asked.cold))
            for type_ in types.split(","):
                same = filecmp.cmp(work / f"one-{type_}", work / f"two-{type_}", shallow=False)
                print(f"{type_}: {'the same bytes' if same else 'DIFFERENT BYTES'}", flush=True)
            for path in work.iterdir():
                path.unlink()
        floor = step("floor", checkpoint, work / "none", types, asked.threads)["seconds"]
        table(results, floor, types)


if __name__ == "__main__":
    main()
