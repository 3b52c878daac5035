"""Mixtures of types to a size: recipes, plans, tampered plans, and the whole way on real files."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner import models
from planner.core.candidate import Candidate
from planner.core.data import data_path
from planner.core.errors import DoesNotFit, InputError, UsageError
from planner.core.hardware import Disk, HardwareProfile
from planner.core.model import Tensor
from planner.core.plan import Plan, Step
from planner.core.units import GIB
from planner.core.workload import Workload
from planner.decide.mixture import variant_of
from planner.estimate.making import forecast
from planner.formats.ggml import type_traits
from planner.methods import gguf, gguf_mix, gguf_recipe
from planner.workflow.frontier import frontier
from planner.workflow.mixture import Wish, mixture
from planner.workflow.planning import Measuring, load_plan, make_plan, plan_text
from planner.workflow.recommend import Recommendation, recommend, recommend_for
from tests.conftest import Qplan

CATALOG = ("demo", "llama-3.2-1b", "qwen2.5-0.5b", "mixtral-8x7b", "gemma-2-9b", "deepseek-v2-lite", "phi-4")


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(CATALOG), st.floats(0.0, 1.0), st.booleans())
def test_a_planned_recipe_fills_its_size_and_never_more(name: str, share: float, imatrix: bool) -> None:
    model = models.resolve(name)
    largest = gguf.size(model, gguf.variant("Q8_0")).file_bytes
    low = 0.56 if name == "qwen2.5-0.5b" else 0.36 if imatrix else 0.45  # its rows of 896 take no type below Q4_0
    target = round((low + share * (0.98 - low)) * largest)
    variant = variant_of(model, target, imatrix=imatrix)
    made = gguf.size(model, variant).file_bytes
    assert made <= target
    assert made >= 0.995 * target
    for tensor, type_ in zip(model.tensors, gguf.tensor_types(model, variant), strict=True):
        assert tensor.shape[0] % type_traits(type_).block_weights == 0
        if type_ in gguf_recipe.DEMANDING_TYPES:
            assert imatrix and tensor.layer is not None
        if not gguf_mix.is_quantized(tensor):
            assert type_ == gguf_mix.source_type(model, tensor)


def test_more_bytes_are_predicted_to_lose_no_more() -> None:
    model = models.resolve("llama-3.2-1b")
    losses = [
        gguf_recipe.plan_recipe(
            model, gguf.metadata_bytes(model), round(bits * model.parameter_count / 8), imatrix=True
        )
        for bits in (2.6, 3.0, 3.5, 4.0, 4.3, 5.0, 6.0, 8.0)
    ]
    assert [r.loss for r in losses] == sorted((r.loss for r in losses), reverse=True)
    assert all(recipe.gap <= 0.1 * recipe.loss for recipe in losses)  # the tied embedding is a quarter of the model


def test_too_small_says_how_small_it_can_be() -> None:
    model = models.resolve("llama-3.2-1b")
    with pytest.raises(DoesNotFit) as caught:
        variant_of(model, model.parameter_count // 8, imatrix=True)
    assert caught.value.code == "target-too-small" and "bits per weight" in caught.value.numbers


def test_rows_that_are_no_whole_blocks_take_small_blocks_or_stay() -> None:
    assert gguf_recipe.candidate_types(Tensor("blk.0.attn_q.weight", (896, 64)), covered=True) == (
        gguf_recipe.SHORT_ROW_TYPES
    )
    assert gguf_recipe.candidate_types(Tensor("blk.0.attn_q.weight", (100, 64)), covered=True) == ("F16",)
    plain = gguf_recipe.candidate_types(Tensor("output.weight", (256, 64)), covered=False)
    assert not set(plain) & gguf_recipe.DEMANDING_TYPES


@pytest.mark.parametrize(
    "types",
    [
        ((".*", "Q4_K"),),
        (("blk.0.attn_q.weight|.", "Q4_K"),),
        (("a" * 64, "Q4_K"),),
        (("", "Q4_K"),),
        (("blk.0.attn_q.weight", "Q4_K"), ("blk.0.attn_q.weight", "Q5_K")),
        (("blk.0.attn_q.weight", "TQ1_0"),),
        (("blk.0.attn_q.weight", "../Q4_K"),),
    ],
)
def test_a_recipe_of_a_stranger_is_refused(types: tuple[tuple[str, str], ...]) -> None:
    assert gguf_recipe.fault(types)


@pytest.fixture(scope="module")
def answer() -> Recommendation:
    return recommend("demo", Workload(context=512))


def planned(answer: Recommendation, wish: Wish) -> Plan:
    candidate, target = mixture(answer, wish)
    return make_plan(answer, candidate, Measuring(chunks=8, probes=9, seed=4, target_bytes=target))


def test_a_plan_records_recipe_size_and_text(answer: Recommendation, tmp_path: Path) -> None:
    plan = planned(answer, Wish(bits_per_weight=4.0))
    path = tmp_path / "plan.json"
    path.write_text(plan_text(plan))
    assert load_plan(path) == plan
    by_kind = {step.kind: step for step in plan.steps}
    assert list(by_kind) == ["convert", "imatrix", "sensitivity", "quantize", "verify"]
    made = by_kind["quantize"]
    assert made.target_bytes == int(4.0 * plan.model.parameter_count / 8)
    assert made.imatrix == "imatrix" and made.sensitivity == "sensitivity" and made.tensor_types == plan.variant.recipe
    text = by_kind["imatrix"].calibration
    assert text is not None and text.chunks == 8 and text.seed == 4 and len(text.sha256) == 64
    assert all(step.predicted_seconds for step in plan.steps if step.output)
    ratio = next(e for e in plan.expectations if e.quantity == "perplexity_ratio")
    assert ratio.low < ratio.predicted < ratio.high and "between" in ratio.source


Change = Callable[[Step], Step]
CHANGES: list[Change] = [
    lambda s: dataclasses.replace(s, tensor_types=((".*", "Q4_K"),)) if s.kind == "quantize" else s,
    lambda s: dataclasses.replace(s, target_bytes=None) if s.kind == "quantize" else s,
    lambda s: dataclasses.replace(s, target_bytes=0) if s.kind == "quantize" else s,
    lambda s: dataclasses.replace(s, sensitivity="elsewhere") if s.kind == "quantize" else s,
    lambda s: dataclasses.replace(s, calibration=None) if s.kind == "imatrix" else s,
    lambda s: dataclasses.replace(s, probes=0) if s.kind == "sensitivity" else s,
    lambda s: dataclasses.replace(s, gpu_layers=-1) if s.kind == "sensitivity" else s,
]


@pytest.mark.parametrize("number", range(len(CHANGES)))
def test_a_tampered_plan_is_refused_although_its_hash_is_right(
    answer: Recommendation, tmp_path: Path, number: int
) -> None:
    plan = planned(answer, Wish(bits_per_weight=4.0))
    evil = dataclasses.replace(plan, steps=tuple(CHANGES[number](step) for step in plan.steps)).sealed()
    path = tmp_path / "plan.json"
    path.write_text(plan_text(evil))
    with pytest.raises(InputError) as caught:
        load_plan(path)
    assert caught.value.code == "bad-plan"


def test_a_matrix_can_be_had_for_any_type_or_ruled_out() -> None:
    auto = recommend("demo", Workload(context=512, methods=("gguf",))).decision
    found = [auto.chosen, *auto.alternatives]
    with_matrix = {c.variant.type for c in found if c is not None and c.variant.imatrix}
    assert {"IQ2_XXS", "Q2_K_S", "IQ3_M", "Q3_K_M"} <= with_matrix and not {"Q6_K", "Q8_0", "BF16"} & with_matrix
    on = recommend("demo", Workload(context=512, types=("Q6_K",), imatrix="on")).decision.chosen
    assert on is not None and on.variant.imatrix
    assert [s.kind for s in forecast(models.resolve("demo"), on.variant, answer_hardware())][1] == "imatrix"
    off = recommend("demo", Workload(context=512, types=("IQ2_XS",), imatrix="off")).decision
    assert off.chosen is None and off.rejected[0].rule == "needs-imatrix"


def answer_hardware() -> HardwareProfile:
    from planner.workflow.survey import survey

    return survey()


def test_a_matrix_of_ones_own_is_pinned_and_its_change_is_seen(qplan: Qplan, tmp_path: Path) -> None:
    import numpy as np

    from planner.formats.imatrix import Importance, ImportanceMatrix, write_imatrix

    mine = tmp_path / "mine.gguf"
    entry = Importance(sums=np.ones((1, 256), dtype=np.float32), counts=np.array([512]))
    write_imatrix(mine, ImportanceMatrix(entries={"blk.0.attn_q.weight": entry}, chunk_count=1, chunk_size=512))
    asked = ("plan", "demo", "--context", "512", "--types", "Q4_K_M", "--imatrix")
    done = qplan(*asked, str(mine), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    step = next(step for step in load_plan(tmp_path / "plan.json").steps if step.kind == "imatrix")
    assert step.calibration is not None and step.calibration.kind == "imatrix"
    mine.write_bytes(mine.read_bytes() + b"x")
    stale = qplan("check", "plan.json", "--output", "out", cwd=tmp_path)
    assert stale.returncode == 4 and "calibration-changed" in stale.stderr
    missing = qplan(*asked, str(tmp_path / "none.gguf"), "-o", "other.json", cwd=tmp_path)
    assert missing.returncode == 1 and "bad-text" in missing.stderr and not (tmp_path / "other.json").exists()


def test_a_mixture_fills_the_memory_that_a_run_may_take() -> None:
    answer = recommend("llama-2-13b", Workload(context=4096), profile="rtx-4090")
    candidate, target = mixture(answer, Wish(memory_bytes=10 * GIB))
    device = candidate.estimate.memory.devices[0]
    assert 0.99 * 10 * GIB < device.needed_bytes <= 10 * GIB
    assert candidate.estimate.size.file_bytes <= target
    assert candidate.placement.gpu_layers == answer.model.offloadable_count
    quality = candidate.estimate.quality.perplexity_ratio
    assert quality is not None and quality.low <= quality.value <= quality.high
    with pytest.raises(DoesNotFit):
        mixture(answer, Wish(memory_bytes=GIB))


def test_a_limit_that_falls_between_types_gets_a_word() -> None:
    between = recommend("llama-2-13b", Workload(max_memory_bytes=9 * GIB, methods=("gguf",)), profile="rtx-4090")
    told = [note for note in between.notes if "with a mixture of types" in note]
    used = between.decision.chosen.estimate.memory.devices[0].needed_bytes if between.decision.chosen else 0
    assert bool(told) == (used < 0.92 * 9 * GIB)
    free = recommend("llama-2-13b", Workload(), profile="rtx-4090")
    assert not any("with a mixture of types" in note for note in free.notes)


def test_a_limit_between_two_types_is_filled_unasked_and_a_type_of_ones_own_is_not(
    qplan: Qplan, tmp_path: Path
) -> None:
    options = ("--profile", "rtx-4090", "--methods", "gguf", "--max-memory", "9GiB", "--json")
    done = qplan("plan", "llama-2-13b", *options, "-o", "mixed.json", cwd=tmp_path)
    assert done.returncode == 0 and "falls between two types" in done.stderr, done.stderr
    mixed = load_plan(tmp_path / "mixed.json")
    assert mixed.variant.recipe and mixed.estimate.memory.devices[0].needed_bytes <= 9 * GIB
    done = qplan("plan", "llama-2-13b", *options, "--types", "IQ3_XS", "-o", "own.json", cwd=tmp_path)
    assert done.returncode == 0 and "falls between" not in done.stderr, done.stderr
    own = load_plan(tmp_path / "own.json")
    assert not own.variant.recipe
    assert own.estimate.memory.devices[0].needed_bytes < mixed.estimate.memory.devices[0].needed_bytes


def mixture_in(answer: Recommendation) -> Candidate | None:
    chosen = answer.decision.chosen
    ranked = (chosen, *answer.decision.alternatives) if chosen else ()
    return next((candidate for candidate in ranked if candidate.variant.recipe), None)


def test_memory_between_two_types_has_a_mixture_among_the_candidates() -> None:
    """It fills the limit, its loss lies between its neighbours' with a wider range, and it is chosen as it wins."""
    workload = Workload(context=4096, max_memory_bytes=9 * GIB, methods=("gguf",))
    answer = recommend("llama-2-13b", workload, profile="rtx-4090")
    chosen = answer.decision.chosen
    assert chosen is not None and chosen is mixture_in(answer)
    assert chosen.estimate.memory.devices[0].needed_bytes <= 9 * GIB
    assert chosen.reasons[0].startswith("mixture to ")
    ratio, bits = chosen.estimate.quality.perplexity_ratio, chosen.estimate.size.bits_per_weight
    types = [c for c in answer.decision.alternatives if c.variant.method == "gguf"]
    smaller = [c for c in types if c.estimate.size.bits_per_weight < bits]
    best = max(smaller, key=lambda c: c.estimate.size.bits_per_weight).estimate.quality.perplexity_ratio
    assert ratio is not None and best is not None and 1 < ratio.value < best.value
    assert ratio.high - ratio.low > best.high - best.low
    assert chosen.score is not None and all(chosen.score >= (c.score or 0.0) for c in types)
    found = frontier("llama-2-13b", workload, profile="rtx-4090")
    assert [point.chosen for point in found.points if point.candidate.variant.recipe] == [True]


