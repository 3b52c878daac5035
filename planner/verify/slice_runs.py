"""Open slices in this process and time them. Runs only in a child."""

from __future__ import annotations

import ctypes
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from planner.core.model import ModelSpec
from planner.execute.random_gguf import write_random_tensors
from planner.verify import native
from planner.verify.alternating import Piece
from planner.verify.cache_state import tiled

BATCH = 2048
"""Most tokens that one call reads."""
_WARM_TOKENS = 2
_SEED_TOKENS = 64
"""Tokens that are really read where a deep cache is made of their repetition."""
_PROMPTS_WANTED = 3
"""A prompt lasts long enough to repeat within 1 % on a quiet machine."""
_FIRST_TOKEN = 64
"""Above the control tokens."""


@dataclass(slots=True)
class Slice:
    """An open slice with a context and some tokens."""

    spec: ModelSpec
    model: native.Model
    options: native.ContextOptions
    context: native.Context
    tokens: Any
    filled: int = 0

    def decode(self, count: int = 1) -> None:
        """Append ``count`` tokens one at a time."""
        address = ctypes.addressof(self.tokens)
        for _ in range(count):
            self.context.decode((ctypes.c_int32 * 1).from_address(address + 4 * self.filled), 1)
            self.filled += 1

    def read(self, count: int) -> None:
        """Append a prompt of ``count`` tokens, in batches."""
        address = ctypes.addressof(self.tokens)
        while count:
            size = min(count, BATCH)
            self.context.decode((ctypes.c_int32 * size).from_address(address + 4 * self.filled), size)
            self.filled += size
            count -= size

    def back_to(self, depth: int) -> None:
        """Cut the cache to ``depth`` tokens; fill it where there are fewer, or where this kind cannot be cut."""
        if self.filled == depth:
            return
        if self.filled > depth:
            if self.context.cut(depth):
                self.filled = depth
                return
            self.context.clear()
            self.filled = 0
        self.read(depth - self.filled)

    def fill(self, depth: int) -> bool:
        """Read some tokens and repeat their cache up to ``depth``; False for a kind of cache that cannot be repeated.

        Attention takes the same time whatever is cached, and reading 2048 tokens takes a whole 7B model minutes on two
        cores.
        """
        self.back_to(min(depth, _SEED_TOKENS))
        held = self.context.state()
        deep = held and tiled(held, depth)
        done = bool(deep) and self.context.restore(deep or bytearray())
        if not done:
            self.context.clear()
        self.filled = depth if done else 0
        return done

    def decoding(self, threads: int, depth: int = 0) -> Piece:
        """One token at ``depth``."""
        return Piece(name="decode", work=self.decode, before=lambda: self._ready(threads, depth), threads=threads)

    def reading(self, tokens: int, threads: int, depth: int = 0) -> Piece:
        """A prompt of ``tokens`` after ``depth``."""
        before = lambda: self._ready(threads, depth)  # noqa: E731
        work = lambda: self.read(tokens)  # noqa: E731
        return Piece(name="read", work=work, before=before, threads=threads, wanted=_PROMPTS_WANTED)

    def _ready(self, threads: int, depth: int) -> None:
        self.context.set_threads(threads)
        self.back_to(depth)


@contextmanager
def open_slice(
    spec: ModelSpec,
    types: Sequence[str],
    *,
    context: int,
    threads: int,
    gpu_layers: int = 0,
    kv_type: str = "f16",
    ubatch: int = 512,
    repack: bool = True,
) -> Iterator[Slice]:
    """Write ``spec`` with random weights, load it and open a context; the file is gone once it is loaded.

    Raises:
        InputError: llama.cpp refuses the file.
        ExecutionFailed: it refuses the context.
    """
    with tempfile.TemporaryDirectory(prefix="qplan-slice-") as folder:
        path = write_random_tensors(spec, types, Path(folder) / "slice.gguf")
        opening = native.open_model(
            path, offload=native.Offload(gpu_layers=gpu_layers), repack=repack, progress=lambda *_: None
        )
        with opening as model:
            with suppress(OSError):  # mapped as long as it is needed; Windows removes it with its folder
                path.unlink()
            options = native.ContextOptions(
                context=context,
                batch=BATCH,
                ubatch=ubatch,
                threads=threads,
                kv_type=kv_type,
                flash_attention=1,
            )
            with native.open_context(model, options) as opened:
                tokens = some_tokens(context + 64, spec.n_vocab)
                made = Slice(spec=spec, model=model, options=options, context=opened, tokens=tokens)
                made.decode(_WARM_TOKENS)
                yield made


@contextmanager
def second_context(made: Slice) -> Iterator[Slice]:
    """The same weights with a cache of its own, so that a deep and an empty cache are timed by turns."""
    with native.open_context(made.model, made.options) as opened:
        yield replace(made, context=opened, filled=0)


def some_tokens(count: int, vocabulary: int) -> Any:
    """Token ids to run, as a ctypes array."""
    first = min(_FIRST_TOKEN, vocabulary // 2)
    return (ctypes.c_int32 * count)(*(first + (i * 7919) % (vocabulary - first) for i in range(count)))


def seconds_to_read(opened: Slice, tokens: int, threads: int) -> float:
    """One prompt, once: to see what the rest will take."""
    piece = opened.reading(tokens, threads)
    piece.before()
    began = time.perf_counter()
    piece.work()
    return time.perf_counter() - began
