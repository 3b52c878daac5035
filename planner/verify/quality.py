"""Perplexity and KL divergence of a model on a text, as llama-perplexity defines them. Runs only in a child."""

from __future__ import annotations

import hashlib
import time
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from planner.core.errors import InputError
from planner.verify import native
from planner.verify.perplexity import Scores
from planner.verify.trial import AS_IT_IS, Loading, QualityTrial

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_BATCH, _UBATCH = 2048, 512
"""llama-perplexity's defaults."""


class Engine(Protocol):
    """A loaded model that scores chunks of tokens, whatever runs it."""

    @property
    def vocab_size(self) -> int:
        """Logits of a position."""

    @property
    def trained_context(self) -> int:
        """Longest text that the model was trained with."""

    def tokenize(self, text: str) -> list[int]:
        """Tokens of ``text`` with the specials that the model puts around a text."""

    def beginning(self) -> int | None:
        """The BOS token, where the model wants one."""

    def prepare(self, context: int) -> None:
        """Make room for chunks of ``context`` tokens; called once, before the first."""

    def logits(self, chunks: list[list[int]], first: int) -> NDArray[np.float32]:
        """``[len(chunks), length - first, n_vocab]``: logits from position ``first`` on; valid until the next call."""


@dataclass(slots=True)
class _LlamaCpp:
    """llama.cpp with a context of one batch of chunks."""

    model: native.Model
    stack: ExitStack
    threads: int
    vocab_size: int
    trained_context: int
    context: native.Context | None = None

    def tokenize(self, text: str) -> list[int]:
        return self.model.tokenize(text)

    def beginning(self) -> int | None:
        return self.model.beginning()

    def prepare(self, context: int) -> None:
        self.context = self.stack.enter_context(native.open_context(self.model, _options(context, self.threads)))

    def logits(self, chunks: list[list[int]], first: int) -> NDArray[np.float32]:
        assert self.context is not None
        return self.context.logits(chunks, first)


