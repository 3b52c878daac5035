"""The kernel table: what each variant gets on each machine, and which row forbids it."""

from __future__ import annotations

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner import methods, models
from planner.core.candidate import KernelUse, Placement, Rejection, Variant
from planner.core.hardware import HardwareProfile
from planner.core.workload import Workload
from planner.decide import decide
from planner.methods import awq, bitsandbytes, common, gguf, gptq, none
from planner.runtimes import kernels
from planner.runtimes.kernels import Matrix, validate
from planner.workflow.survey import survey
from tests.conftest import Qplan

GPTQ = {bits: gptq.variant(f"{bits}bit", 128) for bits in (2, 3, 4, 8)}
AWQ = awq.variant("4bit", 128)
SQUARE = (Matrix("ffn", 4096, 4096, "outputs"),)


def used(variant: Variant, profile: str, model: str = "llama-2-13b", gpus: int = 1) -> str:
    """Id of the kernel, or of the row that forbids, with a dash before it."""
    found = common.kernel(models.resolve(model), variant, survey(profile), gpus)
    return found.id if isinstance(found, KernelUse) else f"-{found.rule}"


@pytest.mark.parametrize(
    ("variant", "profile", "kernel"),
    [
        (AWQ, "rtx-4090", "vllm-awq-marlin"),
        (AWQ, "t4", "vllm-awq-marlin"),  # Turing: Marlin reached it after vLLM 0.15
        (AWQ, "h100-80gb", "vllm-awq-machete"),
        (awq.variant("4bit", 32), "h100-80gb", "vllm-awq-marlin"),  # Machete has no groups of 32
        (AWQ, "gtx-1080-ti", "-vllm-awq-triton"),
        (AWQ, "rx-7900-xtx", "-vllm-awq-triton"),
        (AWQ, "laptop-16gb", "-vllm-awq-triton"),
        (GPTQ[4], "rtx-4090", "vllm-gptq-marlin"),
        (GPTQ[8], "h100-80gb", "vllm-gptq-machete"),
        (GPTQ[3], "rtx-4090", "vllm-gptq-humming"),
        (GPTQ[2], "t4", "vllm-gptq-humming"),
        (none.variant("bf16"), "rtx-4090", "vllm-16bit"),
        (none.variant("bf16"), "gtx-1080-ti", "-vllm-16bit"),
        (none.variant("bf16"), "rx-7900-xtx", "-vllm-rocm-16bit"),
        (none.variant("fp8"), "rtx-4090", "vllm-fp8"),
        (none.variant("fp8"), "a100-80gb", "vllm-fp8-marlin"),
        (bitsandbytes.variant("nf4"), "gtx-1080-ti", "bnb-4bit-cuda"),
        (bitsandbytes.variant("int8"), "t4", "bnb-int8-cuda"),
        (bitsandbytes.variant("int8"), "gtx-1080-ti", "-bnb-int8-cuda-pascal"),
        (bitsandbytes.variant("nf4"), "laptop-16gb", "bnb-cpu-4bit-unpacked"),
    ],
)
def test_the_kernel_of_a_variant_on_a_machine(variant: Variant, profile: str, kernel: str) -> None:
    assert used(variant, profile) == kernel


def test_act_order_is_refused_where_vllm_dropped_it() -> None:
    ordered = dataclasses.replace(GPTQ[4], act_order=True)
    found = common.kernel(models.resolve("llama-2-7b"), ordered, survey("rtx-4090"))
    assert isinstance(found, Rejection) and "activation order" in found.reason and "0.33.0" in (found.source or "")
    assert not any(v.act_order for v in gptq.variants(models.resolve("llama-2-7b")))
    there = dataclasses.replace(ordered, runtime="transformers")
    kept = common.kernel(models.resolve("llama-2-7b"), there, survey("rtx-4090"))
    assert isinstance(kept, KernelUse) and kept.id == "gptqmodel-gptq-marlin"


def test_a_layout_that_the_runtime_does_not_read_is_refused() -> None:
    gemv = dataclasses.replace(AWQ, format="awq-gemv")
    found = validate(gemv, SQUARE, survey("rtx-4090"))
    assert isinstance(found, Rejection) and found.rule == "vllm-formats" and "awq-gemm" in found.reason
    there = validate(dataclasses.replace(gemv, runtime="transformers"), SQUARE, survey("rtx-4090"))
    assert isinstance(there, KernelUse)


