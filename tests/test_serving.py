"""Commands, manifests and snippets of a service, and the servers that are started for it."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from planner.core.candidate import Placement, Variant
from planner.core.codec import content_sha256
from planner.core.errors import Exit, InputError, QplanError, UsageError
from planner.methods import awq, bitsandbytes, gguf, gptq, none
from planner.runtimes import exports, kernels, snippets
from planner.runtimes.commands import command
from planner.runtimes.service import Service, server, servers, visible_gpus
from planner.serve import python_server
from planner.serve.run import check_port
from planner.workflow.planning import load_plan
from planner.workflow.serve_target import Options
from planner.workflow.serving import prepare
from planner.workflow.verifying import artifact_of
from tests.conftest import Qplan, hear_ctrl_c
from tests.verify_fixtures import write_tiny_llama

ON_CPU = Placement(context=4096, threads=8)
ON_GPU = Placement(context=8192, threads=8, gpu_layers=49, gpu_count=2, sequences=4, kv_type="q8_0", ubatch=1024)
PARTED = dataclasses.replace(ON_GPU, cpu_expert_layers=12, tensor_split=(3.0, 1.0), flash_attention=False)
SPLIT = Placement(context=8192, tensor_parallel=4, gpu_count=4, sequences=16)
ODD_NAMES = (
    "a b.gguf",
    "it's.gguf",
    "$(touch x).gguf",
    "a;b&c.gguf",
    "-rf.gguf",
    'q"uote.gguf',
    "ünïcödé.gguf",
    "new\nline",
)


def file(placement: Placement = ON_CPU, target: str = "/models/m-Q4_K_M.gguf", **more: Any) -> Service:
    return Service(target=target, variant=gguf.variant("Q4_K_M"), placement=placement, **more)


def checkpoint(variant: Variant, placement: Placement = SPLIT, target: str = "/models/m", **more: Any) -> Service:
    kernel = kernels.reading(variant)
    return Service(target=target, variant=variant, placement=placement, kernel=kernel, **more)


SERVICES = {
    "cpu": file(),
    "gpu": file(ON_GPU, host="127.0.0.1", port=9000, name="m"),
    "parted": file(PARTED, repack=False, chat_template="/t.jinja", host="::1", port=9000),
    "awq": checkpoint(awq.variant("4bit"), name="m", host="127.0.0.1", port=9000),
    "gptq": checkpoint(gptq.variant("3bit"), chat_template="/t.jinja"),
    "none": checkpoint(none.variant("bf16"), target="org/model"),
    "fp8": checkpoint(none.variant("fp8"), target="org/model"),
    "bnb": checkpoint(bitsandbytes.variant("nf4"), target="org/model", host="127.0.0.1", port=9000),
    "int8": checkpoint(bitsandbytes.variant("int8")),
}


def options_of(argv: tuple[str, ...]) -> list[str]:
    """What looks like an option; a lone number after one is its value."""
    return [part for part in argv if part.startswith("-") and not part[1:].replace(".", "").isdigit()]


@pytest.mark.parametrize("name", list(SERVICES))
def test_every_option_is_one_that_the_server_documents(name: str) -> None:
    service = SERVICES[name]
    for row in servers():
        if service.variant.format not in row.formats:
            with pytest.raises(UsageError) as refused:
                command(row.name, service)
            assert refused.value.code == "wrong-server" and "--server" in refused.value.hint
            continue
        argv = command(row.name, service).argv
        if row.name == "tgi":
            argv = argv[argv.index(str(row.image)) + 1 :]
        own = {"--no-repack", "--n-cpu-moe", "-m"} if row.name == "llama-cpp-python" else set()
        assert set(options_of(argv)) <= set(row.options) | own, row.name


def test_all_settings_reach_llama_server() -> None:
    argv = command("llama-server", SERVICES["parted"]).argv
    pairs = dict(itertools.pairwise(argv))
    wanted = {"-c": "32768", "-np": "4", "-ngl": "49", "-ub": "1024", "-b": "2048", "-fa": "off", "-t": "8"}
    wanted |= {"-ctk": "q8_0", "-ctv": "q8_0", "--n-cpu-moe": "12", "--tensor-split": "3,1"}
    wanted |= {"--chat-template-file": "/t.jinja", "--host": "::1", "--port": "9000", "-m": "/models/m-Q4_K_M.gguf"}
    assert wanted.items() <= pairs.items() and "--no-repack" in argv
    assert "-ctk" not in command("llama-server", file()).argv


def test_all_settings_reach_the_python_server_or_are_noted() -> None:
    made = command("llama-cpp-python", SERVICES["parted"])
    pairs = dict(zip(made.argv, made.argv[1:], strict=False))
    wanted = {"--n_ctx": "8192", "--n_gpu_layers": "49", "--n_ubatch": "1024", "--type_k": "8", "--flash_attn": "false"}
    wanted |= {"--logits_all": "false", "--use_mlock": "false", "--n_threads": "8", "--n-cpu-moe": "12"}
    assert wanted.items() <= pairs.items() and "--no-repack" in made.argv
    assert made.argv[made.argv.index("--tensor_split") + 1 :][:2] == ("3", "1")
    assert any("one request at a time" in note for note in made.notes)
    assert any("template" in note for note in made.notes)


def test_the_python_servers_own_parser_reads_its_arguments() -> None:
    pytest.importorskip("llama_cpp.server.app")
    import argparse

    from llama_cpp.server.cli import add_args_from_model, parse_model_from_args
    from llama_cpp.server.settings import ModelSettings, Settings

    own, rest = python_server.parse(command("llama-cpp-python", SERVICES["parted"]).argv[3:])
    assert own.no_repack and own.n_cpu_moe == 12
    parser = argparse.ArgumentParser()
    add_args_from_model(parser, Settings)
    read = parse_model_from_args(ModelSettings, parser.parse_args(rest))
    assert (read.n_ctx, read.type_k, read.tensor_split, read.flash_attn) == (8192, 8, [3.0, 1.0], False)


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
@pytest.mark.parametrize("name", ["awq", "gptq", "none", "fp8"])
def test_vllms_own_parser_reads_its_arguments(name: str) -> None:
    from vllm.entrypoints.common.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    argv = command("vllm", SERVICES[name]).argv[2:]
    read = make_arg_parser(FlexibleArgumentParser()).parse_args(list(argv))
    assert read.max_model_len == 8192 and read.tensor_parallel_size == 4


def test_vllm_is_told_how_weights_are_quantized_only_where_it_would_not_know() -> None:
    quantization = {
        name: _after(command("vllm", SERVICES[name]).argv, "--quantization") for name in ("awq", "gptq", "none", "fp8")
    }
    assert quantization == {"awq": None, "gptq": "humming", "none": None, "fp8": "fp8"}


def _after(argv: tuple[str, ...], option: str) -> str | None:
    return argv[argv.index(option) + 1] if option in argv else None


def test_tgi_and_transformers_name_the_quantization() -> None:
    assert _after(command("tgi", SERVICES["awq"]).argv, "--quantize") == "awq"
    assert _after(command("tgi", SERVICES["bnb"]).argv, "--quantize") == "bitsandbytes-nf4"
    assert _after(command("transformers", SERVICES["bnb"]).argv, "--quantization") == "bnb-4bit"
    assert _after(command("transformers", SERVICES["int8"]).argv, "--quantization") == "bnb-8bit"
    published = command("tgi", SERVICES["awq"]).argv
    assert _after(published, "-p") == "127.0.0.1:9000:80" and _after(published, "-v") == "/models:/data:ro"
    assert _after(published, "--model-id") == "/data/m"


@pytest.mark.parametrize("name", ODD_NAMES)
def test_odd_names_stay_one_word_in_a_shell(name: str) -> None:
    for row, service in (("llama-server", file(target=name)), ("vllm", checkpoint(awq.variant("4bit"), target=name))):
        made = command(row, service)
        assert tuple(shlex.split(made.text())) == made.argv
        assert any(part in {name, f"./{name}"} or part == f"/data/{name}" for part in made.argv)
    vllm = command("vllm", checkpoint(awq.variant("4bit"), target=name)).argv
    assert not vllm[2].startswith("-")


def test_a_shell_runs_nothing_of_a_name(tmp_path: Path) -> None:
    text = command("llama-server", file(target="$(touch pwned);touch pwned;`touch pwned`.gguf")).text()
    echoed = subprocess.run(
        ["sh", "-c", f"printf '%s\\n' {text}"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert "$(touch pwned);touch pwned;`touch pwned`.gguf" in echoed.stdout.splitlines()
    assert not list(tmp_path.iterdir())


@given(st.text(min_size=1))
def test_python_snippets_compile_whatever_the_name(name: str) -> None:
    for service in (
        file(target=name),
        file(PARTED, target=name),
        file(target=name, repack=False),
        checkpoint(gptq.variant("3bit"), target=name),
        checkpoint(bitsandbytes.variant("nf4"), target=name),
    ):
        compile(snippets.python(service), "snippet", "exec")


@given(st.text(min_size=1, alphabet=st.characters(codec="utf-8")))
def test_manifests_are_yaml_whatever_the_name(name: str) -> None:
    for service in (file(target=f"/m/{name}"), checkpoint(awq.variant("4bit"), target=f"/m/{name}", name=name)):
        deployment, exposed = yaml.safe_load_all(exports.kubernetes(service))
        label = deployment["metadata"]["name"]
        assert 0 < len(label) <= 63 and label.strip("-") == label and label.isascii()
        assert exposed["spec"]["selector"] == deployment["spec"]["selector"]["matchLabels"] == {"app": label}


def test_a_manifest_asks_for_what_the_plan_takes() -> None:
    text = exports.kubernetes(dataclasses.replace(SERVICES["awq"], memory_bytes=7 << 30))
    deployment, exposed = yaml.safe_load_all(text)
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    assert container["image"] == server("vllm").image and "latest" not in container["image"]
    assert container["args"][0] == "/models/m" and _after(tuple(container["args"]), "--tensor-parallel-size") == "4"
    assert container["resources"] == {"requests": {"memory": str(7 << 30)}, "limits": {"nvidia.com/gpu": 4}}
    assert container["readinessProbe"]["httpGet"] == {"path": "/health", "port": 9000}
    assert exposed["spec"]["ports"] == [{"port": 9000, "targetPort": 9000}] and "&id" not in text
    (cpu,) = next(yaml.safe_load_all(exports.kubernetes(file())))["spec"]["template"]["spec"]["containers"]
    assert cpu["image"].endswith(":server") and cpu["resources"] == {"requests": {"cpu": "8"}}
    (gpu,) = next(yaml.safe_load_all(exports.kubernetes(SERVICES["gpu"])))["spec"]["template"]["spec"]["containers"]
    assert gpu["image"].endswith(":server-cuda") and gpu["resources"]["limits"] == {"nvidia.com/gpu": 2}


def test_a_container_publishes_no_more_than_was_asked() -> None:
    argv = exports.docker(SERVICES["gpu"]).argv
    assert _after(argv, "-p") == "127.0.0.1:9000:9000" and _after(argv, "-v") == "/models:/models:ro"
    assert _after(argv, "-m") == "/models/m-Q4_K_M.gguf" and _after(argv, "--host") == "0.0.0.0"
    assert "--gpus" not in exports.docker(file()).argv
    assert _after(exports.docker(SERVICES["parted"]).argv, "-p") == "[::1]:9000:9000"
    assert exports.docker(SERVICES["awq"], "tgi").argv == command("tgi", SERVICES["awq"]).argv


def test_a_modelfile_says_all_that_ollama_can_be_told() -> None:
    lines = exports.modelfile(file(ON_GPU)).splitlines()
    assert lines[0] == "FROM /models/m-Q4_K_M.gguf" and "PARAMETER num_ctx 8192" in lines
    assert {"PARAMETER num_gpu 49", "PARAMETER num_thread 8", "PARAMETER num_batch 1024"} <= set(lines)
    assert "OLLAMA_KV_CACHE_TYPE=q8_0" in lines[-1] and "OLLAMA_NUM_PARALLEL=4" in lines[-1]
    assert "num_gpu 49" not in exports.modelfile(file(PARTED))
    assert exports.modelfile(file(target="a b.gguf")).startswith('FROM "./a b.gguf"\n')
    for name in ("a\nSYSTEM x.gguf", 'a"b.gguf'):
        with pytest.raises(UsageError):
            exports.modelfile(file(target=name))
    with pytest.raises(UsageError):
        exports.modelfile(SERVICES["awq"])


def test_gpus_of_the_plan_are_shown_unless_somebody_chose() -> None:
    assert visible_gpus(ON_CPU, {}) == {"CUDA_VISIBLE_DEVICES": "-1"}
    assert visible_gpus(ON_GPU, {}) == {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": "0,1"}
    assert visible_gpus(ON_GPU, {"CUDA_VISIBLE_DEVICES": "3"}) == {}


def test_recommend_prints_what_serve_would_print() -> None:
    from planner import methods, models
    from planner.core.workload import Workload
    from planner.decide import decide
    from planner.workflow.survey import survey

    model = models.resolve("llama-2-7b")
    for method, name in (("gguf", "llama-server"), ("awq", "vllm"), ("bitsandbytes", "transformers")):
        chosen = decide(model, survey("rtx-4090"), Workload(methods=(method,))).chosen
        assert chosen is not None
        text = methods.get(method).commands(model, chosen)["serve"]
        target = {"gguf": _after(tuple(shlex.split(text)), "-m"), "awq": shlex.split(text)[2]}.get(
            method, model.source.hub_id
        )
        assert text == command(name, Service.of(str(target), chosen)).text()


# The environment and the library's defaults, as llama_cpp.server reads them.


def test_settings_in_the_environment_do_not_reach_the_server() -> None:
    environment = {"HOST": "0.0.0.0", "N_CTX": "1", "config_file": "x", "HOME": "/root"}
    python_server.forget_environment(environment, ("host", "n_ctx", "config_file"))
    assert environment == {"HOME": "/root"}


@pytest.mark.parametrize("no_repack", [True, False])
def test_repacking_and_sliding_window_caches_follow_llama_cpps_programs(no_repack: bool) -> None:
    class Parameters:
        use_extra_bufts = None
        swa_full = True

    class Library:
        llama_model_default_params = Parameters
        llama_context_default_params = Parameters

    python_server.set_defaults(Library, no_repack, 0)
    assert Library.llama_model_default_params().use_extra_bufts is not no_repack
    assert Library.llama_context_default_params().swa_full is False


# What is served: plans, reports, artifacts.


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("gguf")
    return write_tiny_llama(tmp_path_factory.mktemp("tiny") / "tiny llama-F16.gguf")


def test_a_file_is_served_as_it_would_be_recommended(tiny: Path) -> None:
    made = prepare(tiny, Options(context=256, sequences=2, threads=1), to_run=False)
    assert made.service.variant.type == "F16" and made.service.name == "tiny llama-F16"
    placement = made.service.placement
    assert (placement.context, placement.sequences, placement.threads) == (256, 2, 1)
    assert made.service.repack and made.service.host == "127.0.0.1"


def test_a_report_of_this_machine_says_that_repacking_crashes(tiny: Path, tmp_path: Path) -> None:
    from planner.workflow.survey import survey

    shutil.copy(tiny, tmp_path / "m.gguf")
    report: dict[str, Any] = {"artifact": "/elsewhere/m.gguf", "verdicts": [], "plan_sha256": None}
    report |= {"speed": {"repack": False}, "machine": {"identity": survey(None).identity()}}
    (tmp_path / "report.json").write_text(json.dumps(report))
    for target in (tmp_path / "m.gguf", tmp_path / "report.json"):
        assert prepare(target, Options(context=256), to_run=False).service.repack is False
    assert prepare(tmp_path / "m.gguf", Options(context=256, repack=True), to_run=False).service.repack is True
    (tmp_path / "report.json").write_text(json.dumps({**report, "machine": {"identity": "another"}}))
    assert prepare(tmp_path / "m.gguf", Options(context=256), to_run=False).service.repack is True


def test_another_address_must_be_asked_for_and_is_warned_about(tiny: Path) -> None:
    assert not any("listens" in note for note in prepare(tiny, Options(context=256), to_run=False).notes)
    warned = prepare(tiny, Options(context=256, host="0.0.0.0"), to_run=False).notes
    assert any("every network" in note and "password" in note for note in warned)


@pytest.mark.parametrize(
    ("config", "server_name", "quantization"),
    [
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "vllm", None),
        ({"quantization_config": {"quant_method": "gptq", "bits": 3, "group_size": 128}}, "vllm", "humming"),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "transformers", "bnb-4bit"),
        ({}, "vllm", None),
    ],
)
def test_a_checkpoint_is_served_by_what_its_config_says(
    tmp_path: Path, config: dict[str, Any], server_name: str, quantization: str | None
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"max_position_embeddings": 2048, **config}))
    (tmp_path / "model.safetensors").write_bytes(b"")
    made = prepare(tmp_path, Options(tensor_parallel=2), to_run=False)
    assert made.server.name == server_name
    assert made.service.placement.context == 2048 and made.service.placement.tensor_parallel == 2
    assert _after(command(server_name, made.service).argv, "--quantization") == quantization


def refused(target: Path, options: Options | None = None, *, to_run: bool = False) -> QplanError:
    with pytest.raises(QplanError) as error:
        prepare(target, options or Options(), to_run=to_run)
    return error.value


def test_what_cannot_be_served_is_refused_with_a_hint(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert refused(tmp_path / "none.gguf").code
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"\x80\x02.")
    assert "pickled" in refused(tmp_path / "pickled").hint
    (tmp_path / "text.gguf").write_text("no model")
    assert isinstance(refused(tmp_path / "text.gguf"), InputError)
    (tmp_path / "odd.json").write_text("{}")
    assert refused(tmp_path / "odd.json").code == "bad-document"
    (tmp_path / "r.json").write_text(json.dumps({"verdicts": [], "artifact": "../../etc/passwd"}))
    assert refused(tmp_path / "r.json").code == "no-artifact"
    assert refused(tiny, Options(server="vllm")).code == "wrong-server"
    assert refused(tiny, Options(chat_template=tmp_path / "none.jinja")).code == "no-template"
    monkeypatch.setenv("PATH", str(tmp_path))
    lacking = refused(tiny, Options(server="llama-server", context=256), to_run=True)
    assert lacking.code == "missing-dependency" and "llama.cpp" in lacking.hint and "--print" in lacking.hint


def test_the_folder_of_a_run_is_served_as_its_plan_says_wherever_the_plan_lies(
    tmp_path: Path, applied_plan: Path
) -> None:
    plan = json.loads(applied_plan.read_text())
    run = tmp_path / "out"
    run.mkdir()
    (run / plan["artifact"]).write_bytes(b"")
    report = {"artifact": plan["artifact"], "verdicts": [], "plan_sha256": plan["content_sha256"], "plan": plan}
    (run / "report.json").write_text(json.dumps(report))
    for target in (run, run / "report.json"):
        service = prepare(target, Options(), to_run=False).service
        assert service.target == str(run / plan["artifact"]) and service.placement == load_plan(applied_plan).placement
        found, artifact = artifact_of(target, None)
        assert found == load_plan(applied_plan) and artifact == run / plan["artifact"]
    (run / "report.json").write_text(json.dumps({**report, "plan": {**plan, "artifact": "../x.gguf"}}))
    assert isinstance(refused(run), InputError), "an edited plan is passed over, and the file itself is no model"


def test_a_plan_runs_no_program_of_its_own(tmp_path: Path, applied_plan: Path) -> None:
    """Edited and sealed again, as a stranger would: only qplan's own servers and options come of it."""
    plan = json.loads(applied_plan.read_text())

    def sealed(**changed: Any) -> Path:
        document = {**plan, **changed, "content_sha256": ""}
        document["content_sha256"] = content_sha256(document)
        path = tmp_path / "plan.json"
        path.write_text(json.dumps(document))
        return path

    for variant in ({"runtime": "/bin/sh"}, {"format": "sh", "runtime": "bash"}, {"runtime": "vllm"}):
        assert refused(sealed(variant={**plan["variant"], **variant}), Options(output=applied_plan.parent)).code in {
            "bad-plan",
            "wrong-server",
        }
    placement = {**plan["placement"], "kv_type": "f16 --api-key x"}
    assert refused(sealed(placement=placement), Options(output=applied_plan.parent)).code == "bad-plan"
    assert refused(sealed(commands={"serve": "sh -c evil"})).code
    for artifact in ("../x.gguf", "/bin/sh", ".hidden"):
        assert refused(sealed(artifact=artifact)).code == "bad-plan"
    assert refused(sealed(), Options(output=tmp_path)).code == "no-artifact"