def measure_quality(
    model_path: Path,
    reference_path: Path | None,
    text: str,
    *,
    context: int = 512,
    max_chunks: int | None = None,
    threads: int,
    offload: native.Offload = native.ON_CPU,
    repack: bool = True,
    loading: Loading = AS_IT_IS,
    like_llama_cpp: bool = False,
    budget_seconds: float | None = None,
    progress: native.Progress,
) -> QualityTrial:
    """Score ``text`` in chunks of ``context`` tokens; of each, the second half is scored.

    As llama-perplexity: four chunks of 512 make a batch (the batching moves the fifth digit), the text is tokenized
    once with the model's specials, every chunk begins with BOS in place of its first token (where the model wants
    BOS), one trailing newline is dropped, and a last incomplete chunk is left out. The KV cache is f16 and flash
    attention is left to llama.cpp.

    A GGUF file is run by llama.cpp, a checkpoint directory by transformers; text, windows and statistics are the same,
    so that they compare.

    Args:
        context: tokens of a chunk; a model trained on shorter texts gets chunks of its length.
        max_chunks: at most so many chunks; ``None`` is all.
        loading: how transformers loads the model; the reference is computed exactly.
        like_llama_cpp: round the reference's log-probabilities to 16 bits as llama-perplexity's file does.
        budget_seconds: stop after the batch that passes this.

    Raises:
        InputError: the text is too short, or the models do not share a vocabulary.
        ExecutionFailed: logits are not finite, or llama.cpp cannot run a model.
    """
    if not (model_path.is_dir() and (reference_path is None or reference_path.is_dir())):
        # Before numpy: a llama.cpp built for CUDA with a static libstdc++ that it exports (GCC 13, nvcc 13.0) crashes
        # in print_info when numpy has loaded the shared one first.
        native.library()
    with ExitStack() as stack:
        opened = partial(_opened, stack=stack, threads=threads, offload=offload, repack=repack, progress=progress)
        scorer = opened(model_path, loading=loading)
        context = min(context, scorer.trained_context)
        reference = None if reference_path is None else opened(reference_path)
        tokens = _tokens(scorer, reference, text, context)
        available = len(tokens) // context
        wanted = min(available, max_chunks or available)
        chunks = [tokens[i * context : (i + 1) * context] for i in range(wanted)]
        scores, done = _scored(
            chunks, context, scorer, reference, stored=like_llama_cpp, budget_seconds=budget_seconds, progress=progress
        )
    return QualityTrial(
        perplexity=scores.perplexity(),
        comparison=scores.comparison(),
        chunk_count=done,
        chunk_available_count=available,
        context=context,
        token_count=done * (context - context // 2 - 1),
        text_sha256=hashlib.sha256(text.encode()).hexdigest(),
    )


def _opened(
    path: Path,
    stack: ExitStack,
    *,
    threads: int,
    offload: native.Offload,
    repack: bool,
    progress: native.Progress,
    loading: Loading = AS_IT_IS,
) -> Engine:
    """What runs ``path``: a checkpoint directory or a GGUF file, which stays open until ``stack`` ends."""
    if path.is_dir():
        from planner.verify.torch_engine import open_checkpoint

        return open_checkpoint(path, on_gpu=offload.gpu_layers > 0, threads=threads, progress=progress, loading=loading)
    model = stack.enter_context(native.open_model(path, offload=offload, repack=repack, progress=progress))
    return _LlamaCpp(model, stack, threads, model.vocab_size, model.trained_context)


def _scored(
    chunks: list[list[int]],
    context: int,
    scorer: Engine,
    reference: Engine | None,
    *,
    stored: bool,
    budget_seconds: float | None,
    progress: native.Progress,
) -> tuple[Scores, int]:
    """Scores of ``chunks`` of ``context`` tokens, batch by batch until the budget is used up, and of how many.

    Both models take the chunks in turn, so no more than one batch's logits of each is ever held: 1024 × n_vocab
    floats.
    """
    import numpy as np

    for engine in filter(None, (scorer, reference)):
        engine.prepare(context)
    scores, first, done, began = Scores(), context // 2, 0, time.perf_counter()
    while done < len(chunks) and (not done or budget_seconds is None or time.perf_counter() - began < budget_seconds):
        progress("score the text", done / len(chunks))
        batch = chunks[done : done + _sequences(context)]
        logits = _logits(scorer, batch, first)
        base_logits = None if reference is None else _logits(reference, batch, first)
        for i, chunk in enumerate(batch):
            targets, base = np.asarray(chunk[first + 1 :]), None if base_logits is None else base_logits[i]
            scores.add(logits[i], targets, base, stored=stored)
        done += len(batch)
    return scores, done


def _sequences(context: int) -> int:
    return max(1, _BATCH // context)


def _options(context: int, threads: int) -> native.ContextOptions:
    count = _sequences(context)
    return native.ContextOptions(
        context=context, batch=count * context, ubatch=min(context, _UBATCH), threads=threads, sequences=count
    )


def _logits(scorer: Engine, chunks: list[list[int]], first: int) -> NDArray[np.float32]:
    """Rows ``first`` to the last but one of each chunk: each predicts the token after it."""
    beginning = scorer.beginning()
    tokens = chunks if beginning is None else [[beginning, *chunk[1:]] for chunk in chunks]
    return scorer.logits(tokens, first)[:, :-1]


def _tokens(model: Engine, reference: Engine | None, text: str, context: int) -> list[int]:
    text = text.removesuffix("\n")
    tokens = model.tokenize(text)
    if len(tokens) < 2 * context:  # as llama-perplexity: fewer than two chunks say too little
        raise InputError(
            "the text is too short to measure quality on",
            numbers=f"{len(tokens)} tokens, two chunks of {context} are needed",
            hint="give a longer text with --text",
            code="text-too-short",
        )
    if reference is not None and (reference.vocab_size != model.vocab_size or reference.tokenize(text) != tokens):
        raise InputError(
            "the reference is another model: its tokens differ",
            numbers=f"{reference.vocab_size} entries in its vocabulary, {model.vocab_size} in the artifact's",
            hint="the reference must be the 16-bit model that the artifact was quantized from",
            code="other-vocabulary",
        )
    return tokens
