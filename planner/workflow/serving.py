"""From a plan, a report or an artifact to a server that runs with the right settings."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from planner.core.candidate import Placement, Variant
from planner.core.codec import read_json
from planner.core.data import home
from planner.core.errors import DoesNotFit, InputError, MissingDependency, QplanError, UsageError
from planner.core.hardware import HardwareProfile
from planner.core.plan import Plan
from planner.core.workload import KV_TYPES, Workload
from planner.execute.process import ChildDied
from planner.runtimes import kernels
from planner.runtimes.commands import command, default_server
from planner.runtimes.service import HOST, LOOPBACK, PORT, Command, Server, Service, server, servers, visible_gpus
from planner.serve import run as serving
from planner.verify.run import FAULTS
from planner.workflow.applying import REPORT
from planner.workflow.planning import check_hardware, load_plan
from planner.workflow.survey import survey

PYTHON_SERVER = "llama-cpp-python"
_PYTHON_SERVER_PACKAGES = ("llama_cpp", "uvicorn", "fastapi", "sse_starlette", "starlette_context", "pydantic_settings")
_MOST_DOCUMENTS = 64
"""JSON files beside a report that are looked at for its plan."""
_MOST_DOCUMENT_BYTES = 8 << 20
_CHECKPOINT_CONTEXT = 8192
NO_REPACK = (
    "llama.cpp crashed in its CPU-specific kernels (AMX or repacked weights) on this machine: it is started again "
    "without them; --no-repack does so at once"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What a person said on the command line; ``None`` leaves the plan's setting."""

    output: Path | None = None
    """Folder of a plan's artifact; ``None``: beside the plan."""
    server: str | None = None
    host: str = HOST
    port: int = PORT
    """0: a free one."""
    repack: bool | None = None
    """``None``: off where a verification on this machine found that it crashes."""
    chat_template: Path | None = None
    context: int | None = None
    sequences: int | None = None
    gpu_layers: int | None = None
    threads: int | None = None
    ubatch: int | None = None
    kv_type: str | None = None
    flash_attention: bool | None = None
    tensor_parallel: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A service that is ready to be started or printed, the server for it and what a person should know."""

    service: Service
    server: Server
    notes: tuple[str, ...] = ()

    @property
    def command(self) -> Command:
        """How the server is started."""
        made = command(self.server.name, self.service)
        environment = {**dict(made.environment), **visible_gpus(self.service.placement, os.environ)}
        if self.server.name not in {"llama-server", PYTHON_SERVER} or not self.service.placement.gpu_count:
            return made
        return dataclasses.replace(made, environment=tuple(environment.items()))


def prepare(target: Path, options: Options, *, to_run: bool) -> Prepared:
    """Everything that serving ``target`` needs.

    Args:
        target: a plan, a report, a GGUF file or a directory with a checkpoint.
        to_run: check that this machine can run it; False where it is only printed.

    Raises:
        InputError: the artifact is missing or damaged, or the document is none of qplan's.
        StalePlan: the plan is for another machine, or was edited.
        MissingDependency: no server for it is installed.
        UsageError: the server that was asked for does not read it.
    """
    here = survey(output=target.absolute().parent)
    service = _with_options(_service(target, options, here, to_run=to_run), options)
    _check_known(service)
    kernel = service.kernel or kernels.reading(service.variant)
    service = dataclasses.replace(service, kernel=kernel, repack=_repack(service, options, here))
    chosen = _choose(service, options.server, to_run=to_run)
    notes = [*command(chosen.name, service).notes, *_exposure(options)]
    if kernel is not None and kernel.note:
        notes.append(kernel.note)
    return Prepared(service=service, server=chosen, notes=tuple(notes))


def _service(target: Path, options: Options, here: HardwareProfile, *, to_run: bool) -> Service:
    if target.suffix == ".json":
        document = read_json(target)
        if isinstance(document, dict) and "verdicts" in document:
            return _of_report(target, document, options, here, to_run=to_run)
        return _of_plan(load_plan(target), options.output or target.absolute().parent, here, to_run=to_run)
    return _of_artifact(target.absolute(), options, here)


def _of_plan(plan: Plan, folder: Path, here: HardwareProfile, *, to_run: bool) -> Service:
    """A plan's settings for its artifact in ``folder``. The plan names no program: the server is qplan's choice."""
    if to_run:
        check_hardware(plan, here)
    artifact = folder.absolute() / plan.artifact
    _check_artifact(artifact, hint="`qplan apply` makes it; --output DIR says where it lies")
    return Service(
        target=str(artifact),
        variant=plan.variant,
        placement=plan.placement,
        name=_name(artifact.stem),
        memory_bytes=plan.estimate.memory.host.total_bytes or None,
    )


def _of_report(
    path: Path, document: dict[str, Any], options: Options, here: HardwareProfile, *, to_run: bool
) -> Service:
    """The artifact that lies beside a report, with the settings of the plan that lies there too, if it does."""
    named = document.get("artifact")
    if not isinstance(named, str) or not Path(named).name:
        raise InputError(f"{path} is no report of qplan", numbers="it names no artifact", code="bad-document")
    folder = path.absolute().parent
    sha256 = document.get("plan_sha256")
    plan = next((p for p in map(_plan_or_none, _documents(folder)) if p and p.content_sha256 == sha256), None)
    if plan is not None:
        return _of_plan(plan, options.output or folder, here, to_run=to_run)
    artifact = (options.output or folder) / Path(named).name
    _check_artifact(artifact, hint="the report's artifact lies elsewhere: name it, as in `qplan serve model.gguf`")
    return _of_artifact(artifact.absolute(), options, here)


def _documents(folder: Path) -> list[Path]:
    found = sorted(folder.glob("*.json"))[:_MOST_DOCUMENTS]
    return [path for path in found if path.is_file() and path.stat().st_size <= _MOST_DOCUMENT_BYTES]


def _plan_or_none(path: Path) -> Plan | None:
    try:
        return load_plan(path)
    except QplanError:
        return None


def _name(text: str) -> str:
    """What the API calls the model: nothing that a server could take for an option."""
    return text.lstrip("-") or "model"


def _check_known(service: Service) -> None:
    """Refuse a format, a runtime or a KV type that no server has: a plan may come from a stranger."""
    variant, kv_type = service.variant, service.placement.kv_type
    if not any(row.runtime == variant.runtime and variant.format in row.formats for row in servers()):
        raise InputError(f"no server runs {variant.format!r} with {variant.runtime!r}", code="bad-plan")
    if kv_type not in KV_TYPES:
        raise InputError(f"{kv_type!r} is no type of a KV cache", hint=f"one of {', '.join(KV_TYPES)}", code="bad-plan")


def _check_artifact(artifact: Path, hint: str) -> None:
    if not artifact.exists():
        raise InputError(f"{artifact} does not exist", hint=hint, code="no-artifact")


def _of_artifact(artifact: Path, options: Options, here: HardwareProfile) -> Service:
    if artifact.is_dir():
        return _of_checkpoint(artifact, options)
    from planner.verify.artifact import gguf_files

    gguf_files(artifact)
    return _of_gguf(artifact, options)


def _of_gguf(artifact: Path, options: Options) -> Service:
    """A GGUF file as it would be recommended on this machine."""
    from planner.models.gguf_file import file_type_of
    from planner.workflow.recommend import recommend

    asked = Workload()
    workload = Workload(
        context=options.context or asked.context,
        context_fixed=options.context is not None,
        concurrency=options.sequences or asked.concurrency,
        methods=("gguf",),
        types=(file_type_of(artifact),),
        kv_type=options.kv_type,
        gpu_layers=options.gpu_layers,
        threads=options.threads,
        ubatch=options.ubatch or asked.ubatch,
        flash_attention=asked.flash_attention if options.flash_attention is None else options.flash_attention,
    )
    answer = recommend(str(artifact), workload)
    chosen = answer.decision.chosen
    if chosen is None:
        least = next((r for r in answer.decision.rejected), None)
        raise DoesNotFit(
            f"{artifact.name} does not run here with {workload.context} tokens of context",
            numbers=least.reason if least else "",
            hint="a shorter --context, --kv-type q8_0 or fewer --parallel take less memory",
        )
    service = Service.of(str(artifact), chosen)
    return dataclasses.replace(
        service, name=_name(artifact.stem), memory_bytes=chosen.estimate.memory.host.total_bytes or None
    )


_FORMATS = {
    "awq": ("awq", "awq-gemm", "vllm"),
    "gptq": ("gptq", "gptq", "vllm"),
    "compressed-tensors": ("none", "compressed-tensors", "vllm"),
    "bitsandbytes": ("bitsandbytes", "bitsandbytes", "transformers"),
}
"""``quant_method`` of a config.json → method, format and runtime."""


def _of_checkpoint(folder: Path, options: Options) -> Service:
    """A checkpoint directory as its config.json describes it; memory is not checked, only GGUF files are read."""
    if not any(folder.glob("*.safetensors")):
        hint = "name a GGUF file, or a directory with .safetensors files; pickled weights are not loaded"
        raise InputError(f"{folder} holds no weights that can be served", hint=hint, code="no-artifact")
    config = read_json(folder / "config.json")
    if not isinstance(config, dict):
        raise InputError(f"{folder / 'config.json'} is no configuration of a model", code="bad-config")
    quantization = config.get("quantization_config") or {}
    method, format_, runtime = "none", "safetensors", "vllm"
    if quantization:
        named = quantization.get("quant_method") if isinstance(quantization, dict) else None
        if named not in _FORMATS:
            known = ", ".join(_FORMATS)
            raise InputError(f"{folder} is quantized with {named!r}", hint=f"known are {known}", code="unknown-format")
        method, format_, runtime = _FORMATS[named]
    gpus = options.tensor_parallel or 1
    context = config.get("max_position_embeddings")
    longest = context if isinstance(context, int) and context > 0 else _CHECKPOINT_CONTEXT
    return Service(
        target=str(folder),
        variant=Variant(method=method, format=format_, runtime=runtime, type=_type(method, quantization)),
        placement=Placement(context=min(longest, _CHECKPOINT_CONTEXT), tensor_parallel=gpus, gpu_count=gpus),
        name=_name(folder.name),
    )


def _type(method: str, quantization: dict[str, Any]) -> str:
    if method == "bitsandbytes":
        return "nf4" if quantization.get("load_in_4bit") else "int8"
    bits = quantization.get("bits")
    return f"{bits}bit" if isinstance(bits, int) else "bf16"


def _with_options(service: Service, options: Options) -> Service:
    """The service with what the command line says instead."""
    given: dict[str, Any] = {
        "context": options.context,
        "sequences": options.sequences,
        "gpu_layers": options.gpu_layers,
        "threads": options.threads,
        "ubatch": options.ubatch,
        "kv_type": options.kv_type,
        "flash_attention": options.flash_attention,
        "tensor_parallel": options.tensor_parallel,
    }
    placement = dataclasses.replace(service.placement, **{k: v for k, v in given.items() if v is not None})
    port = options.port or serving.free_port(options.host)
    template = options.chat_template
    if template is not None and not template.is_file():
        raise InputError(f"{template} does not exist", hint="--chat-template takes a Jinja file", code="no-template")
    return dataclasses.replace(
        service,
        placement=placement,
        host=options.host,
        port=port,
        chat_template=str(template.absolute()) if template else None,
    )


def _repack(service: Service, options: Options, here: HardwareProfile) -> bool:
    """Whether llama.cpp may repack weights: as said, else as this machine's report beside the artifact found."""
    if options.repack is not None:
        return options.repack
    try:
        report = read_json(Path(service.target).parent / REPORT)
    except InputError:
        return True
    speed = report.get("speed") if isinstance(report, dict) else None
    machine = report.get("machine") if isinstance(report, dict) else None
    measured_here = isinstance(machine, dict) and machine.get("identity") == here.identity()
    return not (measured_here and isinstance(speed, dict) and speed.get("repack") is False)


