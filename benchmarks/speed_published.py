"""Speed against published measurements, as qplan would have answered had it never seen the device.

Whole devices (or models, or sources) are held out, everything is fitted on the rest, and each row is then asked of the
code behind `qplan estimate --batch`. Printed are the median and mean error, the share within 20 % and how often the
80 % interval holds the measurement, for decode and prefill, by back end and kind.

    python benchmarks/speed_published.py                    devices held out (needs numpy and scipy; half a minute)
    python benchmarks/speed_published.py --hold models      models held out, their devices known
    python benchmarks/speed_published.py --hold sources     sources held out
    python benchmarks/speed_published.py --folds 5 --seed 1
    python benchmarks/speed_published.py --shipped          no refitting: how well the shipped figures describe the rows
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from fit_speed import held_out_documents, held_sets, nested
from speed_rows import LOCALSCORE_PROMPTS, before_repack, file_type, flash_attention, load_rows, micro_batch

from planner.core.errors import QplanError
from planner.estimate import speed_model
from planner.models import catalog
from planner.workflow.estimates import estimate_case

Row = dict[str, Any]
HELD = {"devices": "device", "models": "model", "sources": "source"}
LONG = 1024
"""Generated tokens from which on the mean depth of a run is not that of its start."""
OWN_TYPES = {"awq": "4bit", "none": "f16"}


@dataclass(frozen=True)
class Answer:
    """One published rate beside what was predicted."""

    row: Row
    quantity: str
    measured: float
    value: float
    low: float
    high: float

    @property
    def error(self) -> float:
        """Share by which the prediction is off."""
        return abs(self.value / self.measured - 1)

    @property
    def inside(self) -> bool:
        """Whether the interval holds the measurement."""
        return self.low <= self.measured <= self.high


def case_of(row: Row) -> dict[str, Any] | None:
    """The line of a batch file that asks for ``row``; ``None`` where qplan has no such method or back end."""
    if row["backend"] == "mlx" or row["method"] not in ("gguf", "awq", "gptq", "bitsandbytes", "none"):
        return None
    case: dict[str, Any] = {"device": row["device"], "backend": row["backend"], "method": row["method"]}
    case["type"] = file_type(row["type"]) if row["method"] == "gguf" else OWN_TYPES.get(row["method"], row["type"])
    if catalog.lookup(row["model"]):
        case["model"] = row["model"]
    else:
        case["params"] = float(row["params"])
        if row["moe"] == "1":
            case["active_params"] = float(row["active_params"])
    if row["stratum"] == "partial" and not row["gpu_layers"].isdigit():
        return None  # how it was split is not known
    if row["method"] != "gguf":
        case["runtime"] = row["runtime"]
    if row["gpu_layers"].isdigit():
        case["gpu_layers"] = int(row["gpu_layers"])
    case["ubatch"] = micro_batch(row)
    generated = float(row["generated_tokens"] or 0)
    case["depth"] = int(float(row["depth"] or 0) + (generated / 2 if generated >= LONG else 0))
    for key, name in (("threads", "threads"), ("device_count", "gpu_count")):
        if row[name] and float(row[name]) >= 1:
            case[key] = int(float(row[name]))
    if row["prompt"] >= 1:
        case["prompt_tokens"] = int(row["prompt"])
    if not flash_attention(row):
        case["flash_attention"] = False
    return case


def prompt_comparable(row: Row) -> bool:
    """Whether the prompt was long, on an empty cache, and read by kernels that today's builds still have."""
    gone = row["stratum"] == "cpu" and before_repack(row)
    return bool(row["prompt"] >= 64 and not row["depth"].strip("0.") and not gone)


def mean_prefill(case: dict[str, Any]) -> dict[str, float]:
    """What LocalScore averages: the rates of its prompts."""
    lengths = [estimate_case(case | {"prompt_tokens": n})["speed"] for n in LOCALSCORE_PROMPTS]
    return {
        key: fmean(speed[key] for speed in lengths)
        for key in ("prefill_tokens_per_second", "prefill_low", "prefill_high")
        if all(speed[key] for speed in lengths)
    }


