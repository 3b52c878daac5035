"""What making the artifact takes, step by step: time, peak memory, GPU memory and disk.

What was measured on this machine corrects the figures, which are in ``data/quantize_rates.csv``.
"""

from __future__ import annotations

from collections.abc import Callable

from planner.core.candidate import Variant
from planner.core.hardware import HardwareProfile
from planner.core.measurement import Calibration
from planner.core.model import ModelSpec
from planner.core.plan import Step
from planner.estimate import making_gguf, making_runs, making_torch
from planner.estimate.making_rates import Site
from planner.methods import get, gguf


def forecast(
    model: ModelSpec,
    variant: Variant,
    hardware: HardwareProfile,
    *,
    threads: int | None = None,
    calibration: Calibration | None = None,
    prepare: Callable[[tuple[Step, ...]], tuple[Step, ...]] = lambda steps: steps,
) -> tuple[Step, ...]:
    """The steps that make ``variant``, each with its predicted time, memory and disk.

    Args:
        threads: of the quantizer; by default as many as inference would use.
        calibration: what was measured on this machine.
        prepare: settles what the steps work with, before it is predicted what they take.
    """
    site = Site(hardware, threads or hardware.cpu.inference_threads(), calibration)
    steps = prepare(get(variant.method).steps(model, variant))
    if variant.method != "gguf":
        return tuple(
            making_torch.quantizing(model, variant, step, site) if step.kind == "quantize" else step for step in steps
        )
    makers = {
        "convert": making_gguf.converting,
        "quantize": making_gguf.one_pass if gguf.is_one_pass(model, variant) else making_gguf.quantizing,
        "imatrix": making_runs.collecting,
        "sensitivity": making_runs.probing,
    }
    return tuple(makers[step.kind](model, variant, step, site) if step.kind in makers else step for step in steps)


def forecast_many(
    model: ModelSpec,
    variants: tuple[Variant, ...],
    hardware: HardwareProfile,
    *,
    threads: int,
    calibration: Calibration | None = None,
) -> Step:
    """One step that makes GGUF files of all ``variants`` from one read of the checkpoint ``model``.

    Its bytes are those of all files; what was measured here of one type corrects a step that makes just that one.
    """
    site = Site(hardware, threads, calibration)
    types = "+".join(variant.type for variant in variants)
    size = sum(gguf.size(model, variant).file_bytes for variant in variants)
    step = Step(name="quantize", kind="quantize", method="gguf", type=types, output=types, predicted_bytes=size)
    return making_gguf.one_pass_of_many(model, variants, step, site, hashed=False)


def uncorrected_rate(model: ModelSpec, variant: Variant, step: Step, hardware: HardwareProfile, threads: int) -> float:
    """Weights per second of a step by the formula alone, which is what a measurement of it is kept with."""
    plain = forecast(model, variant, hardware, threads=threads)
    found = next(made for made in plain if made.name == step.name)
    assert found.predicted_seconds is not None
    return model.parameter_count / found.predicted_seconds.value
