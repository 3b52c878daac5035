"""``report.json``: what was predicted, what was measured, and the evidence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from planner import FORMAT_VERSION
from planner.core.codec import encode, write_atomically

if TYPE_CHECKING:
    from planner.core.hardware import HardwareProfile
    from planner.verify.artifact import VerificationResult


def report_document(
    result: VerificationResult,
    *,
    plan_sha256: str | None,
    steps: Sequence[object] = (),
    recipe: Mapping[str, str] | None = None,
    hardware: HardwareProfile | None = None,
    tools: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """The document of the contract; ``predicted`` and ``measured`` hold one number for each quantity.

    Args:
        plan_sha256: of the plan that was applied; ``None`` when an artifact was measured without one.
        steps: receipts of the steps, as they should appear.
        recipe: tensor → ggml type, of a mixture.
        tools: versions of the programs that made the artifact.
    """
    return {
        "format_version": FORMAT_VERSION,
        "plan_sha256": plan_sha256,
        "artifact": result.artifact,
        "steps": encode(list(steps)),
        "predicted": {v.quantity: v.predicted for v in result.verdicts},
        "measured": {quantity: measured.value for quantity, measured in result.measured.items()},
        "verdicts": encode(result.verdicts),
        "ok": result.ok,
        "measurements": encode(result.measurements),
        "speed": encode(result.speed),
        "quality": encode(result.quality),
        **({"recipe": dict(recipe)} if recipe else {}),
        "notes": list(result.notes),
        "machine": None if hardware is None else {"identity": hardware.identity(), **hardware.identity_fields()},
        "tools": {**(tools or {}), **({"measured_with": result.tool_version} if result.tool_version else {})},
        "measured_at": result.measured_at,
    }


def write_report(path: Path, document: Mapping[str, Any]) -> None:
    """Write ``document`` as indented JSON; ``path`` never holds half of it."""
    import json

    write_atomically(path, json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
