"""How much each tensor's rounding costs the model: errors by ggml's kernels, their price by quantizing parts of it.

Two measurements. The *error* of each tensor in each type: its rows, or a sample of them, go through ggml's kernels and
back, and the squared differences, weighted by the importance matrix, are set against the squares themselves. The
*price* of an error: a part of the loaded 16-bit model is replaced in memory by what a probing type makes of it, the
calibration text is run, and the KL divergence from the unchanged model is divided by the part's error. The divergence
is proportional to the error and parts add up (both within a few per cent down to about 2.5 bits, ``benchmarks/
budget.py``), so one probe per part tells of all types. Runs only in a child.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from planner import FORMAT_VERSION, models
from planner.convert.encode import float32_to_bf16, float32_to_f16, to_float32
from planner.core.errors import InputError
from planner.core.model import ModelSpec, Tensor, shape_sha256
from planner.formats.gguf import open_gguf
from planner.formats.gguf_header import StoredGgufTensor
from planner.methods import gguf_mix
from planner.methods.gguf_recipe import Sensitivity, SensitivityTable, candidate_types
from planner.methods.samples import choose_chunks
from planner.verify import native
from planner.verify.importance import CHUNK_TOKENS, Collector
from planner.verify.kept import KeptRows
from planner.verify.kernels import round_trip
from planner.verify.perplexity import kl_divergence, log_softmax, mean_and_error
from planner.verify.tensors import NativeTensor, eval_callback

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from planner.formats.imatrix import ImportanceMatrix

SAMPLE_WEIGHTS = 1 << 17
"""Weights of a tensor whose error is measured in every type: whole rows, evenly spread."""
CHUNKS = 4
"""Chunks of 512 tokens that a probe runs by default; the second half of each is compared."""
CANDIDATES_PER_CHUNK = 3
"""Of so many times the chunks, those are taken that the model predicts best: the prices of a text unlike what it was
trained on are those of another trade. Three models of one author's novels, probed with code and other languages, gave
mixtures up to 1.4 times as lossy as the standard types; probed with such novels, 0.45 to 0.96 times (2026-11-26)."""
PROBING_TYPES = ("Q3_K", "Q4_0")
"""What a part is probed with, the second where rows are no whole 256-weight blocks: errors well above those of 16-bit
rounding (a floor of about 1e-5 nats) and well below where the divergence bends."""
_FLOATS = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How much is measured."""

    threads: int
    offload: native.Offload = native.ON_CPU
    probes: int | None = None
    """At most about so many parts; ``None``: each tensor by itself."""
    chunks: int | None = None
    seed: int = 0


@dataclass(frozen=True, slots=True)
class _Weights:
    """The quantized tensors of a 16-bit GGUF file, read as they are needed."""

    stored: Mapping[str, StoredGgufTensor]

    def stored_type(self, name: str) -> str:
        return self.stored[name].type

    def matrices(self, name: str) -> Iterator[NDArray[np.float32]]:
        """``[rows, columns]`` of each expert, or of the one matrix there is."""
        import numpy as np

        tensor = self.stored[name]
        columns, rows = tensor.shape[0], tensor.shape[1] if len(tensor.shape) > 1 else 1
        mapped = np.memmap(tensor.file, _FLOATS[tensor.type], mode="r", offset=tensor.offset, shape=(_count(tensor),))
        for matrix in mapped.reshape(-1, rows, columns):
            yield np.ascontiguousarray(to_float32(np.asarray(matrix), tensor.type))


def _count(tensor: StoredGgufTensor) -> int:
    total = 1
    for length in tensor.shape:
        total *= length
    return total


