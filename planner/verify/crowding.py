"""How much of its cores a measurement had: on a crowded machine a speed says more about the other programs."""

from __future__ import annotations

import os

from planner.core.measurement import DECODE, PREFILL
from planner.core.wording import bare_title
from planner.verify.trial import Samples, SpeedTrial

IDLE_SHARE = 0.9
"""Share of its cores' time below which a measured speed is noted as too low."""
REMEMBER_SHARE = 0.75
"""Below this a speed says more about the other programs: it would mislead all later estimates, and it is no verdict."""


def core_shares(speed: SpeedTrial) -> dict[str, float]:
    """Share of its cores' time that the runtime had, or could have had, while each speed was measured.

    Empty where a GPU did the work. llama.cpp's threads spin while they wait for each other, so on an idle machine the
    share is 1; torch's sleep between the operators, so of it counts what other programs left.
    """
    if speed.gpu_layers > 0:
        return {}
    rates = {PREFILL: speed.prefill, DECODE: speed.decode}
    shares = {name: _share(speed, taken) for name, taken in rates.items()}
    return {name: share for name, share in shares.items() if share is not None}


def _share(speed: SpeedTrial, taken: Samples) -> float | None:
    if speed.runtime == "llama.cpp":
        return taken.cpu_seconds / (speed.threads * sum(taken.seconds_per_sample))
    if taken.others_share is None:
        return None
    return min(1.0, (1 - taken.others_share) * (os.cpu_count() or 1) / speed.threads)


def crowded(speed: SpeedTrial | None) -> set[str]:
    """Speeds that were measured while other programs had too much of the cores."""
    return {name for name, share in core_shares(speed).items() if share < REMEMBER_SHARE} if speed else set()


def busy_notes(speed: SpeedTrial) -> list[str]:
    """What to know of speeds that were measured on busy cores."""
    verb = "had" if speed.runtime == "llama.cpp" else "was left"
    notes = []
    for quantity, share in core_shares(speed).items():
        if share < IDLE_SHARE:
            forgotten = "" if share >= REMEMBER_SHARE else " and is not remembered"
            notes.append(
                f"other programs were busy: {speed.runtime} {verb} {share:.0%} of its {speed.threads} cores while "
                f"{bare_title(quantity)} was measured, so it is lower than this machine's{forgotten}"
            )
    return notes
