"""The command line against wrong input: a clear error, the right exit code, nothing lost and nothing half-written."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from planner.cli import run
from planner.core.codec import read_json, write_atomically
from planner.core.errors import InputError
from planner.core.workload import Workload
from planner.execute import preflight
from planner.workflow import applying
from planner.workflow.estimates import KEYS, estimate_batch, estimate_file
from planner.workflow.planning import make_plan, plan_text
from planner.workflow.recommend import recommend
from tests.conftest import Qplan, hear_ctrl_c

ROOT = Path(__file__).parent.parent


def failure(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any]]:
    """The exit code of a command that fails, and its error as JSON: the only document on stdout."""
    code = run([*arguments, "--json"])
    document = json.loads(capsys.readouterr().out)
    assert next(iter(document)) == "format_version"
    return code, document["error"]


@pytest.mark.parametrize(
    ("arguments", "code", "name"),
    [
        (["recommend"], 2, "usage"),
        (["recommend", "demo", "--threads", "0"], 2, "usage"),
        (["recommend", "demo", "--max-memory", "0"], 2, "usage"),
        (["recommend", "demo", "--min-decode", "nan"], 2, "usage"),
        (["recommend", "demo", "--min-decode", "inf"], 2, "usage"),
        (["recommend", "demo", "--max-memory", "9" * 400 + "GiB"], 2, "bad-size"),
        (["recommend", "demo", "--types", "Q99"], 2, "unknown-type"),
        (["recommend", "phi-2", "--profile", "rtx-4090", "--kv-type", "q8_0"], 1, "row-not-divisible"),
        (["estimate", "llama-2-7b", "--method", "awq", "--group-size", "7"], 2, "bad-case"),
        (["estimate", "llama-2-7b", "--device", "GeForce RTX 4090", "--device-count", "1000000000"], 2, "bad-case"),
        (["estimate", "--batch", "/no/such/file"], 1, "missing-file"),
        (["plan", "demo", "-o", "/proc/nowhere/plan.json"], 1, "unwritable-file"),
        (["apply", "~nobody-has-this-name/plan.json"], 2, "usage"),
        (["verify", "x.gguf", "--seconds", "nan"], 2, "usage"),
    ],
)
def test_every_error_is_one_json_document(
    capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, name: str
) -> None:
    found, error = failure(capsys, *arguments)
    assert (found, error["code"]) == (code, name)


def test_more_digits_than_python_reads_mean_all_layers(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["recommend", "demo", "--gpu-layers", "9" * 5000]) == 0


def test_an_empty_list_of_names_is_no_wish(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["recommend", "demo", "--types", ",", "--methods", " , "]) == 0


def test_a_kv_type_that_a_model_cannot_have_does_not_stop_its_recommendation() -> None:
    assert recommend("phi-2", Workload(context=2048), profile="rtx-4090").decision.chosen is not None


@pytest.mark.parametrize("text", ["[NaN]", "[Infinity]", "9" * 5000, "[" * 100_000, '["\\ud800"]', ""])
def test_what_json_does_not_allow_is_not_read(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        read_json(path)
    assert caught.value.code == "bad-json"


def test_a_byte_order_mark_is_skipped(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(b'\xef\xbb\xbf{"a": "\\ud83d\\ude00"}')
    assert read_json(path) == {"a": "😀"}


def test_writing_keeps_links_and_never_replaces_a_device(tmp_path: Path) -> None:
    target, link, pipe = tmp_path / "target", tmp_path / "link", tmp_path / "pipe"
    target.write_text("old")
    link.symlink_to(target)
    write_atomically(link, "new")
    assert link.is_symlink() and target.read_text() == "new"
    os.mkfifo(pipe)
    reader = subprocess.Popen(["cat", str(pipe)], stdout=subprocess.PIPE, text=True)
    write_atomically(pipe, "through")
    assert reader.communicate()[0] == "through" and stat.S_ISFIFO(pipe.stat().st_mode)


@pytest.mark.parametrize("name", [".", "file/x.json", "x" * 300])
def test_a_name_that_cannot_be_written_is_an_error(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("kept")
    with pytest.raises(InputError) as caught:
        write_atomically(tmp_path / name, "text")
    assert caught.value.code == "unwritable-file"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


BAD_LINES = [
    ("garbage", "bad-json"),
    ("[" * 5000, "bad-json"),
    ('{"model": "llama-2-7b", "context": NaN}', "bad-json"),
    ('{"model": "llama-2-7b", "context": ' + "9" * 5000 + "}", "bad-json"),
    ('{"model": "llama-2-7b", "context": 1e400}', "bad-case"),
    ('{"model": "llama-2-7b", "context": ' + "9" * 400 + "}", "bad-case"),
    ('{"model": "llama-2-7b", "flash_attention": []}', "bad-case"),
    ('{"model": "llama-2-7b", "imatrix": "no"}', "bad-case"),
    ('{"model": "llama-2-7b", "gpu_layers": -1}', "bad-case"),
    ('{"model": "llama-2-7b", "device": "GeForce RTX 4090", "device_count": 1000000000000}', "bad-case"),
    ('{"model": "phi-2", "kv_type": "q8_0", "device": "GeForce RTX 4090"}', "row-not-divisible"),
    ('{"model": "' + "x" * 1_000_000 + '"}', "unknown-model"),
    ('{"model": "llama-2-7b", "context": 4096, "depth": 4097, "device": "GeForce RTX 4090"}', "bad-case"),
    ('{"model": "llama-2-7b", "device": "GeForce RTX 4090", "backend": "metal"}', "backend-mismatch"),
]


@pytest.mark.parametrize(("line", "code"), BAD_LINES, ids=range(len(BAD_LINES)))
def test_a_bad_line_gets_its_error_and_the_rest_go_on(line: str, code: str) -> None:
    good = '{"id": "good", "model": "llama-2-7b", "device": "GeForce RTX 4090"}'
    answers = list(estimate_batch([line, "", good]))
    assert answers[0]["error"]["code"] == code and len(answers[0]["error"]["message"]) < 1000
    assert answers[1]["id"] == "good" and len(answers) == 2


def test_a_case_with_a_number_that_is_none_keeps_its_id() -> None:
    lines = ['{"id": 7, "model": "llama-2-7b", "context": NaN}', '{"id": -Infinity, "model": "llama-2-7b"}']
    first, second = estimate_batch(lines)
    assert first["id"] == 7 and "`context` is NaN" in first["error"]["message"]
    assert second["id"] is None and second["error"]["code"] == "bad-json"


def test_null_is_the_default_of_every_key() -> None:
    """Tables exported as JSON write null where a cell is empty."""
    plain = {"id": 1, "model": "llama-2-7b", "device": "GeForce RTX 4090"}
    nulls = dict.fromkeys(sorted(KEYS - {*plain, "params", "active_params"}))
    found = list(estimate_batch([json.dumps(plain), json.dumps({**nulls, **plain})]))
    assert "error" not in found[0] and found[1] == found[0]


def test_a_backend_that_the_profile_does_not_have_is_refused() -> None:
    lines = [
        json.dumps({"model": "demo", "profile": "m2-pro-16gb", "backend": name}) for name in ("cuda", "metal", "cpu")
    ]
    refused, metal, cpu = estimate_batch(lines)
    assert refused["error"]["code"] == "backend-mismatch" and "metal" in refused["error"]["message"]
    assert metal["memory"]["devices"] and not cpu["memory"]["devices"]


def test_what_is_explained_unasked_is_what_is_recommended(qplan: Qplan) -> None:
    explained = qplan("explain", "llama-2-13b", "--type", "Q5_K_M", "--profile", "rtx-4090").stdout
    chosen = json.loads(qplan("recommend", "llama-2-13b", "--profile", "rtx-4090", "--json").stdout)["chosen"]
    assert f"context  {chosen['context']}," in explained and chosen["type"] == "Q5_K_M"
    beyond = qplan("estimate", "llama-2-13b", "--profile", "rtx-4090").stdout
    assert "context  8192" in beyond and "was trained with 4096 tokens of context" in beyond


def test_an_unasked_context_holds_the_depth() -> None:
    lines = [f'{{"model": "llama-2-7b", "device": "GeForce RTX 4090", "depth": {depth}}}' for depth in (0, 4096, 20000)]
    caches = [answer["memory"]["devices"][0]["kv_cache_bytes"] for answer in estimate_batch(lines)]
    assert caches[0] == caches[1] < caches[2]


def test_a_file_is_answered_in_the_order_of_its_lines() -> None:
    names = ("llama-2-7b", "mistral-7b-v0.3", "llama-2-7b", "nonesuch")
    lines = [
        json.dumps({"id": (i, name, type_), "model": name, "type": type_, "device": "GeForce RTX 4090"})
        for i, name in enumerate(names)
        for type_ in ("Q8_0", "Q4_K_M")
    ]
    assert list(estimate_file(lines)) == list(estimate_batch(lines))


def test_lines_that_are_no_utf8_and_a_missing_last_newline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases = tmp_path / "cases.jsonl"
    good = b'{"id": "\xc3\xbc", "model": "llama-2-7b", "device": "GeForce RTX 4090"}'
    cases.write_bytes(b"\xef\xbb\xbf" + good + b"\r\n\xff\xfe{}\n" + good)
    assert run(["estimate", "--batch", str(cases)]) == 1
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert ["error" in answer for answer in answers] == [False, True, False]
    assert answers[0]["id"] == "ü"


def test_the_reader_may_go_away(tmp_path: Path) -> None:
    for command in ("models", "recommend llama-2-7b"):
        line = f"set -o pipefail; {sys.executable} -m planner.cli {command} | head -1"
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(["bash", "-c", line], env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0 and done.stderr == ""


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="no /dev/full")
def test_a_full_disk_behind_stdout_is_an_error() -> None:
    command = [sys.executable, "-m", "planner.cli", "models"]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            command, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=full, stderr=-1, text=True, check=False
        )
    assert done.returncode == 1 and "No space left" in done.stderr and "Traceback" not in done.stderr


def test_a_terminal_that_is_not_utf8_gets_escapes_and_json_stays_utf8(qplan: Qplan) -> None:
    ascii_only = {"PYTHONIOENCODING": "ascii"}
    assert qplan("recommend", "demo", **ascii_only).returncode == 0
    done = qplan("recommend", "demo", "--json", **ascii_only)
    assert json.loads(done.stdout)["chosen"]


@pytest.fixture(scope="module")
def plan_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    path.write_text(plan_text(make_plan(recommend("demo", Workload(context=512, types=("Q4_K_M",))))))
    return path


def test_a_plan_for_another_machine_makes_no_folder_and_no_environment(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workload = Workload(context=512, methods=("gptq",), types=("4bit",))
    path = tmp_path / "plan.json"
    path.write_text(plan_text(make_plan(recommend("demo", workload, profile="rtx-4090"))))

    def prepared(*_: object, **__: object) -> None:
        pytest.fail("an environment is prepared for a plan that is refused")

    monkeypatch.setattr(applying.environments, "prepare", prepared)
    code, error = failure(capsys, "apply", str(path), "--output", str(tmp_path / "out"))
    assert (code, error["code"]) == (4, "other-machine")
    assert [entry.name for entry in tmp_path.iterdir()] == ["plan.json"]


@pytest.mark.parametrize("below", ["", "sub"])
def test_a_file_in_place_of_the_output_folder(
    capsys: pytest.CaptureFixture[str], plan_file: Path, tmp_path: Path, below: str
) -> None:
    (tmp_path / "file").write_text("kept")
    for verb in ("check", "apply"):
        code, error = failure(capsys, verb, str(plan_file), "--output", str(tmp_path / "file" / below))
        assert (code, error["code"]) == (1, "output-not-writable")


def test_a_report_or_a_folder_of_somebody_else_is_not_replaced(
    capsys: pytest.CaptureFixture[str], plan_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "report.json").write_text("mine")
    code, error = failure(capsys, "apply", str(plan_file), "--output", str(tmp_path))
    assert (code, error["code"]) == (1, "output-exists") and (tmp_path / "report.json").read_text() == "mine"
    (tmp_path / "other" / "demo-Q4_K_M.gguf").mkdir(parents=True)
    code, error = failure(capsys, "apply", str(plan_file), "--output", str(tmp_path / "other"))
    assert (code, error["code"]) == (1, "output-exists")


def test_a_missing_text_is_said_before_anything_is_made(
    capsys: pytest.CaptureFixture[str], plan_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    code, error = failure(capsys, "apply", str(plan_file), "--output", str(out), "--text", str(tmp_path / "none.txt"))
    assert (code, error["code"]) == (1, "bad-text") and not out.exists()


def test_every_hand_edit_of_a_value_is_noticed(
    capsys: pytest.CaptureFixture[str], plan_file: Path, tmp_path: Path
) -> None:
    original = json.loads(plan_file.read_text())
    edited = tmp_path / "edited.json"
    for key, value in original.items():
        changed = f"{value}x" if isinstance(value, str) else []
        edited.write_text(json.dumps({**original, key: changed}))
        code, error = failure(capsys, "check", str(edited))
        assert code in {1, 4} and error["code"] in {"plan-edited", "plan-version", "bad-document"}, key


@pytest.mark.slow
def test_a_disk_that_fills_up_in_the_middle(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, plan_file: Path, small_disk: Path
) -> None:
    monkeypatch.setattr(preflight, "check_room", lambda *_: None)
    code, error = failure(capsys, "apply", str(plan_file), "--output", str(small_disk))
    assert (code, error["code"]) == (1, "no-space") and "free" in error["numbers"]
    assert {path.name for path in small_disk.iterdir()} == {".qplan"}


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0.0, 0.3, 0.5, 0.7, 1.2])
def test_ctrl_c_leaves_no_partial_file(plan_file: Path, tmp_path: Path, delay: float) -> None:
    command = [sys.executable, "-m", "planner.cli", "apply", str(plan_file), "--output", str(tmp_path), "--json"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=environment, stderr=-1, stdout=-1, text=True, preexec_fn=hear_ctrl_c)
    while not any(tmp_path.iterdir()) and process.poll() is None:
        time.sleep(0.01)  # before it has begun, the interpreter itself would be interrupted
    time.sleep(delay)
    process.send_signal(signal.SIGINT)
    answer, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in errors
    assert json.loads(answer)["error"]["code"] == "interrupted"
    assert not list(tmp_path.glob(".*.partial")) and not list(tmp_path.glob("*.partial"))


def test_ctrl_c_inside_an_executed_string_has_the_exit_code_of_any_other(tmp_path: Path) -> None:
    text = "import os, signal; os.kill(os.getpid(), signal.SIGINT); [number for number in range(9)]"
    program = f"import planner.cli as it\nit.cli.main = lambda **_: exec({text!r})\nit.main([])\n"
    (tmp_path / "interrupted.py").write_text(program)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "interrupted"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, preexec_fn=hear_ctrl_c)
    assert (done.returncode, done.stderr.split()) == (130, [b"interrupted"])


def test_plan_replaces_a_plan_and_nothing_else(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    wanted = ["plan", "demo", "--context", "512", "-o"]
    (tmp_path / "weights.safetensors").write_bytes(b"precious")
    code, error = failure(capsys, *wanted, str(tmp_path / "weights.safetensors"))
    assert (code, error["code"]) == (1, "output-exists")
    assert (tmp_path / "weights.safetensors").read_bytes() == b"precious"
    assert [run([*wanted, str(tmp_path / "plan.json")]) for _ in range(2)] == [0, 0]
