"""Importance matrices and mixtures of types, measured: what a matrix gains, and mixtures against every standard type.

    python benchmarks/budget.py [MODEL …]     # demo, or checkpoint folders (benchmarks/budget_models.py makes two)
    python benchmarks/budget.py --prior       # data/tensor_sensitivity.csv from these models

Everything goes through qplan's own steps: the matrix and the sensitivities are of the built-in calibration text, the
types of a mixture are chosen by them, llama.cpp quantizes, and the KL divergence and perplexity are of the held-out
text against the 16-bit model. A mixture is made to the size of every standard type and to sizes between.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from planner import models
from planner.core.candidate import Placement
from planner.core.data import data_path
from planner.core.job import Job
from planner.core.model import ModelSpec
from planner.core.plan import CalibrationSource, Step
from planner.execute import calibration as texts
from planner.execute.process import run_child
from planner.methods import gguf_mix, gguf_recipe
from planner.verify.run import run_trial
from planner.verify.trial import QUALITY, TrialRequest

BETWEEN_BITS = (2.5, 3.0, 3.5, 4.0, 4.5, 5.0, 5.5, 6.0, 7.0, 8.0)
GAIN_TYPES = ("Q6_K", "Q5_K_M", "Q4_K_M", "IQ4_XS", "Q3_K_M", "IQ3_M", "Q2_K")
DEMANDING = ("IQ3_XS", "IQ3_XXS", "IQ2_M", "IQ2_XS", "IQ2_XXS")
STANDARD = ("Q8_0", "Q5_K_S", "Q4_K_S", "Q3_K_L", *GAIN_TYPES, *DEMANDING)
CHUNKS = 24
"""Of the held-out text, 512 tokens each; the whole has 85 and takes nearly three times as long."""


@dataclass(frozen=True, slots=True)
class Result:
    """One file, measured."""

    name: str
    size_bytes: int
    log_ratio: float
    divergence: float
    error: float
    """Standard error of the divergence."""


class Workshop:
    """A model's 16-bit file, steps carried out on it, and what they made measured against it."""

    def __init__(self, text: str, folder: Path, threads: int) -> None:
        self.model: ModelSpec = models.resolve(text)
        self.source, self.folder, self.threads = Path(self.model.source.location), folder, threads
        if self.model.source.kind == "catalog":
            self.source = data_path("demo/model")
        self.name = self.model.name
        self.full = self.run(Step(name="convert", kind="convert", method="gguf", type="BF16"), self.source, "full.gguf")

    @staticmethod
    def measuring(kind: str, text: CalibrationSource) -> Step:
        """A step that measures with a text."""
        return Step(name=kind, kind=kind, method="gguf", calibration=text)

    def run(self, step: Step, source: Path, name: str, **more: str | None) -> Path:
        """What a step makes."""
        output = self.folder / name
        child = "planner.verify.step_child" if step.kind in ("imatrix", "sensitivity") else "planner.execute.child"
        job = Job(step=step, source=str(source), output=str(output), model_name=self.name, threads=self.threads, **more)
        run_child(child, job, what=step.name, log=self.folder / "log")
        return output

    def quantize(self, type_: str, matrix: Path | None) -> Path:
        """A file of a standard type."""
        step = Step(name="quantize", kind="quantize", method="gguf", type=type_)
        return self.run(step, self.full, "made.gguf", imatrix=str(matrix) if matrix else None)

    def measure(self, name: str, made: Path, text: Path, chunks: int) -> Result:
        """Its divergence from the 16-bit file on a text."""
        request = TrialRequest(
            kind=QUALITY,
            model_path=str(made),
            reference_path=str(self.full),
            text_path=str(text),
            placement=Placement(context=512, threads=self.threads),
            budget_seconds=3600,
            max_chunks=chunks,
            repack=False,
        )
        trial = run_trial(request).quality
        assert trial is not None and trial.comparison is not None
        found = trial.comparison
        return Result(name, made.stat().st_size, found.log_ratio, found.kl_mean_nats, found.kl_standard_error_nats)


class Bench(Workshop):
    """One model with its 16-bit file, matrix and sensitivities in a folder."""

    def __init__(self, text: str, folder: Path, threads: int, calibration: Path | None) -> None:
        super().__init__(text, folder, threads)
        self.known: dict[tuple[str, bool], Result] = {}
        chunks = self._text(calibration, 128, 0)
        self.matrix = self.run(self.measuring("imatrix", chunks), self.full, "matrix.gguf")
        few = self._text(calibration, 8, 1)
        self.table = self.run(self.measuring("sensitivity", few), self.full, "table.json", imatrix=str(self.matrix))

    @staticmethod
    def _text(path: Path | None, chunks: int, seed: int) -> CalibrationSource:
        return texts.from_text(path, chunks, seed) if path else texts.built_in(chunks, seed)

    def standard(self, type_: str, *, imatrix: bool) -> Result:
        """A standard type; measured once."""
        if (type_, imatrix) not in self.known:
            self.known[type_, imatrix] = self._standard(type_, imatrix)
        return self.known[type_, imatrix]

    def _standard(self, type_: str, imatrix: bool) -> Result:
        made = self.quantize(type_, self.matrix if imatrix else None)
        return self._measured(f"{type_}{' +imatrix' if imatrix else ''}", made)

    def mixture(self, target_bytes: int) -> Result:
        """The mixture of at most so many bytes."""
        step = Step(name="quantize", kind="quantize", method="gguf", type="mixture", target_bytes=target_bytes)
        made = self.run(step, self.full, "made.gguf", imatrix=str(self.matrix), sensitivity=str(self.table))
        assert 0.995 * target_bytes <= made.stat().st_size <= target_bytes, (target_bytes, made.stat().st_size)
        return self._measured(f"{8 * target_bytes / self.model.parameter_count:.2f}bpw", made)

    def _measured(self, name: str, made: Path) -> Result:
        result = self.measure(name, made, data_path("demo/heldout.txt"), CHUNKS)
        made.unlink()
        return result


