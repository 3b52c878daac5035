"""The decision: every row of the owner's matrix speaks where it should, numbers decide, reasons hold numbers."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner import models
from planner.core.candidate import Candidate
from planner.core.hardware import HardwareProfile
from planner.core.wording import short_percent
from planner.core.workload import OBJECTIVES, Workload
from planner.decide import Decision, decide, explain, rules
from planner.decide.rank import memory_bytes, pareto, quality_ratio
from planner.workflow.recommend import recommend
from planner.workflow.survey import profiles, survey


def decided(model: str, profile: str, **workload: object) -> Decision:
    return decide(models.resolve(model), survey(profile), Workload(**workload))  # type: ignore[arg-type]


def spoken(decision: Decision) -> set[str]:
    return {entry.rule for entry in decision.trace}


SCENARIOS = [
    ("gpu-quality-critical", "rtx-4090", {"objective": "quality"}),
    ("gpu-speed-critical", "rtx-4090", {"objective": "speed"}),
    ("cpu-inference", "laptop-16gb", {}),
    ("mixed-cpu-gpu", "rtx-3060", {"context": 32768}),
    ("fine-tuning", "rtx-4090", {"objective": "finetune"}),
    ("extreme-compression", "rtx-4090", {"objective": "memory"}),
    ("maximum-quality", "rtx-4090", {"objective": "quality"}),
    ("nvidia-12gb", "rtx-4090", {}),
    ("nvidia-below-12gb", "rtx-3080-10gb", {}),
    ("apple-silicon", "m3-max-64gb", {}),
    ("multi-gpu", "2x-rtx-3090", {}),
    ("many-users", "a100-80gb", {"concurrency": 8}),
]


@pytest.mark.parametrize(("rule", "profile", "workload"), SCENARIOS)
def test_every_row_of_the_matrix_speaks_where_it_should(rule: str, profile: str, workload: dict[str, object]) -> None:
    decision = decided("llama-2-13b", profile, **workload)
    assert rule in spoken(decision)
    assert all(entry.source for entry in decision.trace)


def test_every_rule_of_the_table_has_a_scenario_here() -> None:
    assert {rule for rule, _, _ in SCENARIOS} == {rule.id for rule in rules.all_rules()}


@pytest.mark.parametrize(
    ("model", "profile", "workload", "method", "types"),
    [
        ("llama-2-13b", "rtx-4090", {}, {"awq", "gptq", "gguf"}, None),
        ("llama-2-7b", "laptop-16gb", {}, {"gguf"}, {"Q4_K_M", "Q4_K_S", "Q5_K_S", "Q5_K_M"}),
        ("llama-2-13b", "m3-max-64gb", {}, {"gguf"}, None),
        ("llama-2-7b", "rtx-4090", {"objective": "finetune"}, {"bitsandbytes"}, {"nf4"}),
        ("llama-2-7b", "h100-80gb", {"objective": "quality"}, {"none", "gguf"}, {"f16", "bf16", "F16", "BF16", "Q8_0"}),
        ("llama-2-70b", "rtx-4090", {"objective": "memory"}, {"gguf", "gptq"}, None),
    ],
)
def test_choices_an_expert_would_agree_with(
    model: str, profile: str, workload: dict[str, object], method: set[str], types: set[str] | None
) -> None:
    chosen = decided(model, profile, **workload).chosen
    assert chosen is not None and chosen.variant.method in method
    assert types is None or chosen.variant.type in types


@pytest.mark.parametrize("name", [name for name, _ in profiles()])
def test_every_profile_gets_an_answer(name: str) -> None:
    decision = decided("llama-2-13b", name)
    if decision.chosen is None:
        assert all(r.reason for r in decision.rejected)
        assert decided("llama-2-7b", name, context=2048).chosen is not None or "pi" in name or "8gb" in name
    else:
        assert_sound(decision, survey(name), Workload())


def assert_sound(decision: Decision, hardware: HardwareProfile, workload: Workload) -> None:
    assert decision.chosen is not None
    everyone = (decision.chosen, *decision.alternatives)
    scores = [c.score for c in everyone]
    assert scores == sorted(scores, key=lambda s: -(s or 0.0))
    for candidate in everyone:
        assert candidate.reasons and any(ch.isdigit() for ch in candidate.reasons[0])
        for device in (*candidate.estimate.memory.devices, candidate.estimate.memory.host):
            room = (device.capacity_bytes or 1 << 60) * (1 - workload.memory_margin_fraction)
            assert device.needed_bytes <= room


@pytest.mark.parametrize("name", [name for name, _ in profiles()])
def test_unasked_the_context_becomes_what_fits(name: str) -> None:
    answer = recommend("llama-2-13b", Workload(context_fixed=False), profile=name)
    assert answer.workload.context in {4096, 2048}  # it was trained with 4096
    if answer.workload.context == 2048 and answer.decision.chosen is not None:
        assert "4096 tokens of context do not fit" in " ".join(answer.notes)


def test_a_context_beyond_the_training_is_kept_with_a_note() -> None:
    answer = recommend("llama-2-7b", Workload(context=8192), profile="rtx-4090")
    assert answer.workload.context == 8192 and "trained with 4096" in " ".join(answer.notes)


def test_a_rejection_names_what_was_needed_and_what_there_is() -> None:
    decision = decided("llama-2-70b", "rtx-4090", methods=("awq", "none"))
    assert decision.chosen is None
    for rejection in decision.rejected:
        assert rejection.needed and rejection.available and rejection.needed > rejection.available
        assert rejection.unit == "bytes" and "RTX 4090" in rejection.reason


def test_a_rejection_says_that_sharing_with_the_ram_was_tried_too() -> None:
    """Else "needs 23.8 GiB, has 10.0 GiB" contradicts a chosen file of 14.8 GiB that is shared."""
    decision = decided("qwen3-30b-a3b", "m2-pro-16gb", methods=("gguf",))
    assert decision.chosen is not None
    chosen = decision.chosen.estimate
    refused = [r for r in decision.rejected if r.rule == "memory"]
    assert refused and all("nor with layers left in RAM" in r.reason for r in refused)
    assert all(r.available is not None and r.available < chosen.size.file_bytes for r in refused)
    on_gpu_alone = decided("qwen3-30b-a3b", "m2-pro-16gb", methods=("gguf",), gpu_layers=49)
    assert not any("left in RAM" in r.reason for r in on_gpu_alone.rejected)


def test_for_memory_the_size_counts_where_the_gpu_is_full_whatever_the_type() -> None:
    """The fullest device is 22 GiB of any of them: it chose 38.6 GiB of Q4_K_M where `balanced` chose 34.3 GiB."""
    least = decided("llama-2-70b", "rtx-4090", objective="memory", context=4096).chosen
    balanced = decided("llama-2-70b", "rtx-4090", context=4096).chosen
    assert least is not None and balanced is not None
    assert least.placement.gpu_layers < 81, "it is parted between GPU and RAM"
    assert least.estimate.size.file_bytes < balanced.estimate.size.file_bytes


def test_limits_are_kept() -> None:
    least = decided("llama-2-13b", "laptop-16gb", min_decode_tokens_per_second=1000.0)
    assert least.chosen is None
    assert any(r.rule == "min-decode" and r.needed == 1000 for r in least.rejected)
    capped = decided("llama-2-7b", "rtx-4090", max_memory_bytes=6 << 30)
    assert capped.chosen is not None
    assert all(d.total_bytes <= 6 << 30 for d in capped.chosen.estimate.memory.devices)


def test_the_cpu_alone_uses_no_gpu() -> None:
    chosen = decided("llama-2-7b", "rtx-4090", cpu_only=True).chosen
    assert chosen is not None and chosen.placement.gpu_layers == 0 and chosen.estimate.memory.devices == ()


def test_offload_takes_the_most_layers_that_fit() -> None:
    from dataclasses import replace

    from planner.estimate.memory import memory
    from planner.estimate.placement import shortage

    model, machine = models.resolve("llama-2-13b"), survey("rtx-3080-10gb")
    chosen = decide(model, machine, Workload(context=16384, types=("Q6_K",), methods=("gguf",))).chosen
    assert chosen is not None and 0 < chosen.placement.gpu_layers <= model.n_layer
    more = replace(chosen.placement, gpu_layers=chosen.placement.gpu_layers + 1)
    assert shortage(memory(model, chosen.variant, chosen.placement, machine), 0.06) is None
    assert shortage(memory(model, chosen.variant, more, machine), 0.06) is not None


@settings(max_examples=20, deadline=None)
@given(
    st.sampled_from(["tinyllama-1.1b", "llama-3.1-8b", "qwen3-30b-a3b", "gemma-2-9b"]),
    st.sampled_from(["rtx-3060", "rtx-4090", "m1-8gb", "laptop-16gb", "2x-rtx-3090"]),
    st.sampled_from(OBJECTIVES),
    st.sampled_from([2048, 8192]),
)
def test_whatever_is_asked_the_answer_is_sound(model: str, profile: str, objective: str, context: int) -> None:
    workload = Workload(objective=objective, context=context)
    decision = decide(models.resolve(model), survey(profile), workload)
    if decision.chosen is not None:
        assert_sound(decision, survey(profile), workload)
        front = [c for c in (decision.chosen, *decision.alternatives) if c.pareto]
        assert front and no_one_is_dominated(front)


def no_one_is_dominated(front: list[Candidate]) -> bool:
    return all(pareto(tuple(front))) and min(map(memory_bytes, front)) > 0 and min(map(quality_ratio, front)) > 0


@pytest.mark.parametrize("method", ["awq", "gptq", "none"])
def test_a_served_method_says_how_to_run_it_with_each_runtime(method: str) -> None:
    from planner import methods

    model = models.resolve("llama-2-13b")
    chosen = decide(model, survey("4x-a100-80gb"), Workload(methods=(method,), concurrency=16)).chosen
    assert chosen is not None
    commands = methods.get(method).commands(model, chosen)
    assert {"quantize", "serve", "python", "transformers", "docker"} <= set(commands)
    compile(commands["python"], "python", "exec")
    compile(commands["transformers"], "transformers", "exec")
    parallel = chosen.placement.tensor_parallel
    assert (f"--tensor-parallel-size {parallel}" in commands["serve"]) == (parallel > 1)
    assert (f"tensor_parallel_size={parallel}" in commands["python"]) == (parallel > 1)


def test_the_same_question_gets_the_same_answer() -> None:
    assert decided("llama-2-13b", "rtx-4090") == decided("llama-2-13b", "rtx-4090")


def test_a_rule_says_that_a_required_one_set_it_aside_not_that_its_methods_do_not_fit() -> None:
    answer = recommend("llama-3.1-8b", Workload(objective="finetune"), profile="rtx-4090")
    said = {entry.rule: entry.effect for entry in answer.decision.trace}
    assert "only bitsandbytes nf4" in said["fine-tuning"]
    assert "set aside" in said["nvidia-12gb"] and "bitsandbytes nf4" in said["nvidia-12gb"]
    assert not any("cannot run here" in effect for effect in said.values())


def test_a_speed_that_nothing_reaches_is_not_blamed_on_the_context() -> None:
    answer = recommend(
        "llama-2-7b", Workload(context_fixed=False, min_decode_tokens_per_second=1e9), profile="rtx-4090"
    )
    assert answer.decision.chosen is None and answer.workload.context == 4096
    assert not any("context" in note for note in answer.notes)


def test_nothing_that_fits_is_not_said_to_fit_a_shorter_context() -> None:
    answer = recommend("llama-2-70b", Workload(context_fixed=False), profile="laptop-8gb")
    assert answer.decision.chosen is None and answer.workload.context == 2048
    assert "no context from 4096 down to 2048 tokens is possible; this is for 2048" in answer.notes


def test_a_severe_loss_is_said_with_its_source_and_a_smaller_model() -> None:
    workload = Workload(max_memory_bytes=8 << 30)
    decision = recommend("qwen3-30b-a3b", workload, profile="laptop-16gb").decision
    assert decision.chosen is not None and quality_ratio(decision.chosen) > 1.172
    entry = next(e for e in decision.trace if e.rule == "severe-loss")
    assert entry.effect in decision.chosen.reasons and "llama.cpp" in entry.source
    name = decision.chosen.reasons[-1].partition("qplan recommend ")[2].rstrip("`)")
    smaller = recommend(name, workload, profile="laptop-16gb").decision
    assert smaller.chosen is not None and "severe-loss" not in spoken(smaller)


def test_an_ordinary_loss_is_not_called_severe() -> None:
    decision = recommend("llama-2-7b", Workload(), profile="laptop-16gb").decision
    assert decision.chosen is not None and "severe-loss" not in spoken(decision)
    assert not any("likely better" in reason for reason in decision.chosen.reasons)


def test_a_severe_loss_without_a_smaller_model_in_the_table_is_said_in_words() -> None:
    decision = recommend("mixtral-8x7b", Workload(max_memory_bytes=12 << 30), profile="laptop-16gb").decision
    assert decision.chosen is not None and "severe-loss" in spoken(decision)
    assert "a smaller model at about 4 bits" in decision.chosen.reasons[-1]


def test_a_change_that_rounds_to_nothing_has_no_minus() -> None:
    assert (short_percent(0.9998), explain.percent(0.99999)) == ("+0.0", "+0.00 %")
    assert (short_percent(0.99), short_percent(8.64)) == ("-1.0", "+764")
