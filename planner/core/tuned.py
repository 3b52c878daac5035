"""Settings that ``qplan tune`` found best for a model on a machine, as a value that later decisions take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from planner.core.candidate import Placement
from planner.core.hardware import STRICT

COSTS = ("decode", "prefill", "balanced")
"""What can be tuned for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuned:
    """The best settings of one model in one type, on the CPU or with the machine's GPUs."""

    __pydantic_config__: ClassVar[dict[str, str]] = STRICT

    model: str
    model_sha256: str
    """Fingerprint of the model's shape."""
    type: str
    objective: str
    """One of :data:`COSTS`."""
    on_gpu: bool
    """Whether a GPU was there to be used, whatever the number of layers that turned out best."""
    placement: Placement
    gain_fraction: float
    """How much longer the settings took that would have been recommended; 0 where they were the best."""
    hardware_identity: str = ""
    hardware_name: str = ""
    tool_version: str = ""
    measured_at: str = ""
    """UTC, ISO 8601."""


def setting_line(setting: Placement) -> str:
    """The settings that are tuned, in a line."""
    parts = [f"{setting.gpu_layers} layers on the GPU"] if setting.gpu_count else []
    if setting.threads is not None:
        parts.append(f"{setting.threads} thread{'s' * (setting.threads != 1)}")
    flash = "on" if setting.flash_attention else "off"
    return ", ".join((*parts, f"micro-batch {setting.ubatch}", f"flash attention {flash}", f"KV {setting.kv_type}"))
