"""``qplan calibrate [MODEL]``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from planner.cli.options import Finite, json_option
from planner.cli.output import console, escape, print_json, table
from planner.core import rates as kinds
from planner.core.errors import Exit, UsageError
from planner.core.wording import short_rate

if TYPE_CHECKING:
    from planner.core.rates import Rate
    from planner.workflow.calibrating import Calibrated

_BAR_WIDTH = 24
_UNITS = {
    "bytes_per_second": (1e9, "GB/s"),
    "scores_per_second": (1e9, "10⁹/s"),
    "flops": (1e9, "GFLOP/s"),
    "seconds": (1e-6, "µs"),
}
"""By the end of a rate's name: one of its unit, and what it is called."""


@click.command("calibrate")
@click.argument("model", required=False)
@click.option("--type", "types", multiple=True, metavar="TYPE", help="Only this type; may be repeated.")
@click.option("--quick", is_flag=True, help="15 seconds: the three most frequent types.")
@click.option("--thorough", is_flag=True, help="4 minutes: all types, more samples.")
@click.option("--seconds", type=Finite(2, 3600), help="Another time budget.")
@click.option("--threads", type=click.IntRange(1, 1024), multiple=True, help="Only this thread count; may be repeated.")
@click.option("--imatrix", is_flag=True, help="MODEL quantized with an importance matrix.")
@click.option("--cpu-only", is_flag=True, help="Leave the GPUs alone.")
@click.option("--scale", type=Finite(0.1, 1), default=1.0, hidden=True, help="Narrower slices, for tests.")
@click.option("--show", is_flag=True, help="Print what is stored, measure nothing.")
@click.option("--forget", is_flag=True, help="Drop what is stored for this machine.")
@json_option
def command(show: bool, forget: bool, as_json: bool, **given: Any) -> int:
    """Measure how fast this machine runs llama.cpp, for the estimates from then on; 60 seconds by default.

    Models of real width with few layers and random weights are timed by turns: each type, attention, thread counts.
    With MODEL (and --type Q4_K_M), slices of that very model: measure before you download.
    """
    if show and forget:
        raise UsageError("--show and --forget exclude each other")
    if forget:
        return _forget(as_json)
    if show:
        from planner.workflow.calibrating import stored_rates

        return _print(stored_rates(), as_json)
    return _calibrate(as_json, **given)


def _calibrate(
    as_json: bool,
    *,
    model: str | None,
    types: tuple[str, ...],
    quick: bool,
    thorough: bool,
    seconds: float | None,
    threads: tuple[int, ...],
    imatrix: bool,
    cpu_only: bool,
    scale: float,
) -> int:
    from planner.cli.apply import Watching
    from planner.workflow import calibrating

    if sum((quick, thorough, seconds is not None)) > 1:
        raise UsageError("--quick, --thorough and --seconds exclude each other")
    default = calibrating.DEFAULT_SECONDS
    default = calibrating.QUICK_SECONDS if quick else calibrating.THOROUGH_SECONDS if thorough else default
    options = calibrating.CalibrateOptions(
        budget_seconds=seconds or default,
        model=model,
        types=tuple(dict.fromkeys(type_.upper() for type_ in types)),
        threads=tuple(dict.fromkeys(threads)),
        imatrix=imatrix,
        gpu=not cpu_only,
        scale=scale,
    )
    with Watching() as watcher:
        found = calibrating.calibrate(options, watcher.measuring("calibrate"))
    if as_json:
        return _print(found.rates, as_json, found)
    _print(found.rates, as_json)
    _curve(*calibrating.depth_curve(found, model, options.types[0] if model and options.types else None))
    _finish(found, model)
    return Exit.DONE


def _forget(as_json: bool) -> int:
    from planner import FORMAT_VERSION
    from planner.workflow.calibrating import forget

    count = forget()
    if as_json:
        print_json({"format_version": FORMAT_VERSION, "forgotten": count})
    else:
        click.echo(f"forgot {count} rates of this machine", err=True)
    return Exit.DONE


def _print(rates: tuple[Rate, ...], as_json: bool, found: Calibrated | None = None) -> int:
    if as_json:
        from planner import FORMAT_VERSION
        from planner.core.codec import encode

        document: dict[str, Any] = {"format_version": FORMAT_VERSION, "rates": [encode(rate) for rate in rates]}
        if found is not None:
            document |= {
                "seconds": round(found.seconds, 2),
                "best_threads": found.best_threads,
                "hardware_identity": found.hardware.identity(),
                "notes": list(found.notes),
            }
        print_json(document)
    elif not rates:
        click.echo("nothing is calibrated on this machine yet; `qplan calibrate` takes a minute", err=True)
    else:
        _show(rates)
    return Exit.DONE


