"""Programs that make safetensors artifacts (``data/quantizers.toml``): which one makes what was asked for, and why."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING

from planner.core.data import named, read_rows
from planner.core.errors import UsageError
from planner.core.plan import Settings
from planner.core.workload import Quantizing

if TYPE_CHECKING:
    from planner.core.candidate import Variant

TABLE = "quantizers.toml"
CALIBRATED = ("awq", "gptq")
"""Methods that run text through the model while they quantize it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantizer:
    """A row of the table of programs."""

    name: str
    title: str
    packages: tuple[str, ...]
    """Those whose versions decide the artifact's bytes."""
    version: str
    licence: str
    source: str
    date: str
    environment: str | None = None
    """Where it is installed; ``None``: in qplan's own environment."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """What a program makes of a method."""

    method: str
    quantizer: str
    format: str
    types: tuple[str, ...]
    why: str
    """Why one would take it."""
    trap: str = ""
    """What was seen to go wrong with it, and what is done about it."""
    group_sizes: tuple[int, ...] = ()
    symmetric: tuple[bool, ...] = (True,)
    act_order: tuple[bool, ...] = (False,)
    compute_dtypes: tuple[str, ...] = ()


@cache
def quantizers() -> tuple[Quantizer, ...]:
    """All programs, in the table's order."""
    return read_rows(Quantizer, TABLE, "quantizer")


@cache
def ways() -> tuple[Way, ...]:
    """All ways, in the order of preference."""
    return read_rows(Way, TABLE, "way")


def quantizer(name: str) -> Quantizer:
    """The program of a name.

    Raises:
        UsageError: there is none.
    """
    return named(quantizers(), name, what="quantizer", code="unknown-quantizer")


def way_of(variant: Variant) -> Way | None:
    """How a variant is made; ``None`` for GGUF, and for what no program makes."""
    for way in ways():
        same = (way.method, way.format) == (variant.method, variant.format) and variant.type in way.types
        if same and variant.quantizer in (None, way.quantizer):
            return way
    return None


def settings(variant: Variant) -> Settings:
    """What a step needs to know to make ``variant``.

    Raises:
        UsageError: no program makes it.
    """
    way = way_of(variant)
    if way is None:
        raise UsageError(
            f"no program makes {variant.label()} in the format {variant.format}",
            hint=f"`qplan methods {variant.method}` lists what is made",
            code="not-executable",
        )
    return Settings(
        quantizer=way.quantizer,
        format=way.format,
        symmetric=variant.symmetric,
        act_order=variant.act_order,
        double_quantization=variant.double_quantization,
        compute_dtype=variant.compute_dtype,
    )


def wished(variant: Variant, wishes: Quantizing) -> Variant:
    """The variant as a person wants it made.

    Raises:
        UsageError: no program makes it so, with what the nearest one takes.
    """
    if variant.method == "gguf":
        return variant
    changes = {
        "group_size": wishes.group_size if variant.group_size is not None else None,
        "act_order": wishes.act_order if variant.method == "gptq" else None,
        "symmetric": wishes.symmetric if variant.method in ("gptq", "awq") else None,
        "double_quantization": wishes.double_quantization if variant.is_4bit_bitsandbytes else None,
        "compute_dtype": wishes.compute_dtype if variant.is_4bit_bitsandbytes else None,
    }
    asked = replace(variant, **{key: value for key, value in changes.items() if value is not None})  # type: ignore[arg-type]
    if asked == variant and wishes.quantizer is None and wishes.layout is None:
        return variant
    return _made_by(asked, _choose(asked, wishes))


def _choose(asked: Variant, wishes: Quantizing) -> Way:
    """The first way that makes ``asked``."""
    if wishes.quantizer is not None:
        quantizer(wishes.quantizer)
    having = [way for way in ways() if way.method == asked.method and asked.type in way.types]
    refusals = []
    for way in having:
        faults = list(_faults(way, asked, wishes))
        if not faults:
            return way
        if wishes.quantizer in (None, way.quantizer):
            refusals.append(f"{quantizer(way.quantizer).title} ({way.format}): {'; '.join(faults)}")
    makers = ", ".join(dict.fromkeys(way.quantizer for way in having))
    raise UsageError(
        f"nothing makes {asked.label()} so",
        numbers="\n".join(refusals) or f"{wishes.quantizer} makes no {asked.method} {asked.type}",
        hint=f"`qplan methods {asked.method}` lists what is made" + (f", by {makers}" if makers else ""),
        code="no-quantizer",
    )


def _faults(way: Way, asked: Variant, wishes: Quantizing) -> Iterator[str]:
    """Why a way does not make what was asked for."""
    if wishes.quantizer not in (None, way.quantizer):
        yield f"it is not {wishes.quantizer}"
    if wishes.layout is not None and way.format != f"awq-{wishes.layout}":
        yield f"it writes no {wishes.layout} layout"
    if asked.group_size is not None and way.group_sizes and asked.group_size not in way.group_sizes:
        yield f"group sizes {', '.join(map(str, way.group_sizes))}, not {asked.group_size}"
    if asked.symmetric not in way.symmetric and asked.method in ("gptq", "awq"):
        yield "symmetric only" if way.symmetric == (True,) else "with zero points only"
    if asked.act_order not in way.act_order:
        yield "without activation order only"
    if asked.compute_dtype is not None and asked.compute_dtype not in way.compute_dtypes:
        yield f"compute dtypes {', '.join(way.compute_dtypes)}"


def _made_by(asked: Variant, way: Way) -> Variant:
    made = replace(asked, format=way.format, quantizer=None)
    if way_of(made) is not way:
        made = replace(made, quantizer=way.quantizer)
    # vLLM reads no GEMV layout; transformers with GPTQModel does
    return replace(made, runtime="transformers") if way.format == "awq-gemv" else made


def reason(variant: Variant) -> str | None:
    """Who makes a variant and why, for a person; ``None`` where there is no choice to explain."""
    way = way_of(variant)
    if way is None or sum(row.method == variant.method for row in ways()) < 2:
        return None
    row = quantizer(way.quantizer)
    return f"made by {f'{row.title} {row.version}'.strip()}: {way.why}"
