"""One checkpoint by every method: planned, made, measured and compared, predicted beside measured.

Run: ``python benchmarks/methods.py --work DIR [--shape tinyllama-1.1b] [--layers 4] [--cases gptq:4bit,awq:4bit]``.

A checkpoint with random weights of the shape is made in DIR and kept for the next run; ``--model`` takes another one.
Each case is ``qplan plan`` and ``qplan apply`` as a user runs them, in the environments of `qplan methods`; at the end
is ``qplan compare``. What a case told is in DIR/CASE/report.json. Random weights have real sizes, memory and speeds,
but no meaning: nothing judges their perplexity.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from checkpoints import random_checkpoint  # noqa: E402

from planner.core.errors import Exit  # noqa: E402
from planner.core.measurement import DECODE, FILE_BYTES, KL_DIVERGENCE, PEAK_MEMORY, PREFILL  # noqa: E402
from planner.methods.quantizers import CALIBRATED  # noqa: E402

CASES = "none:bf16,bitsandbytes:nf4,bitsandbytes:int8,gptq:4bit,gptq:3bit,awq:4bit,gguf:Q4_K_M"
JUDGED = (FILE_BYTES, PEAK_MEMORY, PREFILL, DECODE)


def qplan(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run one command of qplan's."""
    command = [sys.executable, "-m", "planner.cli", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def folder_of(case: str, work: Path) -> Path:
    """Where a case is made."""
    return work / case.replace(":", "-")


def carry_out(model: str, case: str, asked: argparse.Namespace) -> dict[str, Any] | None:
    """Plan, make and measure one case; its report, or nothing if it failed, which is told."""
    method, type_ = case.split(":")
    folder = folder_of(case, asked.work)
    folder.mkdir(parents=True, exist_ok=True)
    plan = str(folder / "plan.json")
    text = ["--calibration-chunks", str(asked.chunks), "--calibration-tokens", "512"] if method in CALIBRATED else []
    started = time.perf_counter()
    steps = (
        ["plan", model, "--methods", method, "--types", type_, "--context", str(asked.context), *text, "-o", plan],
        ["apply", plan, "--output", str(folder), "--seconds", str(asked.seconds), "--yes", "--json"],
    )
    for step in steps:
        done = qplan(*step)
        if done.returncode not in (Exit.DONE, Exit.OUTSIDE):
            print(f"{case}: {step[0]} failed ({done.returncode})\n{done.stderr[-6000:]}", flush=True)
            return None
    report: dict[str, Any] = json.loads(done.stdout)
    (folder / "report.json").write_text(json.dumps(report))
    print(line(case, report, time.perf_counter() - started), flush=True)
    return report


def line(case: str, report: dict[str, Any], seconds: float) -> str:
    """One row: of each quantity what was measured, and over what was predicted."""
    verdicts = {verdict["quantity"]: verdict for verdict in report["verdicts"]}
    told = [f"{case:18}"]
    for name in JUDGED:
        verdict = verdicts.get(name)
        if verdict is None or verdict["measured"] is None:
            told.append(f"{'–':>22}")
        else:
            inside = "" if verdict["ok"] else " !"
            told.append(f"{verdict['measured']:>14,.6g} {verdict['ratio']:5.3f}{inside:2}")
    divergence = report["measured"].get(KL_DIVERGENCE, float("nan"))
    return " ".join([*told, f"{divergence:9.5f}", f"{seconds:6.0f} s", report["variant"]["runtime"]])


def main() -> None:
    """Parse, make the checkpoint, run the cases one after the other, compare."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", default="tinyllama-1.1b", help="of the catalog (`qplan models`)")
    parser.add_argument("--layers", type=int, help="fewer than the shape has")
    parser.add_argument("--model", help="a checkpoint to take instead")
    parser.add_argument("--cases", default=CASES, help="METHOD:TYPE,…")
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--chunks", type=int, default=32, help="of calibration text, 512 tokens each")
    parser.add_argument("--seconds", type=int, default=60, help="to measure a case")
    parser.add_argument("--work", type=Path, required=True)
    asked = parser.parse_args()
    model = asked.model or str(random_checkpoint(asked.shape, asked.work, layers=asked.layers))
    print(f"{'case':18} " + " ".join(f"{name:>22}" for name in JUDGED) + "   KL, nats", flush=True)
    runs = [case for case in asked.cases.split(",") if carry_out(model, case, asked)]
    if len(runs) > 1:
        print(qplan("compare", *(str(folder_of(run, asked.work)) for run in runs)).stdout)


if __name__ == "__main__":
    main()
