"""A severe loss said plainly: of a choice that is worse than a smaller model of its family would be."""

from __future__ import annotations

from planner.core.candidate import Candidate, TraceEntry
from planner.decide import rules

RULE = "severe-loss"
"""Its name in a trace."""


def reason(chosen: Candidate) -> str:
    """What to say of a chosen candidate whose predicted loss is severe; empty if it is not."""
    terms, predicted = rules.severe_loss(), chosen.estimate.quality.perplexity_ratio
    least = 1 + terms.least_loss_percent / 100
    if predicted is None or predicted.value < least:
        return ""
    return f"severe loss: perplexity × {predicted.value:.2f} of the 16-bit model; from × {least:.2f} on, {terms.text}"


def trace(chosen: Candidate) -> tuple[TraceEntry, ...]:
    """The entry of a severe loss, with its source; none if the loss is not severe."""
    said = reason(chosen)
    return (TraceEntry(rule=RULE, effect=said, source=rules.severe_loss().source),) if said else ()
