"""What ``qplan tune`` measures: settings of a model by turns, in rungs that keep the better half. Runs only in a child.

Threads change within a context, other settings open another context of the loaded model, and another number of layers
on a GPU loads it again.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from planner.core.candidate import Placement
from planner.core.errors import ExecutionFailed, QplanError
from planner.core.model import ModelSpec
from planner.core.tuned import setting_line
from planner.core.units import pad
from planner.estimate import slices
from planner.estimate.kv_cache import CELL_PADDING
from planner.execute.random_gguf import write_random_tensors
from planner.methods import gguf
from planner.verify import halving, native
from planner.verify.alternating import Piece, alternate
from planner.verify.slice_runs import Slice, seconds_to_read
from planner.verify.tuning_bench import SHORTEST_PROMPT, Bench
from planner.verify.tuning_trial import ALIKE, FAILED, MEASURED, NOT_REACHED, TuneAnswer, TuneRequest, TuneRow

_FIRST_SHARE = 0.4
"""Of the time, for the first rung: all settings are in it."""
_READ_SHARE = 0.65
"""Of a rung's time for prompts, where tokens are decoded too: one of those takes far less than a prompt."""
_PROBES = 4
"""Prompts that are read to see what the rest will take: the fastest of them counts."""
_PROBE_SHARE = 0.08
_ROOM = 128
_ENOUGH = 8
"""So many settings should get into the first rung, with a shorter prompt if need be."""
_DECODES, _PROMPTS = 4, 1
"""Samples in the first rung; each rung wants twice as many, or as many more."""
_MOST_DECODES, _MOST_PROMPTS = 32, 7

Progress = native.Progress


@dataclass(slots=True)
class _Arm:
    """One setting with its samples."""

    number: int
    setting: Placement
    decode: Piece | None = None
    read: Piece | None = None
    status: str = NOT_REACHED
    note: str = ""
    rungs: int = 0

    @property
    def pieces(self) -> list[Piece]:
        """What is timed of it."""
        return [piece for piece in (self.read, self.decode) if piece is not None]

    def fail(self, error: QplanError) -> None:
        """It is out of the search."""
        self.status, self.note = FAILED, " ".join(filter(None, (error.what, error.numbers)))
        for piece in self.pieces:
            piece.broken = True


def kept(piece: Piece | None) -> list[float]:
    """The samples that count: the best class that there are some of, as in a calibration."""
    return [] if piece is None else piece.good or sorted(piece.disturbed)[:2]


