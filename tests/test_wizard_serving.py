"""The wizard starts the server of a result, shows how far it is, and takes it along when it ends."""

from __future__ import annotations

import asyncio
import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("textual", reason="the wizard's extra is not installed: pip install 'qplan[tui]'")

from planner.tui import serving
from planner.tui.app import Wizard
from planner.tui.screens.dialogs import Question
from planner.tui.screens.result import ResultScreen
from planner.tui.screens.serve import ServeScreen
from planner.tui.state import State
from tests import wizard_values as values
from tests.formats_builders import write_gguf
from tests.test_serving import STAND_IN, answers, gone
from tests.wizard_driver import Showing, drive, press, text_of


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> State:
    """A result whose artifact a stand-in of llama-server can serve."""
    program = tmp_path / "bin" / "llama-server"
    program.parent.mkdir()
    program.write_text(STAND_IN.format(python=sys.executable))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=":")
    artifact = tmp_path / "tiny.gguf"
    write_gguf(artifact, vocab=128)
    return values.DONE.but(outcome=dataclasses.replace(values.outcome(), report_path=artifact))


async def until(pilot: Any, app: Wizard, phase: str) -> serving.Serving:
    """Wait until the server is so far."""
    for _ in range(1200):
        await pilot.pause(0.05)
        if app.serving is not None and app.serving.phase == phase:
            return app.serving
    raise AssertionError(f"{app.serving}\n{text_of(app)}")


def test_it_starts_says_where_it_answers_and_is_stopped(served: State) -> None:
    async def script(pilot: Any, app: Wizard) -> None:
        await press(pilot, "s", settled=False)
        assert isinstance(app.screen, ServeScreen)
        found = await until(pilot, app, serving.ANSWERS)
        await pilot.pause(0.2)
        shown = text_of(app)
        assert found.url in shown and "curl" in shown and await asyncio.to_thread(answers, f"{found.url}/models")
        await press(pilot, "escape", settled=False)  # it goes on
        assert isinstance(app.screen, ResultScreen) and f"answers at {found.url}" in text_of(app)
        assert "Server" in {command.title for command in app.get_system_commands(app.screen)}
        await press(pilot, "s", settled=False)
        assert app.serving == found  # no second one
        await press(pilot, "x", settled=False)
        await until(pilot, app, serving.STOPPED)
        assert await asyncio.to_thread(gone, found.url) and "stopped" in text_of(app)
        await press(pilot, "r", settled=False)
        again = await until(pilot, app, serving.ANSWERS)
        assert await asyncio.to_thread(answers, f"{again.url}/models")
        urls.append(again.url)

    urls: list[str] = []
    drive(Showing(ResultScreen(served)), script, (120, 40))
    assert gone(urls[0])  # with the wizard


def test_leaving_asks_and_prints_the_line_that_serves(served: State) -> None:
    async def script(pilot: Any, app: Wizard) -> None:
        await press(pilot, "s", settled=False)
        found = await until(pilot, app, serving.ANSWERS)
        await press(pilot, "ctrl+q", settled=False)
        assert isinstance(app.screen, Question) and "Stop it and leave" in text_of(app)
        await press(pilot, "n", settled=False)
        assert isinstance(app.screen, ServeScreen) and await asyncio.to_thread(answers, f"{found.url}/models")
        await press(pilot, "ctrl+q", "y", settled=False)
        urls.append(found.url)

    urls: list[str] = []
    left = drive(Showing(ResultScreen(served)), script)
    assert left is not None and left.outcome is not None
    assert left.command_lines()[-1] == f"qplan serve {left.outcome.report_path}" and gone(urls[0])


@pytest.mark.parametrize(
    ("dies", "words"), [("old", "another version"), ("hangs", "being loaded")], ids=["dies", "is slow"]
)
def test_a_server_that_dies_or_is_slow_never_takes_the_wizard_along(
    served: State, monkeypatch: pytest.MonkeyPatch, dies: str, words: str
) -> None:
    monkeypatch.setenv("DIES", dies)

    async def script(pilot: Any, app: Wizard) -> None:
        await press(pilot, "s", settled=False)
        await until(pilot, app, serving.FAILED if dies == "old" else serving.STARTING)
        await pilot.pause(0.2)
        assert words in " ".join(text_of(app).split())
        if dies == "hangs":
            await press(pilot, "x", settled=False)
            await until(pilot, app, serving.STOPPED)

    drive(Showing(ResultScreen(served)), script, (120, 40))


def test_without_a_server_it_is_said_what_to_install_and_how_by_hand(
    served: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    from planner.workflow import server_programs

    lacking = lambda row, variant=None: server_programs.Program(lacking=(row.program,))  # noqa: E731
    monkeypatch.setattr(server_programs, "find", lacking)

    async def script(pilot: Any, app: Wizard) -> None:
        await press(pilot, "s", settled=False)
        await until(pilot, app, serving.FAILED)
        await pilot.pause(0.2)
        shown = text_of(app)
        assert "missing-dependency" in shown and "by hand" in shown

    drive(Showing(ResultScreen(served)), script, (120, 50))


def test_what_is_known_of_a_server_is_a_value() -> None:
    found = serving.Serving(target=Path("x"))
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.phase = serving.ANSWERS  # type: ignore[misc]
    assert found.alive and not dataclasses.replace(found, phase=serving.STOPPED).alive
