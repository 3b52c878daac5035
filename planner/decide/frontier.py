"""What size, quality and speed cost each other: which ways to run a model nothing beats, and what beats the others."""

from __future__ import annotations

from dataclasses import dataclass

from planner.core.candidate import Candidate


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One way to run a model among the others."""

    candidate: Candidate
    chosen: bool
    """What ``recommend`` takes under the same workload."""
    on_front: bool
    """No other is at least as good in size, quality and speed and better in one; False where one of them is unknown."""
    beaten_by: Candidate | None = None
    """Of those that are better, the one of the best score; ``None`` on the front, and where a number is unknown."""

    @property
    def size_bytes(self) -> int:
        """Size of the file."""
        return self.candidate.estimate.size.file_bytes

    @property
    def comparable(self) -> bool:
        """Whether quality and speed are known."""
        return _axes(self.candidate) is not None


def points(ranked: tuple[Candidate, ...], chosen: Candidate | None) -> tuple[Point, ...]:
    """Every candidate as a point, the smallest file first.

    Args:
        ranked: the candidates, best score first.
        chosen: the recommended one, a member of ``ranked``.
    """
    found = [_point(candidate, ranked, chosen) for candidate in ranked]
    return tuple(sorted(found, key=lambda p: (p.size_bytes, p.candidate.variant.label())))


def _point(candidate: Candidate, ranked: tuple[Candidate, ...], chosen: Candidate | None) -> Point:
    mine = _axes(candidate)
    better = None if mine is None else next((c for c in ranked if _beats(_axes(c), mine)), None)
    return Point(
        candidate=candidate,
        chosen=candidate is chosen,
        on_front=mine is not None and better is None,
        beaten_by=better,
    )


_Axes = tuple[float, float, float]


def _axes(candidate: Candidate) -> _Axes | None:
    """File bytes, loss and minus speed: less is better in each. ``None`` where one is unknown."""
    ratio, decode = candidate.estimate.quality.perplexity_ratio, candidate.estimate.speed.decode
    if ratio is None or decode is None:
        return None
    return float(candidate.estimate.size.file_bytes), ratio.value, -decode.value


def _beats(one: _Axes | None, other: _Axes) -> bool:
    return one is not None and one != other and all(a <= b for a, b in zip(one, other, strict=True))
