"""``qplan quality``: llama.cpp and transformers on the same windows, and what is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from planner.core.data import data_path
from planner.core.errors import InputError, MissingDependency
from planner.workflow.quality import QualityOptions, checkpoint_variant, measure, published
from tests import verify_fixtures as fixtures
from tests.conftest import Qplan


@pytest.fixture(scope="session")
def demo_gguf(tmp_path_factory: pytest.TempPathFactory, demo_checkpoint: Path) -> dict[str, Path]:
    """The demo model as F16 and Q8_0, by qplan's own converter and llama.cpp's quantizer."""
    pytest.importorskip("llama_cpp")
    from planner.convert.write import convert_checkpoint

    folder = tmp_path_factory.mktemp("demo-gguf")
    convert_checkpoint(demo_checkpoint, folder / "f16.gguf", out_type="f16")
    fixtures.quantize(folder / "f16.gguf", folder / "q8.gguf", "Q8_0")
    return {"f16": folder / "f16.gguf", "q8": folder / "q8.gguf"}


@pytest.mark.slow
def test_transformers_and_llama_cpp_score_alike(demo_gguf: dict[str, Path]) -> None:
    """The checkpoint in float32 against its F16 file: the same text, windows, statistics."""
    pytest.importorskip("torch")
    found = measure(demo_gguf["f16"], QualityOptions(reference="demo", chunks=3))
    comparison = found.quality.comparison
    assert comparison is not None and found.quality.chunk_count == 3
    assert comparison.reference.value == pytest.approx(found.quality.perplexity.value, rel=2e-3)
    assert 0 <= comparison.kl_mean_nats < 2e-4 and comparison.same_top_fraction > 0.99
    there = measure(Path(data_path("demo/model")), QualityOptions(reference=str(demo_gguf["f16"]), chunks=3))
    other = there.quality.comparison
    assert other is not None and there.trial.tool_version.startswith("transformers")
    assert other.log_ratio == pytest.approx(-comparison.log_ratio, abs=1e-5)


@pytest.mark.slow
def test_a_measurement_is_printed_and_remembered(qplan: Qplan, demo_gguf: dict[str, Path]) -> None:
    arguments = ("quality", str(demo_gguf["q8"]), "--reference", str(demo_gguf["f16"]), "--chunks", "4")
    run = qplan(*arguments, "--json")
    assert run.returncode == 0, run.stderr
    answer = json.loads(run.stdout)
    comparison = answer["comparison"]
    assert (answer["method"], answer["type"], answer["chunk_count"]) == ("gguf", "Q8_0", 4)
    assert answer["perplexity_ratio"] == pytest.approx(1, abs=0.01)
    assert comparison["kl_quantile_99_nats"] > comparison["kl_mean_nats"] > 0
    assert comparison["same_top_fraction"] > 0.97 and comparison["same_top_standard_error"] > 0
    assert answer["perplexity"]["standard_error"] > 0 and answer["token_count"] == 4 * 255
    assert answer["remembered"] == ["perplexity_ratio", "kl_divergence_nats"]
    assert answer["predicted"]["perplexity_ratio"]["low"] < answer["predicted"]["perplexity_ratio"]["high"]
    again = json.loads(qplan("estimate", str(demo_gguf["f16"]), "--type", "Q8_0", "--json").stdout)
    assert again["quality"]["basis"] == "measured"
    assert again["quality"]["perplexity_ratio"] == pytest.approx(answer["perplexity_ratio"], rel=1e-5)
    shown = qplan(*arguments)
    assert shown.returncode == 0 and "same top token" in shown.stdout and "99 %" in shown.stdout


@pytest.mark.slow
def test_a_checkpoint_that_bitsandbytes_quantized(tmp_path: Path, demo_checkpoint: Path) -> None:
    """NF4 through transformers' own loading, on a CPU, against the checkpoint it was made from."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("accelerate")
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(demo_checkpoint, quantization_config=how, device_map="cpu")
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(demo_checkpoint).save_pretrained(tmp_path)
    found = measure(tmp_path, QualityOptions(reference="demo", chunks=2))
    assert found.variant is not None and found.variant.label() == "bitsandbytes nf4"
    comparison = found.quality.comparison
    assert comparison is not None and 0.001 < comparison.kl_mean_nats < 0.1
    assert 0.85 < comparison.same_top_fraction < 1


