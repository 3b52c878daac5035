"""A run as `qplan apply` leaves it, but without the quantizer: a real plan, its context, a GGUF file of its shapes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from planner.core.codec import encode
from planner.core.measurement import DECODE, PREFILL
from planner.core.plan import Plan
from planner.core.workload import Workload
from planner.execute.stub import write_stub
from planner.models import resolve
from planner.workflow.planning import make_plan
from planner.workflow.recommend import recommend
from planner.workflow.reporting import context_of
from planner.workflow.survey import survey

MEASURED_AT = "2026-11-26T12:00:00+00:00"


def planned(type_: str = "Q4_K_M") -> Plan:
    """A plan for the demo model on this machine."""
    return make_plan(recommend("demo", Workload(context=512, types=(type_,))))


def run_document(plan: Plan, factor: float = 0.95) -> dict[str, Any]:
    """A report of `plan` in which everything measured ``factor`` times what was expected; speeds fall short."""
    factors = {PREFILL: None, DECODE: 0.01}
    verdicts = []
    for item in plan.expectations:
        scale = factors.get(item.quantity, factor)
        measured = None if scale is None else item.predicted * scale
        inside = measured is not None and item.low <= measured <= item.high
        position = "not measured" if measured is None else "inside" if inside else "outside"
        row = {"quantity": item.quantity, "predicted": item.predicted, "low": item.low, "high": item.high}
        verdicts.append({**row, "measured": measured, "ok": None if measured is None else inside, "position": position})
    step = plan.artifact_step()
    return {
        "format_version": "1.0",
        "plan_sha256": plan.content_sha256,
        "artifact": plan.artifact,
        "steps": [
            {
                "step": step.name,
                "output": plan.artifact,
                "size_bytes": step.predicted_bytes,
                "sha256": "ab" * 32,
                "seconds": 1.25,
                "peak_memory_bytes": 62_000_000,
                "verdicts": [],
                "notes": ["a note of the step"],
            }
        ],
        "predicted": {v["quantity"]: v["predicted"] for v in verdicts},
        "measured": {v["quantity"]: v["measured"] for v in verdicts if v["measured"] is not None},
        "verdicts": verdicts,
        "ok": not any(v["ok"] is False for v in verdicts),
        "measurements": [
            {"quantity": DECODE, "value": 2000.0, "low": 1900.0, "high": 2100.0, "conditions": {"depth": 64}}
        ],
        "notes": ["quality is of 8 of 85 chunks of the text"],
        "tools": {"measured_with": "llama-cpp-python 0.3.36"},
        "measured_at": MEASURED_AT,
        **context_of(plan, resolve("demo"), survey()),
    }


def write_run(folder: Path, type_: str = "Q4_K_M", **changes: Any) -> Path:
    """``report.json`` and the artifact's header in ``folder``; the report's path."""
    folder.mkdir(parents=True, exist_ok=True)
    plan = planned(type_)
    model = resolve("demo")
    types = ["F32" if len(t.shape) == 1 else "Q6_K" if "attn_v" in t.name else "Q4_K" for t in model.tensors]
    write_stub(model, folder / plan.artifact, types)
    path = folder / "report.json"
    path.write_text(json.dumps({**encode(run_document(plan)), **changes}))
    return path
