"""Hardware: what was found, its notes, or a captured machine instead.

It is the first screen, so what it needs only once it is painted is imported by the threads that look.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from textual.containers import Horizontal, VerticalScroll
from textual.content import Content
from textual.widget import Widget
from textual.widgets import OptionList, Static
from textual.widgets.option_list import Option

from planner.core.units import format_bytes
from planner.tui import keys
from planner.tui.messages import Forward, HardwareFound, ProfilesFound
from planner.tui.screens.base import QplanScreen
from planner.tui.state import State

if TYPE_CHECKING:
    from planner.core.hardware import HardwareProfile

HERE = "(this machine)"
LOOKING = "looking at this machine …"


class Machines(OptionList):
    """This machine and the captured ones."""

    HELP = """\
## Machines

The first row is the machine you are at. The others are captured: plan for one of them to see what a model would need
before you buy or rent it. A plan for another machine can be saved, and applied there.

Command line: `qplan probe`, `qplan profiles`, `--profile NAME`.
"""


class HardwareScreen(QplanScreen):
    """The first step. It is painted before anything is looked at."""

    TITLE_TEXT = "Hardware"
    LEADS_ON = True
    BINDINGS = keys.HARDWARE

    def __init__(self, state: State) -> None:
        super().__init__(state)
        self._shown: HardwareProfile | None = None

    def body(self) -> Iterable[Widget]:
        """Facts beside the list of machines."""
        yield Horizontal(
            VerticalScroll(Static(LOOKING, id="facts"), id="hardware-facts", classes="card"),
            Machines(Option(HERE, id=HERE), id="machines"),
            classes="columns",
        )

    def on_mount(self) -> None:
        """Look once the screen is painted."""
        self.query_one("#hardware-facts").border_title = "the machine to plan for"
        machines = self.query_one(Machines)
        machines.border_title, machines.border_subtitle = "others, captured", "Enter picks, then goes on"
        machines.focus()
        self.call_after_refresh(self._look, self.state.profile)
        self.call_after_refresh(self.ask, _profiles, group="profiles")

    def _look(self, profile: str | None, again: bool = False) -> None:
        self._shown = None
        self.query_one("#facts", Static).update(LOOKING if profile is None else f"reading {profile} …")
        self.ask(lambda: _found(profile, again), group="survey")

    def on_hardware_found(self, message: HardwareFound) -> None:
        """Show the machine; it is what the next step plans for."""
        message.stop()
        self._shown = message.hardware
        self.state = self.state.but(hardware=message.hardware, profile=message.profile)
        from rich.text import Text

        from planner.tui import texts

        found = message.hardware
        self.query_one("#facts", Static).update(
            texts.spaced(
                Text.assemble((found.name, "bold"), (f"  {found.os}", "dim")),
                texts.facts(texts.machine_facts(found)),
                texts.notes(found.notes),
            )
        )

    def on_profiles_found(self, message: ProfilesFound) -> None:
        """The captured machines, with their GPU or RAM."""
        message.stop()
        machines = self.query_one(Machines)
        machines.clear_options()
        machines.add_option(Option(HERE, id=HERE))
        for name, hardware in message.profiles:
            machines.add_option(Option(Content.assemble(f"{name:<21}", (_size(hardware), "$text-muted")), id=name))
        wanted = self.state.profile or HERE
        if wanted in {HERE, *(name for name, _ in message.profiles)}:
            machines.highlighted = machines.get_option_index(wanted)

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        """Enter or a click: this machine; Enter again on the one that is shown goes on."""
        profile = None if event.option_id == HERE else event.option_id
        if self._shown is not None and profile == self.state.profile:
            self.action_forward()
        else:
            self._look(profile)

    def action_again(self) -> None:
        """Look again, and measure the memory bandwidth again."""
        self._look(self.state.profile, again=True)

    def action_forward(self) -> None:
        """On to the model, once the machine is known."""
        if self._shown is not None:
            self.post_message(Forward(self.state))


def _profiles() -> ProfilesFound:
    from planner.workflow import survey

    return ProfilesFound(survey.profiles())


def _found(profile: str | None, again: bool) -> HardwareFound:
    import planner.tui.texts  # noqa: F401  # here, so that showing what was found waits for no import
    from planner.workflow import survey

    return HardwareFound(survey.survey(profile, measure=True, again=again), profile)


def _size(hardware: HardwareProfile) -> str:
    gpus = hardware.gpus
    if not gpus:
        return f"{format_bytes(hardware.memory.total_bytes, 0)} RAM"
    return f"{f'{len(gpus)}×' if len(gpus) > 1 else ''}{format_bytes(gpus[0].memory_total_bytes, 0)}"
