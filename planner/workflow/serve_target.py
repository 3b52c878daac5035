"""What is served: the artifact of a plan or a report, a GGUF file or a checkpoint, with its settings."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from planner.core.candidate import Placement, Variant
from planner.core.codec import read_json
from planner.core.errors import DoesNotFit, InputError, QplanError
from planner.core.hardware import HardwareProfile
from planner.core.plan import Plan
from planner.core.workload import KV_TYPES, Workload
from planner.runtimes.service import HOST, PORT, Service, servers
from planner.workflow.planning import check_hardware, load_plan, plan_of
from planner.workflow.reporting import is_report, run_report

_MOST_DOCUMENTS = 64
"""JSON files beside a report that are looked at for its plan."""
_MOST_DOCUMENT_BYTES = 8 << 20
_CHECKPOINT_CONTEXT = 8192


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


def service_of(target: Path, options: Options, here: HardwareProfile, *, to_run: bool) -> Service:
    """The artifact that ``target`` stands for, with the settings that it was planned with or that fit here.

    Raises:
        InputError: it is missing or damaged, or the document is none of qplan's.
        StalePlan: the plan was edited, or is for another machine and is to run here.
        DoesNotFit: a GGUF file does not fit this machine.
    """
    found = _found(target, options, here, to_run=to_run)
    _check_known(found)
    return found


def _found(target: Path, options: Options, here: HardwareProfile, *, to_run: bool) -> Service:
    target = run_report(target)
    if target.suffix == ".json":
        document = read_json(target)
        if is_report(document):
            return _of_report(target, document, options, here, to_run=to_run)
        return _of_plan(load_plan(target), options.output or target.absolute().parent, here, to_run=to_run)
    return _of_artifact(target.absolute(), options)


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
    """The artifact that lies beside a report, with the settings of its plan: the report holds it, or it lies there."""
    named = document.get("artifact")
    if not isinstance(named, str) or Path(named).name in {"", ".."}:
        raise InputError(f"{path} is no report of qplan", numbers="it names no artifact", code="bad-document")
    folder = path.absolute().parent
    sha256 = document.get("plan_sha256")
    plans = chain((_plan_or_none(lambda: plan_of(document.get("plan"), str(path))),), map(_plan_in, _documents(folder)))
    plan = next((p for p in plans if p and p.content_sha256 == sha256), None)
    if plan is not None:
        return _of_plan(plan, options.output or folder, here, to_run=to_run)
    artifact = (options.output or folder) / Path(named).name
    _check_artifact(artifact, hint="the report's artifact lies elsewhere: name it, as in `qplan serve model.gguf`")
    return _of_artifact(artifact.absolute(), options)


def _documents(folder: Path) -> list[Path]:
    found = sorted(folder.glob("*.json"))[:_MOST_DOCUMENTS]
    return [path for path in found if path.is_file() and path.stat().st_size <= _MOST_DOCUMENT_BYTES]


def _plan_in(path: Path) -> Plan | None:
    return _plan_or_none(lambda: load_plan(path))


def _plan_or_none(read: Callable[[], Plan]) -> Plan | None:
    try:
        return read()
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


def _of_artifact(artifact: Path, options: Options) -> Service:
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