@pytest.mark.parametrize("profile", ["rtx-4090", "rtx-4070-ti", "laptop-16gb"])
def test_a_mixture_in_the_machines_own_memory_leaves_the_margin_free(profile: str) -> None:
    for name in ("qwen3-30b-a3b", "qwen2.5-14b", "llama-3.1-8b"):
        found = mixture_in(recommend(name, Workload(), profile=profile))
        for device in () if found is None else found.estimate.memory.devices:
            assert device.needed_bytes <= (1 - 0.06) * (device.capacity_bytes or 0)


def test_no_mixture_is_proposed_that_cannot_be_made_here() -> None:
    """The 16-bit model must fit into memory, time and disk; and a type, or no matrix, may have been asked for."""
    asked = Workload(context=4096, max_memory_bytes=9 * GIB, methods=("gguf",))
    usual = recommend("llama-2-13b", asked, profile="rtx-4090")
    model, machine = usual.model, usual.hardware
    small = dataclasses.replace(machine.memory, available_bytes=16 * GIB, total_bytes=16 * GIB)
    (gpu,) = machine.gpus
    tight = dataclasses.replace(machine, memory=small)
    full = dataclasses.replace(machine, disk=Disk(path="/", free_bytes=GIB))
    assert mixture_in(recommend_for(model, machine, asked, simulated=True)) is not None
    for elsewhere in (tight, full):
        assert mixture_in(recommend_for(model, elsewhere, asked, simulated=True)) is None
    assert gpu.usable_bytes()
    for other in ({"types": ("Q4_K_M", "Q3_K_M")}, {"imatrix": "off"}, {"methods": ("awq",)}):
        wished = dataclasses.replace(asked, **other)  # type: ignore[arg-type]
        assert mixture_in(recommend_for(model, machine, wished, simulated=True)) is None
    assert mixture_in(recommend("13b", asked, profile="rtx-4090")) is None