@pytest.mark.slow
def test_another_models_tokens_are_refused(tmp_path: Path, demo_gguf: dict[str, Path]) -> None:
    alien = fixtures.write_tiny_llama(tmp_path / "tiny.gguf")
    with pytest.raises(InputError) as refused:
        measure(demo_gguf["q8"], QualityOptions(reference=str(alien), chunks=2))
    assert refused.value.code == "other-vocabulary"


def test_tasks_without_the_harness_say_how_to_get_it(demo_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingDependency) as refused:
        measure(demo_checkpoint, QualityOptions(tasks=("hellaswag",)))
    assert "lm-eval" in refused.value.hint


TASK = """task: endings
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{q}}}}"
doc_to_target: "{{{{gold}}}}"
doc_to_choice: "{{{{a}}}}"
target_delimiter: ""
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


@pytest.mark.slow
def test_a_task_of_ones_own(tmp_path: Path, demo_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    questions = [("The sun rises in the", [" east", " spoon"], 0), ("It was a dark and stormy", [" of", " night"], 1)]
    lines = (json.dumps({"q": q, "a": a, "gold": gold}) for q, a, gold in questions)
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    (tmp_path / "endings.yaml").write_text(TASK.format(data=tmp_path / "data.jsonl"))
    options = QualityOptions(chunks=2, tasks=("endings",), task_folder=tmp_path)
    found = measure(demo_checkpoint, options).tasks
    assert found is not None
    assert [(score.task, score.metric) for score in found.scores] == [("endings", "acc")]
    assert found.scores[0].value in (0.0, 0.5, 1.0)


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        ((), "usage"),
        (("nothing.gguf",), None),
        (("empty",), "not-a-model"),
        (("{demo}", "--reference", "llama-2-7b"), "no-weights"),
        (("{demo}", "--reference", "no-such-model"), None),
        (("{demo}", "--text", "missing.txt"), "bad-text"),
        (("--table", "smollm2-135m"), "nothing-published"),
    ],
)
def test_bad_input_is_refused(qplan: Qplan, tmp_path: Path, arguments: tuple[str, ...], code: str | None) -> None:
    (tmp_path / "empty").mkdir()
    given = [a.replace("{demo}", str(data_path("demo/model"))) for a in arguments]
    run = qplan("quality", *given, "--json", cwd=tmp_path)
    assert run.returncode in (1, 2) and "Traceback" not in run.stderr
    error = json.loads(run.stdout)["error"]
    assert error["message"] and (code is None or error["code"] == code)


def test_the_published_table_shows_what_was_set_aside_and_why() -> None:
    rows = published("llama-13b")
    by_status = {row["status"]: row for row in rows}
    assert {"used", "superseded", "confirmed"} <= set(by_status)
    assert "5.19" in by_status["superseded"]["notes"]
    assert all(row["source"] and row["date"] for row in rows)


@pytest.mark.parametrize(
    ("stated", "label"),
    [
        (None, "bf16"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": True}, "GPTQ 4bit g128"),
        ({"quant_method": "awq", "bits": 4, "group_size": 64}, "AWQ 4bit g64"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, "bitsandbytes fp4"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes int8"),
    ],
)
def test_a_checkpoints_variant_is_read_from_its_configuration(
    tmp_path: Path, stated: dict[str, object] | None, label: str
) -> None:
    config = {"model_type": "llama", "dtype": "bfloat16"} | ({} if stated is None else {"quantization_config": stated})
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert checkpoint_variant(tmp_path).label() == label


def test_an_unknown_quantization_has_no_variant(tmp_path: Path) -> None:
    config = {"model_type": "llama", "quantization_config": {"quant_method": "hqq"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="hqq"):
        checkpoint_variant(tmp_path)
