"""Bare sizes: any size in range gives a model of that size, and nonsense is refused."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.core.errors import UsageError
from planner.models.size_model import (
    MAX_PARAMETERS,
    MIN_PARAMETERS,
    TOLERANCE_FRACTION,
    spec_from_parameters,
    spec_from_size,
)


@pytest.mark.parametrize(
    ("text", "parameters", "active"),
    [
        ("14b", 14e9, None),
        ("7B", 7e9, None),
        ("0.5b", 5e8, None),
        ("350m", 3.5e8, None),
        ("1.5 B", 1.5e9, None),
        ("30b-a3b", 30e9, 3e9),
        ("671B-A37B", 671e9, 37e9),
        ("3b-a800m", 3e9, 8e8),
        ("1t-a32b", 1e12, 32e9),
    ],
)
def test_sizes_are_read(text: str, parameters: float, active: float | None) -> None:
    spec = spec_from_size(text)
    assert spec is not None
    assert spec.name == text.lower()
    assert spec.family == "generic"
    assert spec.source.kind == "size"
    assert "made-up" in spec.notes[-1]
    assert spec.parameter_count == pytest.approx(parameters, rel=TOLERANCE_FRACTION)
    assert (spec.mixture is None) == (active is None)
    if active is not None:
        assert spec.active_parameter_count == pytest.approx(active, rel=0.03)


@pytest.mark.parametrize("text", ["", "b", "llama-2-7b", "7", "7bb", "b7", "7b-instruct", "-7b", "8x7b", "7b-a"])
def test_other_text_is_no_size(text: str) -> None:
    assert spec_from_size(text) is None


@pytest.mark.parametrize("text", ["0b", "100k", "9t", "7b-a8b", "7b-a0b"])
def test_impossible_sizes_are_refused(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        spec_from_size(text)
    assert caught.value.code == "bad-size"


@settings(max_examples=60, deadline=None)
@given(exponent=st.floats(0, 1))
def test_dense_sizes_are_met_within_one_percent(exponent: float) -> None:
    parameters = min(MIN_PARAMETERS * (MAX_PARAMETERS / MIN_PARAMETERS) ** exponent, MAX_PARAMETERS)
    spec = spec_from_parameters(parameters)
    assert spec.parameter_count == pytest.approx(parameters, rel=TOLERANCE_FRACTION)
    assert spec.mixture is None
    assert len(spec.attention) == spec.n_layer
    assert spec.n_head % spec.n_head_kv == 0


@settings(max_examples=40, deadline=None)
@given(billions=st.floats(7, 1500), share=st.floats(0.06, 0.35))
def test_mixtures_are_met_within_one_percent(billions: float, share: float) -> None:
    parameters = billions * 1e9
    spec = spec_from_parameters(parameters, parameters * share)
    assert spec.parameter_count == pytest.approx(parameters, rel=TOLERANCE_FRACTION)
    assert spec.mixture is not None
    assert spec.mixture.expert_used_count <= spec.mixture.expert_count
    assert spec.active_parameter_count == pytest.approx(parameters * share, rel=0.1)


def test_bigger_is_bigger() -> None:
    sizes = (5e6, 5e7, 5e8, 1e9, 3e9, 7e9, 14e9, 32e9, 70e9, 123e9, 405e9)
    counts = [spec_from_parameters(size).parameter_count for size in sizes]
    assert counts == sorted(counts)


def test_an_active_share_of_one_is_dense() -> None:
    assert spec_from_parameters(7e9, 7e9).mixture is None


def test_k_quants_apply_to_common_sizes() -> None:
    for text in ("1b", "3b", "7b", "8b", "13b", "14b", "32b", "70b", "30b-a3b"):
        spec = spec_from_size(text)
        assert spec is not None
        assert all(t.shape[0] % 256 == 0 for t in spec.tensors if len(t.shape) > 1 and t.name.endswith("weight"))
