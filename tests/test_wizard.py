"""The wizard driven through Textual's pilot: the way through, messages, keys, errors, leaving."""

from __future__ import annotations

import dataclasses
import json
import re
import threading
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("textual", reason="the wizard's extra is not installed: pip install 'qplan[tui]'")

from textual.widgets import DataTable, HelpPanel, Input, OptionList

from planner.core.errors import Interrupted, QplanError
from planner.tui import keys, messages, settings
from planner.tui.app import Wizard
from planner.tui.screens.choose import ChooseScreen
from planner.tui.screens.dialogs import ErrorDialog, Page, Question
from planner.tui.screens.goal import GoalScreen
from planner.tui.screens.hardware import LOOKING, HardwareScreen
from planner.tui.screens.model import ModelScreen
from planner.tui.screens.result import ResultScreen
from planner.tui.screens.review import ReviewScreen
from planner.tui.screens.run import RunScreen
from planner.tui.screens.settings import SettingsScreen
from planner.tui.state import State
from planner.tui.watching import Watching
from planner.workflow import applying, survey
from tests import wizard_values as values
from tests.conftest import Qplan
from tests.wizard_driver import Showing, drive, press, settle, text_of


def start(tmp_path: Path) -> Wizard:
    """The wizard as `qplan wizard --output` begins it."""
    return Wizard(State(output=tmp_path / "out", plan_path=tmp_path / "plan.json"))


def test_from_hardware_to_a_plan_that_the_command_line_makes_too(tmp_path: Path, qplan: Qplan) -> None:
    async def script(pilot: Any, app: Wizard) -> None:
        await press(pilot, "enter")
        assert isinstance(app.screen, ModelScreen)
        await press(pilot, *"tinyllama")
        await press(pilot, "enter")
        assert isinstance(app.screen, GoalScreen)
        await press(pilot, *"1024")
        await press(pilot, "enter")
        assert isinstance(app.screen, ChooseScreen)
        await press(pilot, "down", "down", "enter")
        assert isinstance(app.screen, ReviewScreen) and app.screen.state.plan is not None
        await press(pilot, "ctrl+s")
        await press(pilot, "ctrl+q")

    left = drive(start(tmp_path), script)
    assert left is not None and left.plan is not None
    planned, applied = left.command_lines()
    assert applied == f"qplan apply {tmp_path / 'plan.json'} --output {tmp_path / 'out'}"
    saved = json.loads((tmp_path / "plan.json").read_text())
    done = qplan(*planned.split()[1:], "--json")
    assert done.returncode == 0, done.stderr
    again = json.loads(done.stdout)
    for key in ("variant", "placement", "artifact"):
        assert saved[key] == again[key]
    assert saved["placement"]["context"] == 1024


def test_the_table_shows_what_recommend_prints(qplan: Qplan) -> None:
    state = State(
        hardware=survey.survey("rtx-4090"), profile="rtx-4090", model_text="llama-2-13b",
    )  # fmt: skip
    from planner.workflow.library import resolve
    from planner.workflow.recommend import recommend_for

    state = state.but(model=resolve("llama-2-13b"))
    answer = recommend_for(state.model, state.hardware, state.workload, simulated=True)  # type: ignore[arg-type]
    shown: list[list[str]] = []

    async def script(pilot: Any, app: Wizard) -> None:
        table = app.screen.query_one(DataTable)
        shown.extend([str(cell) for cell in table.get_row_at(n)] for n in range(table.row_count))

    workload = dataclasses.replace(answer.workload, context_fixed=True)
    chosen = state.but(answer=answer, candidate=answer.decision.chosen, workload=workload)
    drive(Showing(ChooseScreen(chosen)), script, (120, 40))
    line = chosen.command_lines()[0]
    printed = qplan(*line.split()[1:], "-v", COLUMNS="240").stdout
    assert len(shown) == 1 + len(answer.decision.alternatives)
    for row in shown[1:]:
        listed = next(text for text in printed.splitlines() if re.match(rf" (GGUF )?{re.escape(row[0])} ", text))
        assert all(cell in listed for cell in row if cell)