def test_below_two_bits_there_are_types_of_one_bit_for_those_with_a_matrix() -> None:
    model = models.resolve("llama-2-13b")
    target = round(1.9 * model.parameter_count / 8)
    variant = variant_of(model, target, imatrix=True)
    held = {type_ for _, type_ in variant.recipe}
    assert held & {"IQ1_S", "IQ1_M"} and 0.99 * target < gguf.size(model, variant).file_bytes <= target
    assert gguf_recipe.fault(variant.recipe) is None
    with pytest.raises(DoesNotFit):
        variant_of(model, target, imatrix=False)


def test_two_wishes_are_one_too_many(answer: Recommendation, qplan: Qplan, tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        mixture(answer, Wish(bits_per_weight=4.0, size_bytes=3 << 20))
    done = qplan("plan", "demo", "--target-bpw", "4", "--fit-memory", "1GiB", cwd=tmp_path)
    assert done.returncode == 2 and "exclude" in done.stderr and not list(tmp_path.iterdir())


def test_show_draws_the_recipe(answer: Recommendation, tmp_path: Path, qplan: Qplan) -> None:
    path = tmp_path / "plan.json"
    path.write_text(plan_text(planned(answer, Wish(bits_per_weight=4.0))))
    done = qplan("show", str(path))
    assert done.returncode == 0, done.stderr
    rows = {
        line.split()[0]: line.split() for line in done.stdout.splitlines() if line.startswith(("attn", "ffn", "out"))
    }
    assert set(rows) >= {"attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down", "output"}
    assert len(rows["attn_v"][1]) == 6 and 2 < float(rows["attn_v"][2]) < 9


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "QPLAN_HOME": str(folder / "home"), "PYTHONPATH": str(Path(__file__).parent.parent)}
    command = [sys.executable, "-m", "planner.cli", *arguments]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600, check=False
    )


