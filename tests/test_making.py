"""Time, memory and disk of making an artifact: predicted, checked before the start, verified and remembered."""

from __future__ import annotations

import csv
import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.core.candidate import Variant
from planner.core.data import data_path
from planner.core.errors import ExecutionFailed
from planner.core.estimates import Prediction
from planner.core.hardware import Cpu, Disk, Gpu, HardwareProfile, Memory
from planner.core.measurement import ONE_PASS_RATE, Calibration, Conditions, Measurement
from planner.core.model import ModelSpec, shape_sha256
from planner.core.plan import CalibrationSource, Plan, Step, disk_peak_bytes
from planner.core.units import GIB, MIB
from planner.core.workload import Quantizing
from planner.estimate import making, making_gguf, making_torch
from planner.estimate.making import forecast
from planner.execute import receipts
from planner.execute.preflight import check_output, check_room
from planner.execute.receipts import Receipt
from planner.methods import get, gguf, quantizers
from planner.models import catalog
from planner.workflow import step_report


def machine(cores: int = 8, gpu: Gpu | None = None, **fields: object) -> HardwareProfile:
    cpu = Cpu(model="cpu", architecture="x86_64", physical_core_count=cores, simd=("avx2",))
    memory = Memory(total_bytes=64 * GIB)
    made = HardwareProfile(name="test", os="linux", cpu=cpu, memory=memory, gpus=(gpu,) if gpu else ())
    return dataclasses.replace(made, **fields)  # type: ignore[arg-type]


A100 = Gpu(
    name="A100", vendor="nvidia", backend="cuda", memory_total_bytes=80 * GIB, fp16_flops_per_second=312e12
)  # fmt: skip


def model(name: str) -> ModelSpec:
    found = catalog.lookup(name)
    assert found is not None
    return found


def step(name: str, made: tuple[Step, ...]) -> Step:
    return next(each for each in made if each.name == name)


def seconds(name: str, made: tuple[Step, ...]) -> Prediction:
    found = step(name, made).predicted_seconds
    assert found is not None
    return found