def test_the_first_screen_is_painted_before_anything_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    painted: list[str] = []
    app = Wizard(State())

    def look(*_: object, **__: object) -> object:
        painted.append(app.call_from_thread(lambda: text_of(app)))
        return values.HARDWARE

    monkeypatch.setattr(survey, "survey", look)

    async def script(pilot: Any, app: Wizard) -> None:
        assert "NVIDIA GeForce RTX 4070 Ti" in text_of(app)

    drive(app, script)
    assert len(painted) == 1 and LOOKING in painted[0] and "Hardware" in painted[0]


def test_typing_goes_on_while_a_thread_works(monkeypatch: pytest.MonkeyPatch) -> None:
    from planner.workflow import library

    release = threading.Event()
    monkeypatch.setattr(library, "search", lambda _: release.wait(20) and ())

    async def script(pilot: Any, app: Wizard) -> None:
        await press(pilot, *"abc", settled=False)
        assert app.screen.query_one(Input).value == "abc"
        release.set()
        await settle(pilot)

    drive(Showing(ModelScreen(State(hardware=values.HARDWARE))), script, settled=False)


def test_an_error_is_said_and_the_wizard_lives_on() -> None:
    async def script(pilot: Any, app: Wizard) -> None:
        before = app.screen
        app.screen.post_message(
            messages.Failed(QplanError("no [bold]room[/]", numbers="2 of 1", hint="less", code="x"))
        )
        await settle(pilot)
        assert isinstance(app.screen, ErrorDialog)
        shown = text_of(app)
        assert "no [bold]room[/] [x]" in shown and "2 of 1" in shown and "hint: less" in shown
        await press(pilot, "escape")
        assert app.screen is before

    drive(Showing(ChooseScreen(values.CHOSEN)), script)


def test_an_error_nobody_foresaw_is_said_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> object:
        raise ZeroDivisionError("oops")

    monkeypatch.setattr(survey, "survey", broken)

    async def script(pilot: Any, app: Wizard) -> None:
        assert isinstance(app.screen, ErrorDialog) and "unexpected ZeroDivisionError: oops" in text_of(app)
        await press(pilot, "escape")
        assert isinstance(app.screen, HardwareScreen)

    drive(Wizard(State()), script)


def test_the_state_never_changes() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        values.CHOSEN.profile = "x"  # type: ignore[misc]
    assert values.CHOSEN.but(profile="x").profile == "x" and values.CHOSEN.profile is None
    assert all(field.type != "dict" and field.type != "list" for field in dataclasses.fields(State))


def test_a_flood_of_progress_collapses() -> None:
    one, two = messages.Progressed(1, 10), messages.Progressed(2, 10)
    assert two.can_replace(one) and not two.can_replace(messages.StepBegan(None))
    assert messages.Answered(values.ANSWER).can_replace(messages.Answered(values.NOTHING))


def test_what_if_keys_answer_at_once() -> None:
    from planner.workflow.library import resolve
    from planner.workflow.recommend import recommend_for

    model, hardware = resolve("llama-3-8b"), survey.survey("rtx-4070-ti")
    answer = recommend_for(model, hardware, State().workload, simulated=True)
    state = State(hardware=hardware, model=model, model_text="llama-3-8b", profile="rtx-4070-ti")

    async def script(pilot: Any, app: Wizard) -> None:
        screen = app.screen
        await press(pilot, "left_square_bracket")
        assert screen.state.answer.workload.context == 4096
        assert all(c.placement.context == 4096 for c in screen._rows)
        await press(pilot, "k", "k")
        assert screen.state.answer.workload.kv_type == "q8_0"
        assert {c.placement.kv_type for c in screen._rows if c.variant.method == "gguf"} == {"q8_0"}
        assert "--context 4096" in screen.state.command_lines()[0] and "q8_0" in screen.state.command_lines()[0]
        await press(pilot, "w")
        assert isinstance(app.screen, Page) and "KV q8_0" in text_of(app)

    drive(Showing(ChooseScreen(state.but(answer=answer, candidate=answer.decision.chosen))), script)


