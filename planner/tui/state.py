"""The wizard's one value: what is known so far. A screen gets it and hands a changed copy on."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from planner.core.wording import finetune_label
from planner.core.workload import Workload
from planner.workflow import command_line

if TYPE_CHECKING:
    from planner.core.candidate import Candidate
    from planner.core.finetuning import FinetuneChoice
    from planner.core.hardware import HardwareProfile
    from planner.core.model import ModelSpec
    from planner.core.plan import Plan
    from planner.workflow.applying import Outcome
    from planner.workflow.environments import Offer
    from planner.workflow.recommend import Recommendation

UNASKED = Workload(context_fixed=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """Machine, model, goal, choice, plan and result; what is not known yet is ``None``."""

    profile: str | None = None
    """Name of a captured machine; ``None``: this one."""
    hardware: HardwareProfile | None = None
    model_text: str = ""
    model: ModelSpec | None = None
    workload: Workload = UNASKED
    answer: Recommendation | None = None
    candidate: Candidate | None = None
    finetuning: FinetuneChoice | None = None
    """Of the objective ``finetune``: how the adapter is trained."""
    dataset: Path | None = None
    """What it is trained with; ``None``: the smoke test."""
    plan: Plan | None = None
    installs: tuple[Offer, ...] = ()
    """Environments that carrying the plan out installs first."""
    plan_path: Path = Path("plan.json")
    saved: bool = False
    """The plan is in ``plan_path``."""
    output: Path = Path()
    outcome: Outcome | None = None
    served: bool = False
    """A server of the result was started."""

    def but(self, **changes: Any) -> State:
        """A copy with changes."""
        return dataclasses.replace(self, **changes)

    def from_model_on(self) -> State:
        """What is known before a model is: the machine and the goal."""
        return self.but(
            model=None,
            model_text="",
            answer=None,
            candidate=None,
            finetuning=None,
            plan=None,
            installs=(),
            saved=False,
            outcome=None,
        )

    def summary(self) -> str:
        """The state in a line, for the head of each screen."""
        parts = []
        if self.hardware is not None:
            parts.append(self.hardware.name)
        if self.model is not None:
            parts.append(self.model.name)
        if self.finetuning is not None:
            parts.append(finetune_label(self.finetuning.settings))
            parts.append(f"sequences of {self.finetuning.settings.sequence_length:,} tokens")
        elif self.candidate is not None:
            parts.append(self.candidate.variant.label())
            parts.append(f"{self.candidate.placement.context:,} tokens")
        return " · ".join(parts)

    def command_lines(self) -> tuple[str, ...]:
        """The command lines that do what was done here; empty where nothing was."""
        if not self.model_text or self.model is None:
            return ("qplan probe",) if self.hardware is not None and self.profile is None else ()
        planned = self._plan_line()
        if planned is None:
            return (command_line.recommend_line(self.model_text, self.workload, self.profile),)
        if self.outcome is None and not self.saved:
            return (planned,)
        lines = (planned, command_line.apply_line(self.plan_path, self.output))
        if not self.served or self.outcome is None or self.outcome.report_path is None:
            return lines
        return (*lines, command_line.serve_line(self.outcome.report_path))

    def _plan_line(self) -> str | None:
        """The command line of the plan; ``None`` while there is none."""
        asked = (self.model_text, self.workload, self.profile)
        if self.plan is None:
            return None
        if self.finetuning is not None:
            return command_line.finetune_line(*asked, self.dataset, self.plan_path)
        return command_line.plan_line(*asked, self.candidate, self.plan_path) if self.candidate else None
