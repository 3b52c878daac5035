"""Speed predictions: what must hold for any machine and model, and which number wins."""

from __future__ import annotations

import tomllib
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.core.candidate import Placement, Variant
from planner.core.data import data_path
from planner.core.devices import hardware_from_device
from planner.core.estimates import CALIBRATED, FORMULA, MEASURED, PUBLISHED
from planner.core.hardware import HardwareProfile
from planner.core.measurement import DECODE, PREFILL, Calibration, Conditions, Measurement
from planner.core.model import ModelSpec, shape_sha256
from planner.estimate import speed_model, speed_published
from planner.estimate.coefficients import read_coefficients
from planner.estimate.speed import speed
from planner.estimate.speed_hardware import chip_class, compute_rate, cpu_class
from planner.estimate.speed_terms import type_class
from planner.models import catalog

GPUS = (
    "GeForce RTX 4090",
    "GeForce RTX 3060 12 GB",
    "H100 SXM5 80 GB",
    "Radeon RX 7800 XT",
    "Apple M2 Ultra 76c GPU",
    "Arc B580",
    "DGX Spark (GB10)",
    "Tesla P40",
)
CPUS = ("Ryzen 9 7950X", "Raspberry Pi 5", "EPYC 9374F", "Core 2 Quad Q8400")
MODELS = ("llama-3.2-1b", "llama-2-7b", "llama-3.1-70b", "qwen3-30b-a3b", "gemma-2-9b")
TYPES = ("Q2_K", "Q4_0", "Q4_K_M", "Q6_K", "Q8_0", "F16", "IQ4_XS")


def model_of(name: str) -> ModelSpec:
    found = catalog.lookup(name)
    assert found is not None
    return found


def gguf(type_: str) -> Variant:
    return Variant(method="gguf", format="gguf", runtime="llama.cpp", type=type_)


def served(method: str, type_: str, runtime: str = "vllm", group: int | None = None) -> Variant:
    return Variant(method=method, format=method, runtime=runtime, type=type_, group_size=group)


def whole(model: ModelSpec, **changes: object) -> Placement:
    base = Placement(context=8192, gpu_layers=model.n_layer + 1, gpu_count=1)
    return replace(base, **changes)  # type: ignore[arg-type]


def with_bandwidth(hardware: HardwareProfile, factor: float) -> HardwareProfile:
    """``hardware`` with other memory, as a device nobody published rows of."""
    gpus = tuple(
        replace(g, device=None, bandwidth_bytes_per_second=(g.bandwidth_bytes_per_second or 0) * factor)
        for g in hardware.gpus
    )
    memory = replace(
        hardware.memory, bandwidth_bytes_per_second=(hardware.memory.bandwidth_bytes_per_second or 0) * factor
    )
    return replace(hardware, gpus=gpus, memory=memory)


models = st.sampled_from(MODELS)
types = st.sampled_from(TYPES)
gpus = st.sampled_from(GPUS)


@settings(max_examples=60, deadline=None)
@given(name=models, type_=types, device=gpus, factor=st.floats(1.0, 8.0), ngl=st.floats(0, 1))
def test_more_bandwidth_is_never_slower(name: str, type_: str, device: str, factor: float, ngl: float) -> None:
    model, hardware = model_of(name), hardware_from_device(device)
    placement = whole(model, gpu_layers=round(ngl * (model.n_layer + 1)))
    slow = speed(model, gguf(type_), placement, with_bandwidth(hardware, 1.0))
    fast = speed(model, gguf(type_), placement, with_bandwidth(hardware, factor))
    assert slow.decode and fast.decode
    assert fast.decode.value >= slow.decode.value * (1 - 1e-9)


