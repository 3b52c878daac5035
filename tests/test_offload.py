"""Experts in RAM, uneven splits and what-if answers, from the estimate to the commands."""

from __future__ import annotations

import dataclasses
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.core.candidate import Placement
from planner.core.estimates import MemoryEstimate
from planner.core.workload import Workload
from planner.decide import decide
from planner.estimate import compute_buffers, graph_alloc
from planner.estimate.memory import memory
from planner.estimate.speed import speed
from planner.estimate.weights import expert_bytes
from planner.methods import gguf
from planner.methods.serving import llama_cpp
from planner.workflow.estimates import answer_of
from planner.workflow.recommend import recommend
from planner.workflow.survey import survey
from planner.workflow.what_if import answers, document
from tests.conftest import Qplan
from tests.test_placement import MIXED, machine, model, uneven


def used(name: str, experts: int, gpus: int = 1, type_: str = "Q4_K_M", layers: int = 999) -> MemoryEstimate:
    placement = Placement(context=4096, gpu_layers=layers, gpu_count=gpus, cpu_expert_layers=experts)
    return memory(model(name), gguf.variant(type_), placement, machine(24, gpus))


# (model, gpu_layers, cpu_expert_layers, then of the GPU and of the host: weights, KV cache, compute buffer), bytes.
# What llama.cpp itself reports under no_alloc for Q4_K_M, 4096 tokens, ubatch 512 and flash attention: the library of
# llama-cpp-python 0.3.36 with a stand-in for a GPU that allocates and offloads by ggml-cuda's rules but fuses nothing
# (2026-11-23).
REPORTED = [
    ("qwen3-30b-a3b", 49, 0, 18375698432, 402653184, 315359232, 175030272, 0, 12597248),
    ("qwen3-30b-a3b", 49, 1, 17984055040, 402653184, 315359232, 566673408, 0, 12597248),
    ("qwen3-30b-a3b", 49, 2, 17592411648, 402653184, 315359232, 958316544, 0, 12597248),
    ("qwen3-30b-a3b", 49, 24, 9599111168, 402653184, 315359232, 8951611392, 0, 12597248),
    ("qwen3-30b-a3b", 49, 47, 1214167296, 402653184, 315359232, 17336549376, 0, 12597248),
    ("qwen3-30b-a3b", 49, 48, 822523904, 402653184, 315359232, 17728192512, 0, 12597248),
    ("qwen3-30b-a3b", 24, 48, 527209472, 192937984, 315359232, 18023506944, 209715200, 12597248),
    ("qwen3-30b-a3b", 24, 36, 5019312128, 192937984, 315359232, 13531407360, 209715200, 12597248),
    ("deepseek-v2-lite", 28, 0, 10246016768, 127401984, 247738368, 117964800, 0, 12593152),
    ("deepseek-v2-lite", 28, 1, 10246016768, 127401984, 247738368, 117964800, 0, 12593152),
    ("deepseek-v2-lite", 28, 2, 9842314752, 127401984, 251414784, 521666560, 0, 12593152),
    ("deepseek-v2-lite", 28, 13, 5886035584, 127401984, 251414784, 4477943808, 0, 12593152),
    ("deepseek-v2-lite", 28, 26, 1122352384, 127401984, 251414784, 9241624576, 0, 12593152),
    ("deepseek-v2-lite", 28, 27, 718650368, 127401984, 251414784, 9645326336, 0, 12593152),
    ("deepseek-v2-lite", 14, 27, 418371712, 61341696, 260770304, 9945595904, 66060288, 12593152),
    ("deepseek-v2-lite", 14, 20, 3105873536, 61341696, 260770304, 7258095616, 66060288, 12593152),
    ("gpt-oss-20b", 25, 0, 15394011136, 119537664, 428625920, 398154240, 0, 16799744),
    ("gpt-oss-20b", 25, 1, 14745941248, 119537664, 448032768, 1046223360, 0, 16799744),
    ("gpt-oss-20b", 25, 2, 14097871360, 119537664, 448016384, 1694292480, 0, 16799744),
    ("gpt-oss-20b", 25, 12, 8214369280, 119537664, 448016384, 7577786880, 0, 16799744),
    ("gpt-oss-20b", 25, 23, 1682797312, 119537664, 423634944, 14109350400, 0, 16799744),
    ("gpt-oss-20b", 25, 24, 1034727424, 119537664, 423624704, 14757419520, 0, 16799744),
    ("gpt-oss-20b", 12, 24, 807836288, 58195968, 423624704, 14984300672, 61341696, 16799744),
    ("gpt-oss-20b", 12, 18, 4497190016, 58195968, 423624704, 11294951552, 61341696, 16799744),
]


