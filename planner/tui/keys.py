"""What can be done, and by which key: one table. A key can be changed in the settings; an action's id never changes."""

from __future__ import annotations

from textual.binding import Binding, BindingType

APP: list[BindingType] = [
    Binding("ctrl+p", "command_palette", "Palette", id="app.palette", show=False, priority=True),
    Binding("f1", "toggle_help", "Help", id="app.help", priority=True),
    Binding("f2", "go('settings')", "Settings", id="app.settings", show=False),
    Binding("ctrl+q", "leave", "Quit", id="app.quit", priority=True),
]
STEP: list[BindingType] = [
    Binding("escape", "back", "Back", id="step.back"),
    Binding("ctrl+n", "forward", "Next", id="step.forward", priority=True),
]
HARDWARE: list[BindingType] = [Binding("r", "again", "Look again", id="hardware.again")]
MODEL: list[BindingType] = [Binding("ctrl+o", "browse", "Open files", id="model.browse", priority=True)]
CHOOSE: list[BindingType] = [
    Binding("e", "explain", "Explain", id="choose.explain"),
    Binding("x", "rejected", "Rejected", id="choose.rejected"),
    Binding("left_square_bracket", "context(-1)", "Context", id="choose.shorter", key_display="[ ]"),
    Binding("right_square_bracket", "context(1)", "Longer context", id="choose.longer", show=False),
    Binding("k", "kv_type", "KV", id="choose.kv-type"),
    Binding("w", "what_if", "What-if", id="choose.what-if"),
    Binding("f", "frontier", "Plot", id="choose.frontier"),
]
FINETUNE: list[BindingType] = [Binding("x", "rejected", "Rejected", id="finetune.rejected")]
REVIEW: list[BindingType] = [Binding("ctrl+s", "save", "Save plan", id="review.save", priority=True)]
RUN: list[BindingType] = [
    Binding("c", "cancel", "Cancel", id="run.cancel"),
    Binding("r", "resume", "Resume", id="run.resume"),
]
RESULT: list[BindingType] = [
    Binding("o", "open_report", "Open report", id="result.open"),
    Binding("s", "serve", "Serve", id="result.serve"),
    Binding("c", "compare", "Compare", id="result.compare"),
    Binding("n", "new", "New", id="result.new"),
]
SERVE: list[BindingType] = [
    Binding("x", "stop", "Stop", id="serve.stop"),
    Binding("r", "again", "Start again", id="serve.again"),
]

TABLE: dict[str, list[BindingType]] = {
    "everywhere": APP,
    "every step": STEP,
    "Hardware": HARDWARE,
    "Model": MODEL,
    "Choose": CHOOSE,
    "Fine-tune": FINETUNE,
    "Review": REVIEW,
    "Run": RUN,
    "Result": RESULT,
    "Serve": SERVE,
}


def bindings() -> tuple[tuple[str, Binding], ...]:
    """Every binding with the place where it works."""
    return tuple((place, b) for place, found in TABLE.items() for b in found if isinstance(b, Binding))


def known(keymap: dict[str, str]) -> dict[str, str]:
    """The part of a keymap whose actions exist."""
    ids = {binding.id for _, binding in bindings()}
    return {id_: key for id_, key in keymap.items() if id_ in ids and key}
