"""Estimates of single cases and of batches, as the contract's JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import lru_cache
from itertools import islice
from typing import Any

from planner import FORMAT_VERSION, methods
from planner.core.candidate import Placement, Variant
from planner.core.devices import with_backend
from planner.core.errors import QplanError, UsageError
from planner.core.estimates import Estimate
from planner.core.hardware import HardwareProfile
from planner.core.model import ModelSpec, shape_twin
from planner.core.workload import KV_TYPES
from planner.estimate import kv_cache
from planner.runtimes import kernels
from planner.workflow.documents import estimate_document
from planner.workflow.survey import cached_survey, calibration_of, simulated

DEFAULT_TYPES = {"gguf": "Q4_K_M", "awq": "4bit", "gptq": "4bit", "bitsandbytes": "nf4", "none": "bf16"}
DEFAULT_GROUP_SIZE = 128
DEFAULT_CONTEXT = 8192
KEYS = {
    "id", "model", "params", "active_params", "method", "type", "group_size", "imatrix", "context", "depth", "kv_type",
    "gpu_layers", "ubatch", "flash_attention", "profile", "device", "device_count", "backend", "threads",
    "prompt_tokens", "sequences", "act_order", "runtime", "cpu_expert_layers", "tensor_split",
}  # fmt: skip

BLOCK_LINES = 20_000
_GROUPED_BY = tuple(re.compile(rf'"{key}"\s*:\s*"([^"]*)"') for key in ("model", "type"))
MOST_DEVICES = 1024
_LARGEST_SHARE = 1e15

Case = dict[str, Any]


def estimate_case(case: Case) -> dict[str, Any]:
    """The contract's answer to one case.

    Raises:
        QplanError: the case names something unknown or has a value of the wrong kind.
    """
    model, variant, _, _, made = computed_case(case)
    return {
        "format_version": FORMAT_VERSION,
        "id": case.get("id"),
        "model": model.name,
        "method": variant.method,
        "type": variant.type,
        **estimate_document(made),
    }


def computed_case(case: Case) -> tuple[ModelSpec, Variant, Placement, HardwareProfile, Estimate]:
    """The values behind :func:`estimate_case`, for a front end that prints more of them; null is as good as absent."""
    from planner.estimate import estimate

    unknown = sorted(set(case) - KEYS)
    if unknown:
        raise UsageError(f"unknown key {unknown[0]!r}", hint=f"known keys: {', '.join(sorted(KEYS))}", code="bad-case")
    case = {key: value for key, value in case.items() if value is not None}
    model = _model(case)
    hardware = _hardware(case)
    variant = _variant(case)
    if case.get("runtime") is None:
        variant = kernels.fitting(variant, hardware)
    placement = _placement(case, model, hardware, variant)
    measured = None if case.get("device") or case.get("profile") else _calibration(hardware)
    return model, variant, placement, hardware, estimate(model, variant, placement, hardware, measured)


@lru_cache(maxsize=8)
def _calibration(hardware: HardwareProfile) -> Any:
    return calibration_of(hardware)[0]


def _model(case: Case) -> ModelSpec:
    name = case.get("model")
    if name is not None:
        return _resolved(_text(case, "model", ""))
    if case.get("params") is None:
        raise UsageError("a case needs `model`, or `params` for a bare size", code="bad-case")
    active = case.get("active_params")
    return _of_size(_number(case, "params", 0.0), None if active is None else _number(case, "active_params", 0.0))


@lru_cache(maxsize=512)
def _resolved(name: str) -> ModelSpec:
    from planner import models

    return models.resolve(name)


def usual_context(name: str) -> int:
    """Tokens of context that a recommendation for this model begins with: no more than it was trained with.

    Raises:
        QplanError: no model has this name, or its files are unreadable.
    """
    return min(DEFAULT_CONTEXT, _resolved(name).n_ctx_train)


@lru_cache(maxsize=512)
def _of_size(params: float, active: float | None) -> ModelSpec:
    from planner.models.size_model import spec_from_parameters

    return spec_from_parameters(params, active)


def _hardware(case: Case) -> HardwareProfile:
    device = case.get("device")
    if device is not None:
        backend = case.get("backend")
        count = _whole(case, "device_count", 1, least=1, most=MOST_DEVICES)
        return simulated(_text(case, "device", ""), count, backend and _text(case, "backend", ""))
    profile = case.get("profile")
    machine = cached_survey(None if profile is None else _text(case, "profile", ""))
    return machine if case.get("backend") is None else with_backend(machine, _text(case, "backend", ""))


def _variant(case: Case) -> Variant:
    method = _text(case, "method", "gguf")
    methods.row(method)
    group = case.get("group_size")
    made = _made_variant(
        method,
        _text(case, "type", DEFAULT_TYPES.get(method, "")),
        None if group is None else _whole(case, "group_size", DEFAULT_GROUP_SIZE),
        _switch(case, "imatrix", False),
    )
    runtime = case.get("runtime")
    return made if runtime is None or method == "gguf" else _run_by(made, _text(case, "runtime", ""))


@lru_cache(maxsize=1024)
def _made_variant(method: str, type_: str, group_size: int | None, imatrix: bool) -> Variant:
    if method == "gguf":
        from planner.methods import gguf

        return gguf.variant(type_.upper(), imatrix=imatrix)
    module: Any = methods.get(method)
    made: Variant = module.variant(type_.lower(), DEFAULT_GROUP_SIZE if group_size is None else group_size)
    return made


@lru_cache(maxsize=256)
def _run_by(variant: Variant, runtime: str) -> Variant:
    """The same artifact under another program: ``vllm``, ``transformers``, ``exllama`` …"""
    return replace(variant, runtime=runtime.lower())


def _placement(case: Case, model: ModelSpec, hardware: HardwareProfile, variant: Variant) -> Placement:
    count = len(hardware.gpus)
    full = model.offloadable_count
    asked = case.get("gpu_layers", "all" if count else 0)
    layers = full if asked == "all" else min(_whole({"gpu_layers": asked}, "gpu_layers", 0), full)
    kv_type = _text(case, "kv_type", "f16")
    if kv_type not in KV_TYPES:
        raise UsageError(f"{kv_type!r} is no KV cache type", hint=f"one of {', '.join(KV_TYPES)}", code="bad-case")
    if variant.format == "gguf":
        kv_cache.check_type(model, kv_type)
    on_gpu = count > 0 and case.get("backend") != "cpu"
    depth = _whole(case, "depth", 0)
    return Placement(
        context=_context(case, depth),
        kv_type=kv_type,
        gpu_layers=layers if on_gpu else 0,
        tensor_parallel=count if on_gpu and variant.format != "gguf" else 1,
        ubatch=_whole(case, "ubatch", 512, least=1),
        flash_attention=_switch(case, "flash_attention", True),
        sequences=_whole(case, "sequences", 1, least=1),
        threads=None if case.get("threads") is None else _whole(case, "threads", 1, least=1),
        depth=depth,
        prompt_tokens=_whole(case, "prompt_tokens", 512, least=1),
        gpu_count=count if on_gpu else 0,
        cpu_expert_layers=min(_whole(case, "cpu_expert_layers", 0), model.n_layer) if on_gpu else 0,
        tensor_split=_shares(case, count) if on_gpu else (),
    )


def _context(case: Case, depth: int) -> int:
    """The context asked for, which holds ``depth`` tokens; unasked the usual one, or as much as they need."""
    if case.get("context") is None:
        return max(DEFAULT_CONTEXT, depth + 1)
    context = _whole(case, "context", DEFAULT_CONTEXT, least=1)
    if depth > context:
        raise UsageError(
            "`depth` is more than the context holds",
            numbers=f"{depth} tokens in a cache of {context}",
            hint=f"give a context of at least {depth}, or leave it out",
            code="bad-case",
        )
    return context


def _shares(case: Case, count: int) -> tuple[float, ...]:
    """The GPUs' shares: a list of numbers, or text as llama.cpp's ``--tensor-split`` takes it."""
    given = case.get("tensor_split")
    if given is None:
        return ()
    parts: list[Any] = given.split(",") if isinstance(given, str) else given if isinstance(given, list) else [None]
    try:
        shares = tuple(float(part) for part in parts if not isinstance(part, bool)) if len(parts) <= count else ()
    except (TypeError, ValueError, OverflowError):
        shares = ()
    if len(shares) < len(parts) or not any(shares) or not all(0 <= share < _LARGEST_SHARE for share in shares):
        wanted = f"`tensor_split` must be a list of at most {count} shares, one for each GPU"
        raise UsageError(wanted, numbers=f"got {_short(given)}", hint="as in [3, 1] or '3,1'", code="bad-case")
    return shares


def _switch(case: Case, key: str, default: bool) -> bool:
    value = case.get(key, default)
    known: dict[object, bool] = {True: True, False: False, "on": True, "off": False, "true": True, "false": False}
    if not isinstance(value, (bool, str)) or value not in known:
        raise UsageError(f"`{key}` must be true or false", numbers=f"got {_short(value)}", code="bad-case")
    return known[value]


def _short(value: object) -> str:
    """A value for an error; ``repr`` of a number of more than 4300 digits raises."""
    return "a number too long to print" if isinstance(value, int) and value.bit_length() > 256 else repr(value)[:60]


def _text(case: Case, key: str, default: str) -> str:
    value = case.get(key, default)
    if not isinstance(value, str) or not value:
        raise UsageError(f"`{key}` must be text", numbers=f"got {_short(value)}", code="bad-case")
    return value


def _number(case: Case, key: str, default: float) -> float:
    value = case.get(key, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e15:
        raise UsageError(f"`{key}` must be a positive number", numbers=f"got {_short(value)}", code="bad-case")
    return float(value)


def _whole(case: Case, key: str, default: int, *, least: int | None = None, most: int = 1 << 40) -> int:
    value = case.get(key, default)
    floor = least if least is not None else -1 if key == "group_size" else 0
    if isinstance(value, bool) or not isinstance(value, int) or not floor <= value <= most:
        wanted = f"`{key}` must be a whole number from {floor} to {most}"
        raise UsageError(wanted, numbers=f"got {_short(value)}", code="bad-case")
    return value


def estimate_batch(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    """One answer per non-empty line of JSON, in order; a bad line gets an ``error`` and the rest go on."""
    for line in lines:
        if line.strip():
            yield answer_of(line)


def estimate_file(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    """:func:`estimate_batch` of lines that are all there already, a block of them at a time.

    Within a block the cases of one model and type are answered together: what depends on these alone is the larger
    part of the work and is kept for a few hundred of them. The answers come in the order of the lines.
    """
    rest = (line for line in lines if line.strip())
    while block := list(islice(rest, BLOCK_LINES)):
        answers: list[dict[str, Any]] = [{}] * len(block)
        for _, at in grouped(block):
            answers[at] = answer_of(block[at])
        yield from answers


def grouped(lines: list[str]) -> list[tuple[tuple[str, ...], int]]:
    """The model and the type of each case as its line writes them, sorted, with the line's index.

    Models that only differ in their names are neighbours: see :func:`planner.core.model.shape_twin`.
    """
    found = []
    for at, line in enumerate(lines):
        model, type_ = (match[1] if (match := pattern.search(line)) else "" for pattern in _GROUPED_BY)
        found.append(((_twin_name(model), type_), at))
    return sorted(found)


@lru_cache(maxsize=4096)
def _twin_name(name: str) -> str:
    from planner.models import catalog

    found = catalog.lookup(name)
    return name if found is None else shape_twin(found).name


def answer_of(line: str) -> dict[str, Any]:
    """The answer to one line of JSON; an ``error`` if it is a bad one."""
    case: object = None
    try:
        case = _parsed(line)
        if not isinstance(case, dict):
            raise UsageError("a case is a JSON object", numbers=f"got {line.strip()[:60]!r}", code="bad-case")
        _check_numbers(case)
        return estimate_case(case)
    except QplanError as error:
        return _failed(case, error.code, "; ".join(part for part in (error.what, error.numbers, error.hint) if part))


def _parsed(line: str) -> object:
    try:
        return json.loads(line, parse_constant=_NoNumber)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"not JSON: {error}", code="bad-json") from None


class _NoNumber(str):
    """``NaN`` or ``Infinity``: no JSON, but the rest of the line can be read, and with it the case's ``id``."""


def _check_numbers(case: Case) -> None:
    for key, value in case.items():
        if isinstance(value, _NoNumber):
            raise UsageError(f"not JSON: `{key}` is {value}, which is no JSON number", code="bad-json")


def _failed(case: object, code: str, message: str) -> dict[str, Any]:
    name = case.get("id") if isinstance(case, dict) and not isinstance(case.get("id"), _NoNumber) else None
    return {"id": name, "error": {"code": code, "message": message}}