@pytest.fixture(scope="module")
def applied_plan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plan of the demo model with a file of the artifact's name beside it."""
    from planner.core.workload import Workload
    from planner.workflow.planning import make_plan, plan_text
    from planner.workflow.recommend import recommend

    folder = tmp_path_factory.mktemp("planned")
    answer = recommend("demo", Workload(context=512, types=("Q4_K_M",), methods=("gguf",)))
    plan = make_plan(answer)
    (folder / "plan.json").write_text(plan_text(plan))
    (folder / plan.artifact).write_bytes(b"")
    return folder / "plan.json"


@pytest.mark.parametrize("form", ["command", "modelfile", "kubernetes", "docker", "python"])
def test_a_plan_is_printed_in_every_form(qplan: Qplan, applied_plan: Path, form: str) -> None:
    done = qplan("serve", str(applied_plan), "--print", form)
    assert done.returncode == 0, done.stderr
    assert "demo-Q4_K_M.gguf" in done.stdout and "512" in done.stdout
    document = json.loads(qplan("serve", str(applied_plan), "--print", form, "--json").stdout)
    assert next(iter(document)) == "format_version" and document["text"].strip() == done.stdout.strip()


# Servers that really run. The stand-in speaks HTTP and dies as told; llama.cpp's own is in test_serve_http.py.

