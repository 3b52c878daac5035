"""A loaded model with the contexts that ``qplan tune`` tries it in. Runs only in a child."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

from planner.core.candidate import Placement
from planner.core.model import ModelSpec
from planner.verify import native
from planner.verify.slice_runs import BATCH, Slice, some_tokens
from planner.verify.tuning_trial import TuneRequest

SHORTEST_PROMPT = 64
"""Shorter ones fill no tile of the kernels."""
_ROOM = 64


@dataclass(slots=True)
class Bench:
    """A model with some open contexts; the one that was not used for longest makes room for another."""

    path: Path
    spec: ModelSpec
    cells: int
    request: TuneRequest
    _model: native.Model | None = None
    _offload: native.Offload | None = None
    _model_stack: ExitStack = field(default_factory=ExitStack)
    _contexts: dict[tuple[object, ...], tuple[ExitStack, Slice]] = field(default_factory=dict)

    def open(self, setting: Placement) -> Slice:
        """The context of a setting, at a token of warm-up or more.

        Raises:
            QplanError: llama.cpp refuses the model, its place or the context.
        """
        model = self._loaded(self._offload_of(setting))
        key = (setting.ubatch, setting.flash_attention, setting.kv_type)
        if key in self._contexts:
            self._contexts[key] = self._contexts.pop(key)  # the newest is last
            return self._contexts[key][1]
        while len(self._contexts) >= self.request.most_contexts:
            self._contexts.pop(next(iter(self._contexts)))[0].close()
        stack = ExitStack()
        options = self._options(setting)
        opened = stack.enter_context(native.open_context(model, options))
        tokens = some_tokens(self.cells + _ROOM, self.spec.n_vocab)
        made = Slice(spec=self.spec, model=model, options=options, context=opened, tokens=tokens)
        self._contexts[key] = (stack, made)
        opened.set_threads(setting.threads or 1)
        made.read(min(SHORTEST_PROMPT, self.cells - 2))
        made.decode(2)
        return made

    @staticmethod
    def bring(made: Slice, depth: int) -> None:
        """The cache to ``depth`` tokens, by repeating some where that goes: to read them takes too long."""
        if made.filled >= depth or not made.fill(depth):
            made.back_to(depth)

    def close(self) -> None:
        """Everything."""
        for stack, _ in self._contexts.values():
            stack.close()
        self._contexts.clear()
        self._model_stack.close()
        self._model = self._offload = None

    def _loaded(self, offload: native.Offload) -> native.Model:
        if self._model is None or offload != self._offload:
            self.close()
            self._model_stack = ExitStack()
            loading = native.open_model(
                self.path, offload=offload, repack=self.request.repack, progress=lambda *_: None
            )
            self._model, self._offload = self._model_stack.enter_context(loading), offload
        return self._model

    def _offload_of(self, setting: Placement) -> native.Offload:
        """Of a slice, the same share of its layers."""
        whole = native.Offload.of(setting)
        layers = self.request.layers
        if layers is None or not setting.gpu_layers:
            return whole
        count = max(1, self.request.offloadable_count)
        on_gpu = max(1, round(min(1.0, setting.gpu_layers / count) * (layers + 1)))
        return replace(whole, gpu_layers=on_gpu, cpu_expert_layers=round(setting.cpu_expert_layers / count * layers))

    def _options(self, setting: Placement) -> native.ContextOptions:
        return native.ContextOptions(
            context=self.cells,
            batch=max(BATCH, setting.batch),
            ubatch=setting.ubatch,
            threads=setting.threads or 1,
            kv_type=setting.kv_type,
            flash_attention=int(setting.flash_attention),
        )
