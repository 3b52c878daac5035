"""Write, read and check plans."""

from __future__ import annotations

import dataclasses
import json
from importlib import metadata
from pathlib import Path

from planner import FORMAT_VERSION, methods
from planner.core.candidate import Candidate, Variant
from planner.core.codec import content_sha256, decode, encode, read_json, write_atomically
from planner.core.errors import DoesNotFit, InputError, StalePlan, UsageError
from planner.core.estimates import TO_95, Prediction
from planner.core.hardware import HardwareProfile
from planner.core.measurement import DECODE, FILE_BYTES, KL_DIVERGENCE, PEAK_MEMORY, PERPLEXITY_RATIO, PREFILL
from planner.core.model import ModelSpec
from planner.core.plan import (
    BUILT_IN,
    FINETUNE,
    MATRIX,
    STEP_KINDS,
    TEXT,
    Expectation,
    Plan,
    Step,
)
from planner.methods import quantizers
from planner.methods.serving import artifact_name
from planner.workflow.recommend import Recommendation
from planner.workflow.sealing import sealed_plan

TOOLS = ("llama-cpp-python", "gguf", "numpy", "sentencepiece")
FILE_TOLERANCE_FRACTION = 0.005
"""Tensor bytes are exact; this is room for the estimated metadata."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Measuring:
    """How the steps that measure the model shall do it, and what for."""

    calibration: Path | None = None
    """A text, a folder of texts, or a finished importance matrix; ``None``: the text that comes with qplan."""
    chunks: int | None = None
    """Chunks of text; ``None``: as many as the defaults say."""
    chunk_tokens: int | None = None
    """Tokens of each, where a method for GPUs calibrates; ``None``: 512, or what the model was trained with."""
    seed: int = 0
    probes: int | None = None
    """Parts of the model to probe; ``None``: as many as take about ten minutes."""
    target_bytes: int | None = None
    """Most bytes of a mixture's file."""
    dataset: Path | None = None
    """What a fine-tuning trains with; ``None``: a smoke test with the texts that come with qplan."""


def make_plan(answer: Recommendation, candidate: Candidate | None = None, measuring: Measuring = Measuring()) -> Plan:
    """The sealed plan of the best candidate that this version can carry out, or of ``candidate``.

    Raises:
        DoesNotFit: nothing was chosen.
        UsageError: the model is a bare size, or no method that fits can be carried out.
    """
    if answer.finetuning is not None:
        from planner.workflow import finetuning

        return finetuning.make_plan(answer, measuring.dataset, measuring.seed)
    chosen = candidate or best_executable(answer) or answer.decision.chosen
    if chosen is None:
        raise _nothing(answer)
    _check_makeable(answer.model, chosen)
    return sealed_plan(
        answer,
        chosen,
        expectations=expectations(answer.model, chosen, answer.hardware),
        steps=_steps(answer, chosen, measuring),
        tools=tool_versions(chosen.variant),
        artifact=artifact_name(answer.model, chosen.variant),
        reasons=(*chosen.reasons, *_maker(chosen)),
    )


def _maker(chosen: Candidate) -> tuple[str, ...]:
    """Which program makes it, and why that one."""
    told = quantizers.reason(chosen.variant)
    return (told,) if told else ()


def _steps(answer: Recommendation, chosen: Candidate, measuring: Measuring) -> tuple[Step, ...]:
    """The typed steps with what each should take on this machine."""
    from planner.estimate.making import forecast
    from planner.workflow.measuring import prepared
    from planner.workflow.survey import calibration_of

    calibration, _ = calibration_of(answer.hardware)
    return forecast(
        answer.model,
        chosen.variant,
        answer.hardware,
        threads=chosen.placement.threads,
        calibration=calibration,
        prepare=lambda steps: prepared(steps, answer, chosen, measuring),
    )


def conversion_note(model: ModelSpec) -> str | None:
    """What ``apply`` will need besides to convert the model, as far as its config.json tells; ``None``: nothing."""
    from planner import convert

    if model.source.kind != "directory":
        return None
    reason = convert.can_convert(read_json(Path(model.source.location) / "config.json"))
    return reason and f"{reason}; `qplan apply` will need --llama-cpp DIR, a checkout with llama.cpp's converter"


def best_executable(answer: Recommendation) -> Candidate | None:
    """The first candidate, in order of rank, whose method ``apply`` carries out."""
    if answer.decision.chosen is None:
        return None
    ranked = (answer.decision.chosen, *answer.decision.alternatives)
    return next((c for c in ranked if _is_made(c.variant)), None)


def _is_made(variant: Variant) -> bool:
    """Whether ``apply`` carries it out: llama.cpp makes all of GGUF, and of the rest what a quantizer makes."""
    made = variant.method == "gguf" or quantizers.way_of(variant) is not None
    return methods.row(variant.method).executable and made


