"""The wizard where a plan asks for more than GGUF: environments of quantizers, and fine-tunings."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("textual", reason="the wizard's extra is not installed: pip install 'qplan[tui]'")

from textual.widgets import Button, DataTable, Input, Select, Static

from planner.core.errors import Interrupted, MissingEnvironment
from planner.core.workload import Workload
from planner.tui.app import Wizard
from planner.tui.messages import InstallBegan, InstallEnded
from planner.tui.screens import goal
from planner.tui.screens.choose import ChooseScreen
from planner.tui.screens.dialogs import ErrorDialog, Question
from planner.tui.screens.finetune import FinetuneScreen
from planner.tui.screens.goal import GoalScreen
from planner.tui.screens.result import ResultScreen
from planner.tui.screens.review import ReviewScreen, planned
from planner.tui.screens.run import RunScreen, StepRow
from planner.tui.state import State
from planner.workflow import applying, environments
from planner.workflow.planning import make_plan
from planner.workflow.recommend import recommend
from tests import wizard_values as values
from tests.conftest import Qplan
from tests.test_wizard import start
from tests.wizard_driver import Showing, drive, press, settle, text_of

LACKING = values.PLANNED.but(installs=(values.OFFER,))


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """No interpreter here has a quantizer's packages; what qplan's home lacks is lacking."""
    from planner.execute import environments as found

    monkeypatch.setattr(found, "_versions_here", lambda _: {})


class Installing:
    """An apply whose quantizer's environment is missing until it is installed, asked and told as the real one does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, download: bool = False) -> None:
        self.there, self.stop_at, self.download = False, "", download
        self.assumed: list[bool] = []
        monkeypatch.setattr(environments, "offer", lambda name: values.OFFER)
        monkeypatch.setattr(environments, "install", self._install)

    def _check(self) -> None:
        if not self.there:
            raise MissingEnvironment("GPTQModel is not installed", environment=values.OFFER.name)

    def _install(self, wanted: environments.Offer, tell: environments.Tell | None) -> None:
        assert tell is not None
        for what, fraction in (("making a virtual environment", 0.0), ("torch for cpu", 0.1), ("trying it", 0.9)):
            tell(what, fraction)
            if what == self.stop_at:
                raise Interrupted("stopped")
        self.there = True
        tell("done", 1.0)

    def __call__(self, plan: Any, options: applying.ApplyOptions, watcher: Any) -> applying.Outcome:
        self.assumed.append(options.assume_yes)
        environments.prepare(self._check, assume_yes=options.assume_yes, ask=options.confirm, tell=options.installing)
        if self.download:
            applying.confirm_download(plan.model, assume_yes=options.assume_yes, confirm=options.confirm)
        return values.outcome()


@pytest.fixture
def installing(monkeypatch: pytest.MonkeyPatch) -> Iterator[Installing]:
    fake = Installing(monkeypatch)
    monkeypatch.setattr(applying, "apply", fake)
    yield fake


def row(app: Wizard, name: str) -> StepRow:
    return next(found for found in app.screen.query(StepRow) if found.step_name == name)


def test_an_environment_is_asked_about_with_size_and_time_and_installed_in_stages(installing: Installing) -> None:
    async def script(pilot: Any, app: Wizard) -> None:
        assert isinstance(app.screen, Question)
        asked = text_of(app)
        assert "GPTQModel" in asked and "327 MiB" in asked and "1.1 GiB on disk" in asked and "2 min 41 s" in asked
        await press(pilot, "n")
        assert "not installed" in text_of(app) and not isinstance(app.screen, ErrorDialog)
        installing.stop_at = "torch for cpu"
        await press(pilot, "r", settled=False)
        assert isinstance(app.screen, Question), "a no is no yes for the next time"
        await press(pilot, "y")
        assert row(app, "install").state_name == "stopped" and "torch for cpu" in text_of(app)
        installing.stop_at = ""
        await press(pilot, "r", settled=False)
        await press(pilot, "y")
        assert installing.there and isinstance(app.screen, ResultScreen)
        app.pop_screen()
        await settle(pilot)
        assert row(app, "install").state_name == "done" and "GPTQModel is ready" in text_of(app)
        assert installing.assumed == [False, False, False]

    drive(Showing(RunScreen(LACKING)), script, (100, 40), settled=False)


