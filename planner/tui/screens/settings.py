"""Settings: the theme, and the key of every action."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from textual import events
from textual.app import ComposeResult
from textual.containers import Horizontal, Vertical
from textual.content import Content
from textual.screen import ModalScreen
from textual.widget import Widget
from textual.widgets import DataTable, Label, Select, Static

from planner.core.errors import QplanError
from planner.tui import keys, settings
from planner.tui.messages import Failed
from planner.tui.screens.base import QplanScreen


class KeyDialog(ModalScreen[str | None]):
    """The next key pressed is the answer."""

    def __init__(self, action: str) -> None:
        super().__init__()
        self.action = action

    def compose(self) -> ComposeResult:
        """What to do."""
        with Vertical(classes="dialog"):
            yield Static(Content.assemble("press a key for ", (self.action, "bold"), " · Esc keeps the old one"))

    def on_key(self, event: events.Key) -> None:
        """Taken, whatever it is bound to elsewhere."""
        event.stop()
        event.prevent_default()
        self.dismiss(None if event.key == "escape" else event.key)


class SettingsScreen(QplanScreen):
    """Kept in wizard.json."""

    TITLE_TEXT = "Settings"

    def body(self) -> Iterable[Widget]:
        """Theme above keys."""
        themes = [(name, name) for name in sorted(self.app.available_themes)]
        yield Horizontal(
            Label("Theme"),
            Select(themes, value=self.app.theme, allow_blank=False, id="theme", compact=True),
            classes="form-row",
        )
        yield Static(" Enter on a row, then the new key; Delete puts the usual one back", classes="muted")
        yield DataTable(id="keys", cursor_type="row", zebra_stripes=True)

    def on_mount(self) -> None:
        """The keys as they are."""
        self.query_one(DataTable).add_columns("where", "action", "key", "usual key")
        self.query_one(DataTable).focus()
        self._fill()

    def _fill(self) -> None:
        table = self.query_one(DataTable)
        row = table.cursor_row
        table.clear()
        changed = settings.load().keymap
        for place, binding in keys.bindings():
            table.add_row(
                place, binding.description, changed.get(str(binding.id), binding.key), binding.key, key=binding.id
            )
        table.move_cursor(row=row)

    def on_select_changed(self, event: Select.Changed) -> None:
        """Another theme, at once and from now on."""
        if event.select.id == "theme" and event.value != self.app.theme:
            self.app.theme = str(event.value)
            self._keep(theme=str(event.value))

    def on_data_table_row_selected(self, event: DataTable.RowSelected) -> None:
        """Ask for a key."""
        id_ = str(event.row_key.value)
        name = next(binding.description for _, binding in keys.bindings() if binding.id == id_)
        self.app.push_screen(KeyDialog(name), lambda key: self._bind(id_, key))

    def on_key(self, event: events.Key) -> None:
        """Delete puts the usual key back."""
        table = self.query_one(DataTable)
        if event.key == "delete" and table.has_focus and table.row_count:
            id_ = table.coordinate_to_cell_key(table.cursor_coordinate).row_key.value
            kept = {name: key for name, key in settings.load().keymap.items() if name != id_}
            self._keep(keymap=kept)

    def _bind(self, id_: str, key: str | None) -> None:
        if key is not None:
            self._keep(keymap={**settings.load().keymap, id_: key})

    def _keep(self, **changes: object) -> None:
        changed = dataclasses.replace(settings.load(), **changes)  # type: ignore[arg-type]
        try:
            settings.save(changed)
        except QplanError as error:
            self.post_message(Failed(error))
        self.app.set_keymap(changed.keymap)
        self._fill()
