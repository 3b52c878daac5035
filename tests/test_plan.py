"""Plans: written, shown, refused when edited, stale or from a stranger."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from planner.core.codec import content_sha256, encode
from planner.core.errors import DoesNotFit, InputError, QplanError, StalePlan, UsageError
from planner.core.plan import Plan, Settings
from planner.core.workload import Workload
from planner.methods import awq
from planner.workflow.planning import Measuring, check_hardware, load_plan, make_plan, plan_text
from planner.workflow.recommend import recommend
from planner.workflow.survey import survey
from tests.conftest import Qplan


@pytest.fixture(scope="module")
def plan() -> Plan:
    return make_plan(recommend("demo", Workload(context=512, types=("Q4_K_M",))))


def written(tmp_path: Path, plan: Plan) -> Path:
    path = tmp_path / "plan.json"
    path.write_text(plan_text(plan))
    return path


def test_a_plan_survives_its_file(tmp_path: Path, plan: Plan) -> None:
    assert load_plan(written(tmp_path, plan)) == plan


def test_a_plan_holds_no_command_line_and_pins_the_model(plan: Plan) -> None:
    assert {step.kind for step in plan.steps} == {"quantize", "verify"}
    assert {step.source for step in plan.steps if step.kind == "quantize"} == {"model"}
    assert all(set(encode(step)) & {"command", "argv", "shell"} == set() for step in plan.steps)
    weights = next(file for file in plan.model.files if file.name.endswith(".safetensors"))
    assert weights.sha256 is not None and len(weights.sha256) == 64


def test_every_expectation_has_a_range_a_basis_and_a_source(plan: Plan) -> None:
    assert {e.quantity for e in plan.expectations} >= {"file_bytes", "peak_memory_bytes", "decode_tokens_per_second"}
    for item in plan.expectations:
        assert item.low <= item.predicted <= item.high and item.low < item.high
        assert item.basis and item.source


@pytest.mark.parametrize(
    ("key", "value"), [("artifact", "other.gguf"), ("created_at", "2020-01-01T00:00:00+00:00"), ("reasons", [])]
)
def test_an_edited_plan_is_stale(tmp_path: Path, plan: Plan, key: str, value: object) -> None:
    document = {**encode(plan), key: value}
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(document))
    with pytest.raises(StalePlan) as caught:
        load_plan(path)
    assert caught.value.code == "plan-edited" and caught.value.exit_code == 4


@pytest.mark.parametrize("name", ["../evil.gguf", "/etc/passwd", "a/b.gguf", ".hidden", "..", "a\\b"])
def test_a_plan_that_writes_elsewhere_is_refused_although_its_hash_is_right(
    tmp_path: Path, plan: Plan, name: str
) -> None:
    steps = tuple(dataclasses.replace(s, output=name) if s.name == "quantize" else s for s in plan.steps)
    evil = dataclasses.replace(plan, steps=steps, artifact=name).sealed()
    with pytest.raises(InputError) as caught:
        load_plan(written(tmp_path, evil))
    assert caught.value.code == "bad-plan"


def test_a_plan_with_an_unknown_key_or_kind_is_refused(tmp_path: Path, plan: Plan) -> None:
    document = encode(plan)
    document["run"] = "rm -rf /"
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(document))
    with pytest.raises(StalePlan):
        load_plan(path)
    document["content_sha256"] = content_sha256({**document, "content_sha256": ""})
    path.write_text(json.dumps(document))
    with pytest.raises(InputError) as caught:
        load_plan(path)
    assert "run" in caught.value.numbers
    odd = dataclasses.replace(plan, steps=(dataclasses.replace(plan.steps[0], kind="shell"), *plan.steps[1:])).sealed()
    with pytest.raises(InputError):
        load_plan(written(tmp_path, odd))


def test_a_plan_of_another_format_is_stale(tmp_path: Path, plan: Plan) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({**encode(plan), "format_version": "9.0"}))
    with pytest.raises(StalePlan) as caught:
        load_plan(path)
    assert caught.value.code == "plan-version"


def test_a_plan_for_another_machine_says_what_differs(plan: Plan) -> None:
    with pytest.raises(StalePlan) as caught:
        check_hardware(plan, survey("rtx-4090"))
    assert caught.value.code == "other-machine"
    assert "cpu: planned for" in caught.value.numbers and "gpus: planned for" in caught.value.numbers


def test_a_bare_size_and_a_method_without_executor_make_no_plan() -> None:
    with pytest.raises(UsageError) as caught:
        make_plan(recommend("7b", Workload(context=512), profile="rtx-4090"))
    assert caught.value.code == "no-weights"
    answer = recommend("llama-2-7b", Workload(context=512, methods=("awq",)), profile="rtx-4090")
    chosen = answer.decision.chosen
    assert chosen is not None
    with pytest.raises(UsageError) as caught:
        make_plan(answer, dataclasses.replace(chosen, variant=awq.variant("3bit")))
    assert caught.value.code == "not-executable"


@pytest.fixture(scope="module")
def gptq_plan() -> Plan:
    return make_plan(recommend("llama-2-7b", Workload(context=512, methods=("gptq",)), profile="rtx-4090"))


def test_a_plan_for_gptq_says_who_makes_it_with_which_text(tmp_path: Path, gptq_plan: Plan) -> None:
    step = gptq_plan.artifact_step()
    assert step.settings is not None and step.settings.quantizer == "gptqmodel" and step.gpu_layers > 0
    assert step.calibration is not None and step.calibration.kind == "built-in" and step.calibration.chunks == 128
    assert gptq_plan.tools == {"gptqmodel": "7.6.0"}
    assert any("GPTQModel" in reason for reason in gptq_plan.reasons)
    assert load_plan(written(tmp_path, gptq_plan)) == gptq_plan


@pytest.mark.parametrize(
    "change",
    [
        {"settings": None},
        {"calibration": None},
        {"type": "5bit"},
        {"settings": Settings(quantizer="autoawq", format="gptq")},
        {"settings": Settings(quantizer="gptqmodel", format="pickle")},
        {"settings": Settings(quantizer="gptqmodel", format="gptq", compute_dtype="__import__")},
    ],
)
def test_a_step_that_no_quantizer_makes_is_refused(tmp_path: Path, gptq_plan: Plan, change: dict[str, object]) -> None:
    steps = tuple(
        dataclasses.replace(s, **change) if s.name == "quantize" else s
        for s in gptq_plan.steps  # type: ignore[arg-type]
    )
    evil = dataclasses.replace(gptq_plan, steps=steps).sealed()
    with pytest.raises(InputError) as caught:
        load_plan(written(tmp_path, evil))
    assert caught.value.code == "bad-plan"


def test_an_importance_matrix_is_no_text_for_gptq(tmp_path: Path) -> None:
    answer = recommend("llama-2-7b", Workload(context=512, methods=("gptq",)), profile="rtx-4090")
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    with pytest.raises(UsageError) as caught:
        make_plan(answer, None, Measuring(calibration=tmp_path / "m.gguf"))
    assert caught.value.code == "no-matrix"


def test_nothing_fits_is_an_error_with_a_hint() -> None:
    with pytest.raises(DoesNotFit) as caught:
        make_plan(recommend("llama-2-70b", Workload(), profile="raspberry-pi-5-8gb"))
    assert caught.value.exit_code == 3 and caught.value.hint


def test_show_and_check_read_a_plan(qplan: Qplan, tmp_path: Path, plan: Plan) -> None:
    path = written(tmp_path, plan)
    shown = qplan("show", str(path))
    assert shown.returncode == 0 and "demo-Q4_K_M.gguf" in shown.stdout and "95 % range" in shown.stdout
    checked = qplan("check", str(path), "--output", str(tmp_path / "out"))
    assert checked.returncode == 0, checked.stderr


def test_check_refuses_a_plan_whose_model_changed(tmp_path: Path, demo_checkpoint: Path) -> None:
    import shutil

    from planner.workflow.applying import check

    copy = tmp_path / "model"
    shutil.copytree(demo_checkpoint, copy)
    plan = make_plan(recommend(str(copy), Workload(context=512, types=("Q4_K_M",))))
    weights = copy / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(QplanError) as caught:
        check(plan, tmp_path / "out")
    assert caught.value.code == "model-changed" and caught.value.exit_code == 4
