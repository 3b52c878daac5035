"""Drive the wizard without a terminal, and read its screen as text."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Awaitable, Callable
from typing import Any

from rich.console import Console
from textual.app import App
from textual.pilot import Pilot

from planner.tui.app import Wizard
from planner.tui.screens.base import QplanScreen
from planner.tui.state import State

Script = Callable[[Pilot[Any], Wizard], Awaitable[None]]
LONGEST_SECONDS = 60.0


class Showing(Wizard):
    """The wizard begun at one of its screens."""

    def __init__(self, screen: QplanScreen) -> None:
        super().__init__(screen.state)
        self._first = screen

    def first_screen(self) -> QplanScreen:
        """This one."""
        return self._first


def drive(app: Wizard, script: Script, size: tuple[int, int] = (80, 24), *, settled: bool = True) -> State | None:
    """Run ``app`` in a terminal of this size, do what ``script`` says, and return what it left with.

    Args:
        settled: wait first until no thread runs; not where one is to be seen running.
    """

    async def go() -> None:
        async with app.run_test(size=size) as pilot:
            await (settle(pilot) if settled else drawn(pilot))
            await script(pilot, app)

    asyncio.run(asyncio.wait_for(go(), LONGEST_SECONDS))
    return app.return_value


async def settle(pilot: Pilot[Any]) -> None:
    """Until nothing is on its way: timers of the typing, threads, messages."""
    still = 0
    for _ in range(2000):
        await pilot.pause(0.03)
        still = 0 if any(worker.is_running for worker in pilot.app.workers) else still + 1
        if still == 3:
            return


async def drawn(pilot: Pilot[Any]) -> None:
    """A moment, and until the screen shows something: a busy machine draws a new one late."""
    await pilot.pause(0.15)
    for _ in range(200):
        if text_of(pilot.app).strip():
            return
        await pilot.pause(0.03)


async def press(pilot: Pilot[Any], *keys: str, settled: bool = True) -> None:
    """Keys, and what comes of them."""
    await pilot.press(*keys)
    await (settle(pilot) if settled else drawn(pilot))


def text_of(app: App[Any]) -> str:
    """The screen as a terminal would show it, without colours."""
    width, height = app.size
    console = Console(width=width, height=height, file=io.StringIO(), force_terminal=True, record=True)
    update = app.screen._compositor.render_update(full=True, screen_stack=app._background_screens, simplify=False)
    console.print(update)
    return "\n".join(line.rstrip() for line in console.export_text().splitlines()) + "\n"
