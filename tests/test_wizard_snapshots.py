"""Every screen in its states, at two sizes, against the text it showed when it was last looked at.

``pytest --update-snapshots`` writes them anew; look at the difference before it is committed.
"""

from __future__ import annotations

import re
import threading
import types
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("textual", reason="the wizard's extra is not installed: pip install 'qplan[tui]'")

from planner.core.errors import DoesNotFit, ExecutionFailed, InputError, Interrupted, ModelNotFound, QplanError
from planner.tui import messages, serving
from planner.tui.app import Wizard
from planner.tui.screens import choose, compare, goal, measurements, model, review, run
from planner.tui.screens.base import QplanScreen
from planner.tui.screens.choose import ChooseScreen
from planner.tui.screens.compare import CompareScreen
from planner.tui.screens.finetune import FinetuneScreen
from planner.tui.screens.frontier import FrontierScreen
from planner.tui.screens.goal import GoalScreen
from planner.tui.screens.hardware import HardwareScreen
from planner.tui.screens.measurements import MeasurementsScreen
from planner.tui.screens.model import ModelScreen
from planner.tui.screens.result import ResultScreen
from planner.tui.screens.review import ReviewScreen
from planner.tui.screens.run import RunScreen
from planner.tui.screens.serve import ServeScreen
from planner.tui.screens.settings import SettingsScreen
from planner.tui.state import State
from planner.workflow import survey
from tests import wizard_values as values
from tests.wizard_driver import Showing, drive, press, settle, text_of

SNAPSHOTS = Path(__file__).parent / "snapshots"
SIZES = {"80x24": (80, 24), "120x40": (120, 40)}
REFUSED = ExecutionFailed("it cannot be done", numbers="needs 2, has 1", hint="`qplan doctor` may help", code="no-room")

Then = Callable[[Any, Wizard], Awaitable[None]]


def answer(value: object) -> Callable[..., object]:
    """A function that gives ``value``, or raises it."""

    def give(*_: object, **__: object) -> object:
        if isinstance(value, QplanError):
            raise value
        return value

    return give


