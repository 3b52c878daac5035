"""The knapsack behind mixtures of types: against brute force, and the properties that a user relies on."""

from __future__ import annotations

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from planner.methods.allocation import Allocation, Option, allocate, front, hull

OPTIONS = st.lists(
    st.builds(Option, st.integers(1, 40), st.floats(0, 10, allow_nan=False, width=32)), min_size=1, max_size=5
)
SMALL = st.lists(OPTIONS, min_size=1, max_size=5)


def brute_force(tensors: list[list[Option]], budget: int) -> float | None:
    losses = [
        sum(option.loss for option in choice)
        for choice in itertools.product(*tensors)
        if sum(option.size_bytes for option in choice) <= budget
    ]
    return min(losses, default=None)


@settings(max_examples=300)
@given(SMALL, st.integers(0, 220))
def test_it_is_the_optimum_of_small_cases(tensors: list[list[Option]], budget: int) -> None:
    found, best = allocate(tensors, budget), brute_force(tensors, budget)
    if best is None:
        assert found is None
        return
    assert found is not None and found.size_bytes <= budget
    assert abs(found.loss - best) <= 1e-9 * (1 + best)
    picked = [options[i] for options, i in zip(tensors, found.chosen, strict=True)]
    assert found.size_bytes == sum(option.size_bytes for option in picked)


def model_like(seed: int, count: int) -> list[list[Option]]:
    """Tensors of some sizes and sensitivities, each in types of 2 to 8.5 bits whose loss falls by four per bit."""
    import random

    chooser = random.Random(seed)
    tensors = []
    for _ in range(count):
        weights, scale = 32 * chooser.choice((64, 256, 512, 1500)), chooser.lognormvariate(0, 1.5)
        bits = (2.06, 2.56, 3.06, 3.44, 4.25, 4.5, 5.5, 6.56, 8.5)
        tensors.append(
            [Option(int(weights * b / 8), scale * weights * 4.0**-b * chooser.uniform(0.8, 1.25)) for b in bits]
        )
    return tensors


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000), st.integers(20, 60), st.lists(st.floats(0.0, 1.1), min_size=2, max_size=4))
def test_a_model_fits_closely_and_more_bytes_never_lose_more(seed: int, count: int, shares: list[float]) -> None:
    tensors = model_like(seed, count)
    least = sum(min(o.size_bytes for o in options) for options in tensors)
    most = sum(max(o.size_bytes for o in options) for options in tensors)
    found: list[Allocation] = []
    for share in sorted(shares):
        budget = round(least + share * (most - least))
        made = allocate(tensors, budget)
        assert made is not None and made.size_bytes <= budget
        assert made.size_bytes >= min(budget, most) * 0.995
        found.append(made)
    for one, other in itertools.pairwise(found):
        assert other.loss <= one.loss + max(other.gap, 1e-12 * one.loss)


@given(OPTIONS)
def test_front_and_hull_are_what_they_say(options: list[Option]) -> None:
    on_front, corners = front(options), hull(options)
    assert set(corners) <= set(on_front)
    for i in on_front:
        assert not any(
            o.size_bytes <= options[i].size_bytes and o.loss <= options[i].loss and o != options[i] for o in options
        )
    slopes = [
        (options[a].loss - options[b].loss) / (options[b].size_bytes - options[a].size_bytes)
        for a, b in itertools.pairwise(corners)
    ]
    assert slopes == sorted(slopes, reverse=True)


def test_a_budget_below_the_smallest_is_none_and_a_huge_one_takes_the_best() -> None:
    tensors = [[Option(10, 3.0), Option(20, 1.0)], [Option(8, 2.0), Option(9, 2.5)]]
    assert allocate(tensors, 17) is None
    best = allocate(tensors, 10**9)
    assert best is not None and best.chosen == (1, 0) and best.gap == 0