STAND_IN = """#!{python}
import http.server, os, signal, sys, time
arguments = sys.argv[1:]
print("stand-in", *arguments, flush=True)
if os.environ.get("DIES") == "fault" and "--no-repack" not in arguments:
    os.kill(os.getpid(), signal.SIGSEGV)
if os.environ.get("DIES") == "old":
    sys.exit("error: invalid argument: -np")
if os.environ.get("DIES") == "hangs":
    time.sleep(600)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers(); self.wfile.write(b"{{}}")
    def log_message(self, *_): pass
port = int(arguments[arguments.index("--port") + 1])
http.server.HTTPServer((arguments[arguments.index("--host") + 1], port), Handler).serve_forever()
"""


@pytest.fixture
def stand_in(tmp_path: Path) -> dict[str, str]:
    """An environment whose PATH has a llama-server that only answers."""
    program = tmp_path / "bin" / "llama-server"
    program.parent.mkdir()
    program.write_text(STAND_IN.format(python=sys.executable))
    program.chmod(0o755)
    path = f"{program.parent}{os.pathsep}{os.environ['PATH']}"
    home = {"QPLAN_HOME": str(tmp_path / "home"), "PYTHONPATH": str(Path(__file__).parent.parent)}
    return {**os.environ, **home, "PATH": path}


