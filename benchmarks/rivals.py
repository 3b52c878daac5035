"""What other programs say of the memory that llama.cpp reports, where they are installed.

``pip install llmfit hf-mem`` into any environment on PATH (or name one's folder of programs in ``RIVALS_BIN``).
llmfit answers from a table of its own; hf-mem reads headers from the Hugging Face hub and needs a network.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from statistics import median

from planner.core.units import GIB, format_bytes
from planner.models import catalog

SECONDS = 60


def program(name: str) -> str | None:
    """Path of a program in ``RIVALS_BIN`` or on PATH."""
    folders = os.pathsep.join(filter(None, (os.environ.get("RIVALS_BIN"), os.environ.get("PATH"))))
    return shutil.which(name, path=folders)


def _answer(*command: str) -> dict[str, object] | None:
    """The JSON a program prints; ``None`` where it fails. It runs with an empty home folder."""
    with tempfile.TemporaryDirectory() as home:
        try:
            done = subprocess.run(
                command,
                capture_output=True,
                text=True,
                timeout=SECONDS,
                check=True,
                env={**os.environ, "HOME": home},
            )
            made = json.loads(done.stdout)
        except (subprocess.SubprocessError, OSError, json.JSONDecodeError):
            return None
    return made if isinstance(made, dict) else None


def llmfit_bytes(hub_ids: Iterable[str], context: int, type_: str, kv_type: str) -> float | None:
    """llmfit's "minimum" VRAM; it compares its GB with a GPU's GiB, so they are taken as GiB."""
    path = program("llmfit")
    kv = {"f16": "fp16"}.get(kv_type.lower(), kv_type.lower())
    for hub_id in hub_ids if path else ():
        made = _answer(
            str(path), "plan", hub_id, "--context", str(context), "--quant", type_, "--kv-quant", kv, "--json"
        )
        minimum = made.get("minimum") if made else None
        if isinstance(minimum, dict) and minimum.get("vram_gb"):
            return float(minimum["vram_gb"]) * GIB
    return None


def hf_mem_bytes(hub_id: str, context: int) -> float | None:
    """hf-mem's total of weights and KV cache for the published weights."""
    path = program("hf-mem")
    if path is None:
        return None
    made = _answer(
        path, "--model-id", hub_id, "--experimental", "--max-model-len", str(context), "--json-output"
    )  # fmt: skip
    total = made.get("total_memory") if made else None
    return float(total) if isinstance(total, int | float) else None


def ids(name: str) -> tuple[str, ...]:
    """Hub ids of a catalog model, the usual one first."""
    found = catalog.entry(name)
    return tuple(dict.fromkeys((found.hub_id, *found.hub_ids))) if found else ()


Case = tuple[str, int, str, str, int, int]
"""Model, context, type, KV type, bytes that llama.cpp reports on the GPU, bytes that qplan says."""


def lines(cases: list[Case]) -> list[str]:
    """The table: what each says and its error, and the medians; or why a program is not in it."""
    missing = [name for name in ("llmfit", "hf-mem") if program(name) is None]
    out = [f"{name} is not installed: `pip install {name}` and name its folder in RIVALS_BIN" for name in missing]
    hub = ids("qwen2.5-0.5b")
    online = "hf-mem" not in missing and bool(hub) and hf_mem_bytes(hub[0], 512) is not None
    if "hf-mem" not in missing and not online:
        out.append("hf-mem reads headers from the hub, which is not reachable here: no figures")
    if len(missing) == 2 or (missing == ["llmfit"] and not online):
        return out
    out.append(f"{'all layers on a GPU':44} {'llama.cpp':>10} {'qplan':>16} {'llmfit':>18} {'hf-mem':>18}")
    errors: dict[str, list[float]] = {"qplan": [], "llmfit": [], "hf-mem": []}
    for model, context, type_, kv_type, told, ours in cases:
        said: dict[str, float | None] = {"qplan": float(ours)}
        said["llmfit"] = llmfit_bytes(ids(model), context, type_, kv_type)
        whole = type_ in ("F16", "BF16") and kv_type.lower() == "f16"
        said["hf-mem"] = hf_mem_bytes(ids(model)[0], context) if online and whole and ids(model) else None
        shown = []
        for name, value in said.items():
            if value is None:
                shown.append("-")
                continue
            errors[name].append(abs(value / told - 1))
            shown.append(f"{format_bytes(value)} {value / told - 1:+.1%}")
        label = f"{model} {type_} context {context} KV {kv_type}"
        out.append(f"{label:44} {format_bytes(told):>10} {shown[0]:>16} {shown[1]:>18} {shown[2]:>18}")
    if errors["llmfit"]:
        out.append("llmfit's figure holds what it adds for the runtime; llama.cpp's and qplan's here do not")
    for name, found in errors.items():
        if found:
            out.append(f"{name}: median error {median(found):.2%}, largest {max(found):.1%}, {len(found)} cases")
    return out