def test_explain_shows_the_terms_that_the_command_line_prints() -> None:
    async def script(pilot: Any, app: Wizard) -> None:
        await press(pilot, "e")
        shown = text_of(app)
        assert "weights read per token" in shown and "80 %: 54.4 - 81.6" in shown and "a table with a source" in shown

    drive(Showing(ChooseScreen(values.CHOSEN)), script, (120, 60))


def test_sizes_from_80x24_to_200x60() -> None:
    async def script(pilot: Any, app: Wizard) -> None:
        for size in ((80, 24), (100, 30), (200, 60), (60, 18), (80, 24)):
            await pilot.resize_terminal(*size)
            await pilot.pause(0.1)
            lines = text_of(app).splitlines()
            assert len(lines) == size[1] and max(map(len, lines)) <= size[0]
            assert "Q6_K" in text_of(app)
            wide = [str(column.label) for column in app.screen.query_one(DataTable).ordered_columns]
            assert ("score" in wide) == (size[0] >= 100)

    drive(Showing(ChooseScreen(values.CHOSEN)), script)


def test_the_mouse_does_what_keys_do() -> None:
    async def script(pilot: Any, app: Wizard) -> None:
        await pilot.click(DataTable, offset=(5, 3))
        await settle(pilot)
        assert app.screen.state.candidate == values.CANDIDATES[2]

    drive(Showing(ChooseScreen(values.CHOSEN)), script)

    async def buttons(pilot: Any, app: Wizard) -> None:
        app.screen.post_message(messages.Failed(QplanError("no")))
        await settle(pilot)
        await pilot.click("Button")
        await settle(pilot)
        assert isinstance(app.screen, ChooseScreen)

    drive(Showing(ChooseScreen(values.CHOSEN)), buttons)


@pytest.mark.parametrize("theme", [settings.DARK, settings.LIGHT])
def test_light_dark_and_without_colour_show_the_same_words(monkeypatch: pytest.MonkeyPatch, theme: str) -> None:
    shown = []

    async def script(pilot: Any, app: Wizard) -> None:
        app.theme = theme
        await pilot.pause(0.1)
        shown.append(text_of(app))

    drive(Showing(ChooseScreen(values.CHOSEN)), script)
    monkeypatch.setenv("NO_COLOR", "1")
    plain = Showing(ChooseScreen(values.CHOSEN))
    drive(plain, script)
    assert plain.no_color and shown[0] == shown[1] and "█" in shown[0] and "▓" in shown[0]


