"""What ``qplan calibrate`` measures on one device, the most telling first. Runs only in a child.

Every step opens its slices together and times them by turns. A step that the rest of the budget has no room for is left
out and named.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from math import ceil

from planner.core.errors import QplanError
from planner.core.model import ModelSpec
from planner.core.rates import Observation
from planner.estimate import slices
from planner.estimate.slices import FEW, MANY, Kit, Shape
from planner.formats import ggml
from planner.verify import native
from planner.verify.alternating import Piece, alternate
from planner.verify.calibration_trial import CalibrationAnswer, CalibrationRequest
from planner.verify.slice_runs import Slice, open_slice, second_context, seconds_to_read

_ALL_LAYERS = 1 << 20
_CHUNK = 64
"""Tokens of a prompt read at depth: what they take more than at the start is attention."""
_LARGEST_PASS = 2048
"""Tokens of the largest micro-batch that is timed on a GPU, where it decides how full the kernels are."""
_CACHE_MULTIPLE = 1.5
_MOST_FEW = 8
"""A virtual machine tells the whole cache of a host that it shares with others."""
_MANY_OF_MODEL = 12
"""Layers of the larger slice of a very model: noise of the slope grows with the layers that are extrapolated over."""
_DEPTH_ROOM = 128
_LEAST_STEP_SECONDS = 1.0

Types = tuple[str, ...]
Progress = Callable[[str, float], None]
_Step = tuple[str, float, Callable[[float], None]]
"""Name, weight in the budget, and what to do until a moment of ``perf_counter``."""


@dataclass(slots=True)
class _Case:
    """A piece with what it says about which slice."""

    piece: Piece
    seen: Observation


@dataclass(slots=True)
class Calibrating:
    """One run over one device."""

    request: CalibrationRequest
    progress: Progress
    began: float = field(default_factory=time.perf_counter)
    observations: list[Observation] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    @property
    def kit(self) -> Kit:
        """The shapes for this device, scaled as asked."""
        kit = slices.GPU_KIT if self.request.gpu else slices.CPU_KIT
        return kit if self.request.scale == 1 else slices.scaled(kit, self.request.scale)

    def left(self) -> float:
        """Seconds of the budget that are left."""
        return self.request.budget_seconds - (time.perf_counter() - self.began)

    def run(self) -> CalibrationAnswer:
        """Measure until all is done or the budget is spent."""
        native.library()
        steps = self._model_steps() if self.request.model else self._plain_steps()
        weights = sum(weight for _, weight, _ in steps)
        for name, weight, step in steps:
            share = self.left() * weight / weights
            weights -= weight
            if share < _LEAST_STEP_SECONDS * min(1.0, weight) and self.observations:
                self.left_out.append(name)
                continue
            self.progress(name, 1 - max(0.0, self.left()) / self.request.budget_seconds)
            try:
                step(time.perf_counter() + share)
            except QplanError as error:
                self.left_out.append(f"{name} ({error.what})")
        self.progress("done", 1.0)
        return CalibrationAnswer(
            observations=tuple(self.observations),
            tool_version=native.tool_version(),
            seconds=time.perf_counter() - self.began,
            left_out=tuple(self.left_out),
        )

    def _plain_steps(self) -> list[_Step]:
        kit, (first, *others) = self.kit, self.request.types
        steps: list[_Step] = [
            (f"{first}, threads and depth", 2.5, partial(self._type, kit.wide, first, deep=True)),
            *(
                (f"attention, {shape.name}", 0.8, partial(self._attention, shape, first, "f16"))
                for shape in kit.attention[1:]
            ),
            ("overheads", 1.0, self._overheads),
            *((type_, 1.0, partial(self._type, kit.wide, type_)) for type_ in others),
        ]
        for kv_type in self.request.kv_types:
            for shape in kit.attention if kv_type != "f16" else ():
                name = f"KV cache {kv_type}, {shape.name}"
                steps.append((name, 0.7, partial(self._attention, shape, first, kv_type)))
        if self.request.gpu:
            steps.append(("link", 1.0, partial(self._link, first)))
        return steps

    def _model_steps(self) -> list[_Step]:
        from planner import models
        from planner.methods import gguf

        model = models.resolve(self.request.model or "")
        steps: list[_Step] = []
        for type_ in self.request.types:
            types = gguf.tensor_types(model, gguf.variant(type_, imatrix=self.request.imatrix))
            steps.append((f"{model.name} as {type_}", 1.0, partial(self._model_type, model, type_, types)))
        return steps

    def pair(self, layer_bytes: float) -> tuple[int, int]:
        """Layers of the two slices: few enough to be quick, more than the caches hold.

        The larger has at least twice as many: noise of the times is noise of the slope times what they have in common.
        """
        few = min(max(FEW, ceil(_CACHE_MULTIPLE * self.request.cache_bytes / max(layer_bytes, 1.0))), _MOST_FEW)
        return few, max(few + MANY - FEW, 2 * few)

    def model_pair(self, layer_bytes: float, layers: int) -> tuple[int, int]:
        """The same for a very model: more, so that less is extrapolated, as far as the memory holds both."""
        few, many = self.pair(layer_bytes)
        many = min(max(many, _MANY_OF_MODEL), layers)
        few = min(few, max(1, many - 1))
        room = self.request.memory_bytes
        while room is not None and (few + many) * layer_bytes > room and many > few + 1:
            many -= 1
        return few, many

    def _open(self, stack: ExitStack, spec: ModelSpec, types: Types, context: int, kv_type: str = "f16") -> Slice:
        return stack.enter_context(
            open_slice(
                spec,
                types,
                context=context,
                threads=self.request.threads[0],
                gpu_layers=_ALL_LAYERS if self.request.gpu else 0,
                kv_type=kv_type,
                ubatch=_LARGEST_PASS if self.request.gpu else self.kit.tokens,
                repack=self.request.repack,
            )
        )

    def _type(self, shape: Shape, type_: str, until: float, *, deep: bool = False) -> None:
        """Few and many layers of one tensor type; with ``deep`` all thread counts, batch sizes and attention."""
        one = slices.plain(shape, 1)
        few, many = self.pair(layer_bytes(one, slices.pure_types(one, type_)))
        tokens, threads = self.kit.tokens, self.request.threads if deep else self.request.threads[:2]
        sizes = (tokens, _LARGEST_PASS, _CHUNK) if deep and self.request.gpu else (tokens,)
        with ExitStack() as stack:
            opened = []
            for count in (few, many):
                spec = slices.plain(shape, count)
                room = max(self.request.depth if deep else 0, *sizes) + 2 * _DEPTH_ROOM
                opened.append(self._open(stack, spec, slices.pure_types(spec, type_), room))
            cases = [
                case
                for count in self._thread_counts(threads)
                for made in opened
                for case in self._shallow(made, shape.name, type_, count, sizes)
            ]
            if deep:
                cases += self._deep(stack, opened, shape.name, type_, "f16", until, decoded=True)
            self._time(cases, until)

    def _thread_counts(self, threads: Sequence[int]) -> Sequence[int]:
        return threads[:1] if self.request.gpu else threads

    def _shallow(self, made: Slice, shape: str, type_: str, threads: int, sizes: Sequence[int]) -> list[_Case]:
        busy = 0 if self.request.gpu else threads
        seen = _blank(shape, made.spec.n_layer, type_, busy)
        cases = [_Case(made.decoding(threads), seen)]
        cases += [_Case(made.reading(size, threads), replace(seen, tokens=size)) for size in sizes]
        for case in cases:
            case.piece.threads = busy
        return cases

    def _time(self, cases: Sequence[_Case], until: float) -> None:
        alternate([case.piece for case in cases], until=until)
        for case in cases:
            self.observations.append(_observed(case))

    def _deep(
        self,
        stack: ExitStack,
        opened: Sequence[Slice],
        shape: str,
        type_: str,
        kv_type: str,
        until: float,
        *,
        decoded: bool = False,
    ) -> list[_Case]:
        """Attention: a token and a chunk of prompt at depth, and with an empty cache, which is another's context.

        Args:
            decoded: a token with an empty cache is timed already.
        """
        threads = self._thread_counts(self.request.threads[:2])
        filled = [stack.enter_context(second_context(made)) for made in opened]
        depth = self._fill(filled, max(threads), until)
        cases = []
        for count, (empty, deep) in product(threads, zip(opened, filled, strict=True)):
            for made, at in ((empty, 0), (deep, depth)):
                busy = 0 if self.request.gpu else count
                seen = replace(_blank(shape, made.spec.n_layer, type_, busy), depth=at, kv_type=kv_type)
                both = [(made.decoding(count, at), 1), (made.reading(_CHUNK, count, at), _CHUNK)]
                for piece, tokens in both if at or not decoded else both[1:]:
                    piece.threads = busy
                    cases.append(_Case(piece, replace(seen, tokens=tokens)))
        return cases

    def _fill(self, filled: Sequence[Slice], threads: int, until: float) -> int:
        """Fill the caches alike; the depth, less than asked where they must be filled by reading and time is short."""
        for made in filled:
            made.context.set_threads(threads)
        if all(made.fill(self.request.depth) for made in filled):
            return self.request.depth
        per_token = sum(min(seconds_to_read(made, _CHUNK, threads) for _ in range(3)) for made in filled) / _CHUNK
        room = max(0.0, until - time.perf_counter()) * 0.4
        depth = int(min(self.request.depth, max(256, room / per_token)) // 256 * 256)
        for made in filled:
            made.back_to(depth)
        return depth

    def _attention(self, shape: Shape, type_: str, kv_type: str, until: float) -> None:
        one = slices.plain(shape, 1)
        counts = self.pair(layer_bytes(one, slices.pure_types(one, type_)))
        room = self.request.depth + 2 * _DEPTH_ROOM
        with ExitStack() as stack:
            specs = [slices.plain(shape, count) for count in counts]
            opened = [self._open(stack, spec, slices.pure_types(spec, type_), room, kv_type) for spec in specs]
            self._time(self._deep(stack, opened, shape.name, type_, kv_type, until), until)

    def _overheads(self, until: float) -> None:
        """Hardly any weights, and half the width: what layers and rows cost beside their weights."""
        kit, type_ = self.kit, self.request.types[0]
        with ExitStack() as stack:
            cases = []
            for shape in (kit.thin, kit.narrow):
                for count in (FEW, MANY):
                    spec = slices.plain(shape, count)
                    made = self._open(stack, spec, slices.pure_types(spec, type_), kit.tokens + _DEPTH_ROOM)
                    for threads in self._thread_counts(self.request.threads[:2]):
                        cases += self._shallow(made, shape.name, type_, threads, (kit.tokens,))
            self._time(cases, until)

    def _link(self, type_: str, until: float) -> None:
        """Half of the layers on the CPU: what a token's crossing and a prompt's copied weights cost."""
        shape, threads = self.kit.wide, self.request.threads[0]
        spec = slices.plain(shape, MANY)
        with ExitStack() as stack:
            half = MANY // 2 + 1
            opened = stack.enter_context(
                open_slice(
                    spec,
                    slices.pure_types(spec, type_),
                    context=self.kit.tokens + _DEPTH_ROOM,
                    threads=threads,
                    gpu_layers=half,
                    repack=self.request.repack,
                )
            )
            cases = self._shallow(opened, shape.name, type_, threads, (self.kit.tokens,))
            for case in cases:
                case.seen = replace(case.seen, gpu_layers=half, threads=threads)
            self._time(cases, until)

    def _model_type(self, model: ModelSpec, type_: str, types: Types, until: float) -> None:
        """Few and many layers of the very model, with an empty cache and at depth."""
        layer = layer_bytes(*slices.cut(model, types, 1))
        few, many = self.model_pair(layer, model.n_layer)
        with ExitStack() as stack:
            opened = [
                self._open(
                    stack,
                    *slices.cut(model, types, count),
                    context=self.request.depth + 2 * _DEPTH_ROOM,
                )
                for count in (few, many)
            ]
            tokens = self._affordable(opened[1], until)
            threads = self._thread_counts(self.request.threads)
            cases = [c for n in threads for made in opened for c in self._shallow(made, "model", type_, n, (tokens,))]
            cases += self._deep(stack, opened, "model", type_, "f16", until, decoded=True)
            self._time(cases, until)

    def _affordable(self, made: Slice, until: float) -> int:
        """Tokens of a prompt that can be read five times in the time that is left."""
        first = min(seconds_to_read(made, 32, self.request.threads[0]) for _ in range(3)) / 32
        thread_times = sum(max(self.request.threads) / count for count in self._thread_counts(self.request.threads))
        room = 0.5 * max(0.0, until - time.perf_counter()) / (first * thread_times * 1.3)
        tokens = self.kit.tokens
        while tokens > _CHUNK and tokens * 4 > room:
            tokens //= 2
        return tokens


def layer_bytes(model: ModelSpec, types: Types) -> float:
    """Bytes of the matrices in a mean layer."""
    total = sum(
        ggml.tensor_bytes(type_, tensor.shape)
        for tensor, type_ in zip(model.tensors, types, strict=True)
        if tensor.layer is not None and len(tensor.shape) > 1
    )
    return total / max(1, model.n_layer)


def _blank(shape: str, layers: int, type_: str, threads: int) -> Observation:
    return Observation(
        shape=shape, layers=layers, type=type_, threads=threads, seconds=0.0, low=0.0, high=0.0, clean_count=0
    )


def _observed(case: _Case) -> Observation:
    middle, low, high = case.piece.result
    return replace(
        case.seen,
        seconds=middle,
        low=low,
        high=high,
        clean_count=len(case.piece.good),
        disturbed_count=case.piece.taken - len(case.piece.good),
    )