def test_two_and_three_bits_must_be_asked_for() -> None:
    found = common.kernel(models.resolve("llama-2-7b"), GPTQ[3], survey("rtx-4090"))
    assert isinstance(found, KernelUse) and dict(found.arguments) == {"quantization": "humming"}
    assert kernels.reading(GPTQ[3]) == found
    four = kernels.reading(GPTQ[4])
    assert four is not None and four.arguments == ()


@pytest.mark.parametrize(
    ("profile", "type_", "layers", "kernel"),
    [
        ("rtx-4090", "Q4_K_M", 33, "llama-cuda"),
        ("rtx-4090", "IQ2_M", 33, "llama-cuda"),
        ("rtx-4090", "IQ2_M", 0, "llama-cpu-iquants"),
        ("m3-max-64gb", "IQ2_M", 33, "llama-metal-iquants"),
        ("m3-max-64gb", "Q4_K_M", 33, "llama-metal"),
        ("laptop-16gb", "Q4_K_M", 0, "llama-cpu-x86"),
        ("raspberry-pi-5-8gb", "Q4_K_M", 0, "llama-cpu-arm"),
        ("rx-7900-xtx", "Q4_K_M", 33, "llama-rocm"),
    ],
)
def test_llama_cpp_takes_the_back_end_of_the_device(profile: str, type_: str, layers: int, kernel: str) -> None:
    placement = Placement(context=4096, gpu_layers=layers)
    found = gguf.kernel(models.resolve("llama-2-7b"), gguf.variant(type_), placement, survey(profile))
    assert isinstance(found, KernelUse) and found.id == kernel
    assert bool(found.note) == (found.speed == "slow")
    if found.note:
        assert "K-quant" in found.note and found.id in found.note


def test_a_processor_without_avx2_is_said_to_be_slow_and_refused_nothing() -> None:
    machine = survey("laptop-16gb")
    old = dataclasses.replace(machine, cpu=dataclasses.replace(machine.cpu, simd=("sse4_2",)))
    decision = decide(models.resolve("tinyllama-1.1b"), old, Workload(context=2048, types=("Q4_K_M",)))
    assert decision.chosen is not None and decision.chosen.kernel is not None
    assert decision.chosen.kernel.id == "llama-cpu-plain" and "AVX2" in decision.chosen.kernel.note


def test_machines_with_gpus_of_two_kinds_run_gguf() -> None:
    nvidia, intel = survey("rtx-4090"), survey("arc-a770")
    both = dataclasses.replace(nvidia, gpus=nvidia.gpus + intel.gpus)
    placement = Placement(context=2048, gpu_layers=33, gpu_count=2)
    found = gguf.kernel(models.resolve("llama-2-7b"), gguf.variant("Q4_K_M"), placement, both)
    assert isinstance(found, KernelUse) and found.id == "llama-cuda"


@pytest.mark.parametrize("name", ["4x-a100-80gb", "2x-rtx-3090"])
def test_a_split_that_cuts_a_group_is_refused_with_its_row(name: str) -> None:
    """13824 inputs of ffn_down are 108 groups of 128: two or four GPUs hold whole groups, eight would cut one."""
    assert used(AWQ, name, gpus=2) == "vllm-awq-marlin"
    assert used(AWQ, name, gpus=4) == "vllm-awq-marlin"
    machine = survey(name)
    found = common.kernel(models.resolve("llama-2-13b"), AWQ, machine, 8)
    assert isinstance(found, Rejection) and found.source
    assert "1728 inputs on each of 8 GPUs, no multiple of group size 128" in found.reason
    assert found.rule in {row.id for row in kernels.kernels()}


def test_heads_limit_the_split() -> None:
    refusal = kernels.split_refusal(AWQ, 40, 16)
    assert refusal is not None and refusal.rule == "vllm-heads" and "40 heads for 16 GPUs" in refusal.reason
    assert kernels.split_refusal(AWQ, 40, 8) is None


def test_kv_projections_are_copied_where_gpus_outnumber_their_heads() -> None:
    model = models.resolve("llama-3.1-8b")  # 32 heads, 8 KV heads of 128
    qkv = {gpus: common.products(model, gpus)[0].shard(gpus)[1] for gpus in (1, 8, 16)}
    assert qkv == {1: 4096 + 2 * 1024, 8: 512 + 2 * 128, 16: 256 + 2 * 128}


@given(
    st.integers(1, 64),
    st.integers(1, 64),
    st.sampled_from([32, 64, 128]),
    st.sampled_from([1, 2, 4, 8]),
    st.sampled_from(["inputs", "outputs"]),
)
def test_whatever_the_shape_no_group_lies_on_two_gpus(k: int, n: int, group: int, gpus: int, split: str) -> None:
    matrix = Matrix("w", 32 * k, 32 * n, split)
    variant = gptq.variant("4bit", group)
    found = validate(variant, (matrix,), survey("4x-a100-80gb"), tensor_parallel=gpus)
    inputs = matrix.shard(gpus)[0]
    assert isinstance(found, KernelUse) == (inputs % group == 0)


