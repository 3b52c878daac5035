"""Checkpoints on a machine without a GPU: kernels, placements, memory and speed under transformers."""

from __future__ import annotations

import dataclasses
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner import methods, models
from planner.core.candidate import KernelUse, Placement, Rejection, Variant
from planner.core.data import data_path
from planner.core.measurement import DECODE, Calibration, Conditions, Measurement
from planner.core.model import shape_sha256
from planner.core.workload import OBJECTIVES, Workload
from planner.decide import decide
from planner.estimate import estimate, torch_cpu
from planner.estimate.memory import peak_memory_bytes
from planner.methods import awq, bitsandbytes, gptq, none, quantizers
from planner.runtimes import kernels
from planner.workflow import verifying
from planner.workflow.estimates import estimate_case
from planner.workflow.survey import profiles, survey

CPU_PROFILES = tuple(name for name, machine in profiles() if not machine.gpus)
MODEL = models.resolve("tinyllama-1.1b")
VARIANTS = {
    "gptq4": gptq.variant("4bit"),
    "gptq3": gptq.variant("3bit"),
    "gptq8": gptq.variant("8bit"),
    "awq": awq.variant("4bit"),
    "nf4": bitsandbytes.variant("nf4"),
    "int8": bitsandbytes.variant("int8"),
    "bf16": none.variant("bf16"),
}


def on_cpu(name: str, profile: str = "laptop-16gb") -> Variant:
    return kernels.fitting(VARIANTS[name], survey(profile))


@pytest.mark.parametrize(
    ("name", "profile", "kernel"),
    [
        ("gptq4", "laptop-16gb", "gptqmodel-cpu-int4"),
        ("gptq3", "laptop-16gb", "gptqmodel-cpu-torch"),
        ("gptq8", "laptop-16gb", "gptqmodel-cpu-torch"),
        ("awq", "laptop-16gb", "gptqmodel-cpu-awq"),
        ("nf4", "laptop-16gb", "bnb-cpu-4bit-unpacked"),
        ("nf4", "epyc-9654", "bnb-cpu-4bit"),
        ("int8", "laptop-16gb", "bnb-cpu-int8"),
        ("bf16", "laptop-16gb", "transformers-cpu-float32"),
        ("bf16", "epyc-9654", "transformers-cpu-bf16"),
    ],
)
def test_the_kernel_of_a_checkpoint_on_a_cpu(name: str, profile: str, kernel: str) -> None:
    found = kernels.validate(on_cpu(name, profile), (), survey(profile), gpus_used=False)
    assert isinstance(found, KernelUse) and found.id == kernel
    assert found.speed == "slow" and "GGUF" in found.fix


def test_every_cpu_row_that_is_predicted_has_coefficients() -> None:
    rows = [row for row in kernels.kernels() if row.runtime == "transformers" and row.vendor == "cpu"]
    assert len(rows) >= 7
    for row in rows:
        assert row.on_request and row.predicted and row.fix and row.source and row.date
        assert torch_cpu.kernel_row(row.id) is not None, row.id


def test_vllm_gives_way_to_transformers_only_where_there_is_no_gpu() -> None:
    assert kernels.fitting(VARIANTS["awq"], survey("rtx-4090")) == VARIANTS["awq"]
    assert on_cpu("awq").runtime == "transformers"


@pytest.mark.parametrize(
    ("profile", "dtype"),
    [
        ("rtx-4090", "bfloat16"),
        ("rx-7900-xtx", "bfloat16"),
        ("t4", "float16"),
        ("gtx-1080-ti", "float16"),
        ("epyc-9654", "bfloat16"),
        ("laptop-16gb", "bfloat16"),
    ],
)
def test_four_bits_multiply_in_what_the_hardware_is_fast_in(profile: str, dtype: str) -> None:
    asked = Workload(context=2048, methods=("bitsandbytes",), types=("nf4",))
    here = survey(profile)
    assert kernels.fitting(VARIANTS["nf4"], here).compute_dtype == dtype
    wished = dataclasses.replace(VARIANTS["nf4"], compute_dtype="float16")
    assert kernels.fitting(wished, here) == wished
    chosen = decide(MODEL, here, asked).chosen
    if here.gpus and here.gpus[0].vendor == "amd":
        return  # no kernel of bitsandbytes is known there
    assert chosen is not None and quantizers.settings(chosen.variant).compute_dtype == dtype
    assert f"bnb_4bit_compute_dtype=torch.{dtype}" in methods.get("bitsandbytes").commands(MODEL, chosen)["python"]