@settings(max_examples=60, deadline=None)
@given(name=models, type_=types, device=gpus, depths=st.tuples(st.integers(0, 65536), st.integers(0, 65536)))
def test_deeper_is_never_faster(name: str, type_: str, device: str, depths: tuple[int, int]) -> None:
    model, hardware = model_of(name), hardware_from_device(device)
    near, far = (speed(model, gguf(type_), whole(model, depth=d), hardware).decode for d in sorted(depths))
    assert near and far
    assert far.value <= near.value * (1 + 1e-9)


@settings(max_examples=40, deadline=None)
@given(name=models, type_=types, device=gpus, layers=st.tuples(st.floats(0, 1), st.floats(0, 1)))
def test_a_smaller_cache_type_is_never_slower(name: str, type_: str, device: str, layers: tuple[float, float]) -> None:
    model, hardware = model_of(name), hardware_from_device(device)
    half = speed(model, gguf(type_), whole(model, depth=8192, kv_type="q8_0"), hardware).decode
    full = speed(model, gguf(type_), whole(model, depth=8192, kv_type="f16"), hardware).decode
    assert half and full
    assert half.value >= full.value * (1 - 1e-9)


@settings(max_examples=60, deadline=None)
@given(name=models, type_=types, device=st.sampled_from(GPUS + CPUS), ngl=st.floats(0, 1), depth=st.integers(0, 32768))
def test_interval_contains_the_value_and_terms_are_given(
    name: str, type_: str, device: str, ngl: float, depth: int
) -> None:
    model, hardware = model_of(name), hardware_from_device(device)
    layers = round(ngl * (model.n_layer + 1)) if hardware.gpus else 0
    found = speed(model, gguf(type_), whole(model, gpu_layers=layers, depth=depth), hardware)
    for prediction in (found.decode, found.prefill):
        assert prediction is not None
        assert 0 < prediction.low <= prediction.value <= prediction.high
        assert prediction.terms and prediction.source
    assert found.bound_by


def test_layers_on_the_gpu_pay() -> None:
    model, hardware = model_of("llama-3.1-8b"), hardware_from_device("GeForce RTX 3060 12 GB")
    rates = [
        found.value
        for ngl in (0, 8, 16, 24, 32, 33)
        if (found := speed(model, gguf("Q4_K_M"), whole(model, gpu_layers=ngl), hardware).decode)
    ]
    assert rates == sorted(rates)


def test_more_threads_are_never_slower_on_a_cpu() -> None:
    model, hardware = model_of("llama-2-7b"), hardware_from_device("Ryzen 9 7950X")
    rates = [
        found.value
        for n in (1, 2, 4, 8, 16)
        if (found := speed(model, gguf("Q4_K_M"), whole(model, gpu_layers=0, threads=n), hardware).decode)
    ]
    assert rates == sorted(rates)
    assert rates[0] < rates[-1] <= (83.2e9 / 3.9e9)  # never above the roofline of its memory


@pytest.mark.parametrize("device", GPUS)
def test_decode_stays_below_the_roofline(device: str) -> None:
    model, hardware = model_of("llama-2-7b"), hardware_from_device(device)
    found = speed(model, gguf("F16"), whole(model), hardware).decode
    bandwidth = hardware.gpus[0].bandwidth_bytes_per_second
    assert found and bandwidth
    assert found.value < bandwidth / 13.2e9


def test_unknown_bandwidth_is_unknown_speed() -> None:
    model, hardware = model_of("llama-2-7b"), hardware_from_device("GeForce RTX 4090")
    blind = replace(hardware, gpus=(replace(hardware.gpus[0], bandwidth_bytes_per_second=None, device=None),))
    found = speed(model, gguf("Q4_K_M"), whole(model), blind)
    assert found.decode is None and found.prefill is None
    assert "bandwidth is unknown" in found.notes[0]


def test_gpu_method_without_a_gpu_has_a_note() -> None:
    model = model_of("llama-2-7b")
    found = speed(
        model, served("awq", "4bit", group=128), whole(model, gpu_layers=0), hardware_from_device("EPYC 9374F")
    )
    assert found.decode is None and "vllm" in found.notes[0]


