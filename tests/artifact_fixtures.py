"""Safetensors artifacts made by the real quantizers, in the environments that ``apply`` would make. For slow tests."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from planner.core.candidate import Candidate, Placement
from planner.core.errors import QplanError
from planner.core.plan import Plan, Step
from planner.core.workload import Quantizing, Workload
from planner.estimate import estimate
from planner.execute import environments, preflight, process, receipts, runner
from planner.methods import wishes
from planner.workflow.environments import install, offer
from planner.workflow.planning import Measuring, make_plan
from planner.workflow.recommend import recommend

THREADS = 2
SAMPLES, SAMPLE_TOKENS = 8, 256
"""Enough to quantize a model of 6 million weights with, and quick."""
UNASKED = Quantizing()
SHARED_HOME = "QPLAN_TEST_ENVIRONMENTS"
"""A folder that keeps the environments from one run of the tests to the next."""


def environments_home(factory: pytest.TempPathFactory) -> Path:
    """One home for all tests of a run, so that an environment is made once; ``QPLAN_HOME`` is to be set to it."""
    return Path(os.environ.get(SHARED_HOME) or factory.getbasetemp() / "environments-home")


def use_environment(name: str) -> Path:
    """The interpreter of the environment ``name``, which is made in ``QPLAN_HOME`` if it is not there.

    Where it cannot be made, for want of a network, the test is skipped; in CI it fails.
    """
    if environments.status(name).python is None:
        try:
            install(offer(name))
        except QplanError as error:
            if os.environ.get("CI"):
                raise
            pytest.skip(f"the environment {name} cannot be made here: {error.what}")
    return environments.python_for(name)


class Heard:
    """An observer that keeps what it is told."""

    def __init__(self) -> None:
        self.progress: list[tuple[float, ...]] = []
        self.finished_steps: list[tuple[str, bool]] = []
        self.notes: list[str] = []

    def started(self, step: Step) -> process.Progress:
        """A step begins."""
        return lambda *parts: self.progress.append(parts)

    def told(self, text: str) -> None:
        """What an interrupted run left."""
        self.notes.append(text)

    def finished(self, step: Step, receipt: receipts.Receipt, *, reused: bool) -> None:
        """A step is done."""
        self.finished_steps.append((step.name, reused))


@dataclass(frozen=True)
class Made:
    """An artifact, the plan that it was made by, and what its step reported."""

    plan: Plan
    folder: Path
    receipt: receipts.Receipt
    heard: Heard

    @property
    def step(self) -> Step:
        return self.plan.artifact_step()

    @property
    def config(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / "config.json").read_text())
        return found


def plan_for(model: str, method: str, type_: str, wish: Quantizing = UNASKED, *, gpu: bool = False) -> Plan:
    """A plan for the CPU, or the GPU, whatever ranks first."""
    workload = Workload(
        context=512, methods=(method,), types=(type_,), threads=THREADS, cpu_only=not gpu, quantizing=wish
    )
    answer = recommend(model, workload)
    variant = wishes.variants(method, answer.model, workload)[0]
    layers = answer.model.offloadable_count if gpu else 0
    place = Placement(context=512, threads=THREADS, gpu_layers=layers, gpu_count=int(gpu))
    made = estimate(answer.model, variant, place, answer.hardware, None)
    candidate = Candidate(variant=variant, placement=place, estimate=made)
    return make_plan(answer, candidate, Measuring(chunks=SAMPLES, chunk_tokens=SAMPLE_TOKENS))


def carry_out(plan: Plan, output: Path, model: Path) -> Made:
    """What ``apply`` does before it measures."""
    preflight.check_tools(plan)
    preflight.check_output(plan, output)
    place, heard = runner.Workplace(output=output, model=model, threads=THREADS), Heard()
    with runner.locked(output):
        todo = runner.pending(plan, output, reference_needed=False)
        (receipt,) = runner.run_steps(plan, todo, place, heard)
    return Made(plan, output / plan.artifact, receipt, heard)


_LOGITS = """
import sys, json, torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
folder, reference, dtype = sys.argv[1:]
tokens = AutoTokenizer.from_pretrained(reference)(TEXT, return_tensors="pt")
tokens = tokens.input_ids[:, :256]
def logits(path):
    config = AutoConfig.from_pretrained(path)
    if BACKEND and hasattr(config, "quantization_config"):
        config.quantization_config["backend"] = BACKEND
    model = AutoModelForCausalLM.from_pretrained(
        path, config=config, dtype=getattr(torch, dtype), device_map={"": DEVICE}
    ).eval()
    with torch.inference_mode():
        return model(tokens.to(DEVICE)).logits.float().log_softmax(-1).cpu()
ours, theirs = logits(folder), logits(reference)
kl = (theirs.exp() * (theirs - ours)).sum(-1).mean().item()
nll = [(-x[0, :-1].gather(1, tokens[0, 1:, None])).mean().item() for x in (ours, theirs)]
print(json.dumps({"finite": bool(torch.isfinite(ours).all()), "kl": kl, "nll": nll[0], "reference_nll": nll[1]}))
"""


def reloaded(
    python: Path,
    folder: Path,
    reference: Path,
    text: str,
    dtype: str,
    device: str = "cpu",
    kernel: str | None = None,
) -> dict[str, Any]:
    """What plain transformers computes with an artifact, against the model it was made of: KL divergence in nats."""
    program = _LOGITS.replace("TEXT", repr(text)).replace("DEVICE", repr(device)).replace("BACKEND", repr(kernel))
    environment = {**os.environ, "OMP_NUM_THREADS": str(THREADS), "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [str(python), "-c", program, str(folder), str(reference), dtype],
        capture_output=True,
        text=True,
        env=environment,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found
