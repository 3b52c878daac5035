"""The way out of a severe loss: a smaller model of the same family in the table of models."""

from __future__ import annotations

import dataclasses

from planner.core.model import ModelSpec
from planner.core.units import format_bytes
from planner.decide import Decision, loss, rules
from planner.methods import gguf


def with_way_out(decision: Decision, model: ModelSpec) -> Decision:
    """The decision, whose chosen candidate says what would be better if its predicted loss is severe."""
    chosen = decision.chosen
    if chosen is None or not loss.reason(chosen):
        return decision
    said = _way_out(model, chosen.estimate.size.file_bytes)
    return dataclasses.replace(decision, chosen=dataclasses.replace(chosen, reasons=(*chosen.reasons, said)))


def _way_out(model: ModelSpec, room: int) -> str:
    """Names the largest relative that takes no more bytes than ``room`` at the type of the table."""
    from planner.models import catalog

    terms = rules.severe_loss()
    variant = gguf.variant(terms.type)
    others = (other for other in catalog.relatives(model.family) if other.name != model.name)
    sizes = {other.name: gguf.size(other, variant).file_bytes for other in others}
    fitting = {name: size for name, size in sizes.items() if size <= room}
    if not fitting:
        return f"likely better: a smaller model at about 4 bits ({terms.type}), or more memory"
    name = max(fitting, key=lambda name: fitting[name])
    return (
        f"likely better: {name} at {terms.type}, a file of {format_bytes(fitting[name])} against "
        f"{format_bytes(room)} of this one (`qplan recommend {name}`)"
    )
