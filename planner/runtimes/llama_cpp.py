"""llama-server and llama-cpp-python's server with a plan's settings."""

from __future__ import annotations

import sys

from planner.formats import ggml
from planner.runtimes.service import Command, Service

PYTHON_SERVER = "planner.serve.python_server"
"""Module that starts ``llama_cpp.server`` with what its command line cannot say."""


def llama_server(service: Service) -> Command:
    """llama-server: every setting of a placement has an option.

    ``-c`` is the context of all slots together, and ``-np`` is always given: unasked, llama-server opens four.
    """
    placement = service.placement
    argv = ["llama-server", "-m", service.target]
    argv += ["-c", str(placement.context * placement.sequences), "-np", str(placement.sequences)]
    argv += ["-ngl", str(placement.gpu_layers), "-b", str(placement.batch), "-ub", str(placement.ubatch)]
    argv += ["-fa", "on" if placement.flash_attention else "off"]
    if placement.kv_type != "f16":
        argv += ["-ctk", placement.kv_type, "-ctv", placement.kv_type]
    if placement.threads:
        argv += ["-t", str(placement.threads)]
    if placement.cpu_expert_layers:
        argv += ["--n-cpu-moe", str(placement.cpu_expert_layers)]
    if placement.tensor_split:
        argv += ["--tensor-split", ",".join(f"{share:g}" for share in placement.tensor_split)]
    if not service.repack:
        argv.append("--no-repack")
    if service.chat_template:
        argv += ["--jinja", "--chat-template-file", service.chat_template]
    if service.name:
        argv += ["--alias", service.name]
    return Command(argv=(*argv, *_address(service)))


def python_server(service: Service) -> Command:
    """llama-cpp-python's server, through a module of qplan that adds ``--no-repack`` and ``--n-cpu-moe``.

    It serves one sequence at a time, and holds no logits but the last (``--logits_all false``; its default takes
    ``context × vocabulary`` floats).
    """
    placement = service.placement
    settings: dict[str, object] = {
        "model": service.target,
        "n_ctx": placement.context,
        "n_gpu_layers": placement.gpu_layers,
        "n_batch": placement.batch,
        "n_ubatch": placement.ubatch,
        "flash_attn": placement.flash_attention,
        "logits_all": False,
        "use_mlock": False,
    }
    if placement.threads:
        settings |= {"n_threads": placement.threads, "n_threads_batch": placement.threads}
    if placement.kv_type != "f16":
        type_id = ggml.type_traits(placement.kv_type.upper()).id
        settings |= {"type_k": type_id, "type_v": type_id}
    if service.name:
        settings["model_alias"] = service.name
    argv = [sys.executable or "python3", "-m", PYTHON_SERVER]
    for name, value in settings.items():
        argv += [f"--{name}", str(value).lower() if isinstance(value, bool) else str(value)]
    if placement.tensor_split:
        argv += ["--tensor_split", *(f"{share:g}" for share in placement.tensor_split)]
    if placement.cpu_expert_layers:
        argv += ["--n-cpu-moe", str(placement.cpu_expert_layers)]
    if not service.repack:
        argv.append("--no-repack")
    return Command(argv=(*argv, *_address(service)), notes=_python_notes(service))


def _python_notes(service: Service) -> tuple[str, ...]:
    notes = []
    if service.placement.sequences > 1:
        count = service.placement.sequences
        notes.append(f"llama-cpp-python's server answers one request at a time; llama-server would serve {count}")
    if service.chat_template:
        notes.append(
            "llama-cpp-python's server takes no template file: the model's own is used; llama-server takes one"
        )
    return tuple(notes)


def _address(service: Service) -> list[str]:
    host = ["--host", service.host] if service.host else []
    return host + (["--port", str(service.port)] if service.port else [])
