"""Which type each tensor gets when the bytes are few: the multiple-choice knapsack, exactly or within a known gap.

Each tensor takes one of its options ``(bytes, loss)``; bytes add up to at most a budget and the losses, which add up
too, shall be least. First the Lagrangian relaxation: for a price per byte every tensor takes the option of least
``loss + price * bytes``, which is a corner of the convex hull of its options, and walking the hulls' edges from the
steepest on fills the budget but for a rest. Then the rest: any better choice differs from the relaxed one by options
whose *reduced losses* (how much worse each is at that price) add up to no more than the gap between what was found and
the relaxation's bound, so all others are dropped and what remains is enumerated, dominated states left out. This is
the core of Pisinger's minimal algorithm (European Journal of Operational Research 83, 1995). Pure arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

MOST_STATES = 2000
"""Partial choices kept at a time; beyond, the least promising are dropped and the result may miss the optimum by at
most the gap that it reports. Cases of up to some thirty tensors never come near; one of a thousand takes seconds."""


@dataclass(frozen=True, slots=True)
class Option:
    """One type for one tensor."""

    size_bytes: int
    loss: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Allocation:
    """An option of each tensor."""

    chosen: tuple[int, ...]
    """Index into each tensor's options."""
    size_bytes: int
    loss: float
    gap: float
    """No choice within the budget loses less than ``loss - gap``."""


def front(options: Sequence[Option]) -> tuple[int, ...]:
    """Indexes of the options that no other beats in both bytes and loss, from the smallest on."""
    order = sorted(range(len(options)), key=lambda i: (options[i].size_bytes, options[i].loss, i))
    kept: list[int] = []
    for i in order:
        if not kept or options[i].loss < options[kept[-1]].loss:
            kept.append(i)
    return tuple(kept)


def hull(options: Sequence[Option]) -> tuple[int, ...]:
    """The corners of the lower convex hull of :func:`front`: each step to the next gains less per byte."""
    corners: list[int] = []
    for i in front(options):
        while len(corners) > 1 and _gain(options, corners[-2], corners[-1]) <= _gain(options, corners[-1], i):
            corners.pop()
        corners.append(i)
    return tuple(corners)


def _gain(options: Sequence[Option], a: int, b: int) -> float:
    """Loss avoided per byte from ``a`` to the larger ``b``."""
    return (options[a].loss - options[b].loss) / (options[b].size_bytes - options[a].size_bytes)


def allocate(
    tensors: Sequence[Sequence[Option]], budget_bytes: int, most_states: int = MOST_STATES
) -> Allocation | None:
    """The choice of least loss that fits; ``None`` where even the smallest options do not.

    A larger budget never loses more, as far as the search is exact (``gap`` 0).

    Args:
        tensors: the options of each.
        budget_bytes: what all chosen ones may take.
        most_states: of the search for the rest, see :data:`MOST_STATES`; 0 leaves the rest, less than one tensor's
            step, unused.
    """
    smallest = sum(min(option.size_bytes for option in options) for options in tensors)
    if smallest > budget_bytes:
        return None
    relaxed, price = _relaxed(tensors, budget_bytes)
    if not most_states:
        size = sum(options[c].size_bytes for options, c in zip(tensors, relaxed, strict=True))
        gap = price * (budget_bytes - size)
        return Allocation(chosen=tuple(relaxed), size_bytes=size, loss=_loss(tensors, relaxed), gap=gap)
    return _refined(tensors, budget_bytes, relaxed, price, most_states)


def _relaxed(tensors: Sequence[Sequence[Option]], budget: int) -> tuple[list[int], float]:
    """The largest prefix of the hulls' steps that fits, and the gain per byte of the step that no longer did."""
    hulls = [hull(options) for options in tensors]
    steps = [
        (-_gain(options, a, b), t, k, options[b].size_bytes - options[a].size_bytes)
        for t, (options, corners) in enumerate(zip(tensors, hulls, strict=True))
        for k, (a, b) in enumerate(pairwise(corners))
    ]
    chosen = [corners[0] for corners in hulls]
    size = sum(options[c].size_bytes for options, c in zip(tensors, chosen, strict=True))
    for negative_gain, t, k, more in sorted(steps):
        if size + more > budget:
            return chosen, -negative_gain
        chosen[t], size = hulls[t][k + 1], size + more
    return chosen, 0.0


@dataclass(frozen=True, slots=True)
class _State:
    reduced: float
    extra_bytes: int
    loss: float
    changes: tuple[tuple[int, int], ...]


