"""vLLM, text-generation-inference and transformers' own server with a plan's settings."""

from __future__ import annotations

from pathlib import PurePosixPath

from planner.runtimes.service import HOST, PORT, Command, Service, server

_TGI_PORT = 80
"""What the container listens on, https://huggingface.co/docs/text-generation-inference/quicktour."""


def vllm(service: Service) -> Command:
    """``vllm serve``. How the weights are quantized stands in the checkpoint, and vLLM picks its fastest kernel.

    ``--quantization`` is given only where a kernel asks for it: naming ``awq`` or ``gptq`` made vLLM before 0.20 take
    the slow kernel (https://github.com/vllm-project/vllm/pull/14056).
    """
    placement = service.placement
    argv = ["vllm", "serve", service.positional]
    argv += ["--max-model-len", str(placement.context), "--max-num-seqs", str(placement.sequences)]
    if quantization := service.argument("quantization") or _online_quantization(service):
        argv += ["--quantization", quantization]
    if placement.tensor_parallel > 1:
        argv += ["--tensor-parallel-size", str(placement.tensor_parallel)]
    if service.chat_template:
        argv += ["--chat-template", service.chat_template]
    if service.name:
        argv += ["--served-model-name", service.name]
    if service.host:
        argv += ["--host", service.host]
    if service.port:
        argv += ["--port", str(service.port)]
    return Command(argv=tuple(argv), notes=kv_note(service, "vLLM"))


def _online_quantization(service: Service) -> str | None:
    """What vLLM quantizes to while it loads 16-bit weights."""
    return "fp8" if service.variant.method == "none" and service.variant.type == "fp8" else None


def kv_note(service: Service, runtime: str) -> tuple[str, ...]:
    """ggml's types of a KV cache are llama.cpp's alone."""
    if service.placement.kv_type in {"f16", "bf16"}:
        return ()
    return (f"{runtime} has no {service.placement.kv_type} KV cache: it keeps 16 bits, and takes more memory",)


def tgi(service: Service) -> Command:
    """text-generation-inference in docker; the artifact's folder is mounted read-only."""
    placement = service.placement
    model, mount = service.target, []
    if service.is_local:
        path = PurePosixPath(service.target)
        folder = str(path.parent) if path.is_absolute() else "."
        model, mount = f"/data/{path.name}", ["-v", f"{folder}:/data:ro"]
    address = f"{_bracketed(service.host or HOST)}:{service.port or PORT}:{_TGI_PORT}"
    argv = ["docker", "run", "--rm", "--gpus", "all", "--shm-size", "1g", "-p", address, *mount]
    argv += [str(server("tgi").image), "--model-id", model]
    if quantize := _tgi_quantize(service):
        argv += ["--quantize", quantize]
    argv += ["--max-total-tokens", str(placement.context), "--num-shard", str(placement.tensor_parallel)]
    argv += ["--max-concurrent-requests", str(max(placement.sequences, 1))]
    return Command(argv=tuple(argv), notes=kv_note(service, "TGI"))


def _tgi_quantize(service: Service) -> str | None:
    if service.variant.method in {"awq", "gptq"}:
        return service.variant.method
    if service.variant.method == "bitsandbytes":
        return {"nf4": "bitsandbytes-nf4", "fp4": "bitsandbytes-fp4"}.get(service.variant.type, "bitsandbytes")
    return _online_quantization(service)


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def transformers(service: Service) -> Command:
    """``transformers serve``, which quantizes with bitsandbytes while it loads; its context is the model's own."""
    quantization = {"nf4": "bnb-4bit", "int8": "bnb-8bit"}.get(service.variant.type)
    argv = ["transformers", "serve", service.positional, "--continuous-batching"]
    argv += ["--dtype", service.argument("dtype") or "auto"]
    notes = list(kv_note(service, "transformers"))
    if service.variant.method == "bitsandbytes":
        if quantization is None:
            notes.append(f"transformers serve has no {service.variant.type}: it is used where the checkpoint has it")
        else:
            argv += ["--quantization", quantization]
    if service.host:
        argv += ["--host", service.host]
    if service.port:
        argv += ["--port", str(service.port)]
    if service.chat_template:
        notes.append("transformers serve takes no template file: the checkpoint's own is used")
    return Command(argv=tuple(argv), notes=tuple(notes))