@given(st.sampled_from([r.id for r in kernels.kernels() if r.min_capability]), st.integers(50, 120))
def test_a_capability_is_a_lower_bound(row_id: str, tenths: int) -> None:
    row = next(r for r in kernels.kernels() if r.id == row_id)
    machine = with_capability(survey("rtx-4090"), f"{tenths // 10}.{tenths % 10}")
    reasons = kernels._machine_reasons(row, machine, machine.gpus)
    assert bool(reasons) == (
        kernels.capability(f"{tenths // 10}.{tenths % 10}") < kernels.capability(row.min_capability or "")
    )


def with_capability(machine: HardwareProfile, capability: str) -> HardwareProfile:
    return dataclasses.replace(
        machine, gpus=tuple(dataclasses.replace(g, compute_capability=capability) for g in machine.gpus)
    )


def test_every_row_has_a_source_a_date_and_a_version_and_every_slow_one_a_fix() -> None:
    rows = kernels.kernels()
    assert len({row.id for row in rows}) == len(rows)
    runtimes = {row.name for row in kernels.runtimes()}
    for row in (*rows, *kernels.runtimes(), *kernels.split_limits()):
        assert row.source and row.date and row.version
    for row in rows:
        assert row.speed in {"fast", "slow"} and bool(row.fix) >= (row.speed == "slow")
        assert row.runtime in runtimes and set(row.methods) <= set(methods.names())


def test_an_unknown_capability_forbids_nothing() -> None:
    machine = survey("rtx-4090")
    unknown = dataclasses.replace(machine, gpus=(dataclasses.replace(machine.gpus[0], compute_capability=None),))
    assert isinstance(validate(AWQ, SQUARE, unknown), KernelUse)


def test_a_recommendation_names_the_kernel_and_a_rejection_its_row(qplan: Qplan) -> None:
    done = qplan("recommend", "llama-2-7b", "--profile", "rtx-4090", "--methods", "awq,gptq", "--json")
    answer = json.loads(done.stdout)
    assert answer["chosen"]["kernel"]["id"] in {"vllm-awq-marlin", "vllm-gptq-marlin"}
    assert {"id", "name", "speed", "version", "source"} <= set(answer["chosen"]["kernel"])
    humming = next(c for c in answer["alternatives"] if c["method"] == "gptq" and c["type"] == "3bit")
    assert "--quantization humming" in humming["commands"]["serve"]
    assert "--quantization" not in answer["chosen"]["commands"]["serve"]
    old = json.loads(qplan("recommend", "llama-2-7b", "--profile", "gtx-1080-ti", "--json").stdout)
    refused = {r["rule"]: r for r in old["rejected"] if r["method"] == "awq"}
    assert refused["vllm-awq-triton"]["source"].startswith("https://")


def test_a_slow_kernel_is_said_with_the_fix(qplan: Qplan) -> None:
    shown = qplan("recommend", "llama-2-7b", "--profile", "rtx-4090", "--objective", "finetune").stdout
    assert "slow:" in shown and "Instead:" in shown and "[bnb-4bit-cuda]" in shown
    explained = qplan("explain", "llama-2-7b", "--method", "bitsandbytes", "--type", "nf4", "--profile", "rtx-4090")
    assert "bnb-4bit-cuda" in explained.stdout and "Instead" in explained.stdout
    none_here = qplan("explain", "llama-2-7b", "--method", "awq", "--type", "4bit", "--profile", "gtx-1080-ti").stdout
    assert "none here" in none_here and "vllm-awq-triton" in none_here


def test_methods_lists_runtimes_and_kernels_and_one_method_in_detail(qplan: Qplan) -> None:
    listed = qplan("methods").stdout
    assert "exllamav3" in listed and "vllm-awq-marlin" in listed and "llama-cuda" in listed
    detail = qplan("methods", "gptq").stdout
    assert "act-order" in detail and "vllm-gptq-humming" in detail and "llama-cuda" not in detail
    document = json.loads(qplan("methods", "awq", "--json").stdout)
    assert [m["name"] for m in document["methods"]] == ["awq"]
    assert all("awq" in k["methods"] for k in document["kernels"]) and document["runtimes"] and document["servers"]
    assert qplan("methods", "magic").returncode == 2