class Bench:
    """The workflow as the screens see it, with fixed answers."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.patch = patch
        self.released = threading.Event()
        patch.setattr(survey, "survey", answer(values.HARDWARE))
        patch.setattr(survey, "profiles", answer((("laptop", values.UNKNOWN), ("bench", values.HARDWARE))))
        patch.setattr(model.library, "search", answer(values.ENTRIES))
        patch.setattr(model.library, "resolve", answer(values.MODEL))
        patch.setattr(model.library, "sizes", answer(values.SIZES))
        patch.setattr(model.library, "commands", answer({"serve": "llama-server -m example-8b-Q6_K.gguf"}))
        patch.setattr(model.library, "executable", answer(True))
        patch.setattr(goal, "recommend_for", answer(values.ANSWER))
        patch.setattr(choose, "recommend_for", answer(values.ANSWER))
        patch.setattr(review, "make_plan", answer(values.PLAN))
        patch.setattr(run.applying, "apply", self.forever)
        patch.setattr(run, "time", types.SimpleNamespace(strftime=lambda _: "12:00:00", monotonic=self.clock))
        patch.setattr(serving, "serve", answer(None))
        patch.setattr(measurements.survey, "measurements", answer(values.MEASUREMENTS))
        patch.setattr(model, "PAUSE_SECONDS", 0.01)
        patch.setattr(goal, "PAUSE_SECONDS", 0.01)
        self.now = 100.0

    def clock(self) -> float:
        return self.now

    def forever(self, *_: object, **__: object) -> object:
        self.released.wait(30)
        raise Interrupted("stopped")


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Bench]:
    monkeypatch.chdir(tmp_path)
    made = Bench(monkeypatch)
    yield made
    made.released.set()


Case = Callable[[Bench], tuple[QplanScreen, Then]]
CASES: dict[str, Case] = {}


def case(name: str) -> Callable[[Case], Case]:
    def keep(made: Case) -> Case:
        CASES[name] = made
        return made

    return keep


async def nothing(pilot: Any, app: Wizard) -> None:
    """The screen as it comes."""


def keys(*pressed: str, settled: bool = True) -> Then:
    async def then(pilot: Any, app: Wizard) -> None:
        await press(pilot, *pressed, settled=settled)

    return then


def told(*sent: Callable[[], Any]) -> Then:
    async def then(pilot: Any, app: Wizard) -> None:
        for make in sent:
            app.screen.post_message(make())
            await pilot.pause()

    return then


@case("hardware-full")
def _(bench: Bench) -> tuple[QplanScreen, Then]:
    return HardwareScreen(State()), nothing


@case("hardware-loading")
def _(bench: Bench) -> tuple[QplanScreen, Then]:
    bench.patch.setattr(survey, "survey", bench.forever)
    return HardwareScreen(State()), nothing


@case("hardware-empty")
def _(bench: Bench) -> tuple[QplanScreen, Then]:
    bench.patch.setattr(survey, "survey", answer(values.UNKNOWN))
    bench.patch.setattr(survey, "profiles", answer(()))
    return HardwareScreen(State()), nothing


@case("hardware-error")
def _(bench: Bench) -> tuple[QplanScreen, Then]:
    bench.patch.setattr(survey, "survey", answer(InputError("the profile is damaged", hint="pick another")))
    return HardwareScreen(State()), nothing


@case("model-full")
def _(bench: Bench) -> tuple[QplanScreen, Then]:
    return ModelScreen(State(hardware=values.HARDWARE)), keys("e", "x")


@case("model-empty")
def _(bench: Bench) -> tuple[QplanScreen, Then]:
    bench.patch.setattr(model.library, "search", answer(()))
    return ModelScreen(State(hardware=values.HARDWARE)), keys("z", "z")


@case("model-loading")
def _(bench: Bench) -> tuple[QplanScreen, Then]:
    bench.patch.setattr(model.library, "resolve", bench.forever)
    return ModelScreen(State(hardware=values.HARDWARE)), keys("e", "enter", settled=False)


@case("model-error")
def _(bench: Bench) -> tuple[QplanScreen, Then]:
    unknown = ModelNotFound("no model is called 'zz'", numbers="looked everywhere", hint="`qplan models` lists names")
    bench.patch.setattr(model.library, "resolve", answer(unknown))
    return ModelScreen(State(hardware=values.HARDWARE)), nothing


@case("goal-full")
def _(bench: Bench) -> tuple[QplanScreen, Then]:
    return GoalScreen(values.KNOWN), nothing


@case("goal-loading")
def _(bench: Bench) -> tuple[QplanScreen, Then]:
    bench.patch.setattr(goal, "recommend_for", bench.forever)
    return GoalScreen(values.KNOWN), nothing


@case("goal-empty")
def _(bench: Bench) -> tuple[QplanScreen, Then]:
    bench.patch.setattr(goal, "recommend_for", answer(values.NOTHING))
    return GoalScreen(values.KNOWN), nothing


@case("goal-error")
def _(bench: Bench) -> tuple[QplanScreen, Then]:
    return GoalScreen(values.KNOWN), keys("m", "a", "n", "y")


@case("goal-finetune")
def _(bench: Bench) -> tuple[QplanScreen, Then]:
    bench.patch.setattr(goal, "recommend_for", answer(values.TRAIN_ANSWER))
    bench.patch.setattr(goal, "decided", answer(values.TRAIN_ANSWER))
    return GoalScreen(values.KNOWN.but(workload=values.TRAIN)), nothing


@case("finetune-full")
def _(bench: Bench) -> tuple[QplanScreen, Then]:
    return FinetuneScreen(values.TRAINING), keys("down")


@case("finetune-empty")
def _(bench: Bench) -> tuple[QplanScreen, Then]:
    return FinetuneScreen(values.KNOWN), nothing


@case("choose-installs")
def _(bench: Bench) -> tuple[QplanScreen, Then]:
    bench.patch.setattr(choose.environments, "needed_by_variant", answer(values.OFFER))
    return ChooseScreen(values.CHOSEN), nothing


@case("choose-full")
def _(bench: Bench) -> tuple[QplanScreen, Then]:
    return ChooseScreen(values.CHOSEN), keys("down")


@case("choose-empty")
def _(bench: Bench) -> tuple[QplanScreen, Then]:
    return ChooseScreen(values.KNOWN), nothing


@case("choose-loading")
def _(bench: Bench) -> tuple[QplanScreen, Then]:
    bench.patch.setattr(choose, "recommend_for", bench.forever)
    return ChooseScreen(values.CHOSEN), keys("right_square_bracket", settled=False)


@case("choose-error")
def _(bench: Bench) -> tuple[QplanScreen, Then]:
    bench.patch.setattr(choose, "recommend_for", answer(DoesNotFit("nothing fits", hint="a shorter context may")))
    return ChooseScreen(values.CHOSEN), keys("right_square_bracket")


@case("choose-explain")
def _(bench: Bench) -> tuple[QplanScreen, Then]:
    return ChooseScreen(values.CHOSEN), keys("e")


@case("choose-rejected")
def _(bench: Bench) -> tuple[QplanScreen, Then]:
    return ChooseScreen(values.CHOSEN), keys("x")


@case("review-full")
def _(bench: Bench) -> tuple[QplanScreen, Then]:
    return ReviewScreen(values.CHOSEN), nothing


@case("review-installs")
def _(bench: Bench) -> tuple[QplanScreen, Then]:
    bench.patch.setattr(review.environments, "needed_by", answer((values.OFFER,)))
    return ReviewScreen(values.CHOSEN), nothing


@case("review-finetune")
def _(bench: Bench) -> tuple[QplanScreen, Then]:
    bench.patch.setattr(review, "make_plan", answer(values.TRAIN_PLAN))
    bench.patch.setattr(review.environments, "needed_by", answer(()))
    return ReviewScreen(values.TRAINING), nothing


@case("review-loading")
def _(bench: Bench) -> tuple[QplanScreen, Then]:
    bench.patch.setattr(review, "make_plan", bench.forever)
    return ReviewScreen(values.CHOSEN), nothing


@case("review-empty")
def _(bench: Bench) -> tuple[QplanScreen, Then]:
    bench.patch.setattr(model.library, "executable", answer(False))
    return ReviewScreen(values.CHOSEN), nothing


@case("review-error")
def _(bench: Bench) -> tuple[QplanScreen, Then]:
    bench.patch.setattr(review, "make_plan", answer(REFUSED))
    return ReviewScreen(values.CHOSEN), nothing


def began(step: int | None) -> Callable[[], messages.StepBegan]:
    return lambda: messages.StepBegan(None if step is None else values.PLAN.steps[step])


def ended() -> messages.StepEnded:
    return messages.StepEnded(values.PLAN.steps[0], values.RECEIPT, reused=False)


@case("run-loading")
def _(bench: Bench) -> tuple[QplanScreen, Then]:
    return RunScreen(values.PLANNED), nothing


@case("run-full")
def _(bench: Bench) -> tuple[QplanScreen, Then]:
    def later() -> messages.Progressed:
        bench.now += 60.0
        return messages.Progressed(25, 100)

    return RunScreen(values.PLANNED), told(began(0), ended, began(1), lambda: messages.Progressed(0, 100), later)


@case("run-download")
def _(bench: Bench) -> tuple[QplanScreen, Then]:
    def later() -> messages.Progressed:
        bench.now += 60.0
        return messages.Progressed(5 * values.GIB, 15 * values.GIB)

    begun = lambda: messages.DownloadBegan("example/8b")  # noqa: E731
    return RunScreen(values.PLANNED), told(begun, lambda: messages.Progressed(2 * values.GIB, 15 * values.GIB), later)


@case("run-install")
def _(bench: Bench) -> tuple[QplanScreen, Then]:
    steps = ("making a virtual environment", 0.0), ("torch for cpu", 0.1), ("GPTQModel and what it needs", 0.4)
    stages = [lambda what=what, done=done: messages.Progressed(done, 1.0, what) for what, done in steps]
    begun = lambda: messages.InstallBegan(values.OFFER)  # noqa: E731
    return RunScreen(values.PLANNED.but(installs=(values.OFFER,))), told(begun, *stages)


@case("run-installed")
def _(bench: Bench) -> tuple[QplanScreen, Then]:
    ready = lambda: messages.InstallEnded(values.OFFER)  # noqa: E731
    begun = lambda: messages.InstallBegan(values.OFFER)  # noqa: E731
    moved = lambda: messages.Progressed(0, 100)  # noqa: E731
    return RunScreen(values.PLANNED.but(installs=(values.OFFER,))), told(begun, ready, began(0), moved)


@case("run-finetune")
def _(bench: Bench) -> tuple[QplanScreen, Then]:
    begun = lambda: messages.StepBegan(values.TRAIN_PLAN.steps[0])  # noqa: E731
    return RunScreen(values.TRAINING.but(plan=values.TRAIN_PLAN)), told(begun, lambda: messages.Progressed(3, 10))


@case("run-error")
def _(bench: Bench) -> tuple[QplanScreen, Then]:
    return RunScreen(values.PLANNED), told(began(0), lambda: messages.Failed(REFUSED))


@case("run-empty")
def _(bench: Bench) -> tuple[QplanScreen, Then]:
    return RunScreen(values.PLANNED), told(began(0), lambda: messages.Failed(Interrupted("stopped")))


@case("result-full")
def _(bench: Bench) -> tuple[QplanScreen, Then]:
    return ResultScreen(values.DONE), nothing


@case("result-error")
def _(bench: Bench) -> tuple[QplanScreen, Then]:
    return ResultScreen(values.DONE.but(outcome=values.outcome(outside=True))), nothing


@case("result-empty")
def _(bench: Bench) -> tuple[QplanScreen, Then]:
    return ResultScreen(values.PLANNED), nothing


def server(**known: Any) -> Callable[[], serving.ServingChanged]:
    """A server that is so far."""
    target = Path("out/report.json")
    command = "llama-server --model out/example-8b-Q6_K.gguf --ctx-size 8192 --n-gpu-layers 33 --port 8080"
    usual = {"server": "llama-server", "model": "example-8b-Q6_K", "command": command, "log": Path("serve-8080.log")}
    return lambda: serving.ServingChanged(serving.Serving(target=target, **{**usual, **known}))


ANSWERING = server(phase=serving.ANSWERS, url="http://127.0.0.1:8080/v1")


@case("result-serving")
def _(bench: Bench) -> tuple[QplanScreen, Then]:
    return ResultScreen(values.DONE), told(ANSWERING)


@case("serve-loading")
def _(bench: Bench) -> tuple[QplanScreen, Then]:
    return ServeScreen(values.DONE), told(server(phase=serving.STARTING))


@case("serve-full")
def _(bench: Bench) -> tuple[QplanScreen, Then]:
    Path("serve-8080.log").write_text("loading the model\nlistening on http://127.0.0.1:8080\n")
    return ServeScreen(values.DONE), told(ANSWERING)


@case("serve-empty")
def _(bench: Bench) -> tuple[QplanScreen, Then]:
    return ServeScreen(values.DONE), told(server(phase=serving.STOPPED))


@case("serve-error")
def _(bench: Bench) -> tuple[QplanScreen, Then]:
    return ServeScreen(values.DONE), told(server(phase=serving.FAILED, error=REFUSED))


@case("frontier-full")
def _(bench: Bench) -> tuple[QplanScreen, Then]:
    return FrontierScreen(values.CHOSEN), keys("down")


@case("frontier-empty")
def _(bench: Bench) -> tuple[QplanScreen, Then]:
    return FrontierScreen(values.KNOWN), nothing


@case("measurements-full")
def _(bench: Bench) -> tuple[QplanScreen, Then]:
    return MeasurementsScreen(values.KNOWN), nothing


@case("measurements-loading")
def _(bench: Bench) -> tuple[QplanScreen, Then]:
    bench.patch.setattr(measurements.survey, "measurements", bench.forever)
    return MeasurementsScreen(values.KNOWN), nothing


@case("measurements-empty")
def _(bench: Bench) -> tuple[QplanScreen, Then]:
    bench.patch.setattr(measurements.survey, "measurements", answer(()))
    return MeasurementsScreen(values.KNOWN), nothing


@case("measurements-error")
def _(bench: Bench) -> tuple[QplanScreen, Then]:
    bench.patch.setattr(measurements.survey, "measurements", answer(InputError("the store is damaged")))
    return MeasurementsScreen(values.KNOWN), nothing


@case("settings-full")
def _(bench: Bench) -> tuple[QplanScreen, Then]:
    return SettingsScreen(values.KNOWN), nothing


@case("settings-key")
def _(bench: Bench) -> tuple[QplanScreen, Then]:
    return SettingsScreen(values.KNOWN), keys("enter")


@case("compare-loading")
def _(bench: Bench) -> tuple[QplanScreen, Then]:
    bench.patch.setattr(compare.reporting, "load_run", bench.forever)
    return CompareScreen(values.DONE, Path("out/report.json")), nothing


@case("compare-error")
def _(bench: Bench) -> tuple[QplanScreen, Then]:
    bench.patch.setattr(compare.reporting, "load_run", answer(InputError("out has no report", code="no-report")))
    return CompareScreen(values.DONE, Path("out/report.json")), nothing


@case("compare-full")
def _(bench: Bench) -> tuple[QplanScreen, Then]:
    from planner.report.document import parse
    from planner.report.page import Run

    made = Run(report=parse(values.report(), "it"), where="out")
    bench.patch.setattr(compare.reporting, "load_run", answer(made))
    return CompareScreen(values.DONE, Path("out/report.json")), keys("o", "enter")


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", CASES)
def test_the_screen_looks_as_it_did(name: str, size: str, bench: Bench, request: pytest.FixtureRequest) -> None:
    screen, then = CASES[name](bench)
    shown = []

    async def script(pilot: Any, app: Wizard) -> None:
        await then(pilot, app)
        await pilot.pause(0.1)
        assert screen in app.screen_stack
        shown.append(text_of(app))
        bench.released.set()
        await settle(pilot)

    waits = name.endswith("-loading") or name.startswith("run-")
    drive(Showing(screen), script, SIZES[size], settled=not waits)
    path = SNAPSHOTS / f"{name}-{size}.txt"
    if request.config.getoption("--update-snapshots"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(shown[0])
    assert path.is_file(), "there is no snapshot yet: run with --update-snapshots and look at it"
    assert shown[0] == path.read_text()


@pytest.mark.parametrize("name", [name for name in CASES if name.endswith("-full")])
def test_every_screen_is_whole_at_every_size(name: str, bench: Bench) -> None:
    screen, then = CASES[name](bench)

    async def script(pilot: Any, app: Wizard) -> None:
        await then(pilot, app)
        for width, height in ((200, 60), (100, 30), (80, 24)):
            await pilot.resize_terminal(width, height)
            await pilot.pause(0.1)
            lines = text_of(app).splitlines()
            assert len(lines) == height and max(map(len, lines)) <= width
            assert lines[0].startswith(" qplan ") and "Quit" in lines[-1]
        bench.released.set()

    drive(Showing(screen), script, settled=not name.startswith("run-"))


PICTURES = {"wizard-choose": "choose-full", "wizard-result": "result-full"}
"""Pictures for the README, made here so that they show what there is."""


@pytest.mark.parametrize("name", PICTURES)
def test_the_pictures_of_the_readme_are_of_this_version(
    name: str, bench: Bench, request: pytest.FixtureRequest
) -> None:
    screen, then = CASES[PICTURES[name]](bench)
    shown = []

    async def script(pilot: Any, app: Wizard) -> None:
        await then(pilot, app)
        shown.append(re.sub(r"terminal-\d+", "terminal-0", app.export_screenshot(title="qplan wizard")))

    drive(Showing(screen), script, (110, 34))
    path = SNAPSHOTS / f"{name}.svg"
    if request.config.getoption("--update-snapshots"):
        path.write_text(shown[0])
    assert shown[0] == path.read_text()


def test_every_snapshot_belongs_to_a_screen() -> None:
    wanted = {f"{name}-{size}.txt" for name in CASES for size in SIZES}
    assert {path.name for path in SNAPSHOTS.glob("*.txt")} == wanted