def test_every_rate_has_a_source_and_a_date() -> None:
    with data_path("quantize_rates.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row for row in rows if not (float(row["value"]) > 0 and row["source"] and row["date"])] == []


@pytest.mark.parametrize("name", ["llama-2-7b", "llama-3.1-8b"])
def test_published_time_of_another_machine_is_in_the_range(name: str) -> None:
    with data_path("quantize_rates.csv").open(newline="", encoding="utf-8") as file:
        checks = [row for row in csv.DictReader(file) if row["step"] == "check"]
    told = {"llama-2-7b": float(checks[0]["value"]), "llama-3.1-8b": float(checks[1]["value"])}[name]
    made = forecast(model(name), gguf.variant("IQ2_XS", None, True), machine(16), threads=16)
    assert seconds("quantize", made).contains(told)


@pytest.mark.parametrize(("name", "minutes"), [("falcon-7b", 10.0), ("llama-30b", 44.9), ("llama-65b", 96.0)])
def test_gptq_on_an_a100_takes_what_its_paper_says(name: str, minutes: float) -> None:
    made = forecast(model(name), get("gptq").variants(model(name))[0], machine(gpu=A100))
    assert seconds("quantize", made).value == pytest.approx(60 * minutes, rel=0.35)


@pytest.mark.parametrize(("method", "quantizer"), [("gptq", None), ("gptq", "llm-compressor"), ("awq", "autoawq")])
def test_calibration_without_a_gpu_takes_longer_the_more_text_and_weights_there_are(
    method: str, quantizer: str | None
) -> None:
    def forecasted(name: str, chunks: int) -> Step:
        spec = model(name)
        variant = quantizers.wished(get(method).variants(spec)[0], Quantizing(quantizer=quantizer))

        def prepare(steps: tuple[Step, ...]) -> tuple[Step, ...]:
            text = CalibrationSource(kind="text", location="t", sha256="0", size_bytes=1 << 20, chunks=chunks)
            return (dataclasses.replace(steps[0], calibration=text), *steps[1:])

        return step("quantize", forecast(spec, variant, machine(), prepare=prepare))

    little, more, larger = (
        forecasted(*case) for case in (("tinyllama-1.1b", 8), ("tinyllama-1.1b", 64), ("llama-2-7b", 8))
    )
    for each in (little, more, larger):
        took, memory = each.predicted_seconds, each.predicted_memory
        assert took is not None and took.low < took.value < took.high and took.high / took.low > 4
        assert memory is not None and each.predicted_peak_bytes == round(memory.high)
    for other in (more, larger):
        assert little.predicted_seconds.value < other.predicted_seconds.value  # type: ignore[union-attr]
        assert little.predicted_memory.value < other.predicted_memory.value  # type: ignore[union-attr]


def test_the_length_of_the_text_bounds_what_is_calibrated_with() -> None:
    text = CalibrationSource(kind="text", location="t", sha256="0", size_bytes=3000, chunks=128)
    assert making_torch.calibration_tokens(Step(name="q", kind="quantize", method="gptq", calibration=text)) == 1000


def test_a_conversion_takes_blocks_and_not_the_model() -> None:
    made = forecast(model("llama-3-8b"), get("none").variant("f32"), machine())  # type: ignore[attr-defined]
    quantize = step("quantize", made)
    assert quantize.predicted_bytes == pytest.approx(4 * model("llama-3-8b").parameter_count, rel=0.001)
    assert quantize.predicted_memory is not None and quantize.predicted_memory.high < GIB


def test_one_pass_takes_the_disk_of_its_file_and_little_memory() -> None:
    made = forecast(model("llama-3-8b"), gguf.variant("Q4_K_M"), machine())
    assert [each.kind for each in made] == ["quantize", "verify"]
    (quantize, _) = made
    assert quantize.source == "model" and quantize.predicted_scratch_bytes == 0
    assert disk_peak_bytes((quantize,)) == gguf.size(model("llama-3-8b"), gguf.variant("Q4_K_M")).file_bytes
    assert quantize.predicted_memory is not None and quantize.predicted_seconds is not None
    assert quantize.predicted_memory.high < 1.5 * GIB
    assert quantize.predicted_seconds.low < quantize.predicted_seconds.value < quantize.predicted_seconds.high


@given(st.integers(1, 256), st.sampled_from(("Q8_0", "Q4_K_M", "IQ4_XS")), st.sampled_from(("qwen3-4b", "llama-3-70b")))
def test_one_pass_stays_below_its_bound_of_memory(threads: int, type_: str, name: str) -> None:
    made = forecast(model(name), gguf.variant(type_), machine(cores=threads), threads=threads)
    memory, largest = step("quantize", made).predicted_memory, gguf.largest_tensor(model(name))
    assert memory is not None and memory.high < 1.5 * GIB + 2 * largest


def test_several_types_of_one_read_take_less_than_one_after_the_other() -> None:
    spec, types = model("tinyllama-1.1b"), ("Q8_0", "Q6_K", "Q4_K_M")
    variants = tuple(gguf.variant(type_) for type_ in types)
    together = making.forecast_many(spec, variants, machine(), threads=8).predicted_seconds
    alone = [making.forecast_many(spec, (variant,), machine(), threads=8).predicted_seconds for variant in variants]
    assert together is not None and together.value < sum(each.value for each in alone if each)


def test_two_steps_name_memory_disk_and_time() -> None:
    """Of a family that only llama.cpp's converter knows."""
    made = forecast(model("command-r"), gguf.variant("Q4_K_M"), machine())
    convert, quantize = step("convert", made), step("quantize", made)
    for each in (convert, quantize):
        assert each.predicted_memory is not None and each.predicted_seconds is not None
        assert each.predicted_seconds.low < each.predicted_seconds.value < each.predicted_seconds.high
        assert each.predicted_peak_bytes == round(each.predicted_memory.high)
    # the token table is the largest tensor: 16 bits, and what its fp32 form and result may take at most
    assert step("quantize", made).predicted_memory.value == pytest.approx(256000 * 8192 * 2 + 8 * GIB, rel=0.03)  # type: ignore[union-attr]
    assert disk_peak_bytes(made[:-1]) == convert.predicted_bytes + quantize.predicted_bytes  # type: ignore[operator]


@given(st.integers(1, 64), st.sampled_from(("Q8_0", "Q4_K_M", "IQ4_XS")))
def test_more_threads_never_take_longer(threads: int, type_: str) -> None:
    few = forecast(model("tinyllama-1.1b"), gguf.variant(type_), machine(), threads=threads)
    many = forecast(model("tinyllama-1.1b"), gguf.variant(type_), machine(), threads=threads + 1)
    assert seconds("quantize", many).value <= seconds("quantize", few).value


@pytest.mark.parametrize("name", ["qwen2.5-0.5b", "tinyllama-1.1b", "mixtral-8x7b", "deepseek-v2-lite"])
def test_a_bigger_buffer_is_never_more_than_llamacpp_takes(name: str) -> None:
    types = gguf.tensor_types(model(name), gguf.variant("Q4_K_M"))
    value = making_gguf.quantize_memory(model(name), types).value
    largest = max(t.element_count for t in model(name).tensors)
    assert making_gguf.QUANTIZE_BASE_BYTES < value <= making_gguf.QUANTIZE_BASE_BYTES + 8 * GIB + 2 * largest


def measured(spec: ModelSpec, quantity: str, type_: str, factor: float, threads: int = 8) -> Measurement:
    """A step that took ``factor`` times what the formula says."""
    variant: Variant = gguf.variant(type_)
    plain = making.uncorrected_rate(
        spec, variant, step("quantize", forecast(spec, variant, machine())), machine(), threads
    )
    rate = plain / factor
    return Measurement(
        quantity=quantity,
        value=rate,
        low=rate,
        high=rate,
        model=spec.name,
        model_sha256=shape_sha256(spec),
        method="gguf",
        runtime="llama.cpp",
        type=type_,
        conditions=Conditions(threads=threads),
        predicted=plain,
        weights_bytes=float(spec.parameter_count),
    )


def test_what_was_measured_corrects_the_next_prediction() -> None:
    one, other = model("tinyllama-1.1b"), model("llama-2-7b")
    variant = gguf.variant("Q4_K_M")
    known = Calibration(hardware_identity="x", measurements=(measured(one, ONE_PASS_RATE, "Q4_K_M", 2.0),))
    plain, same = forecast(one, variant, machine()), forecast(one, variant, machine(), calibration=known)
    assert seconds("quantize", same).value == pytest.approx(2 * seconds("quantize", plain).value, rel=0.01)
    assert seconds("quantize", same).basis == "measured"
    plain, far = forecast(other, variant, machine()), forecast(other, variant, machine(), calibration=known)
    ratio = seconds("quantize", far).value / seconds("quantize", plain).value
    assert 1.5 < ratio < 2.0
    assert seconds("quantize", far).basis == "calibrated"
    width = [seconds("quantize", made) for made in (plain, far)]
    assert width[1].high / width[1].low < width[0].high / width[0].low


def test_a_tiny_model_says_little_of_a_big_one() -> None:
    tiny = dataclasses.replace(model("qwen2.5-0.5b"), tensors=model("qwen2.5-0.5b").tensors[-3:])
    known = Calibration(hardware_identity="x", measurements=(measured(tiny, ONE_PASS_RATE, "Q4_K_M", 3.0),))
    big = model("llama-2-7b")
    plain = forecast(big, gguf.variant("Q4_K_M"), machine())
    told = forecast(big, gguf.variant("Q4_K_M"), machine(), calibration=known)
    assert seconds("quantize", told).value < 1.5 * seconds("quantize", plain).value


def test_report_puts_each_step_beside_its_prediction() -> None:
    made = forecast(model("tinyllama-1.1b"), gguf.variant("Q4_K_M"), machine())
    quantize = step("quantize", made)
    assert quantize.predicted_memory is not None and quantize.predicted_bytes is not None
    receipt = Receipt(
        step="quantize",
        key="k",
        output=str(quantize.output),
        size_bytes=quantize.predicted_bytes,
        sha256="0" * 64,
        seconds=seconds("quantize", made).value / 100,
        peak_memory_bytes=round(2 * quantize.predicted_memory.value),
        finished_at="2026-11-23T00:00:00+00:00",
    )
    plan = cast("Plan", SimpleNamespace(steps=made))
    (row,) = step_report.rows(plan, (receipt,))
    said = {verdict["quantity"]: verdict for verdict in row["verdicts"]}
    assert [said[name]["position"] for name in ("seconds", "peak_memory_bytes", "file_bytes")] == [
        "better",
        "outside",
        "inside",
    ]
    assert said["peak_memory_bytes"]["ok"] is False and said["peak_memory_bytes"]["ratio"] == pytest.approx(2, rel=0.01)
    assert row["sha256"] == receipt.sha256


def test_rates_of_fresh_steps_are_remembered() -> None:
    spec = model("tinyllama-1.1b")
    made = forecast(spec, gguf.variant("Q4_K_M"), machine())
    plan = cast(
        "Plan", SimpleNamespace(steps=made, variant=gguf.variant("Q4_K_M"), model=SimpleNamespace(name=spec.name))
    )
    receipts = tuple(
        Receipt(step=s.name, key="k", output=str(s.output), size_bytes=1, sha256="0", seconds=20.0, finished_at="x")
        for s in made[:-1]
    )
    found = step_report.measurements(plan, spec, machine(), receipts, (step("quantize", made),), 8)
    assert [(m.quantity, m.type) for m in found] == [(ONE_PASS_RATE, "Q4_K_M")]
    assert found[0].value == pytest.approx(spec.parameter_count / 20)
    again = Calibration(hardware_identity="x", measurements=found)
    assert seconds("quantize", forecast(spec, gguf.variant("Q4_K_M"), machine(), calibration=again)).value == 20.0


def test_preflight_refuses_what_does_not_fit() -> None:
    made = forecast(model("llama-2-7b"), gguf.variant("Q4_K_M"), machine())[:-1]
    need = disk_peak_bytes(made)
    assert need is not None
    roomy = machine(disk=Disk(path="/x", free_bytes=need + 100 * MIB))
    check_room(made, roomy)
    with pytest.raises(ExecutionFailed) as full:
        check_room(made, machine(disk=Disk(path="/x", free_bytes=need)))
    assert full.value.code == "no-space"
    with pytest.raises(ExecutionFailed) as small:
        check_room(made, machine(memory=Memory(total_bytes=64 * MIB)))
    assert small.value.code == "no-memory" and "quantize" in small.value.what


def test_preflight_looks_at_the_gpu_that_calibrates() -> None:
    spec = model("llama-2-7b")
    small = dataclasses.replace(A100, memory_total_bytes=4 * GIB)
    made = forecast(spec, get("gptq").variants(spec)[0], machine(gpu=small))
    with pytest.raises(ExecutionFailed) as error:
        check_room(made, machine(gpu=small))
    assert "A100" in error.value.what


def test_scratch_counts_only_while_its_step_runs() -> None:
    first = Step(name="a", kind="quantize", method="gptq", predicted_bytes=10, predicted_scratch_bytes=100)
    second = Step(name="b", kind="quantize", method="gptq", predicted_bytes=20)
    assert disk_peak_bytes((first, second)) == 110
    assert disk_peak_bytes((dataclasses.replace(first, predicted_bytes=None),)) is None


def test_a_file_of_a_step_that_was_killed_before_its_receipt_is_ours(tmp_path: Path) -> None:
    made = forecast(model("tinyllama-1.1b"), gguf.variant("Q4_K_M"), machine())[:-1]
    plan = cast("Plan", SimpleNamespace(making_steps=lambda: made))
    (tmp_path / str(made[0].output)).write_bytes(b"x")
    with pytest.raises(ExecutionFailed, match="not made by this plan"):
        check_output(plan, tmp_path)
    receipts.begin(tmp_path, made[0])
    check_output(plan, tmp_path)