@pytest.mark.parametrize("row", REPORTED, ids=lambda row: f"{row[0]}-{row[1]}-{row[2]}")
def test_every_buffer_is_what_llamacpp_reports(monkeypatch: pytest.MonkeyPatch, row: tuple[str | int, ...]) -> None:
    for name in ("_program", "_compute_bytes"):
        monkeypatch.setattr(compute_buffers, name, getattr(compute_buffers, name).__wrapped__)
    monkeypatch.setattr(graph_alloc, "_fusions", lambda nodes, sources: {})
    made = used(str(row[0]), int(row[2]), layers=int(row[1]))
    parts = [(d.weights_bytes, d.kv_cache_bytes, d.compute_bytes) for d in (made.devices[0], made.host)]
    assert (*parts[0], *parts[1]) == row[3:]


@given(st.sampled_from(MIXED), st.integers(0, 60), st.sampled_from(("Q4_K_M", "Q8_0")), st.integers(1, 60))
@settings(max_examples=40, deadline=None)
def test_more_experts_in_ram_never_take_more_of_the_gpu(name: str, experts: int, type_: str, layers: int) -> None:
    before, after = (used(name, n, type_=type_, layers=layers) for n in (experts, experts + 1))
    assert after.devices[0].weights_bytes <= before.devices[0].weights_bytes
    assert after.host.weights_bytes >= before.host.weights_bytes
    assert after.devices[0].kv_cache_bytes == before.devices[0].kv_cache_bytes


@pytest.mark.parametrize("name", MIXED)
def test_experts_move_with_all_their_bytes(name: str) -> None:
    spec, variant = model(name), gguf.variant("Q4_K_M")
    here, there = used(name, 0), used(name, spec.n_layer)
    moved = here.devices[0].weights_bytes - there.devices[0].weights_bytes
    assert moved == sum(expert_bytes(spec, variant, True))
    assert there.host.weights_bytes - here.host.weights_bytes == sum(expert_bytes(spec, variant, False))
    assert moved > 0.5 * here.devices[0].weights_bytes


def test_experts_of_layers_that_are_in_ram_anyway_change_nothing() -> None:
    assert used("qwen3-30b-a3b", 8, layers=40) == used("qwen3-30b-a3b", 0, layers=40)
    assert used("llama-2-13b", 8) == used("llama-2-13b", 0)


def test_large_batches_copy_an_experts_matrix_to_the_gpu_and_small_ones_do_not() -> None:
    spec, variant, hardware = model("mixtral-8x7b"), gguf.variant("Q4_K_M"), machine(48)
    whole = Placement(context=512, gpu_layers=spec.offloadable_count, gpu_count=1)
    largest = max(variant_bytes for variant_bytes in gguf.tensor_bytes(spec, variant))
    moved = dataclasses.replace(whole, cpu_expert_layers=spec.n_layer)
    grown = compute(spec, variant, moved, hardware) - compute(spec, variant, whole, hardware)
    assert grown > 0.5 * largest
    small = {"ubatch": 16, "batch": 16}
    few, few_moved = (dataclasses.replace(p, **small) for p in (whole, moved))  # type: ignore[arg-type]
    assert compute(spec, variant, few_moved, hardware) < compute(spec, variant, few, hardware) + 0.1 * largest


def compute(spec, variant, placement, hardware) -> int:  # type: ignore[no-untyped-def]
    return memory(spec, variant, placement, hardware).devices[0].compute_bytes


