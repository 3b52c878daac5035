"""Find the best settings of a model on this machine by measuring, and say what the recommended ones cost."""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from planner.core.candidate import Candidate, Variant
from planner.core.errors import DoesNotFit, InputError, UsageError
from planner.core.hardware import HardwareProfile
from planner.core.model import ModelSpec, shape_sha256
from planner.core.tuned import COSTS
from planner.core.units import GIB, MIB, format_bytes
from planner.core.workload import Workload
from planner.decide import tuning as settings_of
from planner.decide.candidates import restricted
from planner.workflow.recommend import Recommendation, recommend_for
from planner.workflow.survey import survey

if TYPE_CHECKING:
    from planner.verify.tuning_trial import TuneRequest
    from planner.workflow.tuning_result import TuneResult

Progress = Callable[[str, float], None]

DEFAULT_SECONDS = 120.0
PROMPT_TOKENS, ANSWER_TOKENS = 512, 128
"""Of the request that ``balanced`` times: the two tests that llama-bench runs by default, pp512 and tg128
(https://github.com/ggml-org/llama.cpp/tree/master/tools/llama-bench)."""
_WHOLE_BYTES = 8 * GIB
"""A larger file of random weights would take longer to write and load than most budgets last."""
_SHARE_OF_MEMORY, _SHARE_OF_DISK = 0.6, 0.5
_LEAST_LAYERS = 2
_MOST_CONTEXTS = 12
_LEAST_ROOM_BYTES = 64 * MIB


@dataclass(frozen=True, slots=True, kw_only=True)
class TuneOptions:
    """What to tune, and for how long."""

    target: str
    type: str | None = None
    budget_seconds: float = DEFAULT_SECONDS
    objective: str = "balanced"
    depth: int = 0
    prompt_tokens: int = PROMPT_TOKENS
    context: int | None = None
    cpu_only: bool = False
    save: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """What is tuned: a model in a type, with the settings to try."""

    answer: Recommendation
    chosen: Candidate
    space: settings_of.Space
    request: TuneRequest
    material: str
    """What is run: the file, or what stands in for it."""

    @property
    def whole(self) -> bool:
        """All layers are run, so that speeds are those of the model."""
        return self.request.layers is None


def tune(options: TuneOptions, progress: Progress | None = None) -> TuneResult:
    """Search settings of a model by measuring, and keep the best and its speeds.

    Raises:
        UsageError: a type or an objective that does not exist.
        ModelNotFound: nothing has this name.
        DoesNotFit: no setting fits this machine.
        MissingDependency: llama-cpp-python is not installed.
        ExecutionFailed: nothing could be measured.
    """
    from planner import models
    from planner.store import Store
    from planner.verify.tune_run import run_tuning
    from planner.workflow.tuning_result import keep, result_of

    if options.objective not in COSTS:
        raise UsageError(f"{options.objective!r} is no objective", hint=f"one of {', '.join(COSTS)}")
    model = models.resolve(options.target)
    _check_type(model, options)
    here, notes = _machine(options)
    subject = subject_of(_recommended(model, here, options), options)
    if options.save:
        with Store() as store:  # a store that cannot be written is found before minutes are spent
            store.tuned(here.identity())
    found, repacked = run_tuning(subject.request, progress=progress)
    result = result_of(subject, found, notes=notes, repacked=repacked)
    return keep(result) if options.save else result


def forget(target: str) -> int:
    """Drop what was tuned here for a model, so that recommendations are as before; how many settings that were.

    Raises:
        ModelNotFound: nothing has this name.
    """
    from planner import models
    from planner.store import Store, default_path

    model = models.resolve(target)
    if not default_path().exists():
        return 0
    with Store() as store:
        return store.forget_tuned(survey().identity(), shape_sha256(model))


def _machine(options: TuneOptions) -> tuple[HardwareProfile, tuple[str, ...]]:
    """This machine, without the GPUs that llama.cpp cannot use."""
    from planner.workflow.calibrating import supports_gpus

    here = survey(measure=True)
    if here.gpus and not options.cpu_only and not supports_gpus():
        note = "the GPUs are left out: the installed llama-cpp-python was built without GPU support"
        return dataclasses.replace(here, gpus=()), (note,)
    return here, ()


def _check_type(model: ModelSpec, options: TuneOptions) -> None:
    if model.file_type is not None and options.type not in (None, model.file_type):
        raise UsageError(
            f"{options.target} is {model.file_type}, not {options.type}",
            hint="leave --type out, or name the model instead of a file",
            code="other-type",
        )


