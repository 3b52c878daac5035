"""A service as an Ollama Modelfile, a docker command and a Kubernetes manifest. Texts for other programs to read."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import PurePosixPath
from typing import Any

from planner.core.errors import MissingDependency, UsageError
from planner.runtimes.commands import command, default_server
from planner.runtimes.service import HOST, PORT, Command, Service, server

_EVERYWHERE = "0.0.0.0"
"""Inside a container: what reaches it is decided by what is published of it."""
_MODELS = "/models"
_LABEL_LENGTH = 63
"""A name in Kubernetes is a DNS label, RFC 1123."""
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


def modelfile(service: Service) -> str:
    """An Ollama Modelfile. What Ollama is told by its environment stands in comments.

    Ollama has no option for experts or splits: it is left to place such a model by itself.
    Source: https://docs.ollama.com/modelfile and, for the environment, https://docs.ollama.com/faq.

    Raises:
        UsageError: no GGUF file, or a name that a Modelfile cannot hold.
    """
    if service.variant.format != "gguf":
        raise UsageError(f"Ollama reads GGUF files, not {service.variant.format}", code="wrong-server")
    placement = service.placement
    lines = [f"FROM {_quoted(service)}", f"PARAMETER num_ctx {placement.context}"]
    if placement.cpu_expert_layers or placement.tensor_split:
        lines.append(
            "# no num_gpu: Ollama cannot keep experts in RAM or split unevenly, so it chooses the layers itself"
        )
    else:
        lines.append(f"PARAMETER num_gpu {placement.gpu_layers}")
    if placement.threads:
        lines.append(f"PARAMETER num_thread {placement.threads}")
    lines.append(f"PARAMETER num_batch {placement.ubatch}")
    environment = {"OLLAMA_FLASH_ATTENTION": "1"} if placement.flash_attention else {}
    if placement.kv_type != "f16":
        environment["OLLAMA_KV_CACHE_TYPE"] = placement.kv_type
    if placement.sequences > 1:
        environment["OLLAMA_NUM_PARALLEL"] = str(placement.sequences)
    if environment:
        lines.append(f"# start Ollama with {' '.join(f'{name}={value}' for name, value in environment.items())}")
    return "\n".join(lines)


def _quoted(service: Service) -> str:
    """The file as a Modelfile names it: a bare name would be one of Ollama's own models."""
    path = service.target if service.target.startswith("/") else f"./{service.target.removeprefix('./')}"
    if _CONTROL.search(path) or '"' in path:
        raise UsageError(f"a Modelfile cannot name {path!r}", hint="rename the file", code="bad-name")
    return f'"{path}"' if " " in path or "#" in path else path


def docker(service: Service, server_name: str | None = None) -> Command:
    """The server in its own image, with the artifact's folder mounted read-only."""
    name = _with_image(service, server_name)
    if name == "tgi":
        return command("tgi", service)
    host, port = service.host or HOST, service.port or PORT
    image, arguments, mounted = _contained(service, name)
    argv = ["docker", "run", "--rm", *(["--gpus", "all"] if _gpus(service) else [])]
    argv += ["-p", f"{f'[{host}]' if ':' in host else host}:{port}:{port}"]
    if mounted:
        folder = PurePosixPath(service.target).parent
        argv += ["-v", f"{folder}:{_MODELS}:ro"]
    if name == "vllm":
        argv += ["--ipc=host"]
    return Command(argv=(*argv, image, *arguments), notes=command(name, service).notes)


def _with_image(service: Service, asked: str | None) -> str:
    name = asked or default_server(service)
    if name == "llama-cpp-python":
        name = "llama-server"
    if server(name).image is None:
        raise UsageError(f"there is no image of {name}", hint="--print command shows how to start it", code="no-image")
    return name


def _gpus(service: Service) -> int:
    placement = service.placement
    if service.variant.format == "gguf":
        return placement.gpu_count if placement.gpu_layers else 0
    return max(placement.tensor_parallel, placement.gpu_count, 1)