def gain_rows(bench: Bench) -> Iterator[str]:
    """Types with and without the matrix."""
    yield "| type | without: perplexity | KL, nats | with matrix: perplexity | KL, nats | KL with / without |"
    yield "| --- | ---: | ---: | ---: | ---: | ---: |"
    for type_ in GAIN_TYPES:
        plain, guided = bench.standard(type_, imatrix=False), bench.standard(type_, imatrix=True)
        yield (
            f"| {type_} | {_percent(plain)} | {plain.divergence:.5f} | {_percent(guided)} | {guided.divergence:.5f} | "
            f"{guided.divergence / plain.divergence:.2f} |"
        )


def _percent(result: Result) -> str:
    return f"{100 * math.expm1(result.log_ratio):+.2f} %"


def budget_rows(bench: Bench) -> Iterator[str]:
    """Mixtures at the sizes of standard types and between, with the best standard type that is as large or larger."""
    standards = [bench.standard(type_, imatrix=type_ != "Q8_0") for type_ in STANDARD]
    standards.sort(key=lambda result: result.size_bytes)
    sizes = {result.size_bytes: result.name for result in standards if result.name != "Q8_0"}
    for bits in BETWEEN_BITS:
        sizes.setdefault(int(bits * bench.model.parameter_count / 8), f"{bits} bpw")
    yield "| target | bits | mixture: bytes | fills | perplexity | KL, nats | of the type of that size | beats |"
    yield "| --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |"
    for size, name in sorted(sizes.items()):
        made = bench.mixture(size)
        same = next((result for result in standards if result.size_bytes == size), None)
        against = f"{made.divergence / same.divergence:.2f} of {same.divergence:.5f} ± {same.error:.5f}" if same else ""
        beaten = [
            r.name.removesuffix(" +imatrix")
            for r in standards
            if r.size_bytes >= size and r.divergence > made.divergence
        ]
        cells = [
            name,
            f"{8 * size / bench.model.parameter_count:.2f}",
            str(made.size_bytes),
            f"{made.size_bytes / size:.4f}",
            _percent(made),
            f"{made.divergence:.5f} ± {made.error:.5f}",
            against,
            ", ".join(beaten),
        ]
        yield f"| {' | '.join(cells)} |"


def prior_rows(tables: list[tuple[ModelSpec, dict]]) -> list[tuple[str, str, float, int]]:  # type: ignore[type-arg]
    """Sensitivity by role and part of the depth: geometric means over the models."""
    prices: dict[tuple[str, str], list[float]] = defaultdict(list)
    for model, table in tables:
        sums: dict[tuple[str, str], float] = defaultdict(float)
        shapes = {tensor.name: tensor for tensor in model.tensors}
        for entry in table["tensors"]:
            tensor = shapes[entry["tensor"]]
            role = gguf_mix.category(tensor.name)
            role = gguf_mix.OUTPUT if model.tied_embeddings and role == gguf_mix.TOKEN_EMBEDDING else role
            part = "all" if tensor.layer is None else gguf_recipe.part_of_depth(tensor.layer, model.n_layer)
            sums[role, part] += entry["divergence_per_error"]
        for key, value in sums.items():
            prices[key].append(value)
    for part in gguf_recipe.PARTS:
        prices[gguf_mix.OTHER, part] = [v for (_, p), values in list(prices.items()) if p == part for v in values]
    return [(role, part, _mean(values), len(values)) for (role, part), values in sorted(prices.items())]


def _mean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def write_prior(benches: list[Bench]) -> None:
    """Write the table into ``data/``."""
    from datetime import UTC, datetime

    today = datetime.now(UTC).date().isoformat()
    read = [(bench.model, json.loads(bench.table.read_text("utf-8"))) for bench in benches]
    rows = prior_rows(read)
    names = ", ".join(bench.name for bench in benches)
    told = (
        f"benchmarks/budget.py --prior: KL divergence per relative squared error, geometric mean of {{}} over {names}"
    )
    with data_path("tensor_sensitivity.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["role", "part", "value", "source", "date"])
        writer.writerows([role, part, f"{value:.4g}", told.format(count), today] for role, part, value, count in rows)


def main() -> None:
    """Command line entry point."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("models", nargs="*", default=["demo"])
    parser.add_argument("--prior", action="store_true", help="write the tables that plans start from")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--calibration", type=Path, help="a text instead of the built-in one")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="qplan-budget-") as folder:
        benches = []
        for at, name in enumerate(asked.models):
            place = Path(folder) / str(at)
            place.mkdir()
            benches.append(Bench(name, place, asked.threads, asked.calibration))
        if asked.prior:
            write_prior(benches)
            return
        for bench in benches:
            table = json.loads(bench.table.read_text("utf-8"))
            print(f"\n## {bench.name}: {bench.model.parameter_count:,} weights")
            print(f"\nEverything at Q3_K at once against the sum of its parts: {table['additivity']:.3f}\n")
            for line in chain(gain_rows(bench), [""], budget_rows(bench)):
                print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
