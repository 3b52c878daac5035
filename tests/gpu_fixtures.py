"""llama.cpp's memory report of a GPU run, for comparing with a prediction."""

from __future__ import annotations

import re
from collections.abc import Iterable

from planner.verify.trial import Buffer


def reported(buffers: Iterable[Buffer]) -> dict[tuple[str, str], int]:
    """llama.cpp's memory report as bytes by place, ``gpu`` or ``host``, and kind, as ``model`` or ``KV``."""
    totals: dict[tuple[str, str], int] = {}
    for buffer in buffers:
        place = "gpu" if re.fullmatch(r"CUDA\d+", buffer.name) else "host"
        totals[place, buffer.kind] = totals.get((place, buffer.kind), 0) + buffer.size_bytes
    return totals
