"""What this process holds on GPUs, and what llama.cpp's own report adds up to."""

from __future__ import annotations

import os
import re
from typing import Any

from planner.verify.trial import Buffer, DeviceUse

_HOST_BUFFER = re.compile(r"^(CPU|AMX|KLEIDIAI|BLAS|.*_Host)", re.IGNORECASE)


class GpuMemory:
    """What this process takes of each NVIDIA GPU, by NVML; the largest of several looks.

    NVML names the process where it can see its id; in a container it may not, and then the growth of the device's
    use since this object was made stands in, which counts other programs too.
    """

    def __init__(self, *, wanted: bool) -> None:
        self._nvml: Any = None
        self._handles: list[Any] = []
        self._before: list[int] = []
        self._peak: dict[int, tuple[int, str]] = {}
        if wanted:
            self._open()

    def _open(self) -> None:
        try:
            import pynvml

            pynvml.nvmlInit()
        except (ImportError, OSError):
            return
        except pynvml.NVMLError:
            return
        self._nvml = pynvml
        self._handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        self._before = [int(pynvml.nvmlDeviceGetMemoryInfo(handle).used) for handle in self._handles]

    def look(self) -> None:
        """Take a sample; the CUDA pools never shrink while a context lives, so one after each phase is enough."""
        for index, handle in enumerate(self._handles):
            used, basis = self._used(index, handle)
            if used > self._peak.get(index, (0, ""))[0]:
                self._peak[index] = (used, basis)

    def _used(self, index: int, handle: Any) -> tuple[int, str]:
        try:
            for process in self._nvml.nvmlDeviceGetComputeRunningProcesses(handle):
                if process.pid == os.getpid() and process.usedGpuMemory:
                    return int(process.usedGpuMemory), "nvml process"
            return int(self._nvml.nvmlDeviceGetMemoryInfo(handle).used) - self._before[index], "nvml device delta"
        except self._nvml.NVMLError:
            return 0, ""

    def uses(self, buffers: tuple[Buffer, ...]) -> tuple[DeviceUse, ...]:
        """The peaks by device; without NVML, llama.cpp's own sums of its device buffers."""
        if self._peak:
            names = {index: self._nvml.nvmlDeviceGetName(self._handles[index]) for index in self._peak}
            return tuple(
                DeviceUse(name=f"GPU {index} {names[index]}", used_bytes=used, basis=basis)
                for index, (used, basis) in sorted(self._peak.items())
            )
        totals: dict[str, int] = {}
        for buffer in buffers:
            if not _HOST_BUFFER.match(buffer.name):
                device = buffer.name.removesuffix("_Mapped").removesuffix("_Private")
                totals[device] = totals.get(device, 0) + buffer.size_bytes
        return tuple(DeviceUse(name=n, used_bytes=b, basis="llama.cpp buffers") for n, b in sorted(totals.items()))