def _refined(
    tensors: Sequence[Sequence[Option]], budget: int, relaxed: list[int], price: float, most_states: int
) -> Allocation:
    """The best choice that differs from ``relaxed`` by little enough reduced loss; see the module's text."""
    base = [options[c] for options, c in zip(tensors, relaxed, strict=True)]
    size, loss = sum(option.size_bytes for option in base), sum(option.loss for option in base)
    room = budget - size
    greedy = _filled(tensors, relaxed, room)
    most = price * room - (loss - _loss(tensors, greedy))  # of reduced loss: the gap that greedy leaves to the bound
    core = []
    for t, options in enumerate(tensors):
        others = [(i, options[i], _reduced(options[i], base[t], price)) for i in front(options) if i != relaxed[t]]
        inside = [other for other in others if other[2] <= most]
        if inside:
            core.append((t, inside))
    core.sort(key=lambda item: (min(reduced for _, _, reduced in item[1]), item[0]))
    found, cut = _enumerated(core, base, room, most, most_states)
    best = greedy
    if found is not None and loss + found.loss < _loss(tensors, greedy):
        best = list(relaxed)
        for t, i in found.changes:
            best[t] = i
        best = _filled(tensors, best, room - found.extra_bytes)
    total = _loss(tensors, best)
    bound = loss - price * room
    return Allocation(
        chosen=tuple(best),
        size_bytes=sum(options[c].size_bytes for options, c in zip(tensors, best, strict=True)),
        loss=total,
        gap=max(0.0, total - bound) if cut else 0.0,
    )


def _reduced(option: Option, base: Option, price: float) -> float:
    return max(0.0, option.loss - base.loss + price * (option.size_bytes - base.size_bytes))


def _loss(tensors: Sequence[Sequence[Option]], chosen: Sequence[int]) -> float:
    return sum(options[c].loss for options, c in zip(tensors, chosen, strict=True))


def _filled(tensors: Sequence[Sequence[Option]], chosen: Sequence[int], room: int) -> list[int]:
    """``chosen`` with the single changes that gain most, as long as one fits."""
    result = list(chosen)
    while True:
        best = (0.0, 0, 0, 0)
        for t, options in enumerate(tensors):
            now = options[result[t]]
            for i, option in enumerate(options):
                more = option.size_bytes - now.size_bytes
                if more <= room and now.loss - option.loss > best[0]:
                    best = (now.loss - option.loss, t, i, more)
        if best[0] <= 0:
            return result
        result[best[1]], room = best[2], room - best[3]


def _enumerated(
    core: Sequence[tuple[int, list[tuple[int, Option, float]]]],
    base: Sequence[Option],
    room: int,
    most: float,
    most_states: int,
) -> tuple[_State | None, bool]:
    """The best set of changes within ``room`` more bytes, and whether states were dropped for want of space."""
    savings = [0]  # the most bytes that the remaining tensors can give back
    for t, inside in reversed(core):
        savings.append(savings[-1] + max(0, *(base[t].size_bytes - option.size_bytes for _, option, _ in inside)))
    savings.reverse()
    states, cut, slack = [_State(0.0, 0, 0.0, ())], False, most * (1 + 1e-9)
    for at, (t, inside) in enumerate(core):
        grown = list(states)
        for state in states:
            for i, option, reduced in inside:
                extra = state.extra_bytes + option.size_bytes - base[t].size_bytes
                if state.reduced + reduced <= slack and extra - savings[at + 1] <= room:
                    gained = state.loss + option.loss - base[t].loss
                    grown.append(_State(state.reduced + reduced, extra, gained, (*state.changes, (t, i))))
        states = _undominated(grown)
        if len(states) > most_states:
            cut = True
            states = _thinned(states, most_states)
    fitting = [state for state in states if state.extra_bytes <= room]
    return min(fitting, key=lambda s: (s.loss, s.extra_bytes, s.changes), default=None), cut


def _thinned(states: list[_State], count: int) -> list[_State]:
    """Half of them the most promising, half spread evenly over the bytes they take, so that any rest can be filled."""
    promising = sorted(states, key=lambda s: (s.reduced, s.extra_bytes, s.changes))[: count // 2]
    spread = states[:: -(-len(states) // (count - count // 2))]  # they come sorted by bytes
    return list({state.changes: state for state in (*promising, *spread)}.values())


def _undominated(states: list[_State]) -> list[_State]:
    states.sort(key=lambda s: (s.extra_bytes, s.loss, s.changes))
    kept: list[_State] = []
    for state in states:
        if not kept or state.loss < kept[-1].loss:
            kept.append(state)
    return kept
