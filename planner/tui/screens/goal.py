"""Goal: use, context, users at once, objective, limits; their effect is shown as they are typed."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from rich.console import RenderableType
from rich.text import Text
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.content import Content
from textual.timer import Timer
from textual.widget import Widget
from textual.widgets import Checkbox, Input, Label, Select, Static

from planner.core.errors import DoesNotFit, QplanError, UsageError
from planner.core.finetuning import BASES, FinetuneDecision, FinetuneWish
from planner.core.wording import finetune_label
from planner.core.workload import KV_TYPES, OBJECTIVES, Workload
from planner.tui import texts
from planner.tui.messages import Answered, Failed, Forward
from planner.tui.screens.base import QplanScreen
from planner.tui.state import State
from planner.tui.widgets.memory import MemoryBars
from planner.workflow import goals
from planner.workflow.finetuning import decided
from planner.workflow.recommend import Recommendation, recommend_for

PAUSE_SECONDS = 0.15
SHOWN = 3
OWN = "own"


class Field(Input):
    """A field of one line."""

    def __init__(self, value: str, placeholder: str, id: str, help_text: str) -> None:
        super().__init__(value, placeholder=placeholder, id=id, compact=True)
        self.HELP = help_text  # type: ignore[misc]  # the help panel asks the focused widget, not its class


class Box(Checkbox):
    """A checkbox whose mark, not its colour alone, says whether it is set."""

    HELP = "## Leave the GPUs alone\n\nPlan for CPU and RAM. Command line: `--cpu-only`."

    def __init__(self, label: str, value: bool, *, id: str) -> None:
        super().__init__(label, value, id=id, compact=True)
        self.BUTTON_INNER = "X" if value else " "

    def watch_value(self) -> None:
        """The mark goes with the value."""
        self.BUTTON_INNER = "X" if self.value else " "
        super().watch_value()


FIELDS = {
    "context": ("Context", "what fits", "## Context\n\nTokens that one conversation may have. Empty: 8192, or what the "
                "model was trained with, or what fits. Command line: `--context`."),
    "users": ("Users at once", "1", "## Users at once\n\nConversations served at the same time; each has a context of "
              "its own. Command line: `--concurrency`."),
    "min-decode": ("Least speed", "tokens/s", "## Least speed\n\nWhat decodes slower is rejected. Command line: "
                   "`--min-decode`."),
    "max-memory": ("Most memory", "as in 10GiB", "## Most memory\n\nOn one device: the GPU where one is used, else "
                   "RAM. Command line: `--max-memory`."),
}  # fmt: skip

FINETUNE_FIELDS = {
    "dataset": ("Data", "a smoke test", "## Data\n\nA .jsonl file (each line an object with *text*, *messages*, or "
                "*prompt* and *completion*) or plain text. Empty: a few steps on qplan's own texts, to see that it "
                "works. Command line: `--dataset`."),
    "rank": ("LoRA rank", "16", "## Rank\n\nOf the trained matrices. Command line: `--lora-rank`."),
    "sequence": ("Sequence", "the most that fit", "## Sequence\n\nTokens of a sequence. Command line: "
                 "`--sequence-length`."),
    "batch": ("Batch", "16", "## Batch\n\nSequences of an optimizer step. Command line: `--batch`."),
}  # fmt: skip
"""Of the objective ``finetune``; shown with it alone."""
FINETUNE = "finetune"


class GoalScreen(QplanScreen):
    """The third step."""

    TITLE_TEXT = "Goal"
    LEADS_ON = True

    def __init__(self, state: State) -> None:
        super().__init__(state)
        self._pause: Timer | None = None
        self._answer: Recommendation | None = None
        """To what the form says now."""
        self._goes_on = False
        """A person went on before there was an answer."""
        self._prompt_tokens = state.workload.prompt_tokens

    def body(self) -> Iterable[Widget]:
        """The form, and what it leads to."""
        work = self.state.workload
        values = {
            "context": str(work.context) if work.context_fixed else "",
            "users": str(work.concurrency),
            "min-decode": f"{work.min_decode_tokens_per_second:g}" if work.min_decode_tokens_per_second else "",
            "max-memory": str(work.max_memory_bytes) if work.max_memory_bytes else "",
            **self._training_values(),
        }
        uses = [(f"{use.name}: {use.summary}", use.name) for use in goals.USES]
        yield Horizontal(
            VerticalScroll(
                _row("Use", Select(uses, prompt="my own options", id="use", compact=True)),
                *(_row(t, Field(values[name], hint, name, text)) for name, (t, hint, text) in FIELDS.items()),
                _row("Objective", _select(OBJECTIVES, work.objective, "objective")),
                Vertical(
                    *(_row(t, Field(values[n], hint, n, text)) for n, (t, hint, text) in FINETUNE_FIELDS.items()),
                    _row("Base", _select((goals.AUTOMATIC, *BASES), work.finetuning.base or goals.AUTOMATIC, "base")),
                    id="finetune-form",
                ),
                _row("KV cache", _select((goals.AUTOMATIC, *KV_TYPES), work.kv_type or goals.AUTOMATIC, "kv-type")),
                _row("", Box("leave the GPUs alone", work.cpu_only, id="cpu-only")),
                Static("", id="goal-error"),
                id="form",
            ),
            Vertical(
                Static("", id="effect"),
                MemoryBars(id="goal-memory"),
                Static("", id="effect-notes"),
                classes="card",
                id="goal-effect",
            ),
            classes="columns",
        )

    def _training_values(self) -> dict[str, str]:
        wish, data = self.state.workload.finetuning, self.state.dataset
        known = {"rank": wish.rank, "sequence": wish.sequence_length, "batch": wish.batch}
        return {"dataset": str(data) if data else "", **{name: str(value or "") for name, value in known.items()}}

    def on_mount(self) -> None:
        """The effect of what is given already."""
        self._show_form()
        self.query_one("#goal-effect").border_title = "what it leads to"
        self.query_one("#goal-effect").border_subtitle = "Enter shows all ways"
        self.query_one("#context", Input).focus()
        self.call_after_refresh(self._ask)

    def on_input_changed(self) -> None:
        """A field changed."""
        self._later()

    def on_checkbox_changed(self) -> None:
        """The box changed."""
        self._later()

    def on_select_changed(self, event: Select.Changed) -> None:
        """A choice changed; a use fills the form with its options."""
        if event.select.id == "use" and not event.select.is_blank():
            use = next(use for use in goals.USES if use.name == event.value)
            self.query_one("#context", Input).value = str(use.context)
            self.query_one("#users", Input).value = str(use.concurrency)
            self._prompt_tokens = use.prompt_tokens
        self._show_form()
        self._later()

    def _show_form(self) -> None:
        """Fields of a fine-tuning where that is the objective."""
        self.query_one("#finetune-form").display = self.query_one("#objective", Select).value == FINETUNE

    def on_input_submitted(self) -> None:
        """Enter goes on."""
        self.action_forward()

    def _later(self) -> None:
        if self._pause is not None:
            self._pause.stop()
        self._answer, self._goes_on = None, False
        self._pause = self.set_timer(PAUSE_SECONDS, self._ask)

    def _workload(self) -> Workload:
        """What the form says.

        Raises:
            UsageError: a field holds what it cannot.
        """
        field = {name: self.query_one(f"#{name}", Input).value for name in FIELDS}
        return goals.workload_of(
            context=field["context"],
            users=field["users"],
            min_decode=field["min-decode"],
            max_memory=field["max-memory"],
            objective=str(self.query_one("#objective", Select).value),
            kv_type=str(self.query_one("#kv-type", Select).value),
            cpu_only=self.query_one("#cpu-only", Checkbox).value,
            prompt_tokens=self._prompt_tokens,
            finetuning=self._finetuning(),
            base=self.state.workload,
        )

    def _finetuning(self) -> FinetuneWish | None:
        if self.query_one("#objective", Select).value != FINETUNE:
            return None
        field = {name: self.query_one(f"#{name}", Input).value for name in FINETUNE_FIELDS}
        return goals.finetune_wish(
            lora=str(self.query_one("#base", Select).value),
            rank=field["rank"],
            sequence_length=field["sequence"],
            batch=field["batch"],
            kept=self.state.workload.finetuning,
        )

    def _dataset(self, workload: Workload) -> Path | None:
        """What is trained with.

        Raises:
            InputError: there is no such file.
        """
        return goals.dataset(self.query_one("#dataset", Input).value) if workload.objective == FINETUNE else None

    def _ask(self) -> None:
        model, hardware, simulated = self.state.model, self.state.hardware, self.state.profile is not None
        if model is None or hardware is None:
            return
        try:
            workload = self._workload()
            dataset = self._dataset(workload)
        except QplanError as error:
            self._complain(error)
            return
        self.query_one("#goal-error", Static).update("")
        self._answer = None

        def answer() -> Answered:
            return Answered(decided(recommend_for(model, hardware, workload, simulated=simulated), dataset))

        self.ask(answer, group="answer")

    def _complain(self, error: QplanError) -> None:
        """A mistake in a field is said below the form, or beside one that is longer than the screen.

        A dialog would interrupt the typing.
        """
        self._answer, self._goes_on = None, False
        parts = " · ".join(part for part in (error.what, error.numbers, error.hint) if part)
        said = Content.assemble((parts, "$text-error"))
        is_seen = not self.query_one("#form").max_scroll_y
        self.query_one("#goal-error", Static).update(said if is_seen else "")
        self.query_one("#effect", Static).update("" if is_seen else said)
        self.query_one("#effect-notes", Static).update("")
        self.query_one(MemoryBars).show(())

    def on_failed(self, message: Failed) -> None:
        """What the workflow refuses as a wish is a mistake in the form as well."""
        if isinstance(message.error, UsageError):
            message.stop()
            self._complain(message.error)

    def on_answered(self, message: Answered) -> None:
        """Show what the goal leads to."""
        message.stop()
        self._answer = message.answer
        training = message.answer.finetuning
        chosen = None if training else message.answer.decision.chosen
        effect = _effect(message.answer) if training is None else _training_effect(training)
        self.query_one("#effect", Static).update(effect)
        self.query_one("#effect-notes", Static).update(texts.notes(message.answer.notes))
        memory = chosen.estimate.memory if chosen else None
        self.query_one(MemoryBars).show((*memory.devices, memory.host) if memory else ())
        if self._goes_on:
            self._goes_on = False
            self.action_forward()

    def action_forward(self) -> None:
        """On to the choice, if anything fits."""
        answer = self._answer
        if answer is None:
            self._goes_on = True
            return
        if not answer.fits:
            self.post_message(Failed(nothing_fits(answer, self._dataset(answer.workload))))
            return
        asked = self._workload()
        training = answer.finetuning.chosen if answer.finetuning else None
        changed = self.state.but(
            workload=asked,
            answer=answer,
            candidate=answer.decision.chosen,
            finetuning=training,
            dataset=self._dataset(asked),
        )
        self.post_message(Forward(changed))


def nothing_fits(answer: Recommendation, dataset: Path | None = None) -> QplanError:
    """The error of a goal that nothing reaches, with the nearest miss."""
    from planner.workflow.planning import Measuring, make_plan

    try:
        make_plan(answer, measuring=Measuring(dataset=dataset))
    except DoesNotFit as error:
        return error
    return DoesNotFit("nothing fits")


def _effect(answer: Recommendation) -> RenderableType:
    decision = answer.decision
    if decision.chosen is None:
        return texts.spaced(Text("nothing fits", "bold reverse"), texts.rejections(decision.rejected))
    context = f"for {answer.workload.context:,} tokens of context"
    lines = [Text(context, "dim")]
    for number, candidate in enumerate((decision.chosen, *decision.alternatives)[:SHOWN]):
        lines.append(Text(f"{'→' if number == 0 else ' '} {candidate.variant.label()}", "bold"))
        lines.append(Text(texts.short_numbers(candidate)))
    count = len(decision.alternatives) + 1
    lines.append(Text(f"{count} fit, {len(decision.rejected)} do not", "dim"))
    return texts.spaced(Text("\n").join(lines))


def _training_effect(decision: FinetuneDecision) -> RenderableType:
    if decision.chosen is None:
        hint = Text(f"hint: {decision.hint}") if decision.hint else Text()
        return texts.spaced(Text("nothing fits", "bold reverse"), texts.rejections(decision.rejected), hint)
    lines = []
    for number, choice in enumerate((decision.chosen, *decision.alternatives)):
        lines.append(Text(f"{'→' if number == 0 else ' '} {finetune_label(choice.settings)}", "bold"))
        lines.append(Text(texts.short_training(choice)))
    return texts.spaced(Text("\n").join(lines))


def _row(title: str, field: Widget) -> Horizontal:
    return Horizontal(Label(title), field, classes="form-row")


def _select(options: tuple[str, ...], value: str, id: str) -> Select[str]:
    return Select([(option, option) for option in options], value=value, allow_blank=False, id=id, compact=True)
