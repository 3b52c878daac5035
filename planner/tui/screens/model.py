"""Model: search the catalog, paste a hub id, open a directory or a GGUF file."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from rich.console import Group
from rich.text import Text
from textual import events
from textual.containers import Horizontal, VerticalScroll
from textual.content import Content
from textual.timer import Timer
from textual.widget import Widget
from textual.widgets import Input, OptionList, Static
from textual.widgets.option_list import Option

from planner.core.units import format_bytes, format_count
from planner.tui import keys, texts
from planner.tui.messages import Forward, ModelRead, ModelsFound
from planner.tui.screens.base import QplanScreen
from planner.tui.screens.dialogs import FileChooser
from planner.tui.state import State
from planner.workflow import library

PAUSE_SECONDS = 0.12
"""After the last key before the catalog is searched."""
TYPED = "typed"
STRAIGHT = "demo"


class ModelInput(Input):
    """What the model is called, or where it lies."""

    HELP = """\
## Which model

Type part of a name to search the catalog (`llama 8b`), or give one of these:

- a checkpoint directory or a GGUF file: `~/models/mistral`, or open one with **ctrl+o**
- a hub id: `org/name`, `org/name@revision`, `org/name:file.gguf` (only headers are fetched)
- a bare size: `14b`, `30b-a3b`
- `demo`, the small model that comes with qplan

Command line: `qplan models`, `qplan models NAME`.
"""


class ModelScreen(QplanScreen):
    """The second step."""

    TITLE_TEXT = "Model"
    LEADS_ON = True
    BINDINGS = keys.MODEL

    def __init__(self, state: State) -> None:
        super().__init__(state)
        self._pause: Timer | None = None
        self._going = False
        """Go on as soon as the model is read."""

    def body(self) -> Iterable[Widget]:
        """The field, the list, and the model under the cursor."""
        yield ModelInput(self.state.model_text, placeholder="search, path, hub id or size", id="model-text")
        yield Horizontal(
            OptionList(id="models"),
            VerticalScroll(Static("", id="model-facts"), classes="card", id="model-card"),
            classes="columns",
        )

    def on_mount(self) -> None:
        """The catalog is read once the screen is painted."""
        self.query_one("#models").border_title = "catalog"
        self.query_one("#models").border_subtitle = "Enter takes it"
        self.query_one("#model-card").border_title = "the model"
        self.query_one(ModelInput).focus()
        self.call_after_refresh(self._search)

    def on_input_changed(self) -> None:
        """Search when the typing pauses."""
        if self._pause is not None:
            self._pause.stop()
        self._pause = self.set_timer(PAUSE_SECONDS, self._search)

    def _search(self) -> None:
        text = self.query_one(ModelInput).value.strip()
        self.ask(lambda: ModelsFound(text, library.search(text)), group="search")

    def on_models_found(self, message: ModelsFound) -> None:
        """List them; what was typed comes first where it is no name of the catalog."""
        message.stop()
        listed = self.query_one("#models", OptionList)
        listed.clear_options()
        names = [entry.name for entry in message.entries]
        known = names or STRAIGHT.startswith(message.text.lower())
        if message.text and (library.names_itself(message.text) or not known):
            listed.add_option(Option(Content.assemble("use ", (message.text, "bold"), " as it is"), id=TYPED))
        if STRAIGHT.startswith(message.text.lower()):
            listed.add_option(Option(Content.assemble(f"{STRAIGHT:<26}", ("  5.8 M", "$text-muted")), id=STRAIGHT))
        for entry in message.entries:
            size = f"{format_count(entry.parameter_count):>8}" if entry.parameter_count else " " * 8
            listed.add_option(Option(Content.assemble(f"{entry.name:<26}", (size, "$text-muted")), id=entry.name))
        if listed.option_count:
            listed.highlighted = names.index(message.text) if message.text in names else 0

    def on_option_list_option_highlighted(self, event: OptionList.OptionHighlighted) -> None:
        """Show the model under the cursor; what was typed is only looked up when it is taken."""
        if event.option_id == TYPED:
            self.query_one("#model-facts", Static).update("Enter looks it up")
        elif event.option_id:
            self._read(event.option_id)

    def _read(self, text: str) -> None:
        def read() -> ModelRead:
            model = library.resolve(text)
            return ModelRead(text, model, library.sizes(model))

        self.ask(read, group="model")

    def on_model_read(self, message: ModelRead) -> None:
        """Show it, and go on if it was taken."""
        message.stop()
        self.state = self.state.but(model=message.model, model_text=message.text)
        sizes = [(name, format_bytes(size)) for name, size in message.sizes]
        self.query_one("#model-facts", Static).update(
            texts.spaced(
                texts.facts(texts.model_facts(message.model)),
                Group(Text("file in GGUF types", "bold"), texts.facts(sizes)),
                texts.notes(message.model.notes),
            )
        )
        if self._going:
            self._going = False
            self.post_message(Forward(self.state))

    def on_failed(self) -> None:
        """The error goes to the wizard; there is nothing to go on with."""
        self._going = False

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        """Enter or a click takes a model."""
        self._take(self.query_one(ModelInput).value.strip() if event.option_id == TYPED else str(event.option_id))

    def on_input_submitted(self) -> None:
        """Enter in the field takes the model under the cursor."""
        self.action_forward()

    def _take(self, text: str) -> None:
        self._going = True
        self.query_one("#model-facts", Static).update(f"reading {text} …")
        self._read(text)

    def action_forward(self) -> None:
        """Take the model under the cursor."""
        listed = self.query_one("#models", OptionList)
        typed = self.query_one(ModelInput).value.strip()
        option = listed.highlighted_option
        chosen = typed if option is None or option.id == TYPED else str(option.id)
        if chosen:
            self._take(chosen)

    def on_key(self, event: events.Key) -> None:
        """The arrow leads from the field into the list."""
        if event.key == "down" and self.query_one(ModelInput).has_focus:
            event.stop()
            self.query_one("#models", OptionList).focus()

    def action_browse(self) -> None:
        """Open a directory or file of this machine."""
        self.app.push_screen(FileChooser(Path.cwd()), self._browsed)

    def _browsed(self, path: Path | None) -> None:
        if path is not None:
            self.query_one(ModelInput).value = str(path)
            self._take(str(path))
