"""Which settings are worth measuring: the recommended one, then what differs from it in one setting, then in two."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from itertools import product

from planner.core.candidate import Placement, Variant
from planner.core.hardware import HardwareProfile, usable_core_count
from planner.core.model import ModelSpec
from planner.core.units import format_bytes
from planner.core.workload import Workload
from planner.decide.settings import EXACT_KV
from planner.estimate import kv_cache
from planner.estimate.memory import memory
from planner.estimate.placement import shortage

MOST_CHANGES = 2
"""Settings that differ from the recommended one in more ways are left out: effects mostly add up."""
MOST_SETTINGS = 48
_UBATCHES = (128, 256, 512, 1024)
_GPU_UBATCHES = (*_UBATCHES, 2048)
_LEAST_BATCH = 2048
_LAYER_SHARES = (0.95, 0.85, 0.7, 0.5)
"""Shares of the recommended layers to try beside one more, one less and all: fewer leave room for faster passes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Unfit:
    """A setting that is not tried, and why."""

    setting: Placement
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Space:
    """What to measure; the first setting is the recommended one."""

    settings: tuple[Placement, ...]
    unfit: tuple[Unfit, ...] = ()


def space(
    model: ModelSpec, variant: Variant, hardware: HardwareProfile, workload: Workload, base: Placement, objective: str
) -> Space:
    """Settings around ``base`` that fit by the memory estimate, the nearest first.

    Args:
        objective: ``decode``, ``prefill`` or ``balanced``; what it does not depend on is not varied.
    """
    fitting, unfit = [base], []
    seen = {_effect(base, model, workload, objective)}
    for setting in _around(model, hardware, workload, base):
        effect = _effect(setting, model, workload, objective)
        if effect in seen:
            continue
        seen.add(effect)
        lack = shortage(memory(model, variant, setting, hardware), workload.memory_margin_fraction)
        if lack is None:
            fitting.append(setting)
        elif _changes(setting, base) == 1:
            needed, has = format_bytes(lack.needed_bytes), format_bytes(lack.available_bytes)
            reason = f"does not fit on {lack.device}: needs {needed}, has {has}"
            unfit.append(Unfit(setting=setting, reason=reason))
    return Space(settings=tuple(fitting[:MOST_SETTINGS]), unfit=tuple(unfit))


def _around(model: ModelSpec, hardware: HardwareProfile, workload: Workload, base: Placement) -> list[Placement]:
    """Every combination of up to :data:`MOST_CHANGES` changes that llama.cpp accepts, the nearest first."""
    made = [
        dataclasses.replace(
            base,
            threads=threads,
            ubatch=ubatch,
            batch=max(_LEAST_BATCH, ubatch),
            flash_attention=flash,
            kv_type=kv_type,
            gpu_layers=layers,
        )
        for layers, threads, flash, kv_type, ubatch in product(
            gpu_layer_counts(model, hardware, base),
            thread_counts(hardware, workload, base),
            (True, False),
            _kv_types(model, workload, base),
            _GPU_UBATCHES if hardware.gpus else _UBATCHES,
        )
    ]
    allowed = [one for one in made if one.flash_attention or one.kv_type in EXACT_KV]
    near = [one for one in allowed if 1 <= _changes(one, base) <= MOST_CHANGES]
    return sorted(near, key=lambda one: _changes(one, base))


def _changes(setting: Placement, base: Placement) -> int:
    names = ("threads", "ubatch", "flash_attention", "kv_type", "gpu_layers")
    return sum(getattr(setting, name) != getattr(base, name) for name in names)


def _effect(setting: Placement, model: ModelSpec, workload: Workload, objective: str) -> tuple[object, ...]:
    """Settings that are alike in this run the same: a prompt fills no larger micro-batch, and so on."""
    pass_tokens = 0 if objective == "decode" else min(setting.ubatch, workload.prompt_tokens)
    threads = setting.threads if host_works(setting, model) else 0
    return (threads, pass_tokens, setting.flash_attention, setting.kv_type, setting.gpu_layers)


def host_works(setting: Placement, model: ModelSpec) -> bool:
    """Whether the host's threads do any of the work."""
    return setting.gpu_layers < model.offloadable_count or setting.cpu_expert_layers > 0


def thread_counts(hardware: HardwareProfile, workload: Workload, base: Placement) -> tuple[int, ...]:
    """The recommended count, the fast and all physical cores, the logical ones, one fewer of each, and half."""
    if workload.threads:
        return (workload.threads,)
    cpu, allowed = hardware.cpu, usable_core_count()
    known = [c for c in (cpu.performance_core_count, cpu.physical_core_count, cpu.logical_core_count) if c]
    wanted = [base.threads or cpu.inference_threads(), *known, *(count - 1 for count in known)]
    wanted += [count // 2 for count in known]
    return tuple(dict.fromkeys(count for count in wanted if 1 <= count <= max(allowed, base.threads or 1)))


def gpu_layer_counts(model: ModelSpec, hardware: HardwareProfile, base: Placement) -> tuple[int, ...]:
    """The recommended number of layers on the GPUs, its neighbours and shares of it; all, or none where few fit.

    Where all fit, few less are tried: they can only win by chance, and take far longer.
    """
    if not hardware.gpus or base.gpu_count == 0:
        return (base.gpu_layers,)
    full, now = model.offloadable_count, base.gpu_layers
    wanted = [now, now - 1]
    if now < full:
        wanted += [now + 1, full, *(round(share * now) for share in _LAYER_SHARES)]
    if 2 * now < full:
        wanted.append(0)
    return tuple(dict.fromkeys(count for count in wanted if 0 <= count <= full))


def _kv_types(model: ModelSpec, workload: Workload, base: Placement) -> tuple[str, ...]:
    if workload.kv_type:
        return (workload.kv_type,)
    wanted = [base.kv_type, "f16", *(["q8_0"] if kv_cache.divides_heads(model, "q8_0") else [])]
    return tuple(dict.fromkeys(wanted))
