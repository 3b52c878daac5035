"""Modal dialogs: an error with its hint, a question, a page of text, a choice of files."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from rich.console import RenderableType
from textual.app import ComposeResult
from textual.binding import BindingType
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.content import Content
from textual.screen import ModalScreen
from textual.widgets import Button, DirectoryTree, Static

from planner.core.errors import QplanError


class ErrorDialog(ModalScreen[None]):
    """What went wrong, the numbers, a hint that works; the wizard lives on."""

    BINDINGS: ClassVar[list[BindingType]] = [("escape,enter", "dismiss", "Close")]

    def __init__(self, error: QplanError) -> None:
        super().__init__()
        self.error = error

    def compose(self) -> ComposeResult:
        """The four parts of an error."""
        with Vertical(classes="dialog error"):
            yield Static(Content.assemble((f"{self.error.what} ", "bold"), (f"[{self.error.code}]", "$text-muted")))
            if self.error.numbers:
                with VerticalScroll(classes="numbers"):
                    yield Static(Content(self.error.numbers))
            if self.error.hint:
                yield Static(Content.assemble(("hint: ", "bold $accent"), self.error.hint), classes="hint")
            yield Button("Close", variant="primary")

    def on_button_pressed(self) -> None:
        """Back to where it happened."""
        self.dismiss()


class Question(ModalScreen[bool]):
    """A question with two answers."""

    BINDINGS: ClassVar[list[BindingType]] = [("y", "answer(True)", "Yes"), ("n,escape", "answer(False)", "No")]

    def __init__(self, question: str, yes: str = "Yes", no: str = "No") -> None:
        super().__init__()
        self.question, self.yes, self.no = question, yes, no

    def compose(self) -> ComposeResult:
        """The question and its answers."""
        with Vertical(classes="dialog"):
            yield Static(Content(self.question))
            with Horizontal(classes="buttons"):
                yield Button(self.yes, id="yes", variant="primary")
                yield Button(self.no, id="no")

    def on_button_pressed(self, event: Button.Pressed) -> None:
        """An answer by mouse or Enter."""
        self.dismiss(event.button.id == "yes")

    def action_answer(self, yes: bool) -> None:
        """An answer by key."""
        self.dismiss(yes)


class Page(ModalScreen[None]):
    """A page of text to scroll."""

    BINDINGS: ClassVar[list[BindingType]] = [("escape,q", "dismiss", "Close")]

    def __init__(self, title: str, text: RenderableType) -> None:
        super().__init__()
        self.heading, self.text = title, text

    def compose(self) -> ComposeResult:
        """Title, text, how to close it."""
        with Vertical(classes="dialog page"):
            yield Static(Content.assemble((self.heading, "bold")), classes="heading")
            with VerticalScroll(can_focus=True):
                yield Static(self.text)
            yield Static(Content.assemble(("Esc closes · arrows scroll", "$text-muted")))

    def on_mount(self) -> None:
        """The arrows scroll at once."""
        self.query_one(VerticalScroll).focus()


class FileChooser(ModalScreen[Path | None]):
    """A directory or file of this machine."""

    BINDINGS: ClassVar[list[BindingType]] = [("escape", "dismiss(None)", "Cancel"), ("d", "take", "Take this folder")]

    def __init__(self, start: Path) -> None:
        super().__init__()
        self.start = start

    def compose(self) -> ComposeResult:
        """The tree."""
        with Vertical(classes="dialog page"):
            yield Static(Content.assemble(("Open a GGUF file, or a checkpoint directory", "bold")), classes="heading")
            yield DirectoryTree(self.start)
            yield Static(Content.assemble(("Enter takes a file · d takes a folder · Esc cancels", "$text-muted")))

    def on_directory_tree_file_selected(self, event: DirectoryTree.FileSelected) -> None:
        """A file was taken; one beside a config.json stands for its checkpoint."""
        beside = event.path.parent / "config.json"
        self.dismiss(event.path.parent if event.path.suffix != ".gguf" and beside.is_file() else event.path)

    def action_take(self) -> None:
        """The folder under the cursor."""
        node = self.query_one(DirectoryTree).cursor_node
        if node is not None and node.data is not None:
            found = node.data.path
            self.dismiss(found if found.is_dir() else found.parent)