def test_serving_runtimes_rank_as_published() -> None:
    """4-bit in vLLM is faster than 16-bit, and transformers is slower than either (Qwen2.5 speed benchmark, A100)."""
    model, hardware = model_of("qwen2.5-7b"), hardware_from_device("A100 SXM4 80 GB")
    rate = {}
    for label, variant in {
        "gptq": served("gptq", "4bit", group=128),
        "f16": served("none", "bf16"),
        "hf": served("none", "bf16", runtime="transformers"),
    }.items():
        found = speed(model, variant, whole(model), hardware).decode
        assert found
        rate[label] = found.value
    assert rate["gptq"] > rate["f16"] > rate["hf"]


def measurement(model: ModelSpec, quantity: str, value: float, **changes: object) -> Measurement:
    base = Measurement(
        quantity=quantity,
        value=value,
        low=value * 0.99,
        high=value * 1.01,
        model=model.name,
        model_sha256=shape_sha256(model),
        method="gguf",
        runtime="llama.cpp",
        type="Q4_K_M",
        conditions=Conditions(context=8192, depth=0, prompt_tokens=512, gpu_layers=model.n_layer + 1),
        weights_bytes=4.0e9 if quantity == DECODE else float(model.active_parameter_count),
        tool_version="llama.cpp b9000",
        measured_at="2026-11-23T00:00:00Z",
    )
    return replace(base, **changes)  # type: ignore[arg-type]


def test_number_path() -> None:
    model, other = model_of("llama-2-7b"), model_of("llama-3.1-8b")
    hardware = hardware_from_device("GeForce RTX 3090")
    published = speed(model, gguf("Q4_0"), whole(model), hardware).decode
    assert published and published.basis == PUBLISHED and "github.com" in published.source
    here = Calibration(hardware_identity="x", measurements=(measurement(model, DECODE, 100.0, type="Q4_0"),))
    measured = speed(model, gguf("Q4_0"), whole(model), hardware, here).decode
    assert measured and (measured.basis, measured.value) == (MEASURED, 100.0)
    assert measured.low < 100.0 < measured.high
    calibrated = speed(other, gguf("Q4_K_M"), whole(other), hardware, here).decode
    assert calibrated and calibrated.basis == CALIBRATED
    fitted = speed(other, gguf("Q4_K_M"), whole(other), hardware).decode
    assert fitted and fitted.basis == FORMULA
    assert calibrated.value < fitted.value  # 100 tok/s is below what the formula says for that 7B
    width = lambda p: p.high / p.low  # noqa: E731
    assert width(calibrated) < width(fitted)


def test_other_conditions_are_no_measurement_of_this_case() -> None:
    model, hardware = model_of("llama-2-7b"), hardware_from_device("GeForce RTX 4080")
    here = Calibration(hardware_identity="x", measurements=(measurement(model, DECODE, 100.0),))
    for placement in (whole(model, depth=4096), whole(model, gpu_layers=10), whole(model, kv_type="q8_0")):
        found = speed(model, gguf("Q4_K_M"), placement, hardware, here).decode
        assert found and found.basis == CALIBRATED
    on_cpu = speed(model, gguf("Q4_K_M"), whole(model, gpu_layers=0), hardware, here).decode
    assert on_cpu and on_cpu.basis == FORMULA


def test_prefill_is_calibrated_by_prefill() -> None:
    model, hardware = model_of("llama-2-7b"), hardware_from_device("GeForce RTX 4080")
    here = Calibration(hardware_identity="x", measurements=(measurement(model, PREFILL, 1000.0, type="Q8_0"),))
    found = speed(model, gguf("Q4_K_M"), whole(model), hardware, here)
    plain = speed(model, gguf("Q4_K_M"), whole(model), hardware)
    assert found.prefill and plain.prefill and found.decode and plain.decode
    assert found.prefill.basis == CALIBRATED and found.prefill.value < plain.prefill.value
    assert found.decode == plain.decode


