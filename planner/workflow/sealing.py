"""What every plan holds beside what it does: the model and the machine that it was made for, and its seal."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING

from planner import FORMAT_VERSION, __version__
from planner.core.codec import encode
from planner.core.model import shape_sha256
from planner.core.plan import Expectation, PinnedFile, Plan, PlanHardware, PlanModel, Step

if TYPE_CHECKING:
    from planner.core.candidate import Candidate
    from planner.core.hardware import HardwareProfile
    from planner.core.model import ModelSpec
    from planner.workflow.recommend import Recommendation


def sealed_plan(
    answer: Recommendation,
    base: Candidate,
    *,
    expectations: tuple[Expectation, ...],
    steps: tuple[Step, ...],
    tools: dict[str, str],
    artifact: str,
    reasons: tuple[str, ...],
) -> Plan:
    """The plan of ``steps`` for the model and the machine of ``answer``, with the weights of ``base``."""
    return Plan(
        format_version=FORMAT_VERSION,
        qplan_version=__version__,
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        model=plan_model(answer.model),
        hardware=plan_hardware(answer.hardware, simulated=answer.simulated),
        workload=answer.workload,
        variant=base.variant,
        placement=base.placement,
        estimate=base.estimate,
        expectations=expectations,
        steps=steps,
        tools=tools,
        artifact=artifact,
        reasons=reasons,
    ).sealed()


def plan_model(model: ModelSpec, *, weights: bool = True) -> PlanModel:
    """The model with its files pinned by size and hash; the hashes of weights are left out without ``weights``."""
    from planner.models import fingerprint

    pinned = fingerprint.pin(model, weights=weights)
    return PlanModel(
        name=model.name,
        architecture=model.architecture,
        kind=model.source.kind,
        location=model.source.hub_id or str(model.source.location),
        revision=model.source.revision,
        parameter_count=model.parameter_count,
        shape_sha256=shape_sha256(model),
        files=tuple(PinnedFile(name=f.name, size_bytes=f.size_bytes, sha256=f.sha256) for f in pinned),
    )


def plan_hardware(hardware: HardwareProfile, *, simulated: bool) -> PlanHardware:
    """The machine's identity and the fields behind it."""
    return PlanHardware(
        identity=hardware.identity(),
        name=hardware.name,
        fields=encode(hardware.identity_fields()),
        simulated=simulated,
    )
