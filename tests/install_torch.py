"""Install torch for the tests: never gigabytes of CUDA on a machine without an NVIDIA GPU.

pip is asked what it would install. Where that is a CUDA build and there is no GPU, the CPU build is taken from
PyTorch's own index (``TORCH_INDEX`` names another).
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys

TORCH = os.environ.get("TORCH", "torch==2.13.0")
INDEX = os.environ.get("TORCH_INDEX", "https://download.pytorch.org/whl/cpu")
PIP = [sys.executable, "-m", "pip", "install", "--quiet"]


def brings_cuda() -> bool:
    """Whether pip, left alone, would fetch CUDA libraries with torch."""
    report = subprocess.run(
        [*PIP, "--dry-run", "--ignore-installed", "--report", "-", TORCH], capture_output=True, text=True, check=True
    )
    names = [item["metadata"]["name"].lower() for item in json.loads(report.stdout)["install"]]
    return any(name.startswith(("nvidia-", "cuda-")) for name in names)


def main() -> None:
    """Install torch unless it is there."""
    if importlib.util.find_spec("torch") is not None:
        return
    cpu_only = shutil.which("nvidia-smi") is None and brings_cuda()
    subprocess.run([*PIP, TORCH, *(["--index-url", INDEX] if cpu_only else [])], check=True)


if __name__ == "__main__":
    main()
