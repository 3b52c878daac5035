"""The command of each server by name."""

from __future__ import annotations

from collections.abc import Callable

from planner.core.errors import UsageError
from planner.runtimes import gpu_servers, llama_cpp
from planner.runtimes.service import Command, Service, server, servers

_BUILDERS: dict[str, Callable[[Service], Command]] = {
    "llama-server": llama_cpp.llama_server,
    "llama-cpp-python": llama_cpp.python_server,
    "vllm": gpu_servers.vllm,
    "tgi": gpu_servers.tgi,
    "transformers": gpu_servers.transformers,
}


def command(name: str, service: Service) -> Command:
    """How the server called ``name`` is started for ``service``.

    Raises:
        UsageError: there is no such server, or it does not read this format.
    """
    row = server(name)
    if service.variant.format not in row.formats:
        able = [other.name for other in servers() if service.variant.format in other.formats]
        raise UsageError(
            f"{name} does not read {service.variant.format} ({service.variant.label()})",
            numbers=f"it reads {', '.join(row.formats)} ({row.version})",
            hint=f"--server {' or '.join(able)}",
            code="wrong-server",
        )
    return _BUILDERS[name](service)


def default_server(service: Service) -> str:
    """The server that a runtime is named after: what is printed where nothing is installed."""
    return next(row.name for row in servers() if row.runtime == service.variant.runtime)