Started = tuple[subprocess.Popen[str], str]


@contextmanager
def serving(environment: dict[str, str], *arguments: str) -> Iterator[Started]:
    """``qplan serve`` in a process, and the URL that it printed once the server answered."""
    command_line = [sys.executable, "-m", "planner.cli", "serve", *arguments, "--port", "0"]
    child = subprocess.Popen(
        command_line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=hear_ctrl_c
    )
    try:
        assert child.stdout is not None
        url = child.stdout.readline().strip()
        assert url.startswith("http://127.0.0.1:"), child.communicate(timeout=60)
        yield child, url
    finally:
        child.kill()
        child.communicate()


def ask(url: str, body: dict[str, Any]) -> dict[str, Any]:
    """The answer to a JSON document, whatever proxy the environment names."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=120) as answer:
        document: dict[str, Any] = json.load(answer)
        return document


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def gone(url: str) -> bool:
    for _ in range(100):
        if not answers(f"{url}/models"):
            return True
        time.sleep(0.1)
    return False


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, Exit.INTERRUPTED), (signal.SIGTERM, Exit.DONE)])
def test_it_is_ready_when_it_says_so_and_gone_when_it_ends(
    stand_in: dict[str, str], tiny: Path, number: signal.Signals, code: Exit
) -> None:
    with serving(stand_in, str(tiny), "--context", "256") as (child, url):
        assert answers(f"{url}/models")
        child.send_signal(number)
        _, complaints = child.communicate(timeout=60)
        assert child.returncode == code, complaints
        assert "Traceback" not in complaints and gone(url)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the kernel's notice of a parent's death")
def test_killed_it_takes_the_server_with_it(stand_in: dict[str, str], tiny: Path) -> None:
    with serving(stand_in, str(tiny), "--context", "256") as (child, url):
        child.kill()
        child.wait()
        assert gone(url)


def test_a_server_that_faults_is_started_again_without_repacking(stand_in: dict[str, str], tiny: Path) -> None:
    with serving({**stand_in, "DIES": "fault"}, str(tiny), "--context", "256") as (child, url):
        assert answers(f"{url}/models")
        child.send_signal(signal.SIGTERM)
        _, complaints = child.communicate(timeout=60)
        assert "--no-repack" in complaints


Serve = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def serve(stand_in: dict[str, str], tiny: Path) -> Serve:
    def run(*arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, "-m", "planner.cli", "serve", str(tiny), "--context", "256", *arguments]
        environment = {**stand_in, **more}
        return subprocess.run(line, env=environment, capture_output=True, text=True, timeout=120, check=False)

    return run


def test_a_server_that_dies_is_quoted_with_a_hint(serve: Serve) -> None:
    done = serve("--port", "0", "--json", DIES="old")
    assert done.returncode == Exit.FAILED and "invalid argument: -np" in done.stderr
    error = json.loads(done.stdout)["error"]
    assert error["code"] == "child-died" and "another version" in error["hint"]


def test_a_server_that_never_answers_is_ended(serve: Serve) -> None:
    done = serve("--port", "0", "--timeout", "2", DIES="hangs")
    assert done.returncode == Exit.FAILED and "[timeout]" in done.stderr and "--timeout" in done.stderr


def test_a_port_in_use_is_said_before_anything_starts(serve: Serve) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        done = serve("--port", str(taken.getsockname()[1]))
    assert done.returncode == Exit.FAILED and "[port-in-use]" in done.stderr and "--port 0" in done.stderr


def test_an_address_of_another_machine_is_refused() -> None:
    with pytest.raises(QplanError) as error:
        check_port("192.0.2.1", 8080)
    assert error.value.code == "bad-address"