def measure(
    path: Path,
    text: str,
    matrix: ImportanceMatrix | None,
    settings: Settings,
    progress: native.Progress,
    kept: KeptRows | None = None,
) -> SensitivityTable:
    """Errors and sensitivities of every tensor that llama.cpp would quantize.

    Args:
        path: a 16-bit GGUF file.
        text: calibration text; its chunks are drawn by ``settings.seed``.
        matrix: importance of the columns; where a tensor is not in it, what the probes' text gives.
        kept: where errors and probes are kept as they are found, and what a killed run had kept.

    Raises:
        InputError: the file is quantized already, or the text too short.
        ExecutionFailed: llama.cpp cannot run it.
    """
    model = models.resolve(str(path))
    tensors = [tensor for tensor in model.tensors if gguf_mix.is_quantized(tensor)]
    weights = _Weights({tensor.name: tensor for tensor in open_gguf(path).tensors})
    for tensor in tensors:
        if weights.stored_type(tensor.name) not in _FLOATS:
            raise InputError(f"{tensor.name} is quantized already", hint="start from 16 bits", code="already-quantized")
    with ExitStack() as stack:
        probe = _Probe.opened(stack, path, text, settings, progress)
        importance = _importance(tensors, matrix, probe.collector)
        quantizer = _quantizer_importance(matrix)
        errors = _errors(tensors, weights, importance, quantizer, settings, progress, kept)
        groups = parts(model, settings.probes)
        rows, prices, together = probe.run(groups, weights, importance, quantizer, settings.threads, progress, kept)
    return SensitivityTable(
        format_version=FORMAT_VERSION,
        model_shape_sha256=shape_sha256(model),
        tensors=tuple(
            Sensitivity(tensor=t.name, divergence_per_error=prices[t.name], errors=errors[t.name]) for t in tensors
        ),
        probes=tuple(rows),
        additivity=together,
        tokens=len(probe.chunks) * len(probe.chunks[0]),
        seed=settings.seed,
    )


