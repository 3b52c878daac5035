"""Families qplan does not convert itself: llama.cpp's own converter, where the user has a checkout of it."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections import deque
from pathlib import Path

from planner.convert.write import ConvertResult, Progress, atomic_output
from planner.core.errors import ExecutionFailed, InputError, UnsupportedArchitecture
from planner.formats.gguf import open_gguf

SCRIPT = "convert_hf_to_gguf.py"
VARIABLE = "LLAMA_CPP_DIR"
_POLL_SECONDS = 0.5
_STOP_SECONDS = 5.0


def find_script(llama_cpp_dir: Path | None, model_type: str = "") -> Path:
    """The converter script of the checkout ``llama_cpp_dir``, else of ``$LLAMA_CPP_DIR``.

    Raises:
        UnsupportedArchitecture: no checkout is given; names ``model_type`` and the option.
        InputError: the directory has no such script (``no-converter``).
    """
    chosen = llama_cpp_dir or (Path(found) if (found := os.environ.get(VARIABLE)) else None)
    if chosen is None:
        raise UnsupportedArchitecture(
            f"qplan has no conversion for model_type {model_type!r}",
            hint=f"pass --llama-cpp DIR (or set {VARIABLE}) with a llama.cpp checkout to use its own converter",
        )
    script = chosen.expanduser() / SCRIPT
    if not script.is_file():
        raise InputError(
            f"{str(chosen)!r} is no llama.cpp checkout",
            numbers=f"{SCRIPT} is not in it",
            hint="git clone https://github.com/ggml-org/llama.cpp",
            code="no-converter",
        )
    return script.resolve()


def convert_with_script(
    directory: Path,
    output: Path,
    out_type: str = "auto",
    llama_cpp_dir: Path | None = None,
    progress: Progress | None = None,
    *,
    model_type: str = "",
) -> ConvertResult:
    """Convert ``directory`` to ``output`` with llama.cpp's ``convert_hf_to_gguf.py`` in a child process.

    It runs with this Python, which needs torch and transformers installed. Progress is the bytes of the file so far;
    the total, not known beforehand, is the bytes of the checkpoint's safetensors. Atomic as ``convert_checkpoint``.

    Raises:
        UnsupportedArchitecture, InputError: as ``find_script``.
        ExecutionFailed: the script failed (``converter-failed``); its last lines are in the numbers.
    """
    script = find_script(llama_cpp_dir, model_type)
    total = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
    with atomic_output(output) as partial:
        command = [sys.executable, str(script), str(directory), "--outfile", str(partial), "--outtype", out_type]
        _run(command, partial, total, progress or (lambda done_bytes, total_bytes: None))
        header = open_gguf(partial)
    return ConvertResult(
        output=output,
        tensor_count=len(header.tensors),
        tensor_bytes=sum(tensor.size_bytes for tensor in header.tensors),
        file_bytes=output.stat().st_size,
        weight_type=out_type.upper(),
        notes=(f"converted by llama.cpp's {SCRIPT}",),
    )


def _run(command: list[str], partial: Path, total: int, progress: Progress) -> None:
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
    lines: deque[str] = deque(maxlen=12)
    stream = child.stdout

    def drain() -> None:
        for line in stream or ():
            lines.append(line.decode("utf-8", "replace").rstrip())

    reader = threading.Thread(target=drain, daemon=True)
    reader.start()
    try:
        while child.poll() is None:
            reader.join(_POLL_SECONDS)
            done = partial.stat().st_size if partial.exists() else 0
            progress(min(done, total), total)
    finally:
        _stop(child)
    reader.join(_STOP_SECONDS)
    if child.returncode:
        raise ExecutionFailed(
            "llama.cpp's converter failed",
            numbers=f"exit code {child.returncode}\n" + "\n".join(lines),
            hint="its requirements are in requirements/ of the checkout: `pip install torch transformers`",
            code="converter-failed",
        )
    progress(total, total)


def _stop(child: subprocess.Popen[bytes]) -> None:
    if child.poll() is None:
        child.terminate()
        try:
            child.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
