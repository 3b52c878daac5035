"""A report as an HTML page, and several side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from planner import __version__
from planner.core.measurement import (
    DECODE,
    FILE_BYTES,
    PEAK_MEMORY,
    PERPLEXITY_RATIO,
    QUANTITIES,
    STEP_SECONDS,
)
from planner.core.units import format_bytes, format_count, format_rate
from planner.core.wording import TITLES, bare_title, machine_line, placement_line, quantity
from planner.report import charts, plots
from planner.report.bits import Bits
from planner.report.document import Point, Range, Report, StepDone

if TYPE_CHECKING:
    from jinja2 import Environment

GENERATOR = f"qplan {__version__}"
SHADES = ("under 2 bits", "2", "3", "4", "5", "6-7", "8", "9 and more")
TONES = {True: "good", False: "bad", None: "open"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """A large number at the head of the page."""

    label: str
    value: str
    said: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A report with where it lies and what the header of its artifact says."""

    report: Report
    where: str
    bits: Bits | None = None
    bits_note: str = ""
    """Why the artifact could not be read."""


def report_page(run: Run) -> str:
    """The page of one run."""
    report = run.report
    decoded = [taken for taken in report.measurements if taken.quantity == DECODE]
    devices = (*report.plan.estimate.memory.devices, report.plan.estimate.memory.host) if report.plan else ()
    return _render(
        "report.html",
        title=f"{report.name}: qplan report",
        report=report,
        headline=report.name,
        lead=_lead(report),
        verdict=_verdict(report),
        tiles=_tiles(report),
        intervals=charts.intervals(report.verdicts),
        unpredicted=_unpredicted(report),
        bases=_bases(report),
        plan_facts=_plan_facts(report),
        memory=charts.memory_bars(devices),
        plots=_trade_offs(report.candidates),
        no_plots=_no_plots(),
        frontier_rows=[p for p in report.candidates if p.pareto or p.chosen],
        bits=run.bits,
        bits_note=run.bits_note,
        bit_map=charts.bit_map(run.bits) if run.bits else None,
        artifact_name=Path(report.artifact).name,
        depth=plots.by_depth(report.speed_by_depth, decoded),
        machine_facts=_machine_facts(report),
        sources=_sources(report),
    )


def compare_page(runs: Sequence[Run]) -> str:
    """The page of several runs."""
    points = [point for run in runs if (point := _measured_point(run))]
    machines = dict.fromkeys(machine_line(run.report.hardware) for run in runs if run.report.hardware)
    return _render(
        "compare.html",
        title=f"{len(runs)} runs compared",
        rows=[_compare_row(run) for run in runs],
        quantities=QUANTITIES,
        plots=_trade_offs(points),
        no_plots=_no_plots(),
        machines=list(machines),
    )


def frontier_page(title: str, points: Sequence[Point], beaten_by: Sequence[str]) -> str:
    """All ways to run a model, drawn and as a table; ``beaten_by`` names for each what is better, or nothing."""
    rows = list(zip(points, beaten_by, strict=True))
    return _render("frontier.html", title=title, rows=rows, plots=_trade_offs(points), no_plots=_no_plots())


def _trade_offs(points: Sequence[Point]) -> list[plots.Plot]:
    found = (plots.frontier(points, by_speed=by_speed, id=f"plot{by_speed:d}") for by_speed in (False, True))
    return [plot for plot in found if plot is not None]


def _no_plots() -> str:
    """What to say where plots would be, if they cannot be drawn."""
    return "" if plots.installed() else f"Plots are drawn where vl-convert-python is installed: {plots.HINT}."


def is_page(text: str) -> bool:
    """Whether ``text`` is a page that qplan wrote: only such a one is replaced."""
    return '<meta name="generator" content="qplan ' in text[:2000]


@cache
def _environment() -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    folder = Path(__file__).parent / "templates"
    return Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _render(template: str, **context: Any) -> str:
    helpers: dict[str, Callable[..., str] | object] = {
        "generator": GENERATOR,
        "titles": TITLES,
        "shades": SHADES,
        "quantity": quantity,
        "bytes": format_bytes,
        "count": format_count,
        "rate": format_rate,
        "four": "{:.4f}".format,
        "spread": _spread,
        "step_cells": _step_cells,
        "tone": TONES.__getitem__,
    }
    return _environment().get_template(template).render(**helpers, **context)


def _spread(known: Range | None, show: Callable[[float], str]) -> str:
    return "unknown" if known is None else f"{show(known.value)} ({show(known.low)} – {show(known.high)})"


def _lead(report: Report) -> str:
    parts = [machine_line(report.hardware)] if report.hardware else []
    if report.plan:
        parts.append(f"{format_count(report.plan.model.parameter_count)} parameters, {report.plan.model.architecture}")
    return " · ".join(parts) or report.artifact


def _verdict(report: Report) -> dict[str, str]:
    outside, open_ = ([bare_title(v.quantity) for v in report.verdicts if v.ok is ok] for ok in (False, None))
    if outside:
        return {"tone": "bad", "mark": "✗", "text": f"outside of what was expected: {', '.join(outside)}"}
    if open_:
        return {"tone": "open", "mark": "○", "text": f"as expected; not judged: {', '.join(open_)}"}
    return {"tone": "good", "mark": "✓", "text": "everything measured is as expected or better"}