def test_a_yes_to_an_installation_is_none_to_a_download(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Installing(monkeypatch, download=True)
    monkeypatch.setattr(applying, "apply", fake)
    monkeypatch.setattr(applying.obtain, "missing_bytes", lambda _: 15 << 30)

    async def script(pilot: Any, app: Wizard) -> None:
        await press(pilot, "y", settled=False)
        assert isinstance(app.screen, Question) and "Download" in text_of(app)
        await press(pilot, "n")
        assert "not downloaded" in text_of(app)
        await press(pilot, "r", settled=False)
        assert isinstance(app.screen, Question) and "Download" in text_of(app)
        await press(pilot, "y")
        assert isinstance(app.screen, ResultScreen)

    drive(Showing(RunScreen(LACKING)), script, settled=False)


def test_an_environment_that_nobody_foresaw_gets_its_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(applying, "apply", lambda plan, options, watcher: options.stop.wait(30))

    async def script(pilot: Any, app: Wizard) -> None:
        assert "install" not in text_of(app)
        for message in (InstallBegan(values.OFFER), InstallEnded(values.OFFER)):
            app.screen.post_message(message)
            await pilot.pause(0.1)
        assert row(app, "install").state_name == "done"
        assert next(iter(app.screen.query(StepRow))).step_name == "install", "it comes first"

    drive(Showing(RunScreen(values.PLANNED)), script, settled=False)


def test_review_and_choose_say_what_a_method_needs_beforehand(bare: None, tmp_path: Path) -> None:
    answer = recommend("tinyllama-1.1b", Workload(methods=("gptq", "gguf"), context=512, kv_type="f16"))
    ways = [way for way in (answer.decision.chosen, *answer.decision.alternatives) if way]
    gptq = next(way for way in ways if way.variant.method == "gptq")
    gguf = next(way for way in ways if way.variant.method == "gguf")
    offer = environments.needed_by_variant(gptq.variant)
    assert offer is not None and offer.takes_time() != "an unknown time"
    assert environments.needed_by_variant(gguf.variant) is None
    plan = make_plan(answer, gptq)
    assert planned(plan).installs == (offer,) and planned(make_plan(answer, gguf)).installs == ()
    elsewhere = dataclasses.replace(plan, hardware=dataclasses.replace(plan.hardware, simulated=True))
    assert planned(elsewhere).installs == (), "a plan for another machine installs nothing on this one"
    state = State(hardware=answer.hardware, model=answer.model, model_text="tinyllama-1.1b", answer=answer)

    async def script(pilot: Any, app: Wizard) -> None:
        assert isinstance(app.screen, ChooseScreen)
        for at in range(len(ways)):
            app.screen.query_one(DataTable).move_cursor(row=at)
            await pilot.pause(0.05)
            says = f"installs {offer.title} first" in " ".join(text_of(app).split())
            assert says == (ways[at].variant.method == "gptq")
        app.screen.query_one(DataTable).move_cursor(row=ways.index(gptq))
        await press(pilot, "enter")
        assert isinstance(app.screen, ReviewScreen)
        assert f"installs  {offer.title}, once: {offer.takes()}" in text_of(app)

    drive(Showing(ChooseScreen(state.but(candidate=gptq))), script, (160, 60))


async def to_goal(pilot: Any, app: Wizard, model: str) -> None:
    await press(pilot, "enter")
    await press(pilot, *model)
    await press(pilot, "enter")
    assert isinstance(app.screen, GoalScreen)


async def answered(pilot: Any) -> None:
    """Until what the form says now has its answer: the pause of the typing, and a thread."""
    await pilot.pause(2 * goal.PAUSE_SECONDS)
    await settle(pilot)


@pytest.mark.parametrize(("down", "base"), [((), "nf4"), (("down",), "16bit")])
def test_a_fine_tuning_is_chosen_and_planned_as_the_command_line_does(
    tmp_path: Path, qplan: Qplan, down: tuple[str, ...], base: str
) -> None:
    async def script(pilot: Any, app: Wizard) -> None:
        await to_goal(pilot, app, "demo")
        assert not app.screen.query_one("#finetune-form").display
        app.screen.query_one("#objective", Select).value = "finetune"
        await answered(pilot)
        assert app.screen.query_one("#finetune-form").display and "QLoRA r8" not in text_of(app)
        app.screen.query_one("#rank", Input).value = "8"
        await answered(pilot)
        assert "QLoRA r8" in text_of(app), "the effect follows the form"
        await press(pilot, "ctrl+n")
        assert isinstance(app.screen, FinetuneScreen)
        await press(pilot, *down)
        shown = text_of(app)
        assert "rank 8" in shown and "4 x 1 sequences of 256 tokens" in shown and "adamw_torch" in shown
        assert "activations, all kept" in shown and "the runtime besides" in shown and "smoke test" in shown
        await press(pilot, "enter")
        assert isinstance(app.screen, ReviewScreen)
        assert "loss after / before" in text_of(app) and "finetune" in text_of(app)
        await press(pilot, "ctrl+s")
        await press(pilot, "ctrl+q")

    left = drive(start(tmp_path), script, (120, 50))
    assert left is not None and left.plan is not None
    saved = json.loads((tmp_path / "plan.json").read_text())
    (step, _) = saved["steps"]
    assert step["finetune"]["base"] == base and step["finetune"]["rank"] == 8
    line = left.command_lines()[0]
    assert ("--lora-base" in line) == (base == "16bit") and "--lora-rank 8" in line
    done = qplan(*line.split()[1:], "--json")
    assert done.returncode == 0, done.stderr
    again = json.loads(done.stdout)
    for key in ("variant", "placement", "artifact", "steps", "expectations"):
        assert saved[key] == again[key], key
    told, told_again = ([r for r in made["reasons"] if "usable" not in r] for made in (saved, again))
    assert told == told_again, "but for the memory that is free now"


def test_data_are_named_in_the_form_and_trained_with(tmp_path: Path, qplan: Qplan) -> None:
    data = tmp_path / "examples.jsonl"
    data.write_text('{"text": "one"}\n{"text": "two"}\n')

    async def script(pilot: Any, app: Wizard) -> None:
        await to_goal(pilot, app, "demo")
        app.screen.query_one("#objective", Select).value = "finetune"
        app.screen.query_one("#dataset", Input).value = str(tmp_path / "no.jsonl")
        await answered(pilot)
        assert "no.jsonl is no file" in str(app.screen.query_one("#goal-error", Static).render())
        await pilot.resize_terminal(80, 24)
        app.screen.query_one("#batch", Input).value = "4"
        await answered(pilot)
        assert "no.jsonl is no file" in str(app.screen.query_one("#effect", Static).render()), "the form is longer"
        app.screen.query_one("#dataset", Input).value = str(data)
        await answered(pilot)
        await press(pilot, "ctrl+n")
        assert isinstance(app.screen, FinetuneScreen) and "examples.jsonl" in text_of(app)
        await press(pilot, "enter")
        await press(pilot, "ctrl+s")
        await press(pilot, "ctrl+q")

    left = drive(start(tmp_path), script, (200, 60))
    assert left is not None and left.plan is not None
    (step, _) = left.plan.steps
    assert step.calibration is not None and step.calibration.location == str(data)
    assert step.finetune is not None and step.finetune.steps == 0, "once over the data"
    line = left.command_lines()[0]
    assert f"--dataset {data}" in line
    again = json.loads(qplan(*line.split()[1:], "--json").stdout)
    assert again["steps"][0] == json.loads((tmp_path / "plan.json").read_text())["steps"][0]


def test_going_on_before_there_is_an_answer_waits_for_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Enter within the pause after a change must not go on with the answer to what was asked before."""
    monkeypatch.setattr(goal, "PAUSE_SECONDS", 0.5)

    async def script(pilot: Any, app: Wizard) -> None:
        await to_goal(pilot, app, "demo")
        app.screen.query_one("#context", Input).value = "128"
        await press(pilot, "enter", settled=False)
        assert isinstance(app.screen, GoalScreen)
        await pilot.pause(0.7)
        await settle(pilot)
        assert isinstance(app.screen, ChooseScreen)
        assert app.screen.state.answer is not None and app.screen.state.answer.workload.context == 128

    drive(start(tmp_path), script)


def test_a_fine_tuning_that_does_not_fit_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    async def script(pilot: Any, app: Wizard) -> None:
        await to_goal(pilot, app, "llama-3.1-8b")
        app.screen.query_one("#objective", Select).value = "finetune"
        app.screen.query_one("#max-memory", Input).value = "1GiB"
        await answered(pilot)
        assert "nothing fits" in text_of(app)
        await press(pilot, "ctrl+n")
        assert isinstance(app.screen, ErrorDialog) and "fine-tuning" in text_of(app)

    drive(start(tmp_path), script)


def test_an_adapter_is_not_served_but_told_how_to_be_used() -> None:
    document = {**values.report(), "commands": {"transformers": "PeftModel.from_pretrained(model, 'out')"}}
    outcome = applying.Outcome(report=document, report_path=Path("out/report.json"))
    trained = values.TRAINING.but(plan=values.TRAIN_PLAN, outcome=outcome)

    async def script(pilot: Any, app: Wizard) -> None:
        assert [str(button.id) for button in app.screen.query(Button)] == ["open", "compare", "new"]
        assert "PeftModel.from_pretrained" in text_of(app)
        await press(pilot, "s")
        assert isinstance(app.screen, ResultScreen)

    drive(Showing(ResultScreen(trained)), script, (100, 40))
