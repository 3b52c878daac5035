"""The command line as its user meets it: answers, errors, exit codes, start-up."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from planner.cli import VERBS
from tests.conftest import Qplan

HEAVY = {
    "numpy",
    "torch",
    "transformers",
    "pandas",
    "gguf",
    "llama_cpp",
    "huggingface_hub",
    "textual",
    "pynvml",
    "jinja2",
}


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(qplan: Qplan, verb: str) -> None:
    done = qplan(verb, "--help")
    assert done.returncode == 0 and done.stdout.startswith("Usage:") and done.stderr == ""


def test_help_lists_every_verb(qplan: Qplan) -> None:
    text = qplan("--help").stdout
    assert all(verb in text for verb in VERBS)


@pytest.mark.parametrize(
    "arguments",
    [
        ["recommend", "llama-2-13b"],
        ["estimate", "llama-2-13b", "--json"],
        ["recommend", "llama-2-13b", "--profile", "rtx-4090", "--json"],
        ["frontier", "llama-2-13b", "--profile", "rtx-4090"],
        ["quality", "--table", "llama-2-7b"],
        ["--help"],
    ],
)
def test_planning_imports_nothing_heavy(arguments: list[str]) -> None:
    program = (
        "import sys; from planner.cli import run; code = run(sys.argv[1:]);"
        f"print('LOADED', sorted({HEAVY!r} & set(sys.modules)), file=sys.stderr); sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent.parent,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "LOADED []" in done.stderr


def test_recommend_answers_for_this_machine(qplan: Qplan) -> None:
    done = qplan("recommend", "tinyllama-1.1b")
    assert done.returncode == 0, done.stderr
    assert "Why" in done.stdout and "qplan plan" in done.stdout and "llama-server" in done.stdout


def test_recommend_as_json_keeps_the_contract(qplan: Qplan) -> None:
    document = json.loads(qplan("recommend", "llama-2-13b", "--profile", "rtx-4090", "--json").stdout)
    keys = ["format_version", "model", "hardware", "workload", "chosen", "alternatives", "rejected", "trace"]
    assert list(document)[: len(keys)] == keys
    candidate = document["chosen"]
    wanted = {"method", "format", "runtime", "type", "group_size", "bits_per_weight", "context", "kv_type"}
    wanted |= {"gpu_layers", "tensor_parallel", "memory", "speed", "quality", "file_bytes", "commands"}
    assert wanted <= set(candidate)
    assert {"quantize", "serve"} <= set(candidate["commands"])
    assert all({"method", "type", "reason", "needed", "available", "unit"} <= set(r) for r in document["rejected"])
    assert all(list(entry) == ["rule", "effect", "source"] for entry in document["trace"])


def test_an_unknown_model_gets_the_nearest_names(qplan: Qplan) -> None:
    done = qplan("recommend", "lama-2-13")
    assert done.returncode == 1 and done.stdout == ""
    assert "unknown-model" in done.stderr and "llama-2-13b" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["frobnicate"], 2),
        (["recommend"], 2),
        (["recommend", "llama-2-7b", "--context", "0"], 2),
        (["recommend", "llama-2-7b", "--max-memory", "much"], 2),
        (["recommend", "llama-2-7b", "--methods", "magic"], 2),
        (["recommend", "llama-2-7b", "--profile", "no-such-machine"], 2),
        (["recommend", "llama-2-70b", "--profile", "raspberry-pi-5-8gb"], 3),
        (["estimate", "llama-2-7b", "--type", "Q99"], 2),
        (["estimate", "llama-2-7b", "--device", "GeForce RTX 9999"], 2),
        (["show", "/no/such/plan.json"], 1),
        (["apply", "/no/such/plan.json"], 1),
        (["verify", "/no/such/model.gguf"], 1),
        (["plan", "14b"], 2),
    ],
)
def test_bad_input_gets_its_exit_code_and_no_traceback(
    qplan: Qplan, tmp_path: Path, arguments: list[str], code: int
) -> None:
    done = qplan(*arguments, cwd=tmp_path)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    assert list(tmp_path.iterdir()) == []


def test_an_error_is_a_document_too_where_json_was_asked_for(qplan: Qplan) -> None:
    done = qplan("recommend", "nonesuch-model", "--json")
    assert json.loads(done.stdout)["error"]["code"] == "unknown-model"
    assert "error:" in done.stderr


def test_a_batch_answers_in_order_and_goes_on_after_a_bad_line(qplan: Qplan, tmp_path: Path) -> None:
    cases = tmp_path / "cases.jsonl"
    lines = [
        json.dumps({"id": 1, "model": "llama-2-7b", "type": "Q4_K_M", "device": "GeForce RTX 4090"}),
        "not json",
        json.dumps({"id": 3, "model": "llama-2-7b", "surprise": 1}),
        json.dumps({"id": 4, "params": 7e9, "method": "awq", "device": "GeForce RTX 4090", "group_size": -1}),
        json.dumps([1]),
        json.dumps({"id": 6, "model": "llama-2-7b", "context": "long"}),
    ]
    cases.write_text("\n".join(lines))
    done = qplan("estimate", "--batch", str(cases))
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 1
    assert [a["id"] for a in answers] == [1, None, 3, 4, None, 6]
    assert ["error" in a for a in answers] == [False, True, True, False, True, True]
    keys = {"format_version", "id", "model", "method", "type", "tensor_bytes", "file_bytes", "bits_per_weight"}
    assert keys | {"memory", "speed", "quality"} <= set(answers[0])


def test_colour_is_for_terminals_only(qplan: Qplan) -> None:
    assert "\x1b[" not in qplan("recommend", "tinyllama-1.1b").stdout


def test_progress_without_a_terminal_tells_rate_and_time_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from planner.cli import apply
    from planner.workflow import pace

    now = [0.0]
    monkeypatch.setattr(pace.time, "monotonic", lambda: now[0])
    with apply.Watching() as watching:
        tell = watching._task("quantize → x")
        for second in range(0, 100, 5):  # an earlier run had done half of the four GiB
            now[0] = float(second)
            tell((2 << 30) + second * (16 << 20), 4 << 30)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4 and lines[0] == "quantize → x"
    assert lines[1] == "quantize → x: 62%, 16.0 MiB/s, 1 min 38 s left"
