"""What screens and threads tell each other. Each carries values only, so a test can send any of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from textual.message import Message

if TYPE_CHECKING:
    from planner.core.errors import QplanError
    from planner.core.hardware import HardwareProfile
    from planner.core.model import ModelSpec
    from planner.core.plan import Plan, Step
    from planner.tui.state import State
    from planner.workflow.applying import Outcome, Receipt
    from planner.workflow.environments import Offer
    from planner.workflow.library import CatalogEntry
    from planner.workflow.recommend import Recommendation


class Forward(Message):
    """A screen is done: go on with this state."""

    def __init__(self, state: State) -> None:
        super().__init__()
        self.state = state


class Again(Message):
    """From the model on, for the same machine."""

    def __init__(self, state: State) -> None:
        super().__init__()
        self.state = state


class Failed(Message):
    """Something asked for could not be done; the wizard says so and lives on."""

    def __init__(self, error: QplanError) -> None:
        super().__init__()
        self.error = error


class HardwareFound(Message):
    """The machine, this one or a captured one."""

    def __init__(self, hardware: HardwareProfile, profile: str | None) -> None:
        super().__init__()
        self.hardware = hardware
        self.profile = profile


class ProfilesFound(Message):
    """The captured machines by name."""

    def __init__(self, profiles: tuple[tuple[str, HardwareProfile], ...]) -> None:
        super().__init__()
        self.profiles = profiles


class ModelsFound(Message):
    """Catalog models that match what was typed."""

    def __init__(self, text: str, entries: tuple[CatalogEntry, ...]) -> None:
        super().__init__()
        self.text = text
        self.entries = entries


class ModelRead(Message):
    """A model's shapes and the sizes of a few types."""

    def __init__(self, text: str, model: ModelSpec, sizes: tuple[tuple[str, int], ...]) -> None:
        super().__init__()
        self.text = text
        self.model = model
        self.sizes = sizes


class Answered(Message):
    """A recommendation; only the latest of a flood matters."""

    def __init__(self, answer: Recommendation) -> None:
        super().__init__()
        self.answer = answer

    def can_replace(self, message: Message) -> bool:
        """A newer answer makes an older one void."""
        return isinstance(message, Answered)


class Planned(Message):
    """A plan was made; ``installs``: environments that its apply would install first."""

    def __init__(self, plan: Plan, installs: tuple[Offer, ...] = ()) -> None:
        super().__init__()
        self.plan = plan
        self.installs = installs


class InstallBegan(Message):
    """The environment of a quantizer is being installed."""

    def __init__(self, offer: Offer) -> None:
        super().__init__()
        self.offer = offer


class InstallEnded(Message):
    """It is there."""

    def __init__(self, offer: Offer) -> None:
        super().__init__()
        self.offer = offer


class DownloadBegan(Message):
    """A model of the hub is being fetched."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what


class StepBegan(Message):
    """A step of the plan, or the measuring (``None``), begins."""

    def __init__(self, step: Step | None) -> None:
        super().__init__()
        self.step = step


class Progressed(Message):
    """How far the running step is; newer figures make older ones void."""

    def __init__(self, done: float, total: float, what: str = "") -> None:
        super().__init__()
        self.done = done
        self.total = total
        self.what = what

    def can_replace(self, message: Message) -> bool:
        """Only the newest counts."""
        return isinstance(message, Progressed)


class StepEnded(Message):
    """A step is done, or was done before."""

    def __init__(self, step: Step, receipt: Receipt, *, reused: bool) -> None:
        super().__init__()
        self.step = step
        self.receipt = receipt
        self.reused = reused


class Applied(Message):
    """The plan is carried out and measured."""

    def __init__(self, outcome: Outcome) -> None:
        super().__init__()
        self.outcome = outcome