@dataclass(slots=True)
class Tuning:
    """One search."""

    request: TuneRequest
    progress: Progress
    began: float = field(default_factory=time.perf_counter)
    prompt: int = 0
    cells: int = 0
    arms: list[_Arm] = field(default_factory=list)

    def left(self) -> float:
        """Seconds of the budget that are left."""
        return self.request.budget_seconds - (time.perf_counter() - self.began)

    def run(self) -> TuneAnswer:
        """Measure until the search is over.

        Raises:
            ExecutionFailed: no setting runs at all.
        """
        native.library()
        self.arms = [_Arm(number, setting) for number, setting in enumerate(self.request.settings)]
        with self._material() as (path, spec):
            self.cells = pad(max(self.request.depth, self.request.prompt_tokens) + _ROOM, CELL_PADDING)
            bench = Bench(path, spec, self.cells, self.request)
            try:
                found = self._search(bench)
            finally:
                bench.close()
        self.progress("done", 1.0)
        return TuneAnswer(
            rows=tuple(_row(arm) for arm in self.arms),
            ranking=found,
            prompt_tokens=self.prompt,
            depth=self.request.depth,
            context=self.cells,
            tool_version=native.tool_version(),
            seconds=time.perf_counter() - self.began,
        )

    @contextmanager
    def _material(self) -> Iterator[tuple[Path, ModelSpec]]:
        """The file to run: as given, or of random weights, which is gone afterwards."""
        from tempfile import TemporaryDirectory

        from planner import models

        asked = self.request
        model = models.resolve(asked.model)
        if asked.path is not None:
            yield Path(asked.path), model
            return
        types: Sequence[str] = gguf.tensor_types(model, gguf.variant(asked.type, imatrix=asked.imatrix))
        if asked.layers is not None:
            model, types = slices.cut(model, types, asked.layers)
        self.progress("write random weights", 0.0)
        with TemporaryDirectory(prefix="qplan-tune-") as folder:
            yield write_random_tensors(model, types, Path(folder) / "model.gguf"), model

    def _search(self, bench: Bench) -> tuple[int, ...]:
        self._prepare(bench)
        chosen = [arm for arm in self.arms if arm.status == MEASURED]
        if not chosen:
            first = self.arms[0]
            raise ExecutionFailed("no setting runs", numbers=first.note, code="nothing-measured")
        found = halving.search(
            len(chosen),
            lambda alive, rungs_left: self._rung(bench, chosen, alive, rungs_left),
            keep={place for place, arm in enumerate(chosen) if arm.number == 0},
        )
        for place, rungs in found.rungs.items():
            chosen[place].rungs = rungs
        return tuple(chosen[place].number for place in found.ranking)

    def _prepare(self, bench: Bench) -> None:
        """Time the first setting that runs, and choose the prompt and how many settings there is time for."""
        both = self.request.objective == "balanced"
        per_token = per_decode = 0.0
        for arm in self.arms:
            self._tell(arm)
            try:
                made = bench.open(arm.setting)
                threads = arm.setting.threads or 1
                reading = self._probe(made, threads)
                began = time.perf_counter()
                made.decode(2)
            except QplanError as error:
                arm.fail(error)
                continue
            per_token, per_decode = reading / SHORTEST_PROMPT, (time.perf_counter() - began) / 2
            break
        share = _FIRST_SHARE * self.left()
        self.prompt = self.request.prompt_tokens
        reads = self.request.objective != "decode"
        budget = share * (_READ_SHARE if both else 1.0)
        while reads and self.prompt > 2 * SHORTEST_PROMPT and self._count() * self.prompt * per_token > budget:
            self.prompt //= 2
        self._leave_out_alike()
        seconds = (self.prompt * per_token if reads else 0.0) + (_DECODES * per_decode if self._decodes else 0.0)
        self._admit(share, seconds)

    def _probe(self, made: Slice, threads: int) -> float:
        """Seconds of the shortest prompt: the fastest of a few, within a small part of the time."""
        until = time.perf_counter() + _PROBE_SHARE * self.left()
        found = [seconds_to_read(made, SHORTEST_PROMPT, threads)]
        while len(found) < _PROBES and time.perf_counter() + found[-1] < until:
            found.append(seconds_to_read(made, SHORTEST_PROMPT, threads))
        return min(found)

    def _count(self) -> int:
        return min(_ENOUGH, len(self.arms))

    @property
    def _decodes(self) -> bool:
        return self.request.objective != "prefill"

    def _leave_out_alike(self) -> None:
        """A prompt of half a micro-batch does not tell two micro-batches apart."""
        seen: dict[Placement, _Arm] = {}
        for arm in self.arms:
            if arm.status == FAILED:
                continue
            tokens = self.prompt if self.request.objective != "decode" else 1
            same = replace(arm.setting, ubatch=min(arm.setting.ubatch, tokens), batch=0)
            twin = seen.setdefault(same, arm)
            if twin is not arm:
                arm.status = ALIKE
                arm.note = f"the same as with micro-batch {twin.setting.ubatch} for a prompt of {self.prompt} tokens"

    def _admit(self, share: float, seconds: float) -> None:
        """As many as the first rung has time for, at least two."""
        first = next((arm for arm in self.arms if arm.status == NOT_REACHED), None)
        threads = (first.setting.threads if first else None) or 1
        spent, count = 0.0, 0
        for arm in self.arms:
            if arm.status != NOT_REACHED:
                continue
            spent += seconds * max(1.0, threads / (arm.setting.threads or threads))
            count += 1
            if spent > share and count > halving.FINALISTS:
                return
            arm.status = MEASURED
            self._give_pieces(arm)

    def _give_pieces(self, arm: _Arm) -> None:
        arm.decode = Piece("decode", _nothing, _nothing, threads=arm.setting.threads or 0) if self._decodes else None
        if self.request.objective != "decode":
            arm.read = Piece("read", _nothing, _nothing, threads=arm.setting.threads or 0)
        if arm.setting.gpu_layers:
            for piece in arm.pieces:
                piece.threads = 0  # the host's cores may idle

    def _rung(self, bench: Bench, chosen: Sequence[_Arm], alive: tuple[int, ...], rungs_left: int) -> dict[int, float]:
        number = halving.rung_count(len(chosen)) - rungs_left
        share = self.left() * (_FIRST_SHARE if number == 0 and rungs_left > 1 else 1 / rungs_left)
        running = [chosen[place] for place in alive]
        for arm in running:
            if arm.decode:
                arm.decode.wanted = min(_DECODES * 2**number, _MOST_DECODES)
            if arm.read:
                arm.read.wanted = min(_PROMPTS + number, _MOST_PROMPTS) if rungs_left > 1 else _MOST_PROMPTS
        until = time.perf_counter() + share
        groups: dict[tuple[object, ...], list[_Arm]] = {}
        for arm in running:
            place = (arm.setting.gpu_layers, arm.setting.cpu_expert_layers, arm.setting.tensor_split)
            groups.setdefault(place, []).append(arm)
        for count, group in enumerate(groups.values()):
            left = max(0.0, until - time.perf_counter())
            self._time(bench, group, time.perf_counter() + left / (len(groups) - count))
        costs = {place: self._cost(chosen[place]) for place in alive if chosen[place].status == MEASURED}
        return {place: cost for place, cost in costs.items() if cost is not None}

    def _time(self, bench: Bench, group: Sequence[_Arm], until: float) -> None:
        """Prompts by turns, then tokens by turns, so that the cache is cut and not filled again where it can be."""
        owner: dict[int, _Arm] = {}
        for arm in group:
            for piece in arm.pieces:
                owner[id(piece)] = arm
                self._bind(bench, arm, piece)
        reads = [arm.read for arm in group if arm.read]
        decodes = [arm.decode for arm in group if arm.decode]
        failed = lambda piece, error: owner[id(piece)].fail(error)  # noqa: E731
        share = _READ_SHARE if reads and decodes else 1.0
        middle = time.perf_counter() + share * max(0.0, until - time.perf_counter())
        alternate(reads, until=middle if reads else until, failed=failed)
        alternate([piece for piece in decodes if not piece.broken], until=until, failed=failed)

    def _bind(self, bench: Bench, arm: _Arm, piece: Piece) -> None:
        """Let a piece run on the context of its setting, opened when it is needed."""
        depth = self.request.depth if piece is arm.decode else 0
        opened: list[Slice] = []

        def before() -> None:
            self._tell(arm)
            made = bench.open(arm.setting)
            opened[:] = [made]
            made.context.set_threads(arm.setting.threads or 1)
            bench.bring(made, depth)

        piece.before = before
        work = partial(Slice.decode) if piece is arm.decode else partial(Slice.read, count=self.prompt)
        piece.work = lambda: work(opened[0])

    def _cost(self, arm: _Arm) -> float | None:
        """Seconds of what the objective asks for."""
        found = cost(self.request, self.prompt, kept(arm.decode), kept(arm.read))
        return None if found is None else found.seconds

    def _tell(self, arm: _Arm) -> None:
        done = min(1.0, 1 - self.left() / self.request.budget_seconds)
        self.progress(f"setting {arm.number}: {setting_line(arm.setting)}", done)


