"""Plans that train an adapter, and what their apply measured beside what was predicted."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from planner import FORMAT_VERSION
from planner.core.candidate import Candidate, Placement
from planner.core.codec import encode, read_json
from planner.core.errors import DoesNotFit, InputError, UsageError
from planner.core.estimates import FORMULA, Prediction
from planner.core.finetuning import COMPUTE_DTYPES, NF4, FinetuneChoice, FinetuneDecision, FinetuneWish
from planner.core.measurement import FILE_BYTES, LOSS_RATIO, PEAK_MEMORY, TRAINABLE_PARAMETERS, TRAINING_RATE
from planner.core.plan import FINETUNE, CalibrationSource, Expectation, Plan, Step
from planner.estimate.finetuning import trained
from planner.execute import calibration
from planner.methods.serving import name_stem, weights_id
from planner.runtimes import finetuning as texts
from planner.workflow.sealing import sealed_plan

if TYPE_CHECKING:
    from planner.core.hardware import HardwareProfile
    from planner.execute.receipts import Receipt
    from planner.workflow.recommend import Recommendation

SMOKE_STEPS, SMOKE_LENGTH, SMOKE_BATCH, SMOKE_RATE = 10, 256, 4, 1e-3
"""A smoke test: enough to see the loss fall. With the demo model on two cores it takes half a minute; its loss on
qplan's own texts fell from 6.92 to 6.32 (2026-11-26)."""
_HEADER_BYTES = 170
"""Of the adapter's file per matrix: name, type, shape and offsets; names are 90 to 100 characters."""
_KEYS = ("text", "messages", "prompt")
_EXACT = "rank * (inputs + outputs) of every linear layer, as peft counts them"
_FALLS = "training lowers the loss on text of the same kind; by how much is not predicted"


def make_plan(answer: Recommendation, dataset: Path | None, seed: int = 0) -> Plan:
    """The sealed plan of the fine-tuning that was decided, with ``dataset`` or as a smoke test with qplan's own texts.

    Raises:
        DoesNotFit: nothing was decided.
        UsageError: the model is a bare size.
        InputError: the dataset cannot be read.
    """
    choice, data = _chosen(answer, dataset), _data(dataset)
    if answer.model.source.kind == "size":
        raise UsageError(f"{answer.model.name} is a bare size: there is nothing to train", code="no-weights")
    settings = dataclasses.replace(choice.settings, seed=seed)
    base = _base(answer, choice)
    artifact = f"{name_stem(answer.model)}-{'qlora' if settings.base == NF4 else 'lora'}-r{settings.rank}"
    step = Step(
        name=FINETUNE,
        kind=FINETUNE,
        method=base.variant.method,
        type=base.variant.type,
        output=artifact,
        calibration=data,
        finetune=settings,
    )
    return sealed_plan(
        answer,
        base,
        expectations=_expectations(choice, len(trained(answer.model))),
        steps=(_forecast(step, choice, len(trained(answer.model))), Step(name="verify", kind="verify", method="qplan")),
        tools=_tools(),
        artifact=artifact,
        reasons=(*choice.reasons, *((_smoke_reason(choice),) if dataset is None else ())),
    )


def decided(answer: Recommendation, dataset: Path | None) -> Recommendation:
    """The answer with what :func:`make_plan` takes from it: without ``dataset``, the decision of the smoke test."""
    if answer.finetuning is None or dataset is not None:
        return answer
    return dataclasses.replace(answer, finetuning=_smoke(answer))


def with_choice(answer: Recommendation, choice: FinetuneChoice) -> Recommendation:
    """The answer as if ``choice``, one of its ways, had been asked for."""
    if answer.finetuning is not None and answer.finetuning.chosen == choice:
        return answer
    wish = dataclasses.replace(answer.workload.finetuning, base=choice.settings.base)
    return dataclasses.replace(
        answer,
        workload=dataclasses.replace(answer.workload, finetuning=wish),
        finetuning=FinetuneDecision(chosen=choice),
    )


