"""A least squares fit of a few costs, none of them negative."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

_EQUAL = 1e-9
_SINGULAR = 1e-9


def nonnegative_costs(rows: Sequence[tuple[float, tuple[float, float, float]]]) -> tuple[float, float, float]:
    """Costs per unit, none negative, whose sums come nearest to the times, each relative to itself.

    Args:
        rows: seconds, and the amounts of three kinds of work done in them. With fewer rows than kinds the first kinds
            are charged.
    """
    scaled = [tuple(amount / seconds for amount in amounts) for seconds, amounts in rows]
    best, least = (0.0, 0.0, 0.0), float("inf")
    for size in range(min(3, len(rows)), 0, -1):
        for chosen in combinations(range(3), size):
            solved = _least_squares([[row[i] for i in chosen] for row in scaled])
            if solved is None or min(solved) < 0:
                continue
            costs = tuple(solved[chosen.index(i)] if i in chosen else 0.0 for i in range(3))
            error = sum((sum(c * a for c, a in zip(costs, row, strict=True)) - 1) ** 2 for row in scaled)
            if error < least - _EQUAL:
                best, least = (costs[0], costs[1], costs[2]), error
    return best


def _least_squares(rows: Sequence[Sequence[float]]) -> list[float] | None:
    """The solution of ``rows · x = 1`` with the least error, by normal equations; ``None`` where there is none."""
    size = len(rows[0])
    scale = [max(abs(row[i]) for row in rows) or 1.0 for i in range(size)]
    unit = [[row[i] / scale[i] for i in range(size)] for row in rows]
    table = [
        [sum(row[i] * row[j] for row in unit) for j in range(size)] + [sum(row[i] for row in unit)] for i in range(size)
    ]
    for i in range(size):
        pivot = max(range(i, size), key=lambda k: abs(table[k][i]))
        table[i], table[pivot] = table[pivot], table[i]
        if abs(table[i][i]) < _SINGULAR:
            return None
        for k in range(size):
            if k != i:
                factor = table[k][i] / table[i][i]
                table[k] = [a - factor * b for a, b in zip(table[k], table[i], strict=True)]
    return [table[i][size] / table[i][i] / scale[i] for i in range(size)]
