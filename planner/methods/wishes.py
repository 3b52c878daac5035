"""What a method can make of a model for a workload: its own proposals, and what a person asks for by name."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from planner import methods
from planner.core.candidate import Variant
from planner.core.model import ModelSpec
from planner.core.workload import Workload
from planner.methods import quantizers

if TYPE_CHECKING:
    from collections.abc import Callable


def variants(name: str, model: ModelSpec, workload: Workload) -> tuple[Variant, ...]:
    """Variants of the method ``name``, as the workload wants them made.

    A type that a method makes but does not propose, as FP4, counts where both the method and the type are named.

    Raises:
        UsageError: no program makes it so.
    """
    method = methods.get(name)
    proposed = method.variants(model)
    if name == "gguf":
        return proposed
    asked = workload.types if workload.types is not None and name in (workload.methods or ()) else ()
    known = {variant.type for variant in proposed}
    make = cast("Callable[[str], Variant]", method.variant)  # type: ignore[attr-defined]
    more = [make(type_.lower()) for type_ in asked if type_.lower() in _makeable(name) - known]
    wanted = None if workload.types is None else {type_.lower() for type_ in workload.types}
    chosen = [v for v in (*proposed, *more) if wanted is None or v.type in wanted]
    return tuple(dict.fromkeys(quantizers.wished(variant, workload.quantizing) for variant in chosen))


def types(name: str, model: ModelSpec, workload: Workload) -> tuple[str, ...]:
    """Types of a method that may be asked for."""
    own = [variant.type for variant in methods.get(name).variants(model)]
    return tuple(dict.fromkeys((*own, *(sorted(_makeable(name)) if name in (workload.methods or ()) else ()))))


def _makeable(name: str) -> set[str]:
    return {type_ for way in quantizers.ways() if way.method == name for type_ in way.types}