def _choose(service: Service, asked: str | None, *, to_run: bool) -> Server:
    """The server that was asked for; else the first of the runtime's that is installed."""
    if asked is not None:
        row = server(asked)
        command(asked, service)  # refuses a format that it does not read
        if to_run:
            _check_installed(row)
        return row
    runtime = [row for row in servers() if row.runtime == service.variant.runtime]
    for row in runtime:
        if not missing(row):
            return row
    if to_run:
        _check_installed(next((row for row in runtime if row.name == PYTHON_SERVER), runtime[0]))
    return server(default_server(service))


def missing(row: Server) -> tuple[str, ...]:
    """Programs or packages that a server needs and this machine lacks."""
    if row.name != PYTHON_SERVER:
        return () if shutil.which(row.program) else (row.program,)
    return tuple(name for name in _PYTHON_SERVER_PACKAGES if importlib.util.find_spec(name) is None)


def _check_installed(row: Server) -> None:
    lacking = missing(row)
    if lacking:
        raise MissingDependency(
            f"{row.name} is not installed",
            numbers=f"missing: {', '.join(lacking)}",
            hint=f"{row.install}; `--print command` shows how it would be started",
        )


def _exposure(options: Options) -> tuple[str, ...]:
    if options.host in LOOPBACK:
        return ()
    where = "every network of this machine" if options.host in {"0.0.0.0", "::"} else options.host
    return (f"it listens on {where}: whoever reaches it can use the model, and nothing is asked for a password",)