def _chosen(answer: Recommendation, dataset: Path | None) -> FinetuneChoice:
    decision = decided(answer, dataset).finetuning
    if decision is None or decision.chosen is None:
        told = decision.rejected[0] if decision and decision.rejected else None
        raise DoesNotFit(
            f"no fine-tuning of {answer.model.name} fits {answer.hardware.name}",
            numbers=f"{told.reason}" if told else "",
            hint=decision.hint if decision else "",
        )
    return decision.chosen


def _smoke(answer: Recommendation) -> FinetuneDecision:
    """The decision with few, short and fast steps where nothing else was asked for."""
    from planner.decide.finetuning import decide_finetuning

    wish = answer.workload.finetuning
    length = min(SMOKE_LENGTH, answer.model.n_ctx_train)
    short = FinetuneWish(steps=SMOKE_STEPS, sequence_length=length, batch=SMOKE_BATCH, learning_rate=SMOKE_RATE)
    given = {f.name: value for f in dataclasses.fields(wish) if (value := getattr(wish, f.name)) is not None}
    if "micro_batch" in given:
        short = dataclasses.replace(short, batch=None)
    workload = dataclasses.replace(answer.workload, finetuning=dataclasses.replace(short, **given))
    return decide_finetuning(answer.model, answer.hardware, workload)


def _smoke_reason(choice: FinetuneChoice) -> str:
    settings = choice.settings
    return (
        f"no dataset was given: a smoke test of {settings.steps} steps on the texts that come with qplan, at a "
        f"learning rate of {settings.learning_rate:g}; --dataset FILE trains on yours"
    )


def _base(answer: Recommendation, choice: FinetuneChoice) -> Candidate:
    """The frozen weights as a candidate: the decision's, or estimated where it chose another or none."""
    from planner.decide.finetuning import base_variant
    from planner.estimate import estimate

    variant, chosen = base_variant(answer.model, choice.settings.base), answer.decision.chosen
    if chosen is not None and (chosen.variant.method, chosen.variant.type) == (variant.method, variant.type):
        return chosen
    on_gpu = choice.settings.device == "cuda"
    placement = Placement(
        context=choice.settings.sequence_length,
        gpu_layers=answer.model.offloadable_count if on_gpu else 0,
        gpu_count=int(on_gpu),
        threads=answer.workload.threads or answer.hardware.cpu.inference_threads(),
    )
    made = estimate(answer.model, variant, placement, answer.hardware, None)
    return Candidate(variant=variant, placement=placement, estimate=made)


def _data(dataset: Path | None) -> CalibrationSource:
    """The data, pinned by their hash.

    Raises:
        InputError: they cannot be read, or a line of a .jsonl file is no example.
    """
    if dataset is None:
        return calibration.built_in()
    found = calibration.from_text(dataset)
    if dataset.suffix == ".jsonl":
        _check_lines(calibration.text(found), dataset)
    return found


def _check_lines(text: str, dataset: Path) -> None:
    for number, line in enumerate(text.splitlines(), 1):
        try:
            row = json.loads(line) if line.strip() else {"text": ""}
        except ValueError:
            row = None
        if not isinstance(row, dict) or not any(key in row for key in _KEYS):
            raise InputError(
                f"{dataset} has a line that is no example",
                numbers=f"line {number}: {line[:60]!r}",
                hint="each line is an object with 'text', with 'messages', or with 'prompt' and 'completion'",
                code="bad-dataset",
            )


def _tools() -> dict[str, str]:
    """The versions that qplan's environment is made with; the receipt tells those that ran."""
    from planner.execute import environments

    asked = (text.split("==") for text in environments.row("peft").requires if "==" in text)
    return {parts[0]: parts[1] for parts in asked}


def _file(choice: FinetuneChoice, layers: int) -> Prediction:
    """Bytes of the adapter's file: exact tensors, and a header that depends on names."""
    tensors = choice.estimate.adapter_bytes
    header = 2 * layers * _HEADER_BYTES
    return Prediction(
        value=float(tensors + header),
        low=float(tensors),
        high=float(tensors + 2 * header + 4096),
        basis=FORMULA,
        source="LoRA matrices in 32 bits and a header",
    )