def _recommended(model: ModelSpec, here: HardwareProfile, options: TuneOptions) -> Recommendation:
    """What ``qplan recommend`` says for this model and type."""
    workload = Workload(
        context=options.context or Workload().context,
        context_fixed=options.context is not None,
        objective="balanced" if options.objective == "balanced" else "speed",
        methods=("gguf",),
        types=(options.type,) if options.type else None,
        depth=options.depth,
        prompt_tokens=options.prompt_tokens,
        cpu_only=options.cpu_only,
    )
    answer = recommend_for(model, here, workload)
    if answer.decision.chosen is None:
        lack = next((item for item in answer.decision.rejected), None)
        raise DoesNotFit(
            f"no setting of {model.name} fits this machine",
            numbers=f"{lack.type}: {lack.reason}" if lack else "",
            hint="try a smaller --type or a shorter --context",
        )
    context = answer.workload.context
    if options.depth >= context:
        raise UsageError(
            "so many cached tokens leave no room in the context",
            numbers=f"{options.depth} of {context}",
            hint="give a smaller --depth or a larger --context",
            code="context-too-short",
        )
    return answer


def subject_of(answer: Recommendation, options: TuneOptions) -> Subject:
    """The settings to try around the recommended ones, and what to try them with.

    Raises:
        InputError: there is no room for a stand-in of the model.
    """
    from planner.verify.tuning_trial import TuneRequest

    chosen, model = answer.decision.chosen, answer.model
    assert chosen is not None
    variant, base = chosen.variant, chosen.placement
    machine = restricted(answer.hardware, answer.workload)
    space = settings_of.space(model, variant, machine, answer.workload, base, options.objective)
    is_file = model.source.kind == "gguf"
    layers = None if is_file else _layers(model, variant, answer.hardware)
    if layers is not None:  # some layers say nothing of how many the GPU should hold
        alike = tuple(one for one in space.settings if one.gpu_layers == base.gpu_layers)
        space = dataclasses.replace(space, settings=alike)
    request = TuneRequest(
        budget_seconds=options.budget_seconds,
        settings=space.settings,
        objective=options.objective,
        prompt_tokens=min(options.prompt_tokens, answer.workload.context),
        answer_tokens=ANSWER_TOKENS,
        depth=options.depth,
        model=options.target,
        type=variant.type,
        imatrix=variant.imatrix,
        path=model.source.location if is_file else None,
        layers=layers,
        offloadable_count=model.offloadable_count,
        most_contexts=_most_contexts(chosen),
    )
    return Subject(answer=answer, chosen=chosen, space=space, request=request, material=_material(model, request))


def _material(model: ModelSpec, request: TuneRequest) -> str:
    if request.path is not None:
        return "the file"
    if request.layers is None:
        return f"random weights in the shape of {model.name}"
    return f"random weights in the shape of {request.layers} of {model.n_layer} layers of {model.name}"


def _layers(model: ModelSpec, variant: Variant, here: HardwareProfile) -> int | None:
    """Layers of a stand-in with random weights; ``None`` for all of them.

    Raises:
        InputError: not even two layers have room.
    """
    from planner.estimate import slices
    from planner.methods import gguf

    folder = tempfile.gettempdir()
    usable, free = here.memory.usable_bytes(), shutil.disk_usage(folder).free
    room = min(_WHOLE_BYTES, _SHARE_OF_DISK * free, *([_SHARE_OF_MEMORY * usable] if usable else []))
    if gguf.size(model, variant).file_bytes <= room:
        return None
    types = gguf.tensor_types(model, variant)
    few, more = (_bytes_of(*slices.cut(model, types, count)) for count in (_LEAST_LAYERS, _LEAST_LAYERS + 1))
    if few > room:
        raise InputError(
            f"not even {_LEAST_LAYERS} layers of {model.name} have room for a test",
            numbers=f"{format_bytes(few)}; there is room for {format_bytes(room)} in memory and in {folder}",
            hint="make room, or tune a smaller --type",
            code="no-room",
        )
    return min(model.n_layer, _LEAST_LAYERS + int((room - few) / max(1, more - few)))


def _bytes_of(model: ModelSpec, types: Sequence[str]) -> int:
    from planner.formats import ggml

    return sum(ggml.tensor_bytes(type_, tensor.shape) for type_, tensor in zip(types, model.tensors, strict=True))


def _most_contexts(chosen: Candidate) -> int:
    """Contexts that have room beside the weights on every device; they are shorter than the planned one."""
    used, most = chosen.estimate.memory, _MOST_CONTEXTS
    for device in (*used.devices, used.host):
        each = device.kv_cache_bytes + device.compute_bytes
        if device.capacity_bytes is not None and each:
            room = device.capacity_bytes - device.weights_bytes - device.overhead_bytes - _LEAST_ROOM_BYTES
            most = min(most, room // each)
    return max(1, most)
