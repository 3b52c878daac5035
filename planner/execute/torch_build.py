"""Which build of torch belongs on a machine, and whether it comes from the usual index or from PyTorch's own.

No machine without an NVIDIA GPU fetches gigabytes of CUDA: the installer is asked what it would fetch, and only where
that is another build than wanted is PyTorch's index named (``TORCH_INDEX`` names another).
"""

from __future__ import annotations

import os

from planner.core.hardware import HardwareProfile
from planner.execute.environments import TorchBuild, torch_builds

CPU = "cpu"
INDEX_VARIABLE = "TORCH_INDEX"
_CUDA_PREFIXES = ("nvidia-", "cuda-")
_NOT_CUDA = ("nvidia-ml-py",)
"""A few files that ask a driver for its GPUs."""


def choose(here: HardwareProfile) -> TorchBuild:
    """The newest build that a GPU of the machine and its driver can run; the CPU's where there is none.

    macOS has one build, which knows Metal; it stands under ``cpu``.
    """
    return next(row for row in torch_builds() if _runs(row, here))


def _runs(row: TorchBuild, here: HardwareProfile) -> bool:
    if not row.vendor:
        return True
    return any(
        gpu.vendor == row.vendor
        and _at_least(gpu.driver, row.min_driver)
        and _at_least(gpu.compute_capability, row.min_capability)
        for gpu in here.gpus
    )


def _at_least(found: str | None, least: str) -> bool:
    """Whether a version is known and not older than ``least``."""
    parts = [part for part in (found or "").split(".") if part.isdecimal()]
    return bool(parts) and [int(part) for part in parts] >= [int(part) for part in least.split(".")]


def brings_cuda(names: tuple[str, ...]) -> bool:
    """Whether packages that come with torch are CUDA's."""
    return any(name.lower().startswith(_CUDA_PREFIXES) and name.lower() not in _NOT_CUDA for name in names)


def index_of(build: TorchBuild, default: tuple[str, ...]) -> str | None:
    """The index that has the build, or ``None`` for the usual one.

    Args:
        build: what is wanted.
        default: names of the packages that the usual index would give for torch.
    """
    usual = (CPU,) if not brings_cuda(default) else (next(row.build for row in torch_builds() if row.build != CPU),)
    if build.build in usual:
        return None
    return os.environ.get(INDEX_VARIABLE) or build.index
