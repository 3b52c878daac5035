"""Peak memory and speed of fine-tuning on a CUDA GPU, against what qplan predicts.

Needs an interpreter with torch for CUDA, transformers, peft and accelerate: this one, or the environment ``peft``;
bitsandbytes too for 4-bit weights. ``python benchmarks/finetune_memory.py --device cuda --dtype bfloat16`` prints more.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from planner.core.finetuning import NF4, SIXTEEN_BIT
from planner.core.units import MIB
from planner.estimate import finetuning
from planner.execute import environments
from tests.test_finetuning import SETTINGS, model_of

pytestmark = pytest.mark.gpu

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "finetune_memory.py"
SHAPE: dict[str, Any] = {
    "architecture": "llama", "hidden": 2048, "layers": 8, "ff": 5632, "heads": 32, "kv_heads": 8, "vocab": 32000,
    "sequence_length": 1024, "micro_batch": 4, "rank": 16, "checkpointing": 0, "optimizer": "adamw_torch", "base": NF4,
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "qlora": {},
    "qlora-checkpointed": {"checkpointing": 1},
    "qlora-large-vocabulary": {"checkpointing": 1, "vocab": 128256, "micro_batch": 2},
    "qlora-paged": {"optimizer": "paged_adamw_8bit", "rank": 64},
    "lora": {"base": SIXTEEN_BIT},
    "lora-checkpointed": {"base": SIXTEEN_BIT, "checkpointing": 1, "micro_batch": 8},
}


def interpreter(base: str) -> Path:
    """One that has what the case needs; else the test is skipped."""
    found = environments.status("peft").python
    needed = ("torch", "transformers", "peft", "accelerate", *(("bitsandbytes",) if base == NF4 else ()))
    if found is None and all(importlib.util.find_spec(name) for name in needed):
        found = Path(sys.executable)
    if found is None:
        pytest.skip(f"no interpreter with {', '.join(needed)}")
    return found


@pytest.mark.parametrize("name", CASES)
def test_peak_on_a_gpu_lies_in_the_range(name: str) -> None:
    case = {"name": name, **SHAPE, **CASES[name]}
    python = interpreter(case["base"])
    reachable = subprocess.run(
        [str(python), "-c", "import torch, sys; sys.exit(not torch.cuda.is_available())"], check=False
    )
    if reachable.returncode:
        pytest.skip("torch reaches no CUDA GPU")
    done = subprocess.run(
        [str(python), str(SCRIPT), "--device", "cuda", "--dtype", "bfloat16", "--case", json.dumps(case)],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout.splitlines()[-1])
    settings = dataclasses.replace(
        SETTINGS,
        base=case["base"],
        device="cuda",
        compute_dtype="bfloat16",
        rank=case["rank"],
        sequence_length=case["sequence_length"],
        micro_batch=case["micro_batch"],
        gradient_checkpointing=bool(case["checkpointing"]),
        optimizer=case["optimizer"],
    )
    model = model_of(case)
    terms = finetuning.terms(model, settings)
    predicted = finetuning.peak_memory(terms, settings)
    measured = told["training_peak_bytes"]
    print(f"{name}: measured {measured / MIB:.0f} MiB, predicted {predicted.value / MIB:.0f} MiB")
    assert told["trainable_parameters"] == finetuning.trainable_parameter_count(model, settings.rank)
    assert predicted.contains(measured), [(term.name, round(term.bytes / MIB)) for term in terms]
