"""Quality predictions: order of types, sizes and families, and which number wins."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from math import log

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner import methods
from planner.core.candidate import Variant
from planner.core.data import data_path, read_table
from planner.core.estimates import FORMULA, MEASURED, PUBLISHED
from planner.core.measurement import KL_DIVERGENCE, PERPLEXITY_RATIO, Calibration, Measurement
from planner.core.model import ModelSpec, shape_sha256
from planner.estimate import quality_model, quality_noise
from planner.estimate.quality import formula_only, quality
from planner.methods import gguf_mix
from planner.models import catalog

K_TYPES = ("Q2_K_S", "Q2_K", "Q3_K_S", "Q3_K_M", "Q3_K_L", "Q4_K_S", "Q4_K_M", "Q5_K_S", "Q5_K_M", "Q6_K")
I_TYPES = (
    "IQ1_S",
    "IQ1_M",
    "IQ2_XXS",
    "IQ2_XS",
    "IQ2_S",
    "IQ2_M",
    "IQ3_XXS",
    "IQ3_XS",
    "IQ3_S",
    "IQ3_M",
    "IQ4_XS",
    "IQ4_NL",
)
LEGACY = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
NAMES = ("llama-2-7b", "llama-3.1-8b", "qwen2.5-7b", "gemma-3-4b", "mistral-7b-v0.3", "qwen3-30b-a3b", "tinyllama-1.1b")


def model_of(name: str) -> ModelSpec:
    found = catalog.lookup(name)
    assert found is not None
    return found


def gguf(type_: str, imatrix: bool = False) -> Variant:
    return Variant(method="gguf", format="gguf", runtime="llama.cpp", type=type_, imatrix=imatrix)


def served(method: str, type_: str, group: int | None = None, act_order: bool = False) -> Variant:
    return Variant(method=method, format=method, runtime="vllm", type=type_, group_size=group, act_order=act_order)


def loss(name: str, variant: Variant) -> float:
    found = formula_only(model_of(name), variant)
    assert found is not None
    return found.value


@pytest.mark.parametrize("ladder", [K_TYPES, I_TYPES, LEGACY], ids=["K", "I", "legacy"])
@pytest.mark.parametrize("imatrix", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_more_bits_are_never_worse(name: str, imatrix: bool, ladder: tuple[str, ...]) -> None:
    model = model_of(name)
    order = sorted(ladder, key=lambda t: methods.get("gguf").size(model, gguf(t, imatrix)).bits_per_weight)
    losses = [loss(name, gguf(t, imatrix)) for t in order]
    assert losses == sorted(losses, reverse=True)


@settings(max_examples=50, deadline=None)
@given(
    variant=st.sampled_from(K_TYPES + I_TYPES + LEGACY).map(gguf) | st.sampled_from((served("gptq", "2bit", 128),)),
    factors=st.tuples(st.floats(0.02, 50), st.floats(0.02, 50)),
    name=st.sampled_from(("llama-2-7b", "llama-3.1-8b", "qwen3-8b", "yi-9b")),
)
def test_a_larger_model_never_loses_more(variant: Variant, factors: tuple[float, float], name: str) -> None:
    """The same shape with wider rows: types and shares stay, the count of weights grows."""
    base = model_of(name)
    small, large = (quality_model.log_ratio(scaled(base, f), variant, known=False) for f in sorted(factors))
    assert small and large
    assert large[0] <= small[0] * (1 + 1e-9)


@lru_cache
def scaled(model: ModelSpec, factor: float) -> ModelSpec:
    """``model`` with so many times the rows in every matrix."""
    tensors = tuple(
        replace(t, shape=(t.shape[0], max(1, round(t.shape[1] * factor)), *t.shape[2:])) if len(t.shape) > 1 else t
        for t in model.tensors
    )
    return replace(model, name=f"{model.family}-{factor}", tensors=tensors)


@settings(max_examples=40, deadline=None)
@given(noises=st.tuples(st.floats(1e-6, 0.6), st.floats(1e-6, 0.6)), params=st.floats(1e8, 2e12))
def test_more_noise_never_loses_less(noises: tuple[float, float], params: float) -> None:
    less, more = (quality_model.shape_of_loss(noise, params, 1.0) for noise in sorted(noises))
    assert less <= more * (1 + 1e-9)


@given(
    losses=st.tuples(st.floats(1e-6, 1e3), st.floats(1e-6, 1e3)),
    n_vocab=st.sampled_from((0, 1, 2, 256, 32_000, 262_144)),
)
def test_no_loss_exceeds_guessing_evenly(losses: tuple[float, float], n_vocab: int) -> None:
    """Nor does it lose its order, nor is a small one touched."""
    less, more = sorted(losses)
    assert 0 < quality_model.saturated(less, n_vocab) <= quality_model.saturated(more, n_vocab)
    assert quality_model.saturated(more, n_vocab) <= log(max(n_vocab, 2))
    assert quality_model.saturated(less, 32_000) == pytest.approx(less, rel=less / log(32_000))


def test_a_large_loss_bends_towards_that_of_guessing() -> None:
    model, variant = model_of("llama-3.2-1b"), gguf("IQ1_S")
    felt = log(loss(model.name, variant))
    found = quality_model.log_ratio(replace(model, n_vocab=32), variant, known=False)
    assert found and 0.7 * log(32) < found[0] < log(32) < felt < log(model.n_vocab)


@pytest.mark.slow
def test_the_order_of_bits_holds_in_every_model_of_the_catalog() -> None:
    """Mixes differ by shape: grouped heads, experts, rows that no block of 256 divides."""
    broken = []
    for entry in catalog.entries():
        model = model_of(entry.name)
        for ladder in (K_TYPES, I_TYPES, LEGACY):
            sized = [(quality_noise.stored_bits(model, gguf(t)), quality_model.noise(model, gguf(t))) for t in ladder]
            found = [noise for _, noise in sorted(((b, n) for b, n in sized if b and n), key=lambda p: (p[0], -p[1]))]
            broken += [entry.name] if found != sorted(found, reverse=True) else []
    assert not broken


@pytest.mark.parametrize("type_", K_TYPES + LEGACY)
def test_an_importance_matrix_helps(type_: str) -> None:
    assert loss("llama-3.2-3b", gguf(type_, imatrix=True)) <= loss("llama-3.2-3b", gguf(type_))


def test_llama_3_is_more_fragile_than_llama_2() -> None:
    assert log(loss("llama-3.1-8b", gguf("Q4_K_M"))) > 1.5 * log(loss("llama-2-7b", gguf("Q4_K_M")))


def test_group_size_bits_and_order_of_gpu_methods() -> None:
    rate = {g: loss("llama-3.1-8b", served("gptq", "4bit", g)) for g in (-1, 128, 64, 32)}
    assert rate[-1] > rate[128] > rate[64] > rate[32] > 1
    assert loss("llama-3.1-8b", served("gptq", "3bit", 128)) > rate[128]
    assert loss("llama-3.1-8b", served("gptq", "8bit", 128)) < 1.002
    assert loss("llama-3.1-8b", served("gptq", "4bit", 128, act_order=True)) < rate[128]
    assert loss("llama-3.1-8b", served("awq", "4bit", 128)) < rate[128]
    assert loss("llama-3.1-8b", served("bitsandbytes", "fp4")) > loss("llama-3.1-8b", served("bitsandbytes", "nf4"))
    assert loss("llama-3.1-8b", served("bitsandbytes", "int8")) < 1.01


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(NAMES),
    type_=st.sampled_from(K_TYPES + I_TYPES + LEGACY + ("F16", "BF16")),
    imatrix=st.booleans(),
)
def test_intervals_contain_the_value(name: str, type_: str, imatrix: bool) -> None:
    found = quality(model_of(name), gguf(type_, imatrix))
    assert found.perplexity_ratio and found.kl_divergence_nats
    for p in (found.perplexity_ratio, found.kl_divergence_nats):
        assert p.low <= p.value <= p.high and p.source
    assert found.kl_divergence_nats.low >= 0


@pytest.mark.parametrize("variant", [gguf("F16"), gguf("BF16"), served("none", "bf16")])
def test_16_bits_lose_nothing(variant: Variant) -> None:
    found = quality(model_of("llama-2-7b"), variant).perplexity_ratio
    assert found and found.value == 1.0 and found.high - found.low < 0.002


def test_unknown_type_is_unknown() -> None:
    found = quality(model_of("llama-2-7b"), gguf("Q9_Z"))
    assert found.perplexity_ratio is None and found.kl_divergence_nats is None and found.notes


def test_mxfp4_of_a_dense_model_is_q8_0() -> None:
    dense = model_of("llama-2-7b")
    assert quality(dense, gguf("MXFP4_MOE")).perplexity_ratio == quality(dense, gguf("Q8_0")).perplexity_ratio


def test_published_beats_formula_and_measured_beats_both() -> None:
    model, variant = model_of("llama-3-8b"), gguf("Q4_K_M")
    published = quality(model, variant)
    assert published.perplexity_ratio and published.kl_divergence_nats
    assert published.perplexity_ratio.basis == published.kl_divergence_nats.basis == PUBLISHED
    assert published.perplexity_ratio.value == pytest.approx(6.407115 / 6.23316, rel=1e-5)
    assert published.kl_divergence_nats.value == pytest.approx(0.031273)
    assert "llama.cpp" in published.perplexity_ratio.source
    rows = tuple(
        Measurement(
            quantity=quantity,
            value=value,
            low=value,
            high=value * 1.001,
            model=model.name,
            model_sha256=shape_sha256(model),
            method="gguf",
            runtime="llama.cpp",
            type="Q4_K_M",
        )
        for quantity, value in ((PERPLEXITY_RATIO, 1.05), (KL_DIVERGENCE, 0.05))
    )
    here = quality(model, variant, Calibration(hardware_identity="x", measurements=rows))
    assert here.perplexity_ratio and (here.perplexity_ratio.value, here.perplexity_ratio.basis) == (1.05, MEASURED)
    assert here.kl_divergence_nats and here.kl_divergence_nats.value == 0.05
    other = quality(model, gguf("Q5_K_M"), Calibration(hardware_identity="x", measurements=rows))
    assert other.perplexity_ratio and other.perplexity_ratio.basis == FORMULA


def test_a_measurement_of_another_model_of_the_same_shape_does_not_count() -> None:
    model, variant = model_of("llama-3-8b"), gguf("Q4_K_M")
    alien = Measurement(
        quantity=PERPLEXITY_RATIO,
        value=2.0,
        low=2.0,
        high=2.0,
        model="another-8b",
        model_sha256=shape_sha256(model),
        method="gguf",
        runtime="llama.cpp",
        type="Q4_K_M",
    )
    found = quality(model, variant, Calibration(hardware_identity="x", measurements=(alien,))).perplexity_ratio
    assert found and found.basis == PUBLISHED


def test_every_published_row_has_source_date_and_dataset() -> None:
    for row in read_table("published_quality.csv"):
        assert row["source"] and row["date"] and row["dataset"] and row["status"]
        if row["ln_ratio"] and row["metric"] == "ppl":
            assert float(row["ln_ratio"]) == pytest.approx(
                log(float(row["value"]) / float(row["value_16bit"])), abs=1e-5
            )


def test_the_guides_superseded_numbers_are_kept_but_not_used() -> None:
    guide = [row for row in read_table("published_quality.csv") if "guide" in row["source"]]
    assert {row["status"] for row in guide} == {"confirmed", "superseded", "unsourced"}
    found = quality(model_of("llama-13b"), served("awq", "4bit", 128)).perplexity_ratio
    assert found and found.value == pytest.approx(5.19 / 5.09, rel=1e-5)  # not the guide's 5.14


def test_coefficients_say_how_good_they_are() -> None:
    found = quality_model.document()["cross_validation"]
    strangers = quality_model.document()["cross_validation_new_family"]
    known = quality_model.document()["cross_validation_known_model"]
    assert found["mae_4_bits_up"] <= 0.007 and found["mae_below_4_bits"] <= 0.05
    assert strangers["mae_4_bits_up"] <= 0.0075 and strangers["mae_below_4_bits"] <= 0.055
    assert known["mae_4_bits_up"] <= 0.004 and known["mae_below_4_bits"] <= 0.03
    for figures in (found, strangers, known):
        assert figures["rank_correlation"] >= 0.95
        assert 0.75 <= figures["interval_coverage"] <= 0.9
        for part in ("4_bits_up", "below_4_bits"):
            assert 0.75 <= figures[f"interval_coverage_{part}"] <= 0.92


def test_the_less_is_known_of_a_model_the_wider_the_interval() -> None:
    """One with published types, one of a family with published models, one of a family without."""

    def width(name: str) -> float:
        ratio = quality(model_of(name), gguf("IQ3_M")).perplexity_ratio
        assert ratio and ratio.basis == FORMULA
        return log(log(ratio.high) / log(ratio.low))

    known, kin, stranger = (width(name) for name in ("mistral-7b-v0.1", "llama-3.1-8b", "qwen2.5-7b"))
    assert 1.15 * known < kin and 1.15 * kin < stranger


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("scipy")
    monkeypatch.syspath_prepend(str(data_path("").parent / "benchmarks"))


@pytest.mark.slow
@pytest.mark.usefixtures("benchmarks")
def test_refitting_gives_the_shipped_figures() -> None:
    from quality import summary
    from quality_fit import leave_one_family_out, leave_one_model_out
    from quality_rows import Rows

    rows = Rows()
    for table, leave_out in (("", leave_one_model_out), ("_new_family", leave_one_family_out)):
        found, shipped = summary(rows, leave_out(rows)), quality_model.document()[f"cross_validation{table}"]
        assert found["mae_4_bits_up"] == pytest.approx(shipped["mae_4_bits_up"], abs=5e-4)
        assert found["mae_below_4_bits"] == pytest.approx(shipped["mae_below_4_bits"], abs=2e-3)
        assert found["rank_correlation"] == pytest.approx(shipped["rank_correlation"], abs=0.01)


@pytest.mark.slow
@pytest.mark.usefixtures("benchmarks")
def test_derivatives_of_the_fit_and_its_agreement_with_the_formula() -> None:
    import numpy as np
    from quality_fit import Fit, Problem, predict
    from quality_rows import Rows

    rows = Rows()
    everything = np.ones(len(rows), bool)
    problem = Problem(rows, everything)
    theta = problem.solve()
    steps = 1e-6 * np.eye(len(theta))
    slopes = [(problem.residuals(theta + s) - problem.residuals(theta - s)) / 2e-6 for s in steps]
    assert np.abs(problem.jacobian(theta) - np.transpose(slopes)).max() < 1e-4
    made = predict(rows, Fit(dict(zip(problem.names, theta, strict=True))), everything)
    shipped = [quality_model.log_ratio(s, v) for s, v in zip(rows.specs, rows.variants, strict=True)]
    ratio = [made_of / found[0] for made_of, found in zip(made, shipped, strict=True) if found]
    assert len(ratio) == len(rows) and np.quantile(np.abs(np.log(ratio)), 0.9) < 0.01


@pytest.mark.slow
@pytest.mark.usefixtures("benchmarks")
def test_no_other_spread_of_the_priors_is_much_likelier() -> None:
    import dataclasses

    import numpy as np
    from quality_fit import SPREADS, Problem
    from quality_priors import evidence_at
    from quality_rows import Rows

    rows = Rows()
    everything = np.ones(len(rows), bool)
    shipped = Problem(rows, everything).evidence()
    for field in dataclasses.fields(SPREADS):
        assert max(evidence_at(rows, everything, SPREADS, field.name).values()) < shipped + 1, field.name


def as_file(name: str, file_type: str, **types: str) -> tuple[ModelSpec, Variant]:
    """A model as the GGUF file of a type would hold it, but for tensors whose names contain those given."""
    model = model_of(name)
    usual = gguf_mix.tensor_types(model, file_type, False)
    held = tuple(
        replace(tensor, dtype=next((t for part, t in types.items() if part in tensor.name), kind))
        for tensor, kind in zip(model.tensors, usual, strict=True)
    )
    source = replace(model.source, kind="gguf", location="model.gguf")
    file = replace(model, source=source, tensors=held, dtype=file_type.lower(), file_type=file_type)
    return file, methods.get("gguf").variants(file)[0]


@pytest.mark.parametrize("name", ["llama-2-13b", "qwen2.5-7b"])
def test_a_files_own_tensor_types_decide(name: str) -> None:
    """A file of the ordinary mix is that type; one with better or worse tensors under the same name is not."""
    usual = quality(*as_file(name, "Q4_K_M")).perplexity_ratio
    assert usual == quality(model_of(name), gguf("Q4_K_M")).perplexity_ratio
    better = quality(*as_file(name, "Q4_K_M", ffn_down="Q6_K", attn_v="Q8_0")).perplexity_ratio
    worse = quality(*as_file(name, "Q4_K_M", ffn_up="IQ2_XXS", ffn_gate="IQ2_XXS")).perplexity_ratio
    assert usual and better and worse
    assert better.value < worse.value and (better.basis, worse.basis) == (FORMULA, FORMULA)
    assert better.value < formula_only(model_of(name), gguf("Q4_K_M")).value < worse.value  # type: ignore[union-attr]


def test_a_file_that_says_so_had_an_importance_matrix() -> None:
    plain, _ = as_file("qwen2.5-7b", "Q3_K_M")
    guided = replace(plain, guided=True)
    variants = [methods.get("gguf").variants(model)[0] for model in (plain, guided)]
    assert [variant.imatrix for variant in variants] == [False, True]
    without, having = (quality(m, v).perplexity_ratio for m, v in zip((plain, guided), variants, strict=True))
    assert without and having and having.value < without.value