def _tiles(report: Report) -> list[Tile]:
    found = []
    for row in report.verdicts:
        if row.quantity in {FILE_BYTES, PEAK_MEMORY, DECODE, PERPLEXITY_RATIO}:
            low, high = quantity(row.quantity, row.low), quantity(row.quantity, row.high)
            said = f"predicted {quantity(row.quantity, row.predicted)} ({low} – {high})"
            found.append(Tile(label=TITLES[row.quantity], value=quantity(row.quantity, row.measured), said=said))
    return found


def _unpredicted(report: Report) -> list[tuple[str, float | None]]:
    judged = {verdict.quantity for verdict in report.verdicts}
    return [(name, value) for name, value in report.measured.items() if name not in judged]


def _bases(report: Report) -> dict[str, str]:
    return {e.quantity: f"{e.basis}: {e.source}" for e in report.plan.expectations} if report.plan else {}


def _plan_facts(report: Report) -> list[tuple[str, str]]:
    plan = report.plan
    if plan is None:
        return []
    size, workload = plan.estimate.size, plan.workload
    sequences = f", {plan.placement.sequences} sequences" if plan.placement.sequences > 1 else ""
    return [
        ("model", f"{plan.model.name} from {plan.model.location}"),
        (
            "quantized as",
            f"{plan.variant.label()}, {size.bits_per_weight:.2f} bits per weight, for {plan.variant.runtime}",
        ),
        ("runs as", placement_line(plan.placement)),
        ("context", f"{plan.placement.context:,} tokens{sequences}"),
        ("objective", workload.objective),
        ("planned", f"{plan.created_at} for {plan.hardware.name}"),
    ]


def _machine_facts(report: Report) -> list[tuple[str, str]]:
    here = report.hardware
    if here is None:
        return []
    facts = [("GPU", f"{gpu.name}, {format_bytes(gpu.memory_total_bytes)}") for gpu in here.gpus]
    cores = f"{here.cpu.physical_core_count or '?'} physical, {here.cpu.logical_core_count or '?'} logical cores"
    bandwidth = here.memory.bandwidth_bytes_per_second
    facts += [
        ("CPU", f"{here.cpu.model}, {cores}"),
        ("RAM", f"{format_bytes(here.memory.total_bytes)}, {format_bytes(here.memory.usable_bytes())} usable"),
        (
            "memory bandwidth",
            f"{bandwidth / 1e9:.1f} GB/s ({here.memory.bandwidth_basis})" if bandwidth else "unknown",
        ),
        ("system", f"{here.os}, identity {here.identity()}"),
        *(("note", note) for note in here.notes),
    ]
    return facts


def _sources(report: Report) -> list[str]:
    if report.plan is None:
        return []
    return [f"source: {source}" for source in dict.fromkeys(e.source for e in report.plan.expectations)]


def _step_cells(step: StepDone) -> list[tuple[str, str]]:
    """Time, peak memory and bytes, each with what was predicted."""
    said = {verdict.quantity: verdict for verdict in step.verdicts}
    taken = {
        STEP_SECONDS: step.seconds,
        PEAK_MEMORY: None if step.peak_memory_bytes is None else float(step.peak_memory_bytes),
        FILE_BYTES: float(step.size_bytes),
    }
    cells = []
    for name, value in taken.items():
        known = said.get(name)
        text = ""
        if known is not None:
            low, high = quantity(name, known.low), quantity(name, known.high)
            text = f"{quantity(name, known.predicted)} ({low} – {high}), {known.position}"
        cells.append((quantity(name, value), text))
    return cells


def _compare_row(run: Run) -> dict[str, Any]:
    report = run.report
    judged = {verdict.quantity: verdict for verdict in report.verdicts}
    cells = []
    for name in QUANTITIES:
        known = judged.get(name)
        cells.append(
            {
                "measured": quantity(name, report.measured.get(name)),
                "predicted": quantity(name, known.predicted) if known else "not predicted",
                "range": f"{quantity(name, known.low)} – {quantity(name, known.high)}" if known else "",
            }
        )
    verdict = _verdict(report)
    text = {"good": "as expected", "open": "partly judged", "bad": "outside"}[verdict["tone"]]
    variant, top = report.measured_variant, report.same_top_fraction
    return {
        "name": report.name,
        "where": run.where,
        "runtime": variant.runtime if variant else "-",
        "bits": f"{run.bits.bits_per_weight:.2f}" if run.bits else "-",
        "cells": cells,
        "top": "-" if top is None else f"{top:.1%}",
        "tone": verdict["tone"],
        "verdict": text,
    }


def _measured_point(run: Run) -> Point | None:
    """The run as a point among the others, of what was measured alone."""
    report = run.report
    size, memory, ratio = (report.measured.get(name) for name in (FILE_BYTES, PEAK_MEMORY, PERPLEXITY_RATIO))
    if size is None or memory is None or ratio is None:
        return None
    decode = report.measured.get(DECODE)
    spread = {taken.quantity: taken for taken in report.measurements}
    return Point(
        label=report.plan.variant.label() if report.plan else Path(report.artifact).stem,
        file_bytes=int(size),
        memory_bytes=int(memory),
        decode=None if decode is None else _around(decode, spread.get(DECODE)),
        perplexity_ratio=_around(ratio, spread.get(PERPLEXITY_RATIO)),
        pareto=True,
    )


def _around(value: float, taken: Any) -> Range:
    low, high = (taken.low, taken.high) if taken is not None else (value, value)
    return Range(value=value, low=low, high=high, basis="measured")
