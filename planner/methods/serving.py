"""Commands for a person: how to quantize by hand and how to serve. Text only; nothing here is executed."""

from __future__ import annotations

import shlex

from planner.core.candidate import Candidate, Variant
from planner.core.errors import UsageError
from planner.core.model import ModelSpec
from planner.runtimes import exports, snippets
from planner.runtimes.commands import command
from planner.runtimes.service import Service


def weights_id(model: ModelSpec) -> str:
    """What a loader is given for the unquantized weights: a directory or a hub id."""
    return model.source.hub_id or model.source.location


def artifact_name(model: ModelSpec, variant: Variant) -> str:
    """Name of the file or directory a variant is written to; of a quantized GGUF file, the file itself."""
    if model.file_type is not None and model.file_type == variant.type:
        return model.source.location
    stem = name_stem(model)
    if variant.format == "gguf":
        return f"{stem}-{variant.type}.gguf"
    group = f"-g{variant.group_size}" if variant.group_size and variant.group_size > 0 else ""
    method = "" if variant.method == "none" else f"-{variant.method}"
    return f"{stem}{method}-{variant.type}{group}{_settings_suffix(variant)}"


def _settings_suffix(variant: Variant) -> str:
    """What tells two artifacts of a type and group size apart: what is not as the method does it unasked."""
    is_awq, is_gptq = variant.method == "awq", variant.method == "gptq"
    parts = (
        ("row", variant.group_size == -1),
        ("sym", is_awq and variant.symmetric),
        ("asym", is_gptq and not variant.symmetric),
        ("actorder", variant.act_order),
        ("plain", variant.is_4bit_bitsandbytes and not variant.double_quantization),
        ("gemv", variant.format == "awq-gemv"),
        ("ct", (is_awq or is_gptq) and variant.format == "compressed-tensors"),
        (variant.quantizer or "", variant.quantizer is not None),
    )
    return "".join(f"-{name}" for name, shown in parts if shown)


def name_stem(model: ModelSpec) -> str:
    """The model's name as it begins the names of files made of it."""
    return model.name.replace("/", "-")


def vllm(model: ModelSpec, candidate: Candidate) -> dict[str, str]:
    """vLLM's server, its Python class, a transformers snippet, and TGI as a docker command."""
    quantized = candidate.variant.method in {"awq", "gptq"}
    target = artifact_name(model, candidate.variant) if quantized else weights_id(model)
    service = Service.of(target, candidate)
    return {
        "serve": command("vllm", service).text(),
        "python": snippets.vllm(service),
        "transformers": snippets.transformers(service),
        "docker": command("tgi", service).text(),
    }


def bitsandbytes(model: ModelSpec, candidate: Candidate) -> dict[str, str]:
    """Transformers with a BitsAndBytesConfig; no server does better with it."""
    service = Service.of(weights_id(model), candidate)
    load = snippets.transformers(service)
    saved = artifact_name(model, candidate.variant)
    return {
        "quantize": f"{load}\nmodel.save_pretrained({saved!r})",
        "serve": command("transformers", service).text(),
        "python": load,
    }


def llama_cpp(model: ModelSpec, candidate: Candidate) -> dict[str, str]:
    """llama-quantize, llama-server, llama-cpp-python and an Ollama Modelfile with the plan's settings."""
    service = Service.of(artifact_name(model, candidate.variant), candidate)
    return {
        "quantize": _llama_quantize(model, candidate.variant),
        "serve": command("llama-server", service).text(),
        "python": snippets.llama_cpp(service),
        "ollama": _ollama(service),
    }


def _ollama(service: Service) -> str:
    """The Modelfile, or why there is none: a name that it cannot hold spoils no recommendation."""
    try:
        return exports.modelfile(service)
    except UsageError as error:
        return f"# {error.what}"


def _llama_quantize(model: ModelSpec, variant: Variant) -> str:
    target = artifact_name(model, variant)
    if model.file_type is not None:
        return f"nothing to do: {target} is {variant.type}"
    convert = ["convert_hf_to_gguf.py", weights_id(model), "--outtype"]
    if variant.type in {"F32", "F16", "BF16"}:
        return shlex.join([*convert, variant.type.lower(), "--outfile", target])
    full = target.replace(variant.type, "f16")
    imatrix = ["--imatrix", "imatrix.gguf"] if variant.imatrix else []
    types = ["--tensor-type-file", "types.txt"] if variant.recipe else []  # lines of tensor=type
    quantize = ["llama-quantize", *imatrix, *types, full, target, variant.main_type]
    return f"{shlex.join([*convert, 'f16', '--outfile', full])}\n{shlex.join(quantize)}"