def _nothing(answer: Recommendation) -> DoesNotFit:
    rejected = [r for r in answer.decision.rejected if r.unit == "bytes"]
    least = min(rejected, key=lambda r: r.needed or 0, default=None)
    numbers = f"the smallest is {least.method} {least.type}: {least.reason}" if least else ""
    return DoesNotFit(
        f"no way to run {answer.model.name} fits {answer.hardware.name}",
        numbers=numbers,
        hint="`qplan recommend` lists what was tried; a shorter --context or a smaller model may fit",
    )


def _check_makeable(model: ModelSpec, candidate: Candidate) -> None:
    if model.source.kind == "size":
        raise UsageError(
            f"{model.name} is a bare size, not a model: there is nothing to quantize",
            hint="name a model, as in `qplan plan llama-2-13b`",
            code="no-weights",
        )
    if model.file_type is not None:
        raise UsageError(
            f"{model.source.location} is quantized already ({model.file_type}): there is nothing to make",
            hint="`qplan verify` measures it, and `qplan recommend` says how to run it; plan from the 16-bit model",
            code="already-quantized",
        )
    if not _is_made(candidate.variant):
        raise UsageError(
            f"this version of qplan knows {candidate.variant.label()} but cannot carry it out",
            hint="add `--methods gguf` for a plan that applies, or use the commands of `qplan recommend`",
            code="not-executable",
        )


def tool_versions(variant: Variant) -> dict[str, str]:
    """Versions of the packages that do the work; one that is not installed is left out.

    Of a quantizer in an environment of its own: the version that it is made with; a receipt tells those that ran.
    """
    way = quantizers.way_of(variant)
    maker = way and quantizers.quantizer(way.quantizer)
    if maker and maker.environment:
        return {maker.packages[0]: maker.version}
    found = {}
    for name in TOOLS if variant.method == "gguf" else ("numpy",):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def expectations(model: ModelSpec, candidate: Candidate, hardware: HardwareProfile) -> tuple[Expectation, ...]:
    """What measurements of the result should give, as 95 % intervals."""
    estimate = candidate.estimate
    size = estimate.size.file_bytes
    slack = size * FILE_TOLERANCE_FRACTION
    rules = "llama.cpp's rules per tensor" if candidate.variant.format == "gguf" else "the format's bytes per tensor"
    exact = Prediction(value=size, low=size - slack, high=size + slack, basis="formula", source=rules)
    predicted = {
        PEAK_MEMORY: peak_memory(model, candidate, hardware),
        PREFILL: estimate.speed.prefill,
        DECODE: estimate.speed.decode,
        PERPLEXITY_RATIO: estimate.quality.perplexity_ratio,
        KL_DIVERGENCE: estimate.quality.kl_divergence_nats,
    }
    known = [_expected(name, stretched(p)) for name, p in predicted.items() if p is not None]
    return (_expected(FILE_BYTES, exact), *known)


def peak_memory(model: ModelSpec, candidate: Candidate, hardware: HardwareProfile) -> Prediction | None:
    """Peak memory of the process that runs the result: of the GPU where one is used, else resident memory."""
    from planner.estimate.memory import peak_memory_bytes

    return peak_memory_bytes(model, candidate.variant, candidate.placement, hardware)


def stretched(prediction: Prediction) -> Prediction:
    """The prediction with its 80 % interval widened to 95 %, each side in proportion to the value.

    A plan must not cry wolf one time in five.
    """
    if prediction.value <= 0 or prediction.low <= 0:
        low = prediction.value - TO_95 * (prediction.value - prediction.low)
        high = prediction.value + TO_95 * (prediction.high - prediction.value)
    else:
        low = prediction.value * (prediction.low / prediction.value) ** TO_95
        high = prediction.value * (prediction.high / prediction.value) ** TO_95
    return dataclasses.replace(prediction, low=low, high=high)


def _expected(quantity: str, prediction: Prediction) -> Expectation:
    return Expectation(
        quantity=quantity,
        predicted=prediction.value,
        low=prediction.low,
        high=prediction.high,
        basis=prediction.basis,
        source=prediction.source,
    )


def load_plan(path: Path) -> Plan:
    """A plan from a file, unedited and of this version.

    Raises:
        InputError: the file is missing or no plan.
        StalePlan: it was edited by hand, or is of another format version.
    """
    return plan_of(read_json(path), str(path))


def plan_of(document: object, what: str) -> Plan:
    """A plan from JSON that ``what`` names in errors; they are those of :func:`load_plan`."""
    if isinstance(document, dict):
        version = str(document.get("format_version", ""))
        if version and version.split(".")[0] != FORMAT_VERSION.split(".")[0]:
            raise StalePlan(
                f"{what} has plan format {version}",
                numbers=f"this qplan reads {FORMAT_VERSION}",
                hint="plan again with this version",
                code="plan-version",
            )
    _check_unedited(document, what)
    plan = decode(Plan, document, what=what)
    _check_steps(plan, what)
    return plan