def cost(request: TuneRequest, prompt: int, decode: Sequence[float], read: Sequence[float]) -> halving.Timed | None:
    """Of samples in seconds (a token; a prompt of ``prompt``): the time of what the objective asks for."""
    parts = []
    if request.objective != "prefill":
        if not decode:
            return None
        parts.append((float(request.answer_tokens) if request.objective == "balanced" else 1.0, halving.timed(decode)))
    if request.objective != "decode":
        if not read:
            return None
        parts.append((request.prompt_tokens / prompt, halving.timed(read)))
    return halving.added(parts)


def _nothing() -> None:
    """Bound before it is timed."""


def _row(arm: _Arm) -> TuneRow:
    decode, read = kept(arm.decode), kept(arm.read)
    status = FAILED if arm.status == MEASURED and not (decode or read) else arm.status
    return TuneRow(
        status=status,
        decode_seconds=tuple(sorted(decode)),
        prefill_seconds=tuple(sorted(read)),
        set_aside_count=sum(piece.taken for piece in arm.pieces) - len(decode) - len(read),
        disturbed=tuple(
            name
            for name, piece in (("decode", arm.decode), ("prefill", arm.read))
            if piece is not None and not piece.good
        ),
        rungs=arm.rungs,
        note=arm.note,
    )