def test_published_rows_have_source_and_date() -> None:
    rows = speed_published.find("GeForce RTX 3090", "cuda", "llama-2-7b", "Q4_0")
    assert rows and all(row.source.startswith("https://") and row.date for row in rows)
    assert not speed_published.find(None, "cuda", "llama-2-7b", "Q4_0")


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("meta-llama/Llama-3.2-3B-Instruct", "llama-3.2-3b"),
        ("llama-3-8b", "llama-3.1-8b"),
        ("mistral-7b-v0.3", "mistral-7b-v0.3"),
        ("Qwen2.5-Coder-14B-Instruct", "qwen2.5-14b"),
    ],
)
def test_shape_names(name: str, shape: str) -> None:
    assert speed_published.shape_name(name) == shape


@pytest.mark.parametrize("name", ["speed_model.toml", "quality_model.toml"])
def test_the_fast_reader_reads_what_tomllib_reads(name: str) -> None:
    with data_path(name).open("rb") as file:
        assert read_coefficients(data_path(name)) == tomllib.load(file)


@pytest.mark.parametrize(
    ("device", "chip"),
    [
        ("A100 PCIe 80 GB", "ga100"),
        ("GeForce RTX 3090", "ampere"),
        ("L4", "ada"),
        ("DGX Spark (GB10)", "spark"),
        ("B200", "gb100"),
        ("Jetson AGX Orin 64GB", "orin"),
        ("Apple M3 Max 40c GPU", "m3"),
        ("Radeon RX 9070 XT", "rdna4"),
        ("Ryzen AI Max+ 395 (Radeon 8060S)", "rdna3.5"),
        ("Arc A770", "xe"),
        ("Instinct MI300X", "cdna"),
    ],
)
def test_chip_classes(device: str, chip: str) -> None:
    gpu = hardware_from_device(device).gpus[0]
    assert chip_class(gpu) == chip
    rate = compute_rate(gpu, chip)
    assert rate and 1e12 < rate < 5e14


def test_cpu_classes() -> None:
    found = {name: cpu_class(hardware_from_device(name).cpu) for name in (*CPUS, "Apple M2 10c GPU")}
    assert found == {
        "Ryzen 9 7950X": "avx512",
        "Raspberry Pi 5": "dotprod",
        "EPYC 9374F": "avx512",
        "Core 2 Quad Q8400": "x86",
        "Apple M2 10c GPU": "apple",
    }


def test_type_classes() -> None:
    assert [type_class(t) for t in ("Q4_K_M", "IQ2_XXS", "MXFP4_MOE", "Q8_0")] == ["Q4_K", "IQ2", "MXFP4", "Q8_0"]


def test_coefficients_say_how_good_they_are() -> None:
    document = speed_model.document()
    decode = document["gpu_decode"]["cross_validation"]
    assert decode["core_median"] <= 0.10 and decode["core_within_20"] >= 0.75
    assert 0.75 <= decode["interval_coverage"] <= 0.9
    assert document["source"] and document["date"]


@pytest.mark.slow
def test_refitting_gives_the_shipped_figures() -> None:
    pytest.importorskip("scipy")
    import sys

    sys.path.insert(0, str(data_path("").parent / "benchmarks"))
    from fit_speed import cross_validate, errors
    from speed_fits import GPU_DECODE
    from speed_rows import load_rows

    rows = GPU_DECODE.select(load_rows())
    found = errors(cross_validate(GPU_DECODE, rows)[rows.eligible & rows.core])
    shipped = speed_model.document()["gpu_decode"]["cross_validation"]
    assert found["median"] == pytest.approx(shipped["core_median"], abs=0.003)
    assert found["within_20"] == pytest.approx(shipped["core_within_20"], abs=0.01)