def _check_unedited(document: object, path: str) -> None:
    """Compare the hash in a plan with the hash of what the file holds, before anything in it is believed."""
    if not isinstance(document, dict) or not isinstance(document.get("content_sha256"), str):
        raise InputError(f"{path} is no plan", hint="`qplan plan MODEL -o plan.json` writes one", code="bad-document")
    said, found = document["content_sha256"], content_sha256({**document, "content_sha256": ""})
    if said != found:
        raise StalePlan(
            f"{path} was edited after it was written",
            numbers=f"content_sha256 says {said[:16] or 'nothing'}, the content gives {found[:16]}",
            hint="make a new plan with `qplan plan` and the options you want",
            code="plan-edited",
        )


def _check_steps(plan: Plan, path: str) -> None:
    """Names stay inside the output directory and steps refer to earlier ones: a plan may come from a stranger."""
    known = {"model"}
    for step in plan.steps:
        for name in filter(None, (step.name, step.output, plan.artifact)):
            if name != Path(name).name or name.startswith(".") or "\\" in name or "\0" in name:
                raise InputError(f"{path} names a file outside the output directory: {name!r}", code="bad-plan")
        read = {step.source, step.imatrix, step.sensitivity} - {None}
        if step.kind not in STEP_KINDS or not read <= known or (wrong := _step_fault(step)):
            why = wrong if step.kind in STEP_KINDS and read <= known else ""
            raise InputError(f"{path} has a step that cannot be run: {step.name!r}", numbers=why, code="bad-plan")
        known.add(step.name)
    if not any(step.output == plan.artifact for step in plan.steps):
        raise InputError(f"{path} makes no {plan.artifact!r}", code="bad-plan")


def _step_fault(step: Step) -> str:
    """What is wrong with what a step measures with or quantizes to; empty: nothing."""
    from planner.methods import gguf_recipe

    if step.kind in ("imatrix", "sensitivity"):
        kinds = (BUILT_IN, TEXT, MATRIX) if step.kind == "imatrix" else (BUILT_IN, TEXT)
        if step.calibration is None or step.calibration.kind not in kinds:
            return "it names nothing to calibrate with"
    text = step.calibration
    counts = [step.probes, step.target_bytes, *((text.chunks, text.chunk_tokens) if text else ())]
    if any(count is not None and count < 1 for count in counts) or step.gpu_layers < 0:
        return "a count is less than one"
    if step.sensitivity is not None and step.target_bytes is None:
        return "it chooses types and has no size to choose for"
    return gguf_recipe.fault(step.tensor_types) or _settings_fault(step) or _training_fault(step)


def _training_fault(step: Step) -> str:
    """What is wrong with how a step trains an adapter; empty: nothing."""
    if (step.kind == FINETUNE) != (step.finetune is not None):
        return "it does not say how, or is no step that trains"
    if step.finetune is None:
        return ""
    if step.calibration is None or step.calibration.kind not in (BUILT_IN, TEXT):
        return "it names nothing to train with"
    return step.finetune.fault()


def _settings_fault(step: Step) -> str | None:
    """What is wrong with how a step makes a safetensors artifact."""
    made = step.settings
    if made is None:
        return "it does not say how" if step.kind == "quantize" and step.method != "gguf" else None
    known = [way for way in quantizers.ways() if (way.quantizer, way.format) == (made.quantizer, made.format)]
    fitting = [way for way in known if way.method == step.method and step.type in way.types]
    if not fitting or made.compute_dtype not in (None, *fitting[0].compute_dtypes):
        return f"no quantizer {made.quantizer!r} makes {step.method} {step.type} in {made.format}"
    calibrated = step.method in quantizers.CALIBRATED
    if calibrated and (step.calibration is None or step.calibration.kind not in (BUILT_IN, TEXT)):
        return "it names nothing to calibrate with"
    return None


def check_hardware(plan: Plan, here: HardwareProfile) -> None:
    """Refuse a plan for another machine.

    Raises:
        StalePlan: with the fields that differ.
    """
    if plan.hardware.identity == here.identity():
        return
    now = encode(here.identity_fields())
    differing = [
        f"{name}: planned for {old!r}, here {now.get(name)!r}"
        for name, old in plan.hardware.fields.items()
        if old != now.get(name)
    ]
    raise StalePlan(
        f"the plan is for another machine ({plan.hardware.name})",
        numbers="\n".join(differing),
        hint="plan again here with `qplan plan`",
        code="other-machine",
    )


def save_plan(plan: Plan, path: Path) -> None:
    """Write a plan as ``qplan plan -o`` does.

    Raises:
        ExecutionFailed: a file that is no plan has this name.
        InputError: it cannot be written.
    """
    from planner.execute.preflight import check_replaceable

    check_replaceable(path, "content_sha256")
    write_atomically(path, plan_text(plan))


def plan_text(plan: Plan) -> str:
    """The plan as the JSON that is written: sorted keys, one per line, so that two plans diff well."""
    return json.dumps(encode(plan), indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
