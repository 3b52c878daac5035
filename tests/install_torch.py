"""Install torch for the tests as qplan does for a quantizer: no gigabytes of CUDA where there is no NVIDIA GPU.

The installer is asked what it would install. Where that is a CUDA build and there is no GPU, the CPU build is taken
from PyTorch's own index (``TORCH_INDEX`` names another).
"""

from __future__ import annotations

import importlib.util
import os
import sys
import tempfile
from pathlib import Path

from planner.execute import packages, torch_build
from planner.workflow.survey import survey

TORCH = os.environ.get("TORCH", "torch==2.13.0")


def main() -> None:
    """Install torch into this environment unless it is there."""
    if importlib.util.find_spec("torch") is not None:
        return
    with tempfile.TemporaryDirectory() as folder:
        pip = packages.find(packages.PIP, Path(sys.prefix), Path(folder, "log"))
        build = torch_build.choose(survey())
        pip.install(TORCH, index=torch_build.index_of(build, pip.would_fetch(TORCH)))


if __name__ == "__main__":
    main()