def start(
    prepared: Prepared, announce: Callable[[serving.Running], None], tell: Callable[[str], None], timeout_seconds: float
) -> None:
    """Run the server until it or this process is asked to end; once more without repacking where llama.cpp faults.

    Raises:
        ExecutionFailed: the port is taken, the server died, or it does not answer.
        KeyboardInterrupt: Ctrl-C.
    """
    service = prepared.service
    host, port = service.host or HOST, service.port or PORT
    serving.check_port(host, port)
    try:
        _run(prepared, host, port, announce, timeout_seconds)
    except ChildDied as error:
        if service.variant.format != "gguf" or not service.repack or error.signal_number not in FAULTS:
            raise
        tell(NO_REPACK)
        again = dataclasses.replace(prepared, service=dataclasses.replace(service, repack=False))
        _run(again, host, port, announce, timeout_seconds)


def _run(
    prepared: Prepared, host: str, port: int, announce: Callable[[serving.Running], None], timeout_seconds: float
) -> None:
    serving.run(
        prepared.command,
        prepared.server,
        host=host,
        port=port,
        log=home() / "logs" / f"serve-{port}.log",
        announce=announce,
        timeout_seconds=timeout_seconds,
        model_name=prepared.service.name if prepared.server.name == PYTHON_SERVER else None,
    )


def print_text(prepared: Prepared, what: str, asked: str | None) -> str:
    """The service as text: ``command``, ``modelfile``, ``kubernetes``, ``docker`` or ``python``."""
    from planner.runtimes import exports, snippets

    service = prepared.service
    made: dict[str, Callable[[], str]] = {
        "command": lambda: prepared.command.text(),
        "modelfile": lambda: exports.modelfile(service),
        "kubernetes": lambda: exports.kubernetes(service, asked),
        "docker": lambda: exports.docker(service, asked).text(),
        "python": lambda: snippets.python(service),
    }
    if what not in made:
        raise UsageError(f"{what!r} cannot be printed", hint=f"one of {', '.join(made)}")
    return made[what]()
