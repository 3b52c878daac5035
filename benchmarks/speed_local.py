"""Predicted against measured on this machine: whole models with random weights, from slices of them and from rates.

    python benchmarks/speed_local.py generic RESULTS.jsonl [--seconds 60]
    python benchmarks/speed_local.py model RESULTS.jsonl tinyllama-1.1b Q4_K_M [--seconds 60]
    python benchmarks/speed_local.py report RESULTS.jsonl

Each call adds a line of raw observations, so that the pieces of a long benchmark add up and a changed formula can be
judged on old measurements. Nothing else should run meanwhile.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from math import log
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from planner.core.candidate import Placement
from planner.core.codec import decode, encode
from planner.core.estimates import Prediction
from planner.core.hardware import HardwareProfile
from planner.core.measurement import DECODE, PREFILL
from planner.core.model import ModelSpec, shape_sha256
from planner.core.rates import Observation, Rate, Rates
from planner.estimate import slice_rates, slices, speed_calibrated
from planner.methods import gguf
from planner.models import catalog
from planner.verify.calibration_trial import CalibrationAnswer, CalibrationRequest

MODELS = ("tinyllama-1.1b", "llama-3.2-3b", "llama-2-7b")
TYPES = ("Q4_0", "Q4_K_M", "Q8_0")
DEPTH, PROMPT, CHUNK = 2048, 128, 64
"""Tokens in the cache, of the prompt that is timed with and without them, and of the slices' prompt at depth."""
THREADS = (2, 1)
WHOLE = "whole"
"""The shape of the model that is to be predicted; its slices are of the shape ``model``."""
CASES = tuple(
    (quantity, depth, threads) for quantity in (DECODE, PREFILL) for depth in (0, DEPTH) for threads in THREADS
)


def machine() -> HardwareProfile:
    """This machine."""
    from planner.workflow.survey import survey

    return survey()


def spec_of(name: str) -> ModelSpec:
    """A model of the catalog."""
    found = catalog.lookup(name)
    assert found is not None, name
    return found


def request_for(seconds: float, model: str | None, types: tuple[str, ...]) -> CalibrationRequest:
    """What ``qplan calibrate`` would ask on this machine."""
    from planner.workflow.calibrating import CalibrateOptions, calibration_request

    options = CalibrateOptions(budget_seconds=seconds, model=model, types=types, threads=THREADS)
    return calibration_request(options, machine(), spec_of(model) if model else None, seconds, False)


