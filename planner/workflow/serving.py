"""From a plan, a report or an artifact to a server that runs with the right settings."""

from __future__ import annotations

import dataclasses
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from planner.core.candidate import KernelUse
from planner.core.codec import read_json
from planner.core.data import home
from planner.core.errors import ExecutionFailed, InputError
from planner.core.hardware import HardwareProfile
from planner.execute.process import ChildDied, stoppable
from planner.runtimes import kernels
from planner.runtimes.commands import command, default_server
from planner.runtimes.service import (
    HOST,
    LOOPBACK,
    PORT,
    UNCOMPILED,
    Command,
    Server,
    Service,
    server,
    servers,
    visible_gpus,
)
from planner.serve import run as serving
from planner.verify.run import FAULTS
from planner.workflow import server_programs
from planner.workflow.applying import REPORT
from planner.workflow.serve_target import Options, service_of
from planner.workflow.server_programs import PYTHON_SERVER, Program
from planner.workflow.survey import survey

TIMEOUT_SECONDS = 1800.0
"""A large model is read from a slow disk within it."""
NO_REPACK = (
    "llama.cpp crashed in its CPU-specific kernels (AMX or repacked weights) on this machine: it is started again "
    "without them; --no-repack does so at once"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A service that is ready to be started or printed, the server for it and what a person should know."""

    service: Service
    server: Server
    program: str | None = None
    """Where the server lies, if that is known; ``None``: its name."""
    environment: tuple[tuple[str, str], ...] = ()
    """Which GPUs it sees; empty where this machine has none."""
    notes: tuple[str, ...] = ()

    @property
    def model(self) -> str | None:
        """What its API calls the model: transformers' server knows it by its place alone."""
        return self.service.target if self.server.name == "transformers" else self.service.name

    @property
    def command(self) -> Command:
        """How the server is started."""
        made = command(self.server.name, self.service)
        if made.argv[0] == "docker":
            return made
        argv = (self.program or made.argv[0], *made.argv[1:])
        return dataclasses.replace(made, argv=argv, environment=self.environment)


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
    service = _with_options(service_of(target, options, here, to_run=to_run), options)
    service = _kernel_named(service, here, anywhere=not to_run)
    kernel = service.kernel
    service = dataclasses.replace(service, repack=_repack(service, options, here))
    chosen, program = _choose(service, options.server, to_run=to_run)
    notes = [*command(chosen.name, service).notes, *_exposure(options)]
    if kernel is not None and kernel.note:
        notes.append(kernel.note)
    shown = tuple(visible_gpus(service.placement, os.environ).items()) if here.gpus else ()
    if chosen.name == "transformers" and not here.gpus:
        shown += tuple(UNCOMPILED.items())
    if program.own_environment and os.environ.get("PYTHONPATH"):
        shown += (("PYTHONPATH", ""),)  # packages of this Python are of other versions
    return Prepared(service=service, server=chosen, program=program.path, environment=shown, notes=tuple(notes))


def _kernel_named(service: Service, here: HardwareProfile, *, anywhere: bool) -> Service:
    """The service with the kernel that it gets; without a GPU, with the runtime and the kernel that work there.

    That is how ``qplan verify`` measures the same artifact. ``anywhere``: it is only printed, so GPUs that it is set
    for may be another machine's.
    """
    elsewhere = anywhere and service.placement.gpu_count > 0
    if service.kernel is not None or service.variant.format == "gguf" or here.gpus or elsewhere:
        return dataclasses.replace(service, kernel=service.kernel or kernels.reading(service.variant))
    variant = kernels.fitting(service.variant, here)
    found = kernels.validate(variant, (), here, gpus_used=False)
    return dataclasses.replace(
        service,
        variant=variant,
        placement=dataclasses.replace(service.placement, gpu_layers=0, gpu_count=0, tensor_parallel=1),
        kernel=found if isinstance(found, KernelUse) else kernels.reading(variant),
    )


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


def _choose(service: Service, asked: str | None, *, to_run: bool) -> tuple[Server, Program]:
    """The server that was asked for; else the first of the runtime's that is installed."""
    look = server_programs.check if to_run else server_programs.find
    if asked is not None:
        row = server(asked)
        command(asked, service)  # refuses a format that it does not read
        return row, look(row, service.variant)
    runtime = [row for row in servers() if row.runtime == service.variant.runtime]
    for row in runtime:
        if not (found := server_programs.find(row, service.variant)).lacking:
            return row, found
    named = default_server(service)
    if to_run:
        named = next((row.name for row in runtime if row.name == PYTHON_SERVER), named)
    return server(named), look(server(named), service.variant)


def _exposure(options: Options) -> tuple[str, ...]:
    if options.host in LOOPBACK:
        return ()
    where = "every network of this machine" if options.host in {"0.0.0.0", "::"} else options.host
    return (f"it listens on {where}: whoever reaches it can use the model, and nothing is asked for a password",)


def usual_port() -> int:
    """The port that a server has unless told otherwise; 0, for a free one, where somebody has it already."""
    try:
        serving.check_port(HOST, PORT)
    except ExecutionFailed:
        return 0
    return PORT


def log_path(prepared: Prepared) -> Path:
    """Where the server's own words go."""
    return home() / "logs" / f"serve-{prepared.service.port or PORT}.log"


def start(
    prepared: Prepared,
    announce: Callable[[serving.Running], None],
    tell: Callable[[str], None],
    timeout_seconds: float = TIMEOUT_SECONDS,
    stop: threading.Event | None = None,
) -> None:
    """Run the server until it or this process is asked to end; once more without repacking where llama.cpp faults.

    Args:
        prepared: what to run.
        announce: called when it answers.
        tell: called with what a person should know.
        timeout_seconds: it must answer within this.
        stop: set by another thread, it ends the server.

    Raises:
        ExecutionFailed: the port is taken, the server died, or it does not answer.
        Interrupted: ``stop`` was set.
        KeyboardInterrupt: Ctrl-C.
    """
    service = prepared.service
    host, port = service.host or HOST, service.port or PORT
    serving.check_port(host, port)
    with stoppable(stop):
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
        log=log_path(prepared),
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
    return made[what]()
