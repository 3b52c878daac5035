"""Options that several verbs share."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from planner.core.errors import UsageError
from planner.core.units import parse_bytes
from planner.core.workload import COMPUTE_DTYPES, KV_TYPES, LAYOUTS, OBJECTIVES, Quantizing, Workload

F = TypeVar("F", bound=Callable[..., Any])

MORE_THAN_ANY = 1 << 20
"""More layers than any model has."""

json_option = click.option("--json", "as_json", is_flag=True, help="Print the answer as JSON.")
profile_option = click.option(
    "--profile", metavar="NAME", help="Plan for a captured machine (`qplan profiles`) instead of this one."
)
verbose_option = click.option("-v", "--verbose", is_flag=True, help="Say more: every candidate, rule and source.")


class Bytes(click.ParamType[int]):
    """A size such as ``10GiB``."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Bytes of the text."""
        return value if isinstance(value, int) else parse_bytes(value)


class Positive(Bytes):
    """A size above zero."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Bytes of the text."""
        size = super().convert(value, param, ctx)
        if size <= 0:
            raise click.BadParameter(f"{value!r} is not a size above zero", ctx, param)
        return size


class Finite(click.FloatRange):
    """A range of real numbers: click's own lets ``nan`` and ``inf`` pass."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The number."""
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            raise click.BadParameter(f"{value!r} is not a number", ctx, param)
        return number


class GpuLayers(click.ParamType[int]):
    """A number of layers, or ``all``."""

    name = "layers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """The count; ``all`` is more than any model has."""
        if value == "all":
            return MORE_THAN_ANY
        if isinstance(value, int):
            return value
        if value.isdecimal():
            return min(int(value), MORE_THAN_ANY) if len(value) < 10 else MORE_THAN_ANY
        raise click.BadParameter(f"{value!r} is neither a number of layers nor 'all'", ctx, param)


def names(text: str | None) -> tuple[str, ...] | None:
    """The names of a list with commas; an empty list is no wish."""
    return tuple(part.strip() for part in (text or "").split(",") if part.strip()) or None


_WORKLOAD = (
    click.option(
        "--context",
        type=click.IntRange(1),
        help="Tokens of context; default: 8192, or what the model was trained with, or what fits.",
    ),
    click.option("--objective", type=click.Choice(OBJECTIVES), default="balanced", show_default=True),
    click.option("--min-decode", type=Finite(0), metavar="T/S", help="Least decode speed, tokens/s."),
    click.option("--max-memory", type=Positive(), metavar="SIZE", help="Most memory on one device, as in 10GiB."),
    click.option("--concurrency", type=click.IntRange(1), default=1, show_default=True, help="Sequences at once."),
    click.option("--methods", metavar="A,B", help="Only these methods (`qplan methods`)."),
    click.option("--types", metavar="A,B", help="Only these types, as in Q4_K_M,Q6_K."),
    click.option("--kv-type", type=click.Choice(KV_TYPES), help="KV cache type; default: f16, or q8_0 if that fits."),
    click.option("--gpu-layers", type=GpuLayers(), help="Layers on the GPU; default: the most that fit."),
    click.option("--prompt-tokens", type=click.IntRange(1), default=512, show_default=True, help="Prompt to prefill."),
    click.option("--threads", type=click.IntRange(1), help="CPU threads; default: the fast physical cores."),
    click.option("--quantizer", metavar="NAME", help="Program that makes AWQ or GPTQ (`qplan methods awq`)."),
    click.option("--group-size", type=int, help="AWQ, GPTQ: weights per scale; -1: a whole row."),
    click.option("--act-order/--no-act-order", default=None, help="GPTQ: columns in order of their weight."),
    click.option("--symmetric/--asymmetric", default=None, help="AWQ, GPTQ: without or with zero points."),
    click.option("--layout", type=click.Choice(LAYOUTS), help="AWQ: layout for one kernel or the other."),
    click.option("--double-quant/--no-double-quant", "double_quantization", default=None, help="NF4, FP4: scales too."),
    click.option("--compute-dtype", type=click.Choice(COMPUTE_DTYPES), help="NF4, FP4: what is multiplied in."),
    click.option("--cpu-only", is_flag=True, help="Leave the GPUs alone."),
    click.option(
        "--imatrix",
        metavar="auto|on|off|FILE",
        default="auto",
        show_default=True,
        help="Importance matrix for GGUF types: where it is needed or pays, always, never, or this one.",
    ),
)


IMATRIX_WISHES = ("auto", "on", "off")
_MATRIX_KEY = "qplan.imatrix"

_QUANTIZING = tuple(field.name for field in dataclasses.fields(Quantizing))
_FIELDS = (
    "context",
    "objective",
    "min_decode",
    "max_memory",
    "concurrency",
    "methods",
    "types",
    "kv_type",
    "gpu_layers",
    "prompt_tokens",
    "threads",
    "cpu_only",
    "imatrix",
    *_QUANTIZING,
)


def workload_options(command: F) -> F:
    """Add the workload's options; the command gets one ``workload`` argument."""

    @functools.wraps(command)
    def wrapper(**given: Any) -> Any:
        chosen = {name: given.pop(name) for name in _FIELDS}
        if chosen["imatrix"] not in IMATRIX_WISHES:
            click.get_current_context().meta[_MATRIX_KEY] = chosen["imatrix"]
        return command(workload=workload(**chosen), **given)

    for option in reversed(_WORKLOAD):
        wrapper = option(wrapper)
    return wrapper  # type: ignore[return-value]


def workload(
    *,
    context: int | None,
    min_decode: float | None,
    max_memory: int | None,
    methods: str | None,
    types: str | None,
    imatrix: str,
    **same: Any,
) -> Workload:
    """The workload of the options; a context that was not given may be shortened. ``--imatrix FILE`` means on."""
    quantizing = Quantizing(**{name: same.pop(name, None) for name in _QUANTIZING})
    return Workload(
        context=context or Workload().context,
        context_fixed=context is not None,
        min_decode_tokens_per_second=min_decode,
        max_memory_bytes=max_memory,
        methods=names(methods),
        types=names(types),
        imatrix=imatrix if imatrix in IMATRIX_WISHES else "on",
        quantizing=quantizing,
        **same,
    )


def matrix_file() -> Path | None:
    """The file of ``--imatrix FILE`` of the command that runs; ``None`` where a word was given."""
    given = click.get_current_context().meta.get(_MATRIX_KEY)
    return existing(given) if given else None


def existing(path: str) -> Path:
    """A path argument; that it exists is checked where it is read, with a better error than click's."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UsageError(f"{path} names a home that does not exist", hint="write the path in full") from None
