"""Collect an importance matrix through llama.cpp's eval callback. Runs only in a child.

What is summed, and over which chunks of text, is as in llama.cpp's ``tools/imatrix``; the sums here are in float64
and stored as float32.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from planner.core.errors import ExecutionFailed
from planner.formats.imatrix import Importance, ImportanceMatrix
from planner.methods.samples import choose_chunks
from planner.verify import native
from planner.verify.kept import KeptSums
from planner.verify.tensors import NativeTensor, eval_callback

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

CHUNK_TOKENS = 512
"""llama-imatrix's default context."""
_LEAST_ROWS = 16
"""llama-imatrix leaves smaller products alone: they come from single tokens."""
_OUTPUTS = ("output.weight", "token_embd.weight")
"""The output matrix, under the second name where it is the embedding; llama-imatrix's ``--process-output``."""


@dataclass(slots=True)
class Collector:
    """Sums of squares of what each weight is multiplied with, by column and, for experts, by expert."""

    sums: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    """``[matrices, columns]``"""
    counts: dict[str, NDArray[np.int64]] = field(default_factory=dict)
    """``[1]`` of a dense tensor, ``[experts]`` of a routed one."""

    def __call__(self, node: NativeTensor, asked: bool) -> bool:
        """The observer: whether ``node`` is of interest; then take it."""
        operation = node.operation
        if operation not in ("MUL_MAT", "MUL_MAT_ID"):
            return False
        weight, values = node.source(0), node.source(1)
        assert weight is not None and values is not None
        if asked:
            return operation == "MUL_MAT_ID" or (_is_weight(weight.name) and _is_batch(values))
        ids = node.source(2)
        if operation == "MUL_MAT_ID" and ids is not None:
            self._add_routed(weight, values.read(), ids.read())
        else:
            self._add_dense(weight, values.read())
        return True

    def _add_dense(self, weight: NativeTensor, values: NDArray[np.float32]) -> None:
        """``values[i3, i2, row, column]``; a weight of several matrices takes them in turn."""
        columns, matrices = weight.shape[0], weight.shape[2] * weight.shape[3]
        sums = self._of(weight.name, matrices, columns, counts=1)
        for i3, block in enumerate(values):
            for i2, rows in enumerate(block):
                at = (i3 % weight.shape[3]) * weight.shape[2] + i2 % weight.shape[2]
                sums[at] += _sum_of_squares(rows)
        self.counts[weight.name][0] += values[..., 0].size // matrices

    def _add_routed(self, weight: NativeTensor, values: NDArray[np.float32], ids: NDArray[np.int32]) -> None:
        """``values[0, token, used or 1, column]`` and the chosen expert ``ids[0, 0, token, used]``."""
        import numpy as np

        rows, chosen = values[0], ids[0, 0]
        sums = self._of(weight.name, weight.shape[2], weight.shape[0], counts=weight.shape[2])
        for slot in range(chosen.shape[1]):
            taken = rows[:, slot % rows.shape[1]]
            for expert in np.unique(chosen[:, slot]):
                mine = taken[chosen[:, slot] == expert]
                sums[expert] += _sum_of_squares(mine)
                self.counts[weight.name][expert] += len(mine)

    def _of(self, name: str, matrices: int, columns: int, *, counts: int) -> NDArray[np.float64]:
        import numpy as np

        if name not in self.sums:
            self.sums[name] = np.zeros((matrices, columns))
            self.counts[name] = np.zeros(counts, dtype=np.int64)
        return self.sums[name]

    def matrix(self, *, chunk_count: int, chunk_size: int, dataset: str, outputs: bool) -> ImportanceMatrix:
        """What was collected; ``outputs``: that of the output matrix too.

        Raises:
            ExecutionFailed: the model gave numbers that are not finite.
        """
        import numpy as np

        entries = {}
        for name, sums in self.sums.items():
            if name in _OUTPUTS and not outputs:
                continue
            if not np.isfinite(sums).all():
                raise ExecutionFailed(f"the activations of {name} are not finite numbers", code="not-finite")
            counts = self.counts[name]
            entries[name] = Importance(sums=sums.reshape(len(counts), -1).astype(np.float32), counts=counts)
        return ImportanceMatrix(entries=entries, chunk_count=chunk_count, chunk_size=chunk_size, datasets=(dataset,))


def _is_weight(name: str) -> bool:
    return name.startswith("blk.") or name in _OUTPUTS


def _is_batch(values: NativeTensor) -> bool:
    return values.shape[1] >= _LEAST_ROWS and values.type_id == 0


def _sum_of_squares(rows: NDArray[np.float32]) -> NDArray[np.float64]:
    import numpy as np

    squares: NDArray[np.float64] = np.einsum("ij,ij->j", rows, rows, dtype=np.float64)
    return squares


def collect(
    path: Path,
    text: str,
    *,
    dataset: str,
    threads: int,
    progress: native.Progress,
    offload: native.Offload = native.ON_CPU,
    most_chunks: int | None = None,
    seed: int = 0,
    outputs: bool = False,
    kept: KeptSums | None = None,
) -> ImportanceMatrix:
    """The importance matrix of the model ``path`` over ``text``.

    As llama-imatrix: the text is tokenized once with the model's specials and cut into chunks of 512 tokens, each
    begun by BOS where the model wants it; a last incomplete chunk is left out. Weights stay in their plain layout,
    as a repacked one has other names and is multiplied by other kernels.

    Args:
        dataset: what the file will say the text was.
        most_chunks: take so many chunks, drawn by ``seed``; ``None`` is all.
        outputs: collect the output matrix too.
        kept: where sums are kept on the way, and what a killed run had kept.

    Raises:
        InputError: the text is too short, or llama.cpp refuses the model.
        ExecutionFailed: llama.cpp cannot run it, or gives numbers that are not finite.
    """
    collector = Collector()
    done = kept.restore(collector.sums, collector.counts) if kept else 0
    failures: list[BaseException] = []
    callback = eval_callback(collector, failures)
    with native.open_model(path, offload=offload, repack=False, progress=progress) as model:
        size = min(CHUNK_TOKENS, model.trained_context)
        chunks = choose_chunks(model.tokenize(text), size, most_chunks, seed)
        options = native.ContextOptions(context=size, batch=size, ubatch=size, threads=threads, eval_callback=callback)
        with native.open_context(model, options) as context:
            for number, chunk in list(enumerate(chunks))[done:]:
                progress("collect activations", number / len(chunks))
                context.logits([model.begun(chunk)], 0)  # logits of all rows, or the last block leaves most of them out
                if failures:
                    raise failures[0]
                if kept:
                    kept.offer(number + 1, collector.sums, collector.counts)
    return collector.matrix(chunk_count=len(chunks), chunk_size=size, dataset=dataset, outputs=outputs)


def summary(matrix: ImportanceMatrix) -> dict[str, Any]:
    """What a report says of it."""
    unseen = sum(int((entry.counts == 0).sum()) for entry in matrix.entries.values())
    return {
        "tensors": len(matrix.entries),
        "chunks": matrix.chunk_count,
        "tokens": matrix.chunk_count * matrix.chunk_size,
        "experts_unseen": unseen,
        "dataset": ", ".join(matrix.datasets),
    }