def _show(rates: tuple[Rate, ...]) -> None:
    plain = tuple(rate for rate in rates if not rate.model_sha256)
    for device in dict.fromkeys(rate.device for rate in plain):
        here = tuple(rate for rate in plain if rate.device == device)
        console().print(f"[bold]{escape(device)}[/]")
        _plot(here, kinds.DECODE_WEIGHTS, "weights read for a token")
        _plot(here, kinds.PREFILL_WEIGHTS, "matrix products of a prompt")
        _others(here)
    own = tuple(rate for rate in rates if rate.model_sha256)
    if own:
        _models(own)


def _plot(rates: tuple[Rate, ...], work: str, title: str) -> None:
    """A bar for each type and thread count."""
    from rich.bar import Bar

    chosen = [rate for rate in rates if rate.work == work]
    if not chosen:
        return
    top = max(rate.value for rate in chosen)
    rows = table(title, "threads>", f"{_unit(work)[1]}>", "80 %>", "")
    types = sorted({rate.type for rate in chosen}, key=lambda name: -max(r.value for r in chosen if r.type == name))
    for type_ in types:
        for rate in sorted((r for r in chosen if r.type == type_), key=lambda r: (r.threads, r.tokens)):
            name = f"{type_}{f', {rate.tokens} tokens' if rate.tokens and not rate.threads else ''}"
            low, high = _number(work, rate.low), _number(work, rate.high)
            bar = Bar(top, 0, rate.value, width=_BAR_WIDTH, color="cyan")
            rows.add_row(name, str(rate.threads or ""), _number(work, rate.value), f"{low}-{high}", bar)
    console().print(rows)


def _curve(title: str, points: tuple[tuple[int, float], ...]) -> None:
    """Decode against the tokens in the cache."""
    from rich.bar import Bar

    if not points:
        return
    rows = table("cached tokens>", "decode t/s>", f"{title}, predicted from now on")
    for depth, rate in points:
        bar = Bar(max(value for _, value in points), 0, rate, width=2 * _BAR_WIDTH, color="green")
        rows.add_row(f"{depth:,}", short_rate(rate), bar)
    console().print(rows)


def _unit(work: str) -> tuple[float, str]:
    return next(unit for ending, unit in _UNITS.items() if work.endswith(ending))


def _number(work: str, value: float) -> str:
    scaled = value / _unit(work)[0]
    return f"{scaled:,.0f}" if abs(scaled) >= 100 else f"{scaled:.3g}"


def _others(rates: tuple[Rate, ...]) -> None:
    rows = table("beside", "type", "threads>", "value>", "unit")
    for rate in sorted(rates, key=lambda rate: (rate.work, rate.type, rate.threads)):
        if rate.work not in (kinds.DECODE_WEIGHTS, kinds.PREFILL_WEIGHTS):
            name = rate.work.replace("_", " ")
            for ending in (" bytes per second", " per second", " flops", " seconds"):
                name = name.removesuffix(ending)
            threads = str(rate.threads or "")
            rows.add_row(name, rate.type, threads, _number(rate.work, rate.value), _unit(rate.work)[1])
    console().print(rows)


def _models(rates: tuple[Rate, ...]) -> None:
    rows = table("slices of", "type", "device", "threads>", "decode, µs a layer>", "the rest>", "prefill, µs a layer>")
    layers = [rate for rate in rates if rate.work == kinds.MODEL_DECODE_LAYER]
    for rate in layers:
        same = {
            other.work: other
            for other in rates
            if (other.model_sha256, other.type, other.threads, other.device)
            == (rate.model_sha256, rate.type, rate.threads, rate.device)
        }
        cells = [_number(work, same[work].value) if work in same else "" for work in _MODEL_WORKS]
        rows.add_row(escape(rate.model), rate.type, escape(rate.device), str(rate.threads or ""), *cells)
    console().print(rows)


_MODEL_WORKS = (kinds.MODEL_DECODE_LAYER, kinds.MODEL_DECODE_REST, kinds.MODEL_PREFILL_LAYER)


def _finish(found: Calibrated, model: str | None) -> None:
    out = console()
    if found.best_threads:
        out.print(f"decode is fastest with {found.best_threads} threads")
    for note in found.notes:
        out.print(f"[dim]note: {escape(note)}[/]")
    name = model or "llama-3.1-8b"
    out.print(f"{found.seconds:.0f} s; kept for this machine: `qplan estimate {escape(name)}` uses it from now on")