def parts(model: ModelSpec, most: int | None) -> list[list[Tensor]]:
    """The tensors in parts that are probed together: of one kind, in neighbouring blocks; about ``most`` parts."""
    kinds: dict[str, list[Tensor]] = {}
    for tensor in model.tensors:
        if gguf_mix.is_quantized(tensor):
            kinds.setdefault(tensor.name.split(".", 2)[2] if tensor.layer is not None else tensor.name, []).append(
                tensor
            )
    count = sum(map(len, kinds.values()))
    each = count if most is None or most >= count else max(1, most // len(kinds))
    groups = []
    for members in kinds.values():
        members.sort(key=lambda tensor: tensor.layer or 0)
        pieces = min(each, len(members))
        ends = [round(i * len(members) / pieces) for i in range(pieces + 1)]
        groups += [members[a:b] for a, b in pairwise(ends)]
    return groups


Columns = Mapping[str, "NDArray[np.float32]"]
"""Tensor → ``[matrices, columns]``."""


def _importance(tensors: list[Tensor], matrix: ImportanceMatrix | None, seen: Collector) -> Columns:
    """What an error in a column costs: sums of squares, so that an expert counts by the tokens it gets."""
    import numpy as np

    found: dict[str, NDArray[np.float32]] = {}
    for tensor in tensors:
        count = tensor.shape[2] if len(tensor.shape) > 2 else 1
        entry = matrix.entries.get(tensor.name) if matrix else None
        sums = entry.sums if entry is not None else seen.sums.get(tensor.name)
        if sums is None or not np.any(sums):
            sums = np.ones((count, tensor.shape[0]))
        scaled = np.asarray(sums, dtype=np.float64).reshape(count, tensor.shape[0])
        found[tensor.name] = (scaled / scaled.mean()).astype(np.float32)
    return found


def _quantizer_importance(matrix: ImportanceMatrix | None) -> Callable[[str, int], NDArray[np.float32] | None]:
    """(tensor, matrix of it) → what the quantizer is given, as it will be in the end."""

    def of(name: str, at: int) -> NDArray[np.float32] | None:
        import numpy as np

        entry = matrix.entries.get(name) if matrix else None
        if entry is None:
            return None
        means = entry.mean_squares()
        return np.ascontiguousarray(means.reshape(1, -1) if len(means) == 1 else means[at : at + 1]).reshape(-1)

    return of


def _errors(
    tensors: list[Tensor],
    weights: _Weights,
    importance: Columns,
    quantizer: Callable[[str, int], NDArray[np.float32] | None],
    settings: Settings,
    progress: native.Progress,
    kept: KeptRows | None,
) -> dict[str, dict[str, float]]:
    """Relative squared error of each tensor in each type it can take, on a sample of its rows."""
    done = 0

    def of(tensor: Tensor) -> tuple[str, dict[str, float]]:
        known: dict[str, float] | None = kept.get(f"errors of {tensor.name}") if kept else None
        if known is not None:
            return tensor.name, known
        covered = quantizer(tensor.name, 0) is not None
        types = candidate_types(tensor, covered=covered)
        lost, whole = dict.fromkeys(types, 0.0), 0.0
        for at, rows in _sampled(weights, tensor):
            column, given = importance[tensor.name][at], quantizer(tensor.name, at)
            whole += float(_weighted(rows, column))
            for type_ in types:
                lost[type_] += float(_weighted(rows - round_trip(rows, type_, given), column))
        return tensor.name, {type_: value / whole if whole > 0 else 0.0 for type_, value in lost.items()}

    found: dict[str, dict[str, float]] = {}
    with ThreadPoolExecutor(settings.threads) as pool:
        for name, errors in pool.map(of, tensors):
            found[name], done = errors, done + 1
            if kept and kept.get(f"errors of {name}") is None:
                kept.put(f"errors of {name}", errors)
            progress("errors by type", 0.4 * done / len(tensors))
    return found


def _sampled(weights: _Weights, tensor: Tensor) -> Iterator[tuple[int, NDArray[np.float32]]]:
    import numpy as np

    count = tensor.shape[2] if len(tensor.shape) > 2 else 1
    each = max(1, SAMPLE_WEIGHTS // (tensor.shape[0] * count))
    for at, rows in enumerate(weights.matrices(tensor.name)):
        picked = np.linspace(0, len(rows) - 1, min(each, len(rows))).round().astype(int)
        yield at, np.ascontiguousarray(rows[picked])


def _weighted(difference: NDArray[np.float32], column: NDArray[np.float32]) -> Any:
    import numpy as np

    return np.einsum("ij,ij,j->", difference, difference, column, dtype=np.float64)


@dataclass(slots=True)
class _Probe:
    """The 16-bit model, writable, with the log-probabilities it gives while nothing is changed."""

    context: native.Context
    chunks: list[list[int]]
    found: dict[str, NativeTensor]
    collector: Collector
    failures: list[BaseException]
    reference: list[tuple[NDArray[np.float32], NDArray[np.float64]]] = field(default_factory=list)

    @classmethod
    def opened(cls, stack: ExitStack, path: Path, text: str, settings: Settings, progress: native.Progress) -> _Probe:
        """Load the model and run it once: this also finds the weights where they lie in memory."""
        found: dict[str, NativeTensor] = {}
        failures: list[BaseException] = []
        collector, watching = Collector(), [True]

        def observe(node: NativeTensor, asked: bool) -> bool:
            if not watching[0]:
                return False
            source = node.source(0)
            if asked and source is not None and source.name.endswith("weight"):
                found.setdefault(source.name, source)
            return collector(node, asked)

        callback = eval_callback(observe, failures)
        model = stack.enter_context(
            native.open_model(path, offload=settings.offload, repack=False, progress=progress, writable=True)
        )
        size = min(CHUNK_TOKENS, model.trained_context)
        wanted = settings.chunks or CHUNKS
        drawn = choose_chunks(model.tokenize(text), size, CANDIDATES_PER_CHUNK * wanted, settings.seed)
        chunks = [model.begun(chunk) for chunk in drawn]
        options = native.ContextOptions(
            context=size, batch=size, ubatch=size, threads=settings.threads, eval_callback=callback
        )
        probe = cls(stack.enter_context(native.open_context(model, options)), chunks, found, collector, failures)
        surprise = [_surprise(chunk, logits) for chunk, logits in zip(chunks, probe._logits(whole=True), strict=True)]
        watching[0] = False
        best = sorted(sorted(range(len(chunks)), key=lambda i: (surprise[i], i))[:wanted])
        probe.chunks = [chunks[i] for i in best]
        probe.reference = [log_softmax(logits.copy()) for logits in probe._logits()]
        return probe

    def _logits(self, *, whole: bool = False) -> Iterator[NDArray[np.float32]]:
        """``[rows, n_vocab]`` of each chunk's second half; ``whole``: all rows are computed, as collecting needs."""
        half = len(self.chunks[0]) // 2
        for chunk in self.chunks:
            logits = self.context.logits([chunk], 0 if whole else half)[0]
            if self.failures:
                raise self.failures[0]
            yield logits[half:-1] if whole else logits[:-1]

    def divergence(self) -> tuple[float, float]:
        """Mean KL divergence from the unchanged model in nats, and its standard error."""
        import numpy as np

        parts = [
            kl_divergence(base, base_sum, *log_softmax(logits), floor=False)
            for (base, base_sum), logits in zip(self.reference, self._logits(), strict=True)
        ]
        return mean_and_error(np.concatenate(parts))

    def run(
        self,
        groups: list[list[Tensor]],
        weights: _Weights,
        importance: Columns,
        quantizer: Callable[[str, int], NDArray[np.float32] | None],
        threads: int,
        progress: native.Progress,
        kept: KeptRows | None = None,
    ) -> tuple[list[dict[str, str | float]], dict[str, float], float | None]:
        """Probe each part: the rows of the table, the price by tensor, and how far all parts together add up."""
        rows: list[dict[str, str | float]] = []
        prices: dict[str, float] = {}
        for number, group in enumerate(groups):
            name = f"probe of {len(group)} from {group[0].name}"
            row: dict[str, str | float] | None = kept.get(name) if kept else None
            if row is None:
                error, type_ = self._spoil(group, weights, importance, quantizer, threads)
                mean, standard = self.divergence()
                self._restore(group, weights)
                row = {"first": group[0].name, "tensors": len(group), "type": type_}
                row |= {"error": error, "divergence": mean, "standard_error": standard}
                if kept:
                    kept.put(name, row)
            error, mean = float(row["error"]), float(row["divergence"])
            price = max(mean, 0.0) / error if error > 0 else 0.0
            prices |= dict.fromkeys((tensor.name for tensor in group), price)
            rows.append(row)
            progress("probe the model", 0.4 + 0.6 * (number + 1) / (len(groups) + 1))
        apart = sum(float(row["divergence"]) for row in rows)
        everything = [tensor for group in groups for tensor in group]
        self._spoil(everything, weights, importance, quantizer, threads)
        together = self.divergence()[0]
        return rows, prices, together / apart if apart > 0 else None

    def _spoil(
        self,
        group: list[Tensor],
        weights: _Weights,
        importance: Columns,
        quantizer: Callable[[str, int], NDArray[np.float32] | None],
        threads: int,
    ) -> tuple[float, str]:
        """Replace the group's weights by what the probing type makes of them; the sum of its errors, and the type."""
        total, used = 0.0, ""
        with ThreadPoolExecutor(threads) as pool:
            for tensor in group:
                used = _probing_type(tensor)
                lost = whole = 0.0
                made = []
                for at, matrix in enumerate(weights.matrices(tensor.name)):
                    column, given = importance[tensor.name][at], quantizer(tensor.name, at)
                    blocks = [matrix[i : i + 256] for i in range(0, len(matrix), 256)]
                    spoiled = list(pool.map(lambda rows, g=given, t=used: round_trip(rows, t, g), blocks))
                    lost += sum(float(_weighted(b - s, column)) for b, s in zip(blocks, spoiled, strict=True))
                    whole += float(_weighted(matrix, column))
                    made += spoiled
                self._write(tensor, made, weights.stored_type(tensor.name))
                total += lost / whole if whole > 0 else 0.0
        return total, used

    def _restore(self, group: list[Tensor], weights: _Weights) -> None:
        for tensor in group:
            self._write(tensor, list(weights.matrices(tensor.name)), weights.stored_type(tensor.name))

    def _write(self, tensor: Tensor, matrices: list[NDArray[np.float32]], type_: str) -> None:
        import numpy as np

        values = np.concatenate(matrices)
        narrow = values
        if type_ != "F32":
            narrow = float32_to_bf16(values) if type_ == "BF16" else float32_to_f16(values, tensor.name)
        there = self.found.get(tensor.name)
        if there is not None:  # a tensor that this text never touches has no price
            there.write(np.ascontiguousarray(narrow).reshape(-1).view(np.uint8))


def _surprise(chunk: list[int], logits: NDArray[np.float32]) -> float:
    """Mean negative log-likelihood of the chunk's second half, nats."""
    import numpy as np

    shifted, log_sum = log_softmax(logits)
    following = np.asarray(chunk[len(chunk) - len(logits) :])
    return float((log_sum - shifted[np.arange(len(following)), following]).mean())


def _probing_type(tensor: Tensor) -> str:
    return PROBING_TYPES[0] if tensor.shape[0] % 256 == 0 else PROBING_TYPES[1] if tensor.shape[0] % 32 == 0 else "F16"
