"""The steps in the report: what each took beside what was predicted, and what is remembered of it."""

from __future__ import annotations

from dataclasses import replace
from importlib import metadata
from typing import Any

from planner.core.candidate import Variant
from planner.core.codec import encode
from planner.core.estimates import Prediction
from planner.core.hardware import HardwareProfile
from planner.core.measurement import (
    CONVERT_RATE,
    FILE_BYTES,
    ONE_PASS_RATE,
    PEAK_MEMORY,
    QUANTIZE_RATE,
    STEP_SECONDS,
    Conditions,
    Measurement,
)
from planner.core.model import ModelSpec, shape_sha256
from planner.core.plan import Plan, Step
from planner.execute.receipts import Receipt
from planner.methods import gguf
from planner.workflow.planning import FILE_TOLERANCE_FRACTION, stretched


def rows(plan: Plan, made: tuple[Receipt, ...]) -> list[dict[str, Any]]:
    """The receipts as the report lists them, each with ``verdicts`` on its seconds, peak memory and bytes.

    They are evidence for the predictions: the artifact is judged by the report's own verdicts, not by these.
    """
    steps = {step.name: step for step in plan.steps}
    return [
        {**encode(replace(receipt, tensor_types=())), "verdicts": _verdicts(steps[receipt.step], receipt)}
        for receipt in made
    ]


def _verdicts(step: Step, receipt: Receipt) -> list[dict[str, Any]]:
    size = float(step.predicted_bytes) if step.predicted_bytes else None
    slack = (size or 0.0) * FILE_TOLERANCE_FRACTION
    found = []
    if step.predicted_seconds is not None:
        seconds = None if receipt.resumed else receipt.seconds
        found.append(_row(STEP_SECONDS, stretched(step.predicted_seconds), seconds))
    if step.predicted_memory is not None:
        found.append(_row(PEAK_MEMORY, stretched(step.predicted_memory), receipt.peak_memory_bytes))
    if size is not None:
        exact = Prediction(value=size, low=size - slack, high=size + slack, basis="formula", source="rules per tensor")
        found.append(_row(FILE_BYTES, exact, receipt.size_bytes))
    return found


def _row(quantity: str, expected: Prediction, measured: float | None) -> dict[str, Any]:
    where, ok = "not measured", None
    if measured is not None:
        less = measured < expected.low
        where = "inside" if expected.contains(measured) else "better" if less and quantity != FILE_BYTES else "outside"
        ok = where != "outside"
    return {
        "quantity": quantity,
        "predicted": expected.value,
        "low": expected.low,
        "high": expected.high,
        "measured": measured,
        "ratio": measured / expected.value if measured is not None and expected.value else None,
        "ok": ok,
        "position": where,
        "basis": expected.basis,
    }


def measurements(
    plan: Plan,
    model: ModelSpec,
    here: HardwareProfile,
    made: tuple[Receipt, ...],
    fresh: tuple[Step, ...],
    threads: int,
) -> tuple[Measurement, ...]:
    """The rates of the steps that ran just now, for the next prediction on this machine."""
    from planner.estimate.making import uncorrected_rate

    receipts = {receipt.step: receipt for receipt in made}
    found = []
    for step in fresh:
        receipt = receipts.get(step.name)
        quantity = _rate_of(step, model, plan.variant)
        if receipt is None or quantity is None or receipt.resumed or receipt.seconds <= 0:
            continue
        rate = model.parameter_count / receipt.seconds
        found.append(
            Measurement(
                quantity=quantity,
                value=rate,
                low=rate,
                high=rate,
                samples=(rate,),
                model=plan.model.name,
                model_sha256=shape_sha256(model),
                method=step.method,
                runtime="llama.cpp" if step.kind == "quantize" else "qplan",
                type=str(step.type),
                imatrix=step.imatrix is not None,
                conditions=Conditions(threads=threads),
                predicted=uncorrected_rate(model, plan.variant, step, here, threads),
                hardware_identity=here.identity(),
                hardware_name=here.name,
                tool_version=_tool(step.kind),
                measured_at=receipt.finished_at,
                weights_bytes=float(model.parameter_count),
            )
        )
    return tuple(found)


def _rate_of(step: Step, model: ModelSpec, variant: Variant) -> str | None:
    """What the step's time is a rate of; nothing, where its quantizer is not llama.cpp or qplan's own."""
    if step.method != "gguf":
        return None
    if step.kind == "quantize":
        return ONE_PASS_RATE if gguf.is_one_pass(model, variant) else QUANTIZE_RATE
    return CONVERT_RATE if step.kind == "convert" else None


def _tool(kind: str) -> str:
    name = "llama-cpp-python" if kind == "quantize" else "gguf"
    try:
        return f"{name} {metadata.version(name)}"
    except metadata.PackageNotFoundError:
        return name