@pytest.mark.parametrize(
    ("method", "type_"), [("gptq", "4bit"), ("awq", "4bit"), ("bitsandbytes", "nf4"), ("none", None)]
)
def test_a_method_that_is_asked_for_gets_a_placement_on_a_cpu(method: str, type_: str | None) -> None:
    asked = Workload(context=2048, methods=(method,), types=(type_,) if type_ else None)
    decision = decide(MODEL, survey("laptop-16gb"), asked)
    assert decision.chosen is not None and decision.chosen.variant.method == method
    chosen = decision.chosen
    assert chosen.variant.runtime == "transformers" and chosen.placement.gpu_layers == chosen.placement.gpu_count == 0
    assert chosen.estimate.speed.decode is not None and chosen.estimate.speed.prefill is not None
    assert chosen.kernel is not None and "GGUF" in chosen.kernel.note


def test_unasked_they_are_refused_with_what_is_better_and_how_to_have_them_all_the_same() -> None:
    decision = decide(MODEL, survey("laptop-16gb"), Workload(context=2048))
    refused = [r for r in decision.rejected if r.method == "gptq" and r.type == "4bit"]
    assert refused and all("--methods gptq" in r.reason and "GGUF" in r.reason for r in refused)


@pytest.mark.parametrize("profile", CPU_PROFILES)
@pytest.mark.parametrize("objective", [name for name in OBJECTIVES if name != "finetune"])
def test_a_cpu_is_still_recommended_gguf(profile: str, objective: str) -> None:
    for name in ("tinyllama-1.1b", "llama-3.1-8b"):
        decision = decide(models.resolve(name), survey(profile), Workload(context=2048, objective=objective))
        assert decision.chosen is None or decision.chosen.variant.method == "gguf"
        assert all(c.variant.method == "gguf" for c in decision.alternatives)


def test_gguf_wins_where_both_are_asked_for() -> None:
    for profile in CPU_PROFILES:
        decision = decide(MODEL, survey(profile), Workload(context=2048, methods=("gguf", "gptq", "bitsandbytes")))
        assert decision.chosen is not None and decision.chosen.variant.method == "gguf"


@pytest.mark.parametrize("name", VARIANTS)
def test_a_prediction_has_a_range_and_a_basis(name: str) -> None:
    variant, here = on_cpu(name), survey("laptop-16gb")
    made = estimate(MODEL, variant, Placement(context=2048, threads=4), here)
    for prediction in (
        made.speed.decode,
        made.speed.prefill,
        peak_memory_bytes(MODEL, variant, Placement(context=2048), here),
    ):
        assert prediction is not None and prediction.low < prediction.value < prediction.high
        assert prediction.basis == "formula" and "torch" in prediction.source
    assert made.speed.decode is not None and made.speed.decode.high / made.speed.decode.low > 4


def test_unpacking_three_bits_is_far_slower_than_the_int4_kernel() -> None:
    here, place = survey("laptop-16gb"), Placement(context=2048, threads=4)
    speeds = {name: estimate(MODEL, on_cpu(name), place, here).speed.decode for name in ("gptq4", "gptq3")}
    assert speeds["gptq4"] is not None and speeds["gptq3"] is not None
    assert speeds["gptq4"].value > 5 * speeds["gptq3"].value


