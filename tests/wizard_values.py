"""Fixed values for the wizard's screens, so that what they show changes only when the screens do."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from planner.core.candidate import Candidate, Placement, Rejection, TraceEntry, Variant
from planner.core.estimates import (
    DeviceMemory,
    Estimate,
    MemoryEstimate,
    Prediction,
    QualityEstimate,
    SizeEstimate,
    SpeedEstimate,
)
from planner.core.finetuning import FinetuneChoice, FinetuneDecision, FinetuneEstimate, FinetuneSettings, MemoryTerm
from planner.core.hardware import Cpu, Disk, Gpu, HardwareProfile, Memory
from planner.core.measurement import DECODE, FILE_BYTES, LOSS_RATIO, PEAK_MEMORY, PERPLEXITY_RATIO, Measurement
from planner.core.model import AttentionLayer, ModelSource, ModelSpec, Tensor
from planner.core.plan import Expectation, Plan, PlanHardware, PlanModel, Step
from planner.core.units import GIB, MIB
from planner.core.workload import Workload
from planner.decide import Decision
from planner.execute.receipts import Receipt
from planner.models.catalog import CatalogEntry
from planner.tui.state import State
from planner.workflow.applying import Outcome
from planner.workflow.environments import Offer
from planner.workflow.recommend import Recommendation

HARDWARE = HardwareProfile(
    name="test bench",
    os="linux",
    cpu=Cpu(model="Example 8-Core", architecture="x86_64", physical_core_count=8, logical_core_count=16),
    memory=Memory(
        total_bytes=64 * GIB, available_bytes=60 * GIB, bandwidth_bytes_per_second=8e10, bandwidth_basis="measured"
    ),
    gpus=(
        Gpu(
            name="NVIDIA GeForce RTX 4070 Ti",
            vendor="nvidia",
            backend="cuda",
            memory_total_bytes=12 * GIB,
            memory_free_bytes=11 * GIB,
            bandwidth_bytes_per_second=5.04e11,
        ),
    ),
    disk=Disk(path="/models", free_bytes=500 * GIB),
    notes=("the driver does not say how the GPU is linked",),
)
UNKNOWN = HardwareProfile(
    name="bare", os="linux", cpu=Cpu(model="unknown", architecture="x86_64"), memory=Memory(), notes=("no /proc here",)
)
MODEL = ModelSpec(
    name="example-8b",
    architecture="llama",
    family="llama-3",
    source=ModelSource(kind="catalog", location="example-8b", hub_id="example/8b"),
    n_layer=32,
    n_embd=4096,
    n_vocab=1000,
    n_ctx_train=32768,
    n_ff=14336,
    tensors=(Tensor("token_embd.weight", (4096, 1_960_000)),),
    attention=(AttentionLayer(kind="full", head_count=32, head_count_kv=8, k_dim=128, v_dim=128),) * 32,
    notes=("shapes from the catalog",),
)
ENTRIES = tuple(
    CatalogEntry(
        name=name, family="llama-3", license="mit", gated=False, hub_id=f"example/{name}", hub_ids=(), aliases=(),
        parameter_count=count, architecture="llama",
    )
    for name, count in (("example-8b", 8_030_000_000), ("example-70b", 70_600_000_000))
)  # fmt: skip
SIZES = (("BF16", 15 * GIB), ("Q8_0", 8 * GIB), ("Q4_K_M", round(4.6 * GIB)))


def about(value: float, spread: float = 0.2, basis: str = "formula") -> Prediction:
    """A prediction with a range of its own size, and two terms."""
    return Prediction(
        value=value,
        low=value * (1 - spread),
        high=value * (1 + spread),
        basis=basis,
        source="a table with a source",
        terms=(("weights read per token", 4.6 * GIB, "bytes"), ("bandwidth", 5.04e11, "B/s")),
    )


def candidate(type_: str, gib: float, decode: float, loss: float, **changes: Any) -> Candidate:
    """A GGUF candidate on the GPU of :data:`HARDWARE`."""
    size = round(gib * GIB)
    gpu = DeviceMemory(
        name="NVIDIA GeForce RTX 4070 Ti", weights_bytes=size, kv_cache_bytes=GIB, compute_bytes=300 * MIB,
        overhead_bytes=450 * MIB, capacity_bytes=11 * GIB,
    )  # fmt: skip
    host = DeviceMemory(name="host", weights_bytes=280 * MIB, compute_bytes=24 * MIB, capacity_bytes=60 * GIB)
    ratio = 1 + loss
    estimate = Estimate(
        size=SizeEstimate(tensor_bytes=size, metadata_bytes=MIB, file_bytes=size + MIB, bits_per_weight=8 * gib / 7.5),
        memory=MemoryEstimate(devices=(gpu,), host=host),
        speed=SpeedEstimate(decode=about(decode), prefill=about(40 * decode), bound_by="GPU bandwidth"),
        quality=QualityEstimate(
            perplexity_ratio=Prediction(
                value=ratio, low=1 + 0.7 * loss, high=1 + 1.4 * loss, basis="published", source="published rows"
            ),
            kl_divergence_nats=about(loss, basis="published"),
        ),
    )
    return Candidate(
        **{
            "variant": Variant(method="gguf", format="gguf", runtime="llama.cpp", type=type_),
            "placement": Placement(context=8192, gpu_layers=33, gpu_count=1, threads=8),
            "estimate": estimate,
            "reasons": (f"{type_} fits in GPU memory", f"it decodes about {decode:g} tokens/s"),
            "score": round(20 - 100 * loss, 2),
            "pareto": True,
            **changes,
        }
    )


CANDIDATES = (
    candidate("Q6_K", 6.1, 68, 0.003),
    candidate("Q4_K_M", 4.6, 88, 0.028),
    candidate("Q5_0", 5.2, 75, 0.021, pareto=False),
    candidate("Q8_0", 8.0, 52, 0.0004),
    candidate("Q3_K_M", 3.7, 97, 0.105),
)
REJECTED = (
    Rejection(
        method="gguf", type="BF16", reason="does not fit on the GPU with 8192 tokens of context",
        needed=16.2 * GIB, available=11 * GIB, unit="bytes", rule="memory",
    ),
    Rejection(method="gptq", type="4bit", reason="no kernel here", rule="kernels"),
)  # fmt: skip
ANSWER = Recommendation(
    model=MODEL,
    hardware=HARDWARE,
    workload=Workload(),
    decision=Decision(
        chosen=CANDIDATES[0],
        alternatives=CANDIDATES[1:],
        rejected=REJECTED,
        trace=(TraceEntry(rule="r", effect="a rule agrees", source="s"),),
    ),
    simulated=False,
)
NOTHING = Recommendation(
    model=MODEL,
    hardware=HARDWARE,
    workload=Workload(),
    decision=Decision(chosen=None, alternatives=(), rejected=REJECTED, trace=()),
    simulated=False,
)
PLAN = Plan(
    format_version="1.0",
    qplan_version="0",
    created_at="2026-11-26T12:00:00+00:00",
    model=PlanModel(
        name="example-8b", architecture="llama", kind="catalog", location="example/8b", parameter_count=8_030_000_000,
        shape_sha256="0" * 64,
    ),
    hardware=PlanHardware(identity="0" * 16, name="test bench", fields={}),
    workload=Workload(),
    variant=CANDIDATES[0].variant,
    placement=CANDIDATES[0].placement,
    estimate=CANDIDATES[0].estimate,
    expectations=(
        Expectation(quantity=FILE_BYTES, predicted=6e9, low=5.9e9, high=6.1e9, basis="formula", source="a"),
        Expectation(quantity=DECODE, predicted=68, low=50, high=86, basis="formula", source="b"),
    ),
    steps=(
        Step(
            name="convert", kind="convert", method="gguf", output="example-8b-BF16.gguf", intermediate=True,
            predicted_bytes=15 * GIB, predicted_memory=about(300 * MIB), predicted_seconds=about(100),
        ),
        Step(
            name="quantize", kind="quantize", method="gguf", source="convert", output="example-8b-Q6_K.gguf",
            type="Q6_K", predicted_bytes=round(6.1 * GIB), predicted_memory=about(GIB), predicted_seconds=about(240),
        ),
        Step(name="verify", kind="verify", method="gguf", source="quantize"),
    ),
    tools={},
    artifact="example-8b-Q6_K.gguf",
    reasons=("it fits",),
)  # fmt: skip
OFFER = Offer(
    name="gptqmodel", title="GPTQModel", summary="makes AWQ and GPTQ", build="cpu", installer="pip",
    place=Path("/home/qplan/environments/gptqmodel"), package_count=60, download_bytes=327 * MIB,
    disk_bytes=round(1.1 * GIB), seconds=161, free_bytes=500 * GIB, replaces=None,
)  # fmt: skip


def training(base: str, peak_gib: float, seconds: float, **changes: Any) -> FinetuneChoice:
    """A way to fine-tune :data:`MODEL` on the GPU of :data:`HARDWARE`."""
    settings: dict[str, Any] = {
        "base": base, "device": "cuda", "compute_dtype": "bfloat16", "rank": 16, "alpha": 16, "sequence_length": 1024,
        "micro_batch": 2, "accumulation": 8, "gradient_checkpointing": base == "16bit", "learning_rate": 2e-4,
        "optimizer": "paged_adamw_8bit", "max_gradient_norm": 0.3,
    }  # fmt: skip
    weights = round((0.6 if base == "nf4" else 0.8) * peak_gib * GIB)
    return FinetuneChoice(
        settings=FinetuneSettings(**{**settings, **changes}),
        estimate=FinetuneEstimate(
            device="NVIDIA GeForce RTX 4070 Ti",
            terms=(
                MemoryTerm(name=f"weights, {base}", bytes=weights, source="a paper"),
                MemoryTerm(name="activations", bytes=round(peak_gib * GIB) - weights, source="a count"),
            ),
            peak_memory=about(peak_gib * GIB),
            overhead_bytes=700 * MIB,
            capacity_bytes=11 * GIB,
            trainable_parameter_count=41_943_040,
            adapter_bytes=160 * MIB,
            seconds_per_step=about(seconds),
        ),
        reasons=("bfloat16: the GPU has it", "LoRA of rank 16 on all linear layers") if base == "nf4" else (),
    )


TRAININGS = (training("nf4", 8.4, 22.0), training("16bit", 9.9, 31.0))
TRAIN = Workload(objective="finetune")
TRAIN_ANSWER = dataclasses.replace(
    ANSWER,
    workload=TRAIN,
    finetuning=FinetuneDecision(chosen=TRAININGS[0], alternatives=TRAININGS[1:], rejected=REJECTED[:1]),
)
TRAIN_PLAN = dataclasses.replace(
    PLAN,
    workload=TRAIN,
    artifact="example-8b-qlora-r16",
    expectations=(
        Expectation(quantity=PEAK_MEMORY, predicted=9e9, low=7e9, high=11e9, basis="formula", source="a"),
        Expectation(quantity=LOSS_RATIO, predicted=1.0, low=0.0, high=1.0, basis="formula", source="b"),
    ),
    steps=(
        Step(
            name="finetune", kind="finetune", method="bitsandbytes", type="nf4", output="example-8b-qlora-r16",
            finetune=TRAININGS[0].settings, predicted_bytes=160 * MIB, predicted_gpu_memory=about(9.1 * GIB),
        ),
        Step(name="verify", kind="verify", method="qplan"),
    ),
)  # fmt: skip
RECEIPT = Receipt(
    step="convert", key="k", output="example-8b-BF16.gguf", size_bytes=15 * GIB, sha256="ab" * 32, seconds=95.0,
    finished_at="2026-11-26T12:02:00+00:00",
)  # fmt: skip


def report(*, outside: bool = False) -> dict[str, Any]:
    """A report of :data:`PLAN`."""
    return {
        "format_version": "1.0",
        "plan_sha256": "0" * 64,
        "artifact": "out/example-8b-Q6_K.gguf",
        "measured": {FILE_BYTES: 6.1 * GIB, DECODE: 20.0 if outside else 66.0},
        "verdicts": [
            {"quantity": FILE_BYTES, "predicted": 6.1 * GIB, "low": 6.09 * GIB, "high": 6.11 * GIB,
             "measured": 6.1 * GIB, "ok": True, "position": "inside"},
            {"quantity": DECODE, "predicted": 68.0, "low": 50.0, "high": 86.0,
             "measured": 20.0 if outside else 66.0, "ok": not outside, "position": "outside" if outside else "inside"},
            {"quantity": PERPLEXITY_RATIO, "predicted": 1.003, "low": 1.001, "high": 1.006, "measured": 1.0028,
             "ok": True, "position": "inside"},
        ],
        "steps": [{"step": "convert", "output": "a", "size_bytes": 1, "sha256": "ab" * 32, "seconds": 95.0}],
        "notes": ["quality is of 40 of 85 chunks of the text"],
        "ok": not outside,
    }  # fmt: skip


def outcome(*, outside: bool = False) -> Outcome:
    """What applying :data:`PLAN` gave."""
    return Outcome(report=report(outside=outside), report_path=Path("out/report.json"))


MEASUREMENTS = tuple(
    Measurement(
        quantity=quantity, value=value, low=0.97 * value, high=1.02 * value, model="example-8b", model_sha256="0",
        method="gguf", runtime="llama.cpp", type="Q6_K", predicted=1.1 * value, measured_at="2026-11-26T12:00:00+00:00",
    )
    for quantity, value in ((DECODE, 66.0), (PEAK_MEMORY, 8.1 * GIB))
)  # fmt: skip
KNOWN = State(
    hardware=HARDWARE, model=MODEL, model_text="example-8b", output=Path("out"), plan_path=Path("out/plan.json")
)
CHOSEN = KNOWN.but(answer=ANSWER, candidate=CANDIDATES[0], workload=Workload())
PLANNED = CHOSEN.but(plan=PLAN, saved=True)
TRAINING = KNOWN.but(answer=TRAIN_ANSWER, workload=TRAIN, finetuning=TRAININGS[0])
DONE = PLANNED.but(outcome=outcome())