def test_a_checkbox_can_be_read_without_colour(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("planner.tui.screens.goal.recommend_for", lambda *_, **__: values.ANSWER)

    async def script(pilot: Any, app: Wizard) -> None:
        def box() -> str:
            return next(line for line in text_of(app).splitlines() if "leave the GPUs" in line)

        assert "X" not in box()
        app.screen.query_one("#cpu-only").value = True
        await settle(pilot)
        assert "X" in box()

    drive(Showing(GoalScreen(values.KNOWN)), script)


def test_keys_can_be_changed_and_stay_changed() -> None:
    assert len({b.id for _, b in keys.bindings()}) == len(keys.bindings())
    number = [b.id for _, b in keys.bindings()].index("choose.explain")

    async def change(pilot: Any, app: Wizard) -> None:
        await press(pilot, *["down"] * number, "enter")
        await press(pilot, "j")

    drive(Showing(SettingsScreen(values.KNOWN)), change)
    assert settings.load().keymap == {"choose.explain": "j"}

    async def use(pilot: Any, app: Wizard) -> None:
        await press(pilot, "e")
        assert isinstance(app.screen, ChooseScreen)
        await press(pilot, "j")
        assert isinstance(app.screen, Page)

    drive(Showing(ChooseScreen(values.CHOSEN)), use)

    async def back(pilot: Any, app: Wizard) -> None:
        await press(pilot, *["down"] * number, "delete")

    drive(Showing(SettingsScreen(values.KNOWN)), back)
    assert settings.load().keymap == {}


@pytest.mark.parametrize("text", ["nonsense", '{"theme": 3}', '{"theme": "textual-dark", "keymap": {"no.such": "x"}}'])
def test_damaged_settings_are_the_usual_ones(text: str) -> None:
    settings.path().parent.mkdir(parents=True, exist_ok=True)
    settings.path().write_text(text)
    assert settings.load() == settings.Settings()


def test_help_follows_the_focus() -> None:
    async def script(pilot: Any, app: Wizard) -> None:
        await press(pilot, "f1")
        assert app.screen.query(HelpPanel) and "Which model" in text_of(app)
        app.screen.query_one(OptionList).focus()
        await settle(pilot)
        assert "Which model" not in text_of(app)
        await press(pilot, "f1")
        assert not app.screen.query(HelpPanel)

    drive(Showing(ModelScreen(State(hardware=values.HARDWARE))), script, (120, 40))


def test_the_palette_offers_what_makes_sense_now() -> None:
    offered: dict[str, set[str]] = {}

    async def script(pilot: Any, app: Wizard) -> None:
        offered[app.screen.TITLE_TEXT] = {command.title for command in app.get_system_commands(app.screen)}
        await press(pilot, "ctrl+p")
        assert app.screen.query("CommandInput")

    for screen in (HardwareScreen(State()), ChooseScreen(values.CHOSEN), SettingsScreen(values.KNOWN)):
        drive(Showing(screen), script)
    assert "Frontier" not in offered["Hardware"] and "Frontier" in offered["Choose"]
    assert "Settings" in offered["Choose"] and "Settings" not in offered["Settings"]


def test_back_and_forth_keeps_what_was_chosen(tmp_path: Path) -> None:
    async def script(pilot: Any, app: Wizard) -> None:
        await press(pilot, "escape")
        assert isinstance(app.screen, HardwareScreen)  # there is nothing before it
        await press(pilot, "enter")
        await press(pilot, *"demo")
        await press(pilot, "enter")
        assert isinstance(app.screen, GoalScreen)
        await press(pilot, "escape")
        assert isinstance(app.screen, ModelScreen) and app.screen.query_one(Input).value == "demo"

    drive(start(tmp_path), script)


class FakeApply:
    """An apply that goes as far as a test lets it, as the runner would tell of it."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, plan: Any, options: applying.ApplyOptions, watcher: applying.Watcher) -> applying.Outcome:
        self.calls += 1
        progress = watcher.started(plan.steps[0])
        if self.calls == 1:
            for n in range(2000):
                progress(n, 2000)
                if options.stop is not None and options.stop.wait(0.01):
                    raise Interrupted("stopped")
        watcher.finished(plan.steps[0], values.RECEIPT, reused=self.calls > 1)
        watcher.measuring()("decode", 0.5)
        return values.outcome()


def test_cancel_stops_and_resume_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeApply()
    monkeypatch.setattr(applying, "apply", fake)

    async def script(pilot: Any, app: Wizard) -> None:
        screen = app.screen
        assert screen.running and "running" in text_of(app) and not screen.check_action("back", ())
        await press(pilot, "c")
        assert not screen.running and "stopped" in text_of(app) and app.screen is screen
        await press(pilot, "r")
        assert fake.calls == 2 and app.screen.TITLE_TEXT == "Result"
        assert "as expected or better" in text_of(app)

    drive(Showing(RunScreen(values.PLANNED)), script, settled=False)


def test_leaving_a_running_step_asks_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(applying, "apply", FakeApply())

    async def script(pilot: Any, app: Wizard) -> None:
        await press(pilot, "ctrl+q", settled=False)
        assert isinstance(app.screen, Question)
        await press(pilot, "n", settled=False)
        assert isinstance(app.screen, RunScreen) and app.screen.running
        await press(pilot, "ctrl+q", settled=False)
        await press(pilot, "y", settled=False)

    left = drive(Showing(RunScreen(values.PLANNED)), script, settled=False)
    assert left is not None and left.outcome is None


def test_a_question_of_the_thread_waits_for_a_person_and_ends_with_a_stop() -> None:
    posted: list[Any] = []
    stop = threading.Event()
    watching = Watching(posted.append, stop)
    answers: list[object] = []
    thread = threading.Thread(target=lambda: answers.append(watching.confirm("Download?")))
    thread.start()
    while not posted:
        time.sleep(0.01)
    posted[0].answer(True)
    thread.join(5)
    assert answers == [True] and posted[0].question == "Download?"
    stop.set()
    with pytest.raises(Interrupted):
        watching.confirm("again?")


def test_a_failed_step_can_be_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> object:
        raise QplanError("not enough disk space", code="no-space")

    monkeypatch.setattr(applying, "apply", refuse)

    async def script(pilot: Any, app: Wizard) -> None:
        assert isinstance(app.screen, ErrorDialog)
        await press(pilot, "escape")
        assert "failed" in text_of(app) and app.screen.check_action("resume", ())
        monkeypatch.setattr(applying, "apply", lambda *_: values.outcome())
        await press(pilot, "r")
        assert app.screen.TITLE_TEXT == "Result"

    drive(Showing(RunScreen(values.PLANNED)), script)


def test_nothing_that_fits_is_said_with_the_nearest_miss(tmp_path: Path) -> None:
    from planner.workflow.library import resolve

    state = State(hardware=survey.survey("raspberry-pi-5-8gb"), profile="raspberry-pi-5-8gb")
    state = state.but(model=resolve("llama-2-70b"), model_text="llama-2-70b")

    async def script(pilot: Any, app: Wizard) -> None:
        assert "nothing fits" in text_of(app)
        await press(pilot, "enter")
        assert isinstance(app.screen, ErrorDialog) and "does-not-fit" in text_of(app)

    drive(Showing(GoalScreen(state)), script)


def test_the_report_opens_where_there_are_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys
    import webbrowser

    opened: list[str] = []
    monkeypatch.setattr(webbrowser, "open", lambda url: opened.append(url) or True)
    monkeypatch.setattr(sys, "platform", "linux")
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER"):
        monkeypatch.delenv(name, raising=False)

    async def script(pilot: Any, app: Wizard) -> None:
        await press(pilot, "o")
        assert opened == [] and "out/report.html" in text_of(app)
        monkeypatch.setenv("DISPLAY", ":0")
        await press(pilot, "o")
        assert opened == [Path("out/report.html").absolute().as_uri()]

    drive(Showing(ResultScreen(values.DONE)), script)


def test_leaving_prints_the_command_lines(capsys: pytest.CaptureFixture[str]) -> None:
    from planner.cli.wizard import say_goodbye

    say_goodbye(values.DONE)
    printed = capsys.readouterr()
    assert printed.out.splitlines() == [
        "qplan plan example-8b --methods gguf --types Q6_K --context 8192 --kv-type f16 -o out/plan.json",
        "qplan apply out/plan.json --output out",
    ]
    assert "out/report.html" in printed.err


def test_without_a_terminal_or_for_json_the_wizard_says_what_to_do(qplan: Qplan) -> None:
    done = qplan("wizard")
    assert done.returncode == 2 and "terminal" in done.stderr and "qplan recommend" in done.stderr
    assert qplan("wizard", "--json").returncode == 2
    assert "Usage:" in qplan().stderr


def test_a_missing_package_names_its_extra(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import importlib.util

    from planner.cli import run

    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "textual" else found(name))
    assert run(["wizard"]) == 1
    assert "missing-dependency" in (err := capsys.readouterr().err) and "pip install 'qplan[tui]'" in err


def test_the_web_is_for_this_machine_unless_asked(qplan: Qplan) -> None:
    done = qplan("wizard", "--web", "--host", "0.0.0.0")
    assert done.returncode == 2 and "remote-refused" in done.stderr and "--allow-remote" in done.stderr