def test_sixteen_bits_take_twice_their_file_where_they_are_computed_in_32() -> None:
    place = Placement(context=2048, threads=4)
    plain, wide = (estimate(MODEL, on_cpu("bf16", name), place, survey(name)) for name in ("epyc-9654", "laptop-16gb"))
    assert wide.memory.host.weights_bytes == 2 * plain.memory.host.weights_bytes


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(sorted(VARIANTS)), st.integers(1, 64), st.integers(1, 2000), st.integers(0, 2000))
def test_more_work_takes_longer_and_more_cores_do_not(name: str, threads: int, prompt: int, depth: int) -> None:
    here = survey("epyc-9654")
    variant = on_cpu(name, "epyc-9654")
    place = Placement(context=4096, threads=threads, prompt_tokens=prompt, depth=depth)

    def rates(**changed: int) -> tuple[float, float]:
        made = estimate(MODEL, variant, dataclasses.replace(place, **changed), here).speed
        assert made.decode is not None and made.prefill is not None
        return made.decode.value, prompt / made.prefill.value

    decode, seconds = rates()
    assert math.isfinite(decode) and decode > 0 and seconds > 0
    assert rates(depth=depth + 1000)[0] < decode
    assert rates(threads=threads + 1)[0] >= decode


def test_a_batch_case_without_a_gpu_is_answered_for_transformers() -> None:
    case = {"model": "tinyllama-1.1b", "method": "gptq", "type": "4bit", "profile": "laptop-16gb", "context": 2048}
    answer = estimate_case(case)
    assert answer["speed"]["decode_low"] < answer["speed"]["decode_tokens_per_second"] < answer["speed"]["decode_high"]
    assert estimate_case({**case, "runtime": "vllm"})["speed"]["decode_tokens_per_second"] is None


def test_what_was_measured_here_replaces_the_formula_for_that_method_type_and_runtime() -> None:
    here, variant = survey("laptop-16gb"), on_cpu("gptq4")
    taken = Measurement(
        quantity=DECODE,
        value=12.5,
        low=12.0,
        high=13.0,
        model=MODEL.name,
        model_sha256=shape_sha256(MODEL),
        method="gptq",
        runtime="transformers",
        type="4bit",
        group_size=128,
        conditions=Conditions(context=2048, threads=4, prompt_tokens=512),
        hardware_identity=here.identity(),
        tool_version="transformers 5.23.0, gptqmodel 7.6.0",
        weights_bytes=6e8,
    )
    known = Calibration(hardware_identity=here.identity(), measurements=(taken,))
    place = Placement(context=2048, threads=4)
    found = estimate(MODEL, variant, place, here, known).speed.decode
    assert found is not None and found.basis == "measured" and found.value == 12.5 and "gptqmodel" in found.source
    other = estimate(MODEL, on_cpu("nf4"), place, here, known).speed.decode
    assert other is not None and other.basis != "measured"


def test_an_asymmetric_or_odd_layout_has_no_int4_kernel_on_a_cpu() -> None:
    odd = dataclasses.replace(on_cpu("gptq4"), group_size=256)
    found = kernels.validate(odd, (), survey("laptop-16gb"), gpus_used=False)
    assert isinstance(found, KernelUse) and found.id == "gptqmodel-cpu-torch"
    three = dataclasses.replace(on_cpu("awq"), type="3bit")
    assert isinstance(kernels.validate(three, (), survey("laptop-16gb"), gpus_used=False), Rejection)


def test_the_coefficients_say_where_they_come_from() -> None:
    text = data_path("torch_cpu.toml").read_text("utf-8")
    assert "source = " in text and "date = " in text and torch_cpu.source()


def test_a_plan_for_a_cpu_is_served_in_the_type_that_it_is_measured_in() -> None:
    from planner.runtimes.commands import command
    from planner.runtimes.service import Service

    here, variant = survey("laptop-16gb"), on_cpu("gptq4")
    kernel = kernels.validate(variant, (), here, gpus_used=False)
    assert isinstance(kernel, KernelUse)
    service = Service(target="/models/demo", variant=variant, placement=Placement(context=512), kernel=kernel)
    argv = command("transformers", service).argv
    assert argv[argv.index("--dtype") + 1] == "bfloat16"
    told = verifying.kernel_options(variant, here, model=None, on_gpu=False).arguments
    assert dict(told)["dtype"] == "bfloat16"
