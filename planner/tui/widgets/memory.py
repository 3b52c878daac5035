"""A memory bar per device; devices are never added up."""

from __future__ import annotations

from textual import events
from textual.content import Content
from textual.widgets import Static

from planner.core.estimates import DeviceMemory
from planner.core.units import format_bytes

PARTS = (
    ("weights", "█", "$primary", "weights_bytes"),
    ("KV", "▓", "$warning", "kv_cache_bytes"),
    ("compute", "▒", "$success", "compute_bytes"),
    ("overhead", "░", "$text-muted", "overhead_bytes"),
)
"""Each part has a fill of its own, so that the bar can be read without colours."""
NAME_WIDTH = 18
NARROW = 60
"""Below this width the bar has a line of its own."""


class MemoryBars(Static):
    """Weights, KV cache, compute buffers and overhead of every device against what is usable there."""

    HELP = """\
## Memory

A bar for each device, as long as what is usable there. `█` weights, `▓` KV cache, `▒` compute buffers, `░` what the
runtime adds outside its own buffers. In brackets: with pages of the mapped file that the system may drop. Devices are
never added up: a model fits if it fits on each.
"""

    def __init__(self, id: str | None = None) -> None:
        super().__init__(id=id)
        self._devices: tuple[DeviceMemory, ...] = ()

    def show(self, devices: tuple[DeviceMemory, ...]) -> None:
        """Draw these devices."""
        self._devices = tuple(device for device in devices if device.total_bytes)
        self._draw()

    def on_resize(self, _: events.Resize) -> None:
        """Bars are as wide as there is room."""
        self._draw()

    def _draw(self) -> None:
        width = max(self.content_size.width or 76, 24)
        room = max((len(_total(device)) for device in self._devices), default=0)
        lines = [line for device in self._devices for line in _lines(device, width, room)]
        if self._devices:
            lines.append(_legend(max(self._devices, key=lambda device: device.total_bytes)))
        self.update(Content("\n").join(lines))


def _lines(device: DeviceMemory, width: int, total_width: int) -> list[Content]:
    """Name, bar and total in a line; where it is narrow, the bar has a line of its own."""
    total = f"{_total(device):>{total_width}}"
    over = device.capacity_bytes is not None and device.needed_bytes > device.capacity_bytes
    words = (total, "bold $error" if over else "")
    if width < NARROW:
        name = _last_words(device.name, max(width - len(total) - 1, 4))
        gap = " " * max(width - len(name) - len(total), 1)
        return [Content.assemble((name, "bold"), gap, words), Content.assemble(*_bar(device, width))]
    bar = _bar(device, width - NAME_WIDTH - len(total) - 1)
    return [Content.assemble((f"{_last_words(device.name, NAME_WIDTH - 1):<{NAME_WIDTH}}", "bold"), *bar, " ", words)]


def _total(device: DeviceMemory) -> str:
    """What is needed, with the droppable pages in brackets, of what is usable."""
    needed, total = format_bytes(device.needed_bytes), format_bytes(device.total_bytes)
    return f"{needed}{f' ({total})' if total != needed else ''} of {format_bytes(device.capacity_bytes)}"


def _bar(device: DeviceMemory, room: int) -> list[tuple[str, str]]:
    whole = max(device.capacity_bytes or 0, device.total_bytes)
    parts, used = [], 0
    for _, fill, colour, field in PARTS:
        size = getattr(device, field)
        cells = min(max(round(room * size / whole), 1 if size else 0), room - used)
        used += cells
        parts.append((fill * cells, colour))
    return [*parts, ("·" * (room - used), "$text-muted")]


def _last_words(name: str, width: int) -> str:
    """The end of a name that fits: ``NVIDIA GeForce RTX 4090`` → ``GeForce RTX 4090``."""
    words = name.split()
    while len(words) > 1 and len(" ".join(words)) > width:
        words.pop(0)
    return " ".join(words)[:width]


def _legend(device: DeviceMemory) -> Content:
    parts: list[tuple[str, str]] = []
    for name, fill, colour, field in PARTS:
        if size := getattr(device, field):
            parts += [
                (fill, colour),
                (f"\u00a0{name}\u00a0{format_bytes(size).replace(' ', chr(0xA0))}  ", "$text-muted"),
            ]
    return Content.assemble(*parts)