def _forecast(step: Step, choice: FinetuneChoice, layers: int) -> Step:
    """The step with what it should take."""
    made, on_gpu = choice.estimate, choice.settings.device == "cuda"
    peak = made.peak_memory
    moved = dataclasses.replace(
        peak,
        value=peak.value + made.overhead_bytes,
        low=peak.low + 0.7 * made.overhead_bytes,
        high=peak.high + 1.3 * made.overhead_bytes,
    )
    seconds = made.seconds_per_step
    return dataclasses.replace(
        step,
        gpu_layers=1 if on_gpu else 0,
        predicted_bytes=round(_file(choice, layers).value),
        predicted_scratch_bytes=0,
        predicted_memory=None if on_gpu else moved,
        predicted_peak_bytes=None if on_gpu else round(moved.value),
        predicted_gpu_memory=moved if on_gpu else None,
        predicted_seconds=seconds.scaled(choice.settings.steps) if seconds and choice.settings.steps else None,
    )


def _expectations(choice: FinetuneChoice, layers: int) -> tuple[Expectation, ...]:
    """What the training should measure, as 95 % intervals."""
    from planner.workflow.planning import stretched

    count = float(choice.estimate.trainable_parameter_count)
    exact = Prediction(value=count, low=count, high=count, basis=FORMULA, source=_EXACT)
    falls = Prediction(value=1.0, low=0.0, high=1.0, basis=FORMULA, source=_FALLS)
    found = {
        FILE_BYTES: _file(choice, layers),
        PEAK_MEMORY: stretched(choice.estimate.peak_memory),
        TRAINABLE_PARAMETERS: exact,
        LOSS_RATIO: falls,
    }
    seconds = choice.estimate.seconds_per_step
    if seconds is not None:
        tokens = choice.settings.batch * choice.settings.sequence_length
        rate = dataclasses.replace(
            seconds, value=tokens / seconds.value, low=tokens / seconds.high, high=tokens / seconds.low, terms=()
        )
        found[TRAINING_RATE] = stretched(rate)
    return tuple(
        Expectation(quantity=name, predicted=p.value, low=p.low, high=p.high, basis=p.basis, source=p.source)
        for name, p in found.items()
    )


def measured_of(receipt: Receipt) -> dict[str, float]:
    """The quantities of a training that a receipt tells."""
    told = receipt.details
    found = {
        FILE_BYTES: float(receipt.size_bytes),
        TRAINABLE_PARAMETERS: float(told["trainable_parameters"]),
        LOSS_RATIO: float(told["held_back_loss_after"]) / float(told["held_back_loss_before"]),
        TRAINING_RATE: float(told["tokens"]) / float(told["seconds"]),
    }
    if "training_peak_bytes" in told:
        found[PEAK_MEMORY] = float(told["training_peak_bytes"])
    return found


def report_document(plan: Plan, made: tuple[Receipt, ...], here: HardwareProfile, artifact: Path) -> dict[str, Any]:
    """The report of an applied fine-tuning, with the keys that every report has."""
    from planner.verify.verdicts import Measured, all_ok, verdicts
    from planner.workflow import step_report

    receipt = next(receipt for receipt in made if receipt.step == FINETUNE)
    measured = measured_of(receipt)
    judged = verdicts(
        plan.expectations, {name: Measured(value=value, low=value, high=value) for name, value in measured.items()}
    )
    return {
        "format_version": FORMAT_VERSION,
        "plan_sha256": plan.content_sha256,
        "artifact": str(artifact),
        "steps": step_report.rows(plan, made),
        "predicted": {verdict.quantity: verdict.predicted for verdict in judged},
        "measured": measured,
        "verdicts": encode(judged),
        "ok": all_ok(judged),
        "measurements": [],
        "speed": None,
        "quality": None,
        "finetuning": dict(receipt.details),
        "notes": _notes(receipt),
        "machine": {"identity": here.identity(), **here.identity_fields()},
        "tools": plan.tools,
        "measured_at": receipt.finished_at,
    }


def _notes(receipt: Receipt) -> list[str]:
    told = receipt.details
    return [
        f"loss on {told['held_back_sequences']} held-back sequences: {told['held_back_loss_before']:.4f} before, "
        f"{told['held_back_loss_after']:.4f} after {told['steps']} steps",
        f"{texts.SCRIPT} in the adapter's folder is the script that ran; it takes other data and settings",
    ]


