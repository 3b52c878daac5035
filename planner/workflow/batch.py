"""Answers to many cases: those of one model together, and on all cores where there are enough of them."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from typing import TYPE_CHECKING

from planner.core.hardware import usable_core_count
from planner.workflow.estimates import BLOCK_LINES, answer_of, estimate_file, grouped

if TYPE_CHECKING:
    from concurrent.futures import Executor

PARALLEL_FROM = 600
"""Lines from which worker processes are started: they cost as much as about a hundred estimates."""
MOST_WORKERS = 8
_PIECES_PER_WORKER = 8
"""Pieces are handed out as workers get free, as some models take longer than others."""


def answered(lines: Iterable[str]) -> Iterator[str]:
    """One answer as JSON text per non-empty line, in order; a bad line gets an ``error`` and the rest go on."""
    rest = (line for line in lines if line.strip())
    first = list(islice(rest, BLOCK_LINES))
    workers = min(usable_core_count(), MOST_WORKERS)
    if len(first) < PARALLEL_FROM or workers < 2:
        yield from (_text(answer) for answer in estimate_file(chain(first, rest)))
        return
    executor = _executor(workers)
    try:
        while first:
            yield from _block(executor, first, _PIECES_PER_WORKER * workers)
            first = list(islice(rest, BLOCK_LINES))
    finally:
        executor.shutdown(wait=False, cancel_futures=True)


def _executor(workers: int) -> Executor:
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor

    # a fork has everything imported; elsewhere than on Linux it is not safe
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
    return ProcessPoolExecutor(workers, mp_context=context, initializer=_start)


def _start() -> None:
    """In a worker: Ctrl-C is the parent's matter, and nothing here makes cycles that must be found."""
    import gc
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    gc.disable()


def _block(executor: Executor, block: list[str], piece_count: int) -> Iterator[str]:
    from concurrent.futures.process import BrokenProcessPool

    pieces = _pieces(block, piece_count)
    texts = [""] * len(block)
    try:
        for piece, found in zip(pieces, executor.map(_answers, [[block[at] for at in p] for p in pieces]), strict=True):
            for at, text in zip(piece, found, strict=True):
                texts[at] = text
    except BrokenProcessPool:  # a worker was killed, most likely for want of memory: do it here, one at a time
        texts = _answers(block)
    yield from texts


def _pieces(block: list[str], count: int) -> list[list[int]]:
    """Indexes of the lines, those of one model in one piece as far as pieces of about equal length allow."""
    pieces: list[list[int]] = [[]]
    model, least = "", len(block) / count
    for group, at in grouped(block):
        if group[0] != model and len(pieces[-1]) >= least:
            pieces.append([])
        model = group[0]
        pieces[-1].append(at)
    return pieces


def _answers(lines: list[str]) -> list[str]:
    return [_text(answer_of(line)) for line in lines]


def _text(answer: object) -> str:
    return json.dumps(answer, ensure_ascii=False)
