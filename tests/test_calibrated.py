"""Rates from slices, and predictions from rates: on a machine that obeys the formulas both are exact."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.core import rates as kinds
from planner.core.candidate import Placement, Variant
from planner.core.devices import hardware_from_device
from planner.core.estimates import CALIBRATED, FORMULA, MEASURED, Prediction
from planner.core.measurement import DECODE, PREFILL, Calibration, Conditions, Measurement
from planner.core.model import ModelSpec, shape_sha256
from planner.core.rates import Rate, Rates
from planner.estimate import slices
from planner.estimate.nonnegative import nonnegative_costs
from planner.estimate.slice_rates import link_rates_of, model_rates_of, rates_of
from planner.estimate.slices import CPU_KIT, GPU_KIT
from planner.estimate.speed import speed
from planner.estimate.speed_calibrated import predict
from planner.formats import ggml
from planner.methods import gguf
from planner.models import catalog
from tests.calibration_fixtures import Law, model_slices, observed, slices_of

TYPES = ("Q4_K", "Q6_K", "Q8_0", "F16")
LAW = Law(
    bytes_per_second={"Q4_K": 2.1e10, "Q6_K": 2.3e10, "Q8_0": 1.8e10, "F16": 2.4e10, "F32": 2e10},
    flops={"Q4_K": 1.4e11, "Q6_K": 1.6e11, "Q8_0": 1.1e11, "F16": 9e10, "F32": 5e10},
)
HERE = hardware_from_device("EPYC 9374F")
MODELS = ("tinyllama-1.1b", "llama-3.2-3b", "llama-2-7b")
FILE_TYPES = ("Q4_K_M", "Q6_K", "Q8_0", "F16")


def model_of(name: str) -> ModelSpec:
    found = catalog.lookup(name)
    assert found is not None
    return found


def calibrated(law: Law = LAW, threads: tuple[int, ...] = (1, 2)) -> Rates:
    return Rates(rates_of(slices_of(law, TYPES, threads), CPU_KIT))


RATES = calibrated()


def guess(model: ModelSpec, type_: str, quantity: str = DECODE, rates: Rates = RATES, **placed: object) -> Prediction:
    placement = replace(Placement(context=8192, threads=1, ubatch=8192, batch=8192), **placed)  # type: ignore[arg-type]
    found = predict(model, gguf.variant(type_, imatrix=False), placement, HERE, rates, quantity)
    assert found is not None
    assert found.basis == CALIBRATED and found.low < found.value < found.high
    return found


positive = st.floats(5e9, 1e11)


@given(speeds=st.lists(positive, min_size=4, max_size=4), layer=st.floats(0, 5e-5), token=st.floats(0, 1e-3))
@settings(max_examples=25, deadline=None)
def test_rates_of_the_slices_are_found_again(speeds: list[float], layer: float, token: float) -> None:
    by_type = dict(zip(TYPES, speeds, strict=True))
    law = replace(LAW, bytes_per_second=by_type, flops={t: 6 * s for t, s in by_type.items()}, layer=layer, token=token)
    found = {(r.work, r.type, r.threads): r.value for r in calibrated(law).entries}
    for type_, value in by_type.items():
        assert found[kinds.DECODE_WEIGHTS, type_, 1] == pytest.approx(value, rel=1e-6)
        assert found[kinds.DECODE_WEIGHTS, type_, 2] == pytest.approx(2 * value, rel=1e-6)
        assert found[kinds.PREFILL_WEIGHTS, type_, 1] == pytest.approx(6 * value, rel=1e-6)
    assert found[kinds.LAYER_SECONDS, "", 1] == pytest.approx(layer, abs=1e-9)
    assert found[kinds.TOKEN_SECONDS, "", 2] == pytest.approx(token, abs=1e-9)
    assert found[kinds.DECODE_ATTENTION, "f16", 1] == pytest.approx(law.attention_flops, rel=1e-4)
    assert found[kinds.DECODE_CACHE, "f16", 1] == pytest.approx(law.cache_bytes_per_second, rel=1e-4)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("type_", FILE_TYPES)
@pytest.mark.parametrize("threads", (1, 2))
def test_whole_models_follow_from_slices_of_other_widths(name: str, type_: str, threads: int) -> None:
    model = model_of(name)
    types = gguf.tensor_types(model, gguf.variant(type_, imatrix=False))
    for depth in (0, 2048):
        decode = guess(model, type_, threads=threads, depth=depth)
        assert 1 / decode.value == pytest.approx(LAW.decode(model, types, threads, depth), rel=1e-3)
    prefill = guess(model, type_, PREFILL, threads=threads, prompt_tokens=512)
    assert 512 / prefill.value == pytest.approx(LAW.prefill(model, types, threads, 512), rel=1e-3)


@pytest.mark.parametrize("name", MODELS)
def test_slices_of_the_very_model_carry_its_mix(name: str) -> None:
    model, type_ = model_of(name), "Q4_K_M"
    types = gguf.tensor_types(model, gguf.variant(type_, imatrix=False))
    seen = model_slices(LAW, model, type_, types, 2)
    rates = Rates(model_rates_of(seen, CPU_KIT, model, shape_sha256(model)))
    for depth in (0, 1500):
        found = guess(model, type_, rates=rates, threads=2, depth=depth)
        assert 1 / found.value == pytest.approx(LAW.decode(model, types, 2, depth), rel=0.005)
        assert "slices of this model" in found.source
    prefill = guess(model, type_, PREFILL, rates=rates, threads=2, prompt_tokens=1024)
    assert 1024 / prefill.value == pytest.approx(LAW.prefill(model, types, 2, 1024), rel=0.01)


@given(
    name=st.sampled_from(MODELS),
    type_=st.sampled_from(FILE_TYPES),
    depths=st.tuples(st.integers(0, 8000), st.integers(0, 8000)),
    quantity=st.sampled_from((DECODE, PREFILL)),
)
@settings(max_examples=60, deadline=None)
def test_more_to_do_is_never_faster(name: str, type_: str, depths: tuple[int, int], quantity: str) -> None:
    model, (less, more) = model_of(name), sorted(depths)
    assert guess(model, type_, depth=more).value <= guess(model, type_, depth=less).value
    few, many = (guess(slices.plain(slices.WIDE, n), "Q8_0", quantity).value for n in (4, 5))
    assert many < few
    longer, shorter = (guess(model, type_, PREFILL, prompt_tokens=n + 32) for n in (more, less))
    assert (more + 32) / longer.value >= (less + 32) / shorter.value


@given(name=st.sampled_from(MODELS), type_=st.sampled_from(FILE_TYPES), threads=st.integers(1, 8))
@settings(max_examples=30, deadline=None)
def test_threads_between_and_beyond(name: str, type_: str, threads: int) -> None:
    model, rates = model_of(name), calibrated(threads=(1, 4))
    found = guess(model, type_, rates=rates, threads=threads)
    one, four = (guess(model, type_, rates=rates, threads=n) for n in (1, 4))
    assert one.value <= found.value * 1.0001 and found.value <= four.value * 1.0001
    measured = threads in (1, 4)
    assert (found.high / found.low > 1.001 * one.high / one.low) != measured


def test_overheads_of_nothing_hurt_no_thread_count() -> None:
    law = replace(LAW, layer=0.0, token=0.0, row=0.0, pass_=0.0)
    rates = calibrated(law, threads=(1, 4))
    for quantity in (DECODE, PREFILL):
        assert guess(model_of("llama-2-7b"), "Q4_K_M", quantity, rates, threads=2).value > 0


def test_a_type_never_measured_takes_its_neighbours_rate_with_a_wider_range() -> None:
    model = model_of("llama-2-7b")
    measured, unmeasured = guess(model, "Q4_K_S"), guess(model, "Q5_K_S")
    assert any("(as Q" in name for name, _, _ in unmeasured.terms)
    assert unmeasured.high / unmeasured.low > measured.high / measured.low


def test_what_a_busy_machine_spoils_is_filled_in_from_the_rest() -> None:
    seen = slices_of(LAW, TYPES, (1, 2))
    spoilt = [
        replace(o, seconds=50 * o.seconds, low=o.seconds, clean_count=0) if (o.type, o.threads) == ("Q8_0", 2) else o
        for o in seen
    ]
    rates, model = Rates(rates_of(spoilt, CPU_KIT)), model_of("llama-2-7b")
    found, true = guess(model, "Q8_0", rates=rates, threads=2), guess(model, "Q8_0", threads=2)
    assert found.value == pytest.approx(true.value, rel=0.02)
    assert found.high / found.low > true.high / true.low


def test_terms_add_up_to_the_number() -> None:
    for quantity, tokens in ((DECODE, 1), (PREFILL, 512)):
        found = guess(model_of("llama-3.2-3b"), "Q4_K_M", quantity, depth=1000)
        assert sum(value for _, value, _ in found.terms) == pytest.approx(tokens / found.value)


def test_rates_do_not_cover_other_runtimes_batches_and_recurrent_layers() -> None:
    awq = Variant(method="awq", format="awq-gemm", runtime="vllm", type="4bit", group_size=128)
    placement, model = Placement(context=4096, threads=1), model_of("llama-2-7b")
    assert predict(model, awq, placement, HERE, RATES, DECODE) is None
    variant = gguf.variant("Q8_0")
    assert predict(model, variant, replace(placement, sequences=2), HERE, RATES, DECODE) is None
    assert predict(model, variant, placement, HERE, Rates(), DECODE) is None
    gpu = hardware_from_device("GeForce RTX 3090")
    assert predict(model, variant, replace(placement, gpu_layers=33, gpu_count=1), gpu, RATES, DECODE) is None


@given(
    costs=st.tuples(*[st.floats(0, 1e-9)] * 3),
    rows=st.lists(st.tuples(*[st.floats(1e5, 1e8)] * 3), min_size=1, max_size=3),
)
@settings(max_examples=100, deadline=None)
def test_costs_are_never_negative_and_explain_the_times(
    costs: tuple[float, float, float], rows: list[tuple[float, float, float]]
) -> None:
    def seconds(by: tuple[float, float, float], row: tuple[float, float, float]) -> float:
        return sum(cost * amount for cost, amount in zip(by, row, strict=True))

    seen = [(seconds(costs, row), row) for row in rows if seconds(costs, row) > 1e-9]
    found = nonnegative_costs(seen)
    assert min(found) >= 0
    for time, row in seen if len(seen) in (1, 3) else ():
        assert seconds(found, row) == pytest.approx(time, rel=0.05)


def test_number_path() -> None:
    model, placement = model_of("llama-2-7b"), Placement(context=4096, threads=2)
    variant = gguf.variant("Q4_K_M", imatrix=False)
    shape = shape_sha256(model)
    measured = Measurement(
        quantity=DECODE, value=3.0, low=2.9, high=3.1, model=model.name, model_sha256=shape, method="gguf",
        runtime="llama.cpp", type="Q4_K_M", conditions=Conditions(threads=2), weights_bytes=4e9,
    )  # fmt: skip
    other = replace(measured, type="Q8_0", value=1.0)

    def basis(*measurements: Measurement, rates: Rates = RATES) -> tuple[str, str]:
        here = Calibration(hardware_identity="x", measurements=measurements, rates=rates)
        found = speed(model, variant, placement, HERE, here).decode
        assert found is not None
        return found.basis, found.source

    assert basis(measured, other)[0] == MEASURED
    assert basis(other) == (CALIBRATED, basis()[1])  # rates need no correction by another case
    assert "corrected by 1 measurement" in basis(other, rates=Rates())[1]
    assert basis(rates=Rates())[0] == FORMULA
    types = gguf.tensor_types(model, variant)
    own = model_rates_of(model_slices(LAW, model, "Q4_K_M", types, 2), CPU_KIT, model, shape)
    assert "slices of this model" in basis(rates=Rates((*RATES.entries, *own)))[1]


def test_a_gpu_and_the_cpu_share_a_model() -> None:
    machine = hardware_from_device("GeForce RTX 3090")
    key = kinds.gpu_key(machine.gpus[0])
    faster = replace(LAW, bytes_per_second={t: 30 * v for t, v in LAW.bytes_per_second.items()})
    on_gpu = [replace(r, device=key, threads=0) for r in calibrated(faster, (1,)).entries]
    link = [
        Rate(work=kinds.LINK, value=7e9, low=6e9, high=8e9, device=key),
        Rate(work=kinds.CROSSING_SECONDS, value=5e-5, low=5e-5, high=5e-5, device=key),
    ]
    rates, model, variant = Rates((*RATES.entries, *on_gpu, *link)), model_of("llama-2-7b"), gguf.variant("Q8_0")

    def rate(layers: int, quantity: str) -> float:
        placement = Placement(context=4096, threads=1, gpu_layers=layers, gpu_count=1)
        found = predict(model, variant, placement, machine, rates, quantity)
        assert found is not None
        return found.value

    decode = [rate(layers, DECODE) for layers in (0, 1, 10, 20, 32, 33)]
    assert decode == sorted(decode) and decode[-1] > 20 * decode[0]
    half = 1 / rate(17, DECODE)
    assert half == pytest.approx(0.5 / decode[0] + 0.5 / decode[-1] + 5e-5, rel=0.03)
    bytes_on_host = 16 * sum(
        ggml.tensor_bytes("Q8_0", t.shape) for t in model.tensors if t.layer == 0 and len(t.shape) > 1
    )
    copied = 512 / rate(17, PREFILL) - 512 / rate(33, PREFILL)
    assert copied == pytest.approx(bytes_on_host / 7e9, rel=0.01)


def test_the_link_is_what_a_split_slice_takes_beside_its_halves() -> None:
    wide, one = GPU_KIT.wide.name, slices.plain(GPU_KIT.wide, 1)
    layer = sum(ggml.tensor_bytes("Q4_K", t.shape) for t in one.tensors if t.layer == 0 and len(t.shape) > 1)
    seen = [observed(wide, n, "Q4_K", 0, n * 1e-4 + 5e-5) for n in (2, 8)]
    seen += [observed(wide, n, "Q4_K", 0, n * 1e-3 + 1e-4, tokens=512) for n in (2, 8)]
    host = [Rate(work=kinds.DECODE_WEIGHTS, value=2e10, low=2e10, high=2e10, type="Q4_K", threads=8)]
    on_host = 4 * layer / 2e10
    seen.append(observed(wide, 8, "Q4_K", 8, 4e-4 + 5e-5 + on_host + 7e-5, gpu_layers=5))
    seen.append(observed(wide, 8, "Q4_K", 8, 8e-3 + 1e-4 + 4 * layer / 8e9, gpu_layers=5, tokens=512))
    found = {r.work: r.value for r in link_rates_of(seen, GPU_KIT, "cuda:x", host)}
    assert found[kinds.LINK] == pytest.approx(8e9, rel=1e-6)
    assert found[kinds.CROSSING_SECONDS] == pytest.approx(7e-5, rel=1e-6)


@pytest.mark.parametrize("name", ("llama-2-7b", "llama-3.2-3b", "mixtral-8x7b", "gemma-2-9b"))
@pytest.mark.parametrize("type_", ("Q4_K_M", "Q3_K_M", "Q8_0"))
def test_a_cut_has_the_mix_of_the_whole(name: str, type_: str) -> None:
    model = model_of(name)
    types = gguf.tensor_types(model, gguf.variant(type_, imatrix=False))
    whole = per_layer(model, types)
    for layers in (2, 8):
        spec, cut = slices.cut(model, types, layers)
        assert spec.n_layer == layers == len(spec.attention)
        assert {t.name for t in spec.tensors if t.layer is None} == {t.name for t in model.tensors if t.layer is None}
        assert per_layer(spec, cut) == pytest.approx(whole, rel=0.05 if layers == 2 else 0.02)


def per_layer(model: ModelSpec, types: tuple[str, ...]) -> float:
    pairs = zip(model.tensors, types, strict=True)
    return sum(ggml.tensor_bytes(k, t.shape) for t, k in pairs if t.layer is not None) / model.n_layer