def test_experts_in_ram_cost_speed_and_less_than_layers_in_ram_with_a_long_cache() -> None:
    spec, variant, hardware = model("qwen3-30b-a3b"), gguf.variant("Q4_K_M"), survey("rtx-4060-ti-16gb")
    whole = Placement(context=32768, depth=30000, gpu_layers=spec.offloadable_count, gpu_count=1)
    experts = dataclasses.replace(whole, cpu_expert_layers=24)
    layers = dataclasses.replace(whole, gpu_layers=spec.offloadable_count - 24)
    rates = [speed(spec, variant, each, hardware).decode for each in (whole, experts, layers)]
    assert rates[0] and rates[1] and rates[2] and rates[0].value > rates[1].value > rates[2].value


def test_a_mixture_that_is_too_large_keeps_its_attention_on_the_gpu() -> None:
    spec, hardware = model("qwen3-30b-a3b"), survey("rtx-4060-ti-16gb")
    chosen = decide(spec, hardware, Workload(types=("Q8_0",), methods=("gguf",))).chosen
    assert chosen is not None
    assert chosen.placement.gpu_layers == spec.offloadable_count and chosen.placement.cpu_expert_layers > 0
    assert any("experts of" in reason for reason in chosen.reasons)
    commands = llama_cpp(spec, chosen)
    assert f"--n-cpu-moe {chosen.placement.cpu_expert_layers}" in commands["serve"]
    assert "num_gpu " not in commands["ollama"].replace("no num_gpu:", "")


def test_uneven_gpus_get_their_split_in_the_commands() -> None:
    hardware = dataclasses.replace(survey("2x-rtx-3090"), gpus=uneven(6, 10).gpus)
    workload = Workload(types=("Q4_K_M",), methods=("gguf",))
    chosen = decide(model("qwen3-30b-a3b"), hardware, workload).chosen
    assert chosen is not None and chosen.placement.tensor_split
    share = ",".join(f"{part:g}" for part in chosen.placement.tensor_split)
    assert f"--tensor-split {share}" in llama_cpp(model("qwen3-30b-a3b"), chosen)["serve"]


@pytest.mark.parametrize(
    ("extra", "code"),
    [
        ({"tensor_split": [1, 2, 3]}, "bad-case"),
        ({"tensor_split": "a,b"}, "bad-case"),
        ({"tensor_split": [0, 0]}, "bad-case"),
        ({"tensor_split": [float("1e300"), 1]}, "bad-case"),
        ({"tensor_split": 3}, "bad-case"),
        ({"cpu_expert_layers": -1}, "bad-case"),
        ({"tensor_split": [3, 1]}, None),
        ({"tensor_split": "3,1"}, None),
        ({"cpu_expert_layers": 12}, None),
    ],
)
def test_cases_take_experts_and_splits(extra: dict[str, object], code: str | None) -> None:
    case = {"model": "qwen3-30b-a3b", "device": "GeForce RTX 4090", "device_count": 2, **extra}
    answer = answer_of(json.dumps(case))
    assert answer.get("error", {}).get("code") == code
    if code is None:
        plain = answer_of(json.dumps({key: value for key, value in case.items() if key not in extra}))
        assert answer["memory"]["devices"] != plain["memory"]["devices"]


def test_what_if_agrees_with_the_estimate() -> None:
    answer = recommend("llama-3.1-8b", Workload(types=("Q8_0",), methods=("gguf",)), profile="rtx-3060")
    found = answers(answer, table=True)
    assert found is not None and found.options
    longest = {item.kv_type: item.context or 0 for item in found.longest}
    assert longest["q4_0"] >= longest["q8_0"] >= longest["f16"] > 0
    assert all(option.whole == (option.context <= longest[option.kv_type]) for option in found.options)
    assert document(found)["longest_whole_context"] == longest  # type: ignore[index]


def test_what_if_prints_a_table_and_goes_into_the_json(qplan: Qplan) -> None:
    asked = ("recommend", "llama-2-13b", "--profile", "rtx-3060", "--types", "Q8_0", "--methods", "gguf", "--what-if")
    text = qplan(*asked).stdout
    assert "What if" in text and " layers" in text and "Do it" not in text
    block = json.loads(qplan(*asked, "--json").stdout)["what_if"]
    assert {option["kv_type"] for option in block["options"]} == {"f16", "q8_0", "q4_0"}
