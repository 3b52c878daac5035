"""What is served and how, as a value, and the command that a runtime is started with."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from planner.core.candidate import Candidate, KernelUse, Placement, Variant
from planner.core.data import named, read_rows
from planner.runtimes.kernels import runtimes

HOST = "127.0.0.1"
PORT = 8080
UNCOMPILED = {"TORCHDYNAMO_DISABLE": "1"}
"""GPTQModel has torch compile a C++ program for each shape of a layer on a CPU, which takes minutes before the first
token (GPTQModel 7.6.0, GPTQ of 3 bits, 2026-11-26); without, its kernels run as they are."""
LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """A row of ``data/servers.toml``: a program that serves, and the options it has."""

    name: str
    runtime: str
    program: str
    version: str
    ready: str
    """Path that answers 200 once it serves."""
    install: str
    source: str
    date: str
    options: tuple[str, ...]
    modules: tuple[str, ...] = ()
    """Of Python: what must be there where the server is part of it; empty for a program by itself."""
    image: str | None = None
    image_cuda: str | None = None

    @property
    def formats(self) -> tuple[str, ...]:
        """File layouts that its runtime reads."""
        return next(row.formats for row in runtimes() if row.name == self.runtime)


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """An artifact with its settings; what is ``None`` is left to the server."""

    target: str
    """Path of a file or directory, or a hub id."""
    variant: Variant
    placement: Placement
    kernel: KernelUse | None = None
    host: str | None = None
    port: int | None = None
    name: str | None = None
    """What the API calls the model."""
    repack: bool = True
    """False: without llama.cpp's CPU-specific layouts, which crash on machines that announce AMX and fault on it."""
    chat_template: str | None = None
    """Path of a Jinja file that replaces the model's own template."""
    memory_bytes: int | None = None
    """RAM that it should take, for a scheduler."""

    @classmethod
    def of(cls, target: str, candidate: Candidate) -> Service:
        """A candidate's settings for the artifact ``target``."""
        return cls(target=target, variant=candidate.variant, placement=candidate.placement, kernel=candidate.kernel)

    @property
    def positional(self) -> str:
        """The target where a program takes it without an option: a name that starts with a dash is no option."""
        return f"./{self.target}" if self.target.startswith("-") else self.target

    @property
    def is_local(self) -> bool:
        """Whether the target is a path rather than a hub id ``org/name``."""
        return self.target.startswith(("/", ".")) or self.target.count("/") != 1

    def argument(self, name: str) -> str | None:
        """What the kernel asks the runtime to be told."""
        return dict(self.kernel.arguments).get(name) if self.kernel else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """A program with its arguments, one string each: no shell reads them."""

    argv: tuple[str, ...]
    environment: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()
    """What this server cannot do of what was planned."""

    def text(self) -> str:
        """One line for a POSIX shell."""
        set_first = [f"{name}={shlex.quote(value)}" for name, value in self.environment]
        return " ".join((*set_first, shlex.join(self.argv)))


@cache
def servers() -> tuple[Server, ...]:
    """All servers, in the table's order."""
    return read_rows(Server, "servers.toml", "server")


def server(name: str) -> Server:
    """The row of a server.

    Raises:
        UsageError: there is none of this name.
    """
    return named(servers(), name, what="server", code="unknown-server")


def visible_gpus(placement: Placement, environment: Mapping[str, str]) -> dict[str, str]:
    """Variables that show a runtime the plan's GPUs in NVML's order, which the profile follows.

    ``environment`` is the caller's: a choice of GPUs that was made there stands.
    """
    if "CUDA_VISIBLE_DEVICES" in environment:
        return {}
    count = placement.gpu_count
    if placement.gpu_layers == 0 and count == 0:
        return {"CUDA_VISIBLE_DEVICES": "-1"}  # else llama.cpp would lend the GPU for long prompts
    visible = {"CUDA_VISIBLE_DEVICES": ",".join(map(str, range(count)))} if count else {}
    return {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", **visible}