def answers(rows: list[Row]) -> Iterator[Answer]:
    """What qplan says of each row."""
    for row in rows:
        case = case_of(row)
        if case is None:
            continue
        try:
            speed = estimate_case(case)["speed"]
            if row["kind"] == "localscore":
                speed |= mean_prefill(case)
            if "threads" in case:  # the tables give the threads of decode; prompts ran on all cores
                every = estimate_case({name: value for name, value in case.items() if name != "threads"})["speed"]
                speed |= {key: every[key] for key in speed if key.startswith("prefill")}
        except QplanError as error:
            print(f"{row['device']} {row['model']} {row['type']}: {error.what}", file=sys.stderr)
            continue
        for quantity in ("decode", "prefill"):
            measured, value = row[f"{quantity}_tokens_per_second"], speed[f"{quantity}_tokens_per_second"]
            asked = quantity == "decode" or prompt_comparable(row)
            if measured and value and asked:
                low, high = speed[f"{quantity}_low"], speed[f"{quantity}_high"]
                yield Answer(row, quantity, float(measured), value, low, high)


@contextmanager
def knowing(tables: dict[str, Any]) -> Iterator[None]:
    """Let the estimates use these coefficients, and no published row of a device."""
    whole = tables | {"source": "held out", "date": "held out"}
    replaced = [
        patch(f"planner.estimate.{m}.document", lambda: whole) for m in ("speed_model", "speed_serving", "speed")
    ]
    replaced.append(patch("planner.estimate.speed_published.find", lambda *_: ()))
    speed_model.coefficients.cache_clear()
    for each in replaced:
        each.start()
    try:
        yield
    finally:
        for each in replaced:
            each.stop()
        speed_model.coefficients.cache_clear()


def held_out(rows: list[Row], by: str, folds: int, seed: int) -> list[Answer]:
    """Every row answered with its group held out of the fit."""
    sets = held_sets((row[HELD[by]] for row in rows), folds, seed)
    found: list[Answer] = []
    for out, tables in zip(sets, held_out_documents(rows, by, sets), strict=True):
        with knowing({name: nested(fit) for name, fit in tables.items()}):
            found += answers([row for row in rows if row[HELD[by]] in out])
    return found


def groups_of(row: Row) -> Iterator[str]:
    """The lines of the table that ``row`` counts in."""
    if row["method"] != "gguf":
        yield f"served: {row['runtime']}"
        yield f"served: {row['method']}"
        return
    if row["stratum"] == "partial":
        yield "split between GPU and host"
        return
    if row["gpu_count"] not in ("", "1"):
        yield "several GPUs"
        return
    if row["eligible"] != "1" or row["kind"] == "ik_llama.cpp":
        yield "other rows (few threads, other builds)"
        return
    yield "all"
    yield "benchmarks (core)" if row["core"] == "1" else "reports of users, LocalScore"
    yield "CPU" if row["stratum"] == "cpu" else f"GPU, {row['backend']}"
    if row["stratum"] != "cpu":
        yield f"GPU, {row['hardware'].gpus[0].vendor}"
    if row["moe"] == "1":
        yield "mixtures of experts"
    if row["stratum"] == "unified_apu":
        yield "unified memory"


def print_table(found: list[Answer]) -> None:
    """Errors and coverage by quantity and group."""
    for quantity in ("decode", "prefill"):
        print(f"\n{quantity:42s} rows   median     MAPE  in 20 %   in the interval   high/low")
        table: dict[str, list[Answer]] = {}
        for answer in found:
            if answer.quantity == quantity:
                for group in groups_of(answer.row):
                    table.setdefault(group, []).append(answer)
        for group, mine in sorted(table.items(), key=lambda item: (item[0] != "all", item[0])):
            e = np.array([answer.error for answer in mine])
            inside = np.mean([answer.inside for answer in mine])
            width = np.median([answer.high / answer.low for answer in mine])
            print(
                f"  {group:40s} {len(e):4d}  {np.median(e):6.1%}  {e.mean():7.1%}  {(e <= 0.2).mean():6.1%}"
                f"      {inside:6.1%}         {width:5.2f}"
            )


def main(argv: list[str] | None = None) -> None:
    """Print the table; see the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hold", choices=sorted(HELD), default="devices")
    parser.add_argument("--folds", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shipped", action="store_true")
    arguments = parser.parse_args(argv)
    rows = load_rows()
    if arguments.shipped:
        print_table(list(answers(rows)))
    else:
        print_table(held_out(rows, arguments.hold, arguments.folds, arguments.seed))


if __name__ == "__main__":
    main()