def commands_of(plan: Plan, folder: Path) -> dict[str, str]:
    """How the adapter of a plan is used, as text."""
    step = plan.finetune_step()
    assert step is not None and step.finetune is not None
    model = plan.model.location if plan.model.kind == "directory" else _weights(plan)
    made = step.finetune
    return texts.commands(
        model,
        str(folder / plan.artifact),
        rank=made.rank,
        four_bits=made.base == NF4,
        compute_dtype=made.compute_dtype,
    )


def _weights(plan: Plan) -> str:
    from planner import models

    return weights_id(models.resolve(plan.model.name)) if plan.model.kind == "catalog" else plan.model.location


def adapter_commands(target: Path, output: Path | None = None) -> dict[str, str] | None:
    """How the adapter that ``target`` stands for is used; ``None`` where it stands for something else.

    Args:
        target: a plan of a fine-tuning, the report of its apply, or the adapter's folder.
        output: where a plan's adapter lies; ``None``: beside the plan.

    Raises:
        InputError: the plan or the adapter's configuration is damaged.
    """
    from planner.workflow.planning import load_plan

    if target.is_dir():
        return _of_folder(target) if (target / _CONFIG).is_file() else None
    found = read_json(target) if target.suffix == ".json" else None
    if not isinstance(found, dict):
        return None
    if "finetuning" in found and "verdicts" in found:
        folder = (output or target.absolute().parent) / Path(str(found.get("artifact"))).name
        return _of_folder(folder)
    steps = found.get("steps")
    if not isinstance(steps, list) or not any(isinstance(s, dict) and s.get("kind") == FINETUNE for s in steps):
        return None
    return commands_of(load_plan(target), output or target.absolute().parent)


_CONFIG, _TRAINING = "adapter_config.json", "training.json"


def _of_folder(folder: Path) -> dict[str, str]:
    """By what peft and the script wrote: model and rank, whether the model was in 4 bits and its compute type."""
    config = read_json(folder / _CONFIG)
    model, rank = (config.get("base_model_name_or_path"), config.get("r")) if isinstance(config, dict) else (None, None)
    if not isinstance(model, str) or not isinstance(rank, int):
        raise InputError(f"{folder / _CONFIG} is no configuration of a LoRA adapter", code="bad-document")
    told = read_json(folder / _TRAINING) if (folder / _TRAINING).is_file() else {}
    used = told.get("settings") if isinstance(told, dict) else None
    used = used if isinstance(used, dict) else {}
    dtype = used.get("compute_dtype")
    return texts.commands(
        model,
        str(folder),
        rank=rank,
        four_bits=used.get("base") == NF4,
        compute_dtype=dtype if dtype in COMPUTE_DTYPES else COMPUTE_DTYPES[0],
    )


def document(decision: FinetuneDecision) -> dict[str, Any]:
    """The key ``finetuning`` of ``qplan recommend --json``."""
    return {
        "chosen": _choice_document(decision.chosen) if decision.chosen else None,
        "alternatives": [_choice_document(choice) for choice in decision.alternatives],
        "rejected": [encode(rejection) for rejection in decision.rejected],
        "hint": decision.hint or None,
    }


def _choice_document(choice: FinetuneChoice) -> dict[str, Any]:
    made = choice.estimate
    seconds = made.seconds_per_step
    return {
        **encode(choice.settings),
        "batch": choice.settings.batch,
        "device_name": made.device,
        "memory": {
            "terms": encode(made.terms),
            "peak_bytes": {key: round(getattr(made.peak_memory, key)) for key in ("value", "low", "high")},
            "overhead_bytes": made.overhead_bytes,
            "total_bytes": made.needed_bytes,
            "capacity_bytes": made.capacity_bytes,
            "basis": made.peak_memory.basis,
            "source": made.peak_memory.source,
        },
        "trainable_parameters": made.trainable_parameter_count,
        "adapter_bytes": made.adapter_bytes,
        "seconds_per_step": encode(dataclasses.replace(seconds, terms=())) if seconds else None,
        "reasons": list(choice.reasons),
        "notes": list(made.notes),
    }