def _contained(service: Service, name: str) -> tuple[str, list[str], bool]:
    """Image, arguments of its entry point, and whether the target is a mounted file rather than a hub id."""
    row = server(name)
    target, mounted = service.target, service.is_local
    if mounted:
        target = f"{_MODELS}/{PurePosixPath(service.target).name}"
    inside = replace(service, target=target, host=_EVERYWHERE, port=service.port or PORT)
    argv = command(name, inside).argv
    image = row.image_cuda if row.image_cuda and _gpus(service) else row.image
    skipped = 2 if name == "vllm" else 1  # the entry points are `vllm serve` and `llama-server`
    return str(image), list(argv[skipped:]), mounted


def kubernetes(service: Service, server_name: str | None = None) -> str:
    """A Deployment and a Service; a local artifact is expected on the volume claim ``models``.

    Source: https://docs.vllm.ai/en/latest/deployment/k8s/.

    Raises:
        MissingDependency: PyYAML is not installed.
        UsageError: the server has no image.
    """
    try:
        import yaml  # type: ignore[import-untyped]
    except ImportError:
        raise MissingDependency("a manifest needs PyYAML", hint="`pip install pyyaml`") from None

    name = _with_image(service, server_name)
    if name == "tgi":
        raise UsageError("there is no manifest for TGI", hint="--server vllm, or --print docker", code="no-manifest")
    documents = json.loads(
        json.dumps([_deployment(service, name), _service(service)])
    )  # no part twice: no YAML anchors
    text: str = yaml.safe_dump_all(documents, sort_keys=False, allow_unicode=True, width=120)
    return text.rstrip("\n")


def label(text: str) -> str:
    """A DNS label of a model's name: ``Meta-Llama-3.1-8B`` → ``meta-llama-3-1-8b``."""
    found = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:_LABEL_LENGTH].strip("-")
    return found or "model"


def _named(service: Service) -> str:
    return label(service.name or PurePosixPath(service.target).stem)


def _deployment(service: Service, name: str) -> dict[str, Any]:
    labels = {"app": _named(service)}
    container, mounted = _container(service, name)
    volumes: list[dict[str, Any]] = []
    if mounted:
        volumes.append({"name": "models", "persistentVolumeClaim": {"claimName": "models", "readOnly": True}})
    if name == "vllm":
        volumes.append({"name": "shm", "emptyDir": {"medium": "Memory"}})
    pod: dict[str, Any] = {"containers": [container]}
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": labels["app"], "labels": labels},
        "spec": {
            "replicas": 1,
            "selector": {"matchLabels": labels},
            "template": {"metadata": {"labels": labels}, "spec": {**pod, **({"volumes": volumes} if volumes else {})}},
        },
    }


def _container(service: Service, name: str) -> tuple[dict[str, Any], bool]:
    image, arguments, mounted = _contained(service, name)
    port = service.port or PORT
    mounts = [{"name": "models", "mountPath": _MODELS, "readOnly": True}] if mounted else []
    if name == "vllm":
        mounts.append({"name": "shm", "mountPath": "/dev/shm"})
    probe = {"httpGet": {"path": server(name).ready, "port": port}}
    container: dict[str, Any] = {"name": "server", "image": image, "args": arguments}
    container |= {"ports": [{"containerPort": port}], "resources": _resources(service)}
    container |= {"startupProbe": {**probe, "failureThreshold": 360, "periodSeconds": 10}, "readinessProbe": probe}
    if mounts:
        container["volumeMounts"] = mounts
    return container, mounted


def _resources(service: Service) -> dict[str, Any]:
    requests: dict[str, Any] = {}
    if service.memory_bytes:
        requests["memory"] = str(service.memory_bytes)
    if service.placement.threads and not _gpus(service):
        requests["cpu"] = str(service.placement.threads)
    made: dict[str, Any] = {"requests": requests} if requests else {}
    return {**made, "limits": {"nvidia.com/gpu": _gpus(service)}} if _gpus(service) else made


def _service(service: Service) -> dict[str, Any]:
    port = service.port or PORT
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": _named(service)},
        "spec": {
            "type": "ClusterIP",
            "selector": {"app": _named(service)},
            "ports": [{"port": port, "targetPort": port}],
        },
    }