PROSE = str(data_path("calibration/prose.txt"))
FEW = ("--calibration", PROSE, "--calibration-chunks", "16", "--seed", "4")
"""A text of the kind that the demo model was trained on."""


@pytest.fixture(scope="module")
def applied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture of the demo model of the size of Q3_K_M, made and measured once."""
    folder = tmp_path_factory.mktemp("mixture")
    size = gguf.size(models.resolve("demo"), gguf.variant("Q3_K_M")).file_bytes
    planned = run(folder, "plan", "demo", "--context", "512", "--target-size", str(size), *FEW, "-o", "plan.json")
    assert planned.returncode == 0, planned.stderr
    done = run(folder, "apply", "plan.json", "--output", "out", "--seconds", "20")
    assert done.returncode in {0, 5}, done.stderr
    return folder


@pytest.mark.slow
def test_one_pass_with_the_recipe_and_the_matrix_makes_the_same_file(applied: Path) -> None:
    made = applied / "out" / load_plan(applied / "plan.json").artifact
    matrix = next((applied / "out").glob("*.imatrix.gguf"))
    again = applied / "again.gguf"
    options = ("--recipe", "out/report.json", "--imatrix", str(matrix), "-o", str(again))
    done = run(applied, "quantize", "demo", *options)
    assert done.returncode == 0, done.stderr
    assert again.read_bytes() == made.read_bytes()


def test_a_recipe_that_is_none_is_refused(tmp_path: Path, qplan: Qplan) -> None:
    path = tmp_path / "recipe.json"
    for text in ("[]", "{}", '{"blk.0.attn_q.weight": 3}', '{"blk.0.attn_q.weight": "F99"}', '{"a b": "Q4_K"}'):
        path.write_text(text)
        done = qplan("quantize", str(data_path("demo/model")), "--recipe", str(path), "-o", str(tmp_path / "f.gguf"))
        assert done.returncode == 1 and "bad-recipe" in done.stderr and "Traceback" not in done.stderr, done.stderr
    both = qplan("quantize", "demo", "--recipe", str(path), "--types", "Q4_0", "-o", str(tmp_path / "f.gguf"))
    assert both.returncode == 2 and list(tmp_path.iterdir()) == [path]


@pytest.mark.slow
def test_the_file_is_what_the_recipe_says_and_fills_the_target(applied: Path) -> None:
    from planner.formats.gguf import open_gguf

    report = json.loads((applied / "out" / "report.json").read_text())
    plan = load_plan(applied / "plan.json")
    target = plan.artifact_step().target_bytes
    made = applied / "out" / plan.artifact
    assert target is not None and 0.995 * target <= made.stat().st_size <= target
    stored = {tensor.name: tensor.type for tensor in open_gguf(made).tensors}
    recipe = report["recipe"]
    assert len(recipe) == 44 and len(set(recipe.values())) > 2
    assert {name: stored[name] for name in recipe} == recipe
    assert set(stored) - set(recipe) == {name for name in stored if name.endswith("norm.weight")}


@pytest.mark.slow
def test_the_receipts_say_with_what_was_measured(applied: Path) -> None:
    report = json.loads((applied / "out" / "report.json").read_text())
    steps = {step["step"]: step for step in report["steps"]}
    assert steps["imatrix"]["details"]["tokens"] == 16 * 512 and steps["imatrix"]["details"]["seed"] == 4
    assert len(steps["imatrix"]["details"]["text_sha256"]) == 64
    assert steps["sensitivity"]["details"]["probes"] == 44
    assert 0.8 < steps["sensitivity"]["details"]["additivity"] < 1.25
    names = {path.name for path in (applied / "out").iterdir()}
    assert {"demo.imatrix.gguf", "demo.sensitivity.json", "report.json"} < names
    shown = run(applied, "show", "out/report.json")
    assert "types as made" in shown.stdout


@pytest.mark.slow
def test_it_loses_less_than_the_standard_type_of_its_size(applied: Path, tmp_path: Path, demo_checkpoint: Path) -> None:
    """Q3_K_M with the same importance matrix, by the same measure."""
    from planner import convert
    from planner.core.candidate import Placement
    from planner.core.job import Job
    from planner.execute.process import run_child
    from planner.verify.run import run_trial
    from planner.verify.trial import QUALITY, TrialRequest

    full = tmp_path / "full.gguf"
    convert.convert_checkpoint(demo_checkpoint, full, out_type="bf16")
    standard = tmp_path / "standard.gguf"
    step = Step(name="quantize", kind="quantize", method="gguf", type="Q3_K_M")
    matrix = str(applied / "out" / "demo.imatrix.gguf")
    job = Job(step=step, source=str(full), output=str(standard), imatrix=matrix, threads=2)
    run_child("planner.execute.child", job, what="quantize", log=tmp_path / "log")
    plan = load_plan(applied / "plan.json")

    def divergence(path: Path) -> float:
        text = str(data_path("demo/heldout.txt"))
        asked = TrialRequest(
            kind=QUALITY, model_path=str(path), reference_path=str(full), text_path=text,
            placement=Placement(context=512, threads=2), repack=False, max_chunks=24,
        )  # fmt: skip
        trial = run_trial(asked).quality
        assert trial is not None and trial.comparison is not None
        return trial.comparison.kl_mean_nats

    mine, theirs = applied / "out" / plan.artifact, standard
    assert mine.stat().st_size <= 1.003 * theirs.stat().st_size  # the target rests on an estimate of the metadata
    assert divergence(mine) < 0.95 * divergence(theirs)


@pytest.mark.slow
def test_another_size_takes_the_same_measurements_and_a_rerun_the_same_bytes(applied: Path) -> None:
    from planner.models.fingerprint import sha256_of

    before = sha256_of(applied / "out" / load_plan(applied / "plan.json").artifact)
    run(applied, "plan", "demo", "--context", "512", "--target-bpw", "5", *FEW, "-o", "other.json")
    done = run(applied, "apply", "other.json", "--output", "out2", "--seconds", "5")
    assert done.returncode in {0, 5}, done.stderr
    for name in ("demo.imatrix.gguf", "demo.sensitivity.json"):
        assert sha256_of(applied / "out" / name) == sha256_of(applied / "out2" / name), name
    (applied / "out2" / "report.json").unlink()
    again = run(applied, "apply", "plan.json", "--output", "out2", "--seconds", "5")
    assert again.returncode in {0, 5}, again.stderr
    assert "demo.imatrix.gguf" in again.stderr and "is there already" in again.stderr
    assert sha256_of(applied / "out2" / load_plan(applied / "plan.json").artifact) == before