def add(path: Path, record: dict[str, Any]) -> None:
    """One more line of results."""
    stamped = {**record, "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(stamped) + "\n")


def run_generic(path: Path, seconds: float, types: tuple[str, ...]) -> None:
    """Calibrate as ``qplan calibrate`` does and keep the raw observations."""
    from planner.verify.calibrate_run import run_calibration

    answer, repacked = run_calibration(request_for(seconds, None, types))
    add(path, {"kind": "generic", "answer": encode(answer), "repacked": repacked})


def run_model(path: Path, name: str, type_: str, seconds: float, repack: bool) -> None:
    """Slices of one model and type and the whole model, by turns in one process, so that drift hits both."""
    from planner.verify import native

    model = spec_of(name)
    began = time.perf_counter()
    native.library()
    observations, truth = measure_together(model, type_, seconds, repack)
    answer = CalibrationAnswer(
        observations=tuple(observations), tool_version=native.tool_version(), seconds=time.perf_counter() - began
    )
    add(
        path,
        {
            "kind": "model",
            "model": name,
            "type": type_,
            "answer": encode(answer),
            "truth": [encode(seen) for seen in truth],
        },
    )


def measure_together(
    model: ModelSpec, type_: str, seconds: float, repack: bool
) -> tuple[list[Observation], list[Observation]]:
    """Decode and prefill of slices and of the whole model, at both depths, with 1 and 2 threads."""
    from planner.verify.slice_runs import open_slice, second_context

    types = gguf.tensor_types(model, gguf.variant(type_, imatrix=False))
    few, many = slice_layers(model, type_)
    with ExitStack() as stack:
        opened = []
        for layers in (few, many, model.n_layer):
            spec, cut = slices.cut(model, types, layers) if layers < model.n_layer else (model, types)
            made = open_slice(spec, cut, context=DEPTH + 2 * PROMPT + 64, threads=2, repack=repack)
            opened.append(stack.enter_context(made))
        deep = [stack.enter_context(second_context(made)) for made in opened]
        for made in deep:
            made.context.set_threads(2)
            assert made.fill(DEPTH), "this model's cache cannot be repeated"
        found = timed(opened, deep, type_, seconds)
    return [o for o in found if o.shape == "model"], [o for o in found if o.shape == WHOLE]


def slice_layers(model: ModelSpec, type_: str) -> tuple[int, int]:
    """Layers of the two slices, as ``qplan calibrate`` chooses them on this machine."""
    from planner.verify.calibrating import Calibrating, layer_bytes

    types = gguf.tensor_types(model, gguf.variant(type_, imatrix=False))
    run = Calibrating(request=request_for(60, model.name, (type_,)), progress=lambda *_: None)
    return run.model_pair(layer_bytes(*slices.cut(model, types, 1)), model.n_layer)


def timed(opened: Sequence[Any], deep: Sequence[Any], type_: str, seconds: float) -> list[Observation]:
    """A token and prompts with an empty cache and at depth, by turns over slices, the whole model and thread counts."""
    from planner.verify.alternating import alternate

    pieces = []
    for threads in THREADS:
        for depth, contexts in ((0, opened), (DEPTH, deep)):
            for made in contexts:
                shape = WHOLE if made is contexts[-1] else "model"
                case = (shape, made.spec, threads, depth)
                pieces.append((*case, 1, made.decoding(threads, depth)))
                for tokens in tokens_read(shape, depth):
                    pieces.append((*case, tokens, made.reading(tokens, threads, depth)))
    for _, spec, _, _, length, piece in pieces:
        piece.wanted = 10 if length == 1 else 3 if spec.parameter_count < 2e9 else 2
    alternate([piece for *_, piece in pieces], until=time.perf_counter() + seconds)
    return [seen_of(shape, spec.n_layer, type_, *case, piece) for shape, spec, *case, piece in pieces]


def tokens_read(shape: str, depth: int) -> tuple[int, ...]:
    """Lengths of prompts to time: those of ``qplan calibrate`` on a slice, the one to predict on the whole model."""
    if shape == WHOLE:
        return (PROMPT,)
    return (CHUNK,) if depth else (PROMPT, CHUNK)


def seen_of(shape: str, layers: int, type_: str, threads: int, depth: int, tokens: int, piece: Any) -> Observation:
    """A timed case of a slice or of the whole model."""
    middle, low, high = piece.result
    return Observation(
        shape=shape,
        layers=layers,
        type=type_,
        threads=threads,
        depth=depth,
        tokens=tokens,
        seconds=middle,
        low=low,
        high=high,
        clean_count=len(piece.good),
        disturbed_count=piece.taken - len(piece.good),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """One case: measured, and predicted in both ways, tokens per second."""

    model: str
    type: str
    quantity: str
    depth: int
    threads: int
    measured: float
    clean: bool
    spread: float
    by_slices: Prediction | None
    by_rates: Prediction | None


def predicted(
    model: ModelSpec, type_: str, quantity: str, depth: int, threads: int, rates: Rates, here: HardwareProfile
) -> Prediction | None:
    """Tokens per second; a prompt at depth is the longer prompt less the shorter."""
    variant = gguf.variant(type_, imatrix=False)
    base = Placement(context=DEPTH + 2 * PROMPT, threads=threads, depth=depth if quantity == DECODE else 0)
    guess: Callable[[Placement], Prediction | None] = lambda placement: speed_calibrated.predict(  # noqa: E731
        model, variant, placement, here, rates, quantity
    )
    if quantity == DECODE:
        return guess(base)
    longer = guess(dataclasses.replace(base, prompt_tokens=depth + PROMPT))
    if not depth or longer is None:
        return longer
    shorter = guess(dataclasses.replace(base, prompt_tokens=depth))
    assert shorter is not None
    value = PROMPT / ((depth + PROMPT) / longer.value - depth / shorter.value)
    return dataclasses.replace(
        longer, value=value, low=value * longer.low / longer.value, high=value * longer.high / longer.value
    )


def compare(record: dict[str, Any], generic: tuple[Rate, ...], here: HardwareProfile) -> list[Compared]:
    """All cases of one model and type."""
    model, type_ = spec_of(record["model"]), record["type"]
    answer = decode(CalibrationAnswer, record["answer"], what="the results")
    own = slice_rates.model_rates_of(answer.observations, slices.CPU_KIT, model, shape_sha256(model))
    truth = [decode(Observation, seen, what="the results") for seen in record["truth"]]
    found = []
    for quantity, depth, threads in CASES:
        tokens = 1 if quantity == DECODE else PROMPT
        seen = next(o for o in truth if (o.depth, o.threads, o.tokens) == (depth, threads, tokens))
        case = (model, type_, quantity, depth, threads)
        found.append(
            Compared(
                model=model.name,
                type=type_,
                quantity=quantity,
                depth=depth,
                threads=threads,
                measured=tokens / seen.seconds,
                clean=seen.clean_count > 0,
                spread=seen.high / seen.low - 1,
                by_slices=predicted(*case, Rates(own), here),
                by_rates=predicted(*case, Rates(generic), here),
            )
        )
    return found


def report(path: Path) -> None:
    """The table, and the errors of both ways."""
    records = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    generic: tuple[Rate, ...] = ()
    for record in records:
        if record["kind"] == "generic":
            answer = decode(CalibrationAnswer, record["answer"], what="the results")
            generic = slice_rates.rates_of(answer.observations, slices.CPU_KIT)
    here = machine()
    rows = [row for r in records if r["kind"] == "model" for row in compare(r, generic, here)]
    print(
        f"{'model':16} {'type':7} {'what':8} {'depth':>5} {'thr':>3} {'measured':>9} {'spread':>7} "
        f"{'slices':>7} {'rates':>7}"
    )
    for row in rows:
        ratios = [f"{p.value / row.measured:7.3f}" if p else "      -" for p in (row.by_slices, row.by_rates)]
        what, mark = row.quantity.split("_")[0], "" if row.clean else "  disturbed"
        print(
            f"{row.model:16} {row.type:7} {what:8} {row.depth:5} {row.threads:3} {row.measured:9.2f} "
            f"{100 * row.spread:6.1f}% {' '.join(ratios)}{mark}"
        )
    clean = [row for row in rows if row.clean]
    for name, get in (("slices of the model", "by_slices"), ("rates for any model", "by_rates")):
        for quantity in (DECODE, PREFILL):
            summary(f"{name}, {quantity.split('_')[0]}", [r for r in clean if r.quantity == quantity], get)
        summary(f"{name}, all", clean, get)


def summary(title: str, rows: Sequence[Compared], get: str) -> None:
    """Median and 90 % quantile of the error, and how often the measurement lay in the interval."""
    pairs = [(getattr(row, get), row.measured) for row in rows]
    known = [(guess, measured) for guess, measured in pairs if guess is not None]
    if not known:
        print(f"{title}: nothing predicted")
        return
    errors = sorted(abs(guess.value / measured - 1) for guess, measured in known)
    bias = median(log(guess.value / measured) for guess, measured in known)
    inside = sum(guess.contains(measured) for guess, measured in known) / len(known)
    print(
        f"{title}: {len(known)} cases, median error {100 * median(errors):.1f} %, p90 "
        f"{100 * errors[min(len(errors) - 1, round(0.9 * (len(errors) - 1)))]:.1f} %, bias {100 * bias:+.1f} %, "
        f"{100 * inside:.0f} % inside the 80 % interval"
    )


def main(arguments: Iterable[str] | None = None) -> None:
    """Run one piece or print the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("generic", "model", "report"))
    parser.add_argument("results", type=Path)
    parser.add_argument("model", nargs="?")
    parser.add_argument("type", nargs="?")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument(
        "--no-repack",
        dest="repack",
        action="store_false",
        help="With model: without llama.cpp's CPU-specific kernels, where they crash (`qplan calibrate` says so).",
    )
    parser.add_argument("--types", help="With generic: tensor types, separated by commas.")
    given = parser.parse_args(None if arguments is None else list(arguments))
    if given.what == "generic":
        run_generic(given.results, given.seconds, tuple(filter(None, (given.types or "").split(","))))
    elif given.what == "model":
        run_model(given.results, given.model, given.type, given.seconds, given.repack)
    else:
        report(given.results)


if __name__ == "__main__":
    main()
