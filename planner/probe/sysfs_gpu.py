"""Display controllers under ``/sys/class/drm``: what AMD's and Intel's sources share."""

from __future__ import annotations

from dataclasses import dataclass

from planner.core import devices
from planner.core.data import read_table
from planner.core.device_table import DeviceRow
from planner.probe.reader import Reader, whole

# GT/s as sysfs prints a link's speed → PCIe generation.
_GENERATIONS = {"2.5": 1, "5.0": 2, "8.0": 3, "16.0": 4, "32.0": 5, "64.0": 6}


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """One PCI display controller; numbers in lower-case hexadecimal without ``0x``."""

    folder: str
    """Its device directory, as ``/sys/class/drm/card0/device``."""
    vendor: str
    device: str
    revision: str
    link: str | None = None


def cards(reader: Reader, vendor: str) -> list[Card]:
    """Cards of the PCI vendor ``vendor`` (``1002`` AMD, ``8086`` Intel), one for each device."""
    found: dict[str, Card] = {}
    for path in reader.glob("/sys/class/drm/card[0-9]*/device"):
        if "-" in path.split("/")[4]:
            continue  # a connector such as card0-DP-1
        if _hex(reader.line(f"{path}/vendor")) != vendor:
            continue
        card = Card(
            folder=path,
            vendor=vendor,
            device=_hex(reader.line(f"{path}/device")),
            revision=_hex(reader.line(f"{path}/revision")),
            link=_link(reader.line(f"{path}/max_link_speed"), reader.line(f"{path}/max_link_width")),
        )
        found.setdefault(reader.resolve(path), card)
    return list(found.values())


def _hex(text: str) -> str:
    value = text.strip().lower().removeprefix("0x")
    return value if value and all(c in "0123456789abcdef" for c in value) and len(value) <= 8 else ""


def _link(speed: str, width: str) -> str | None:
    """``16.0 GT/s PCIe`` and ``16`` → ``PCIe 4.0 x16``; the card's maximum, as an idle link is slow."""
    generation = _GENERATIONS.get(speed.split(" ")[0])
    lanes = whole(width, high=32)
    return None if generation is None or lanes is None else f"PCIe {generation}.0 x{lanes}"


def marketing_name(reader: Reader, card: Card) -> str | None:
    """The product's name by its PCI numbers: ``data/pci_ids.csv``, then libdrm's table, then ``pci.ids``."""
    for row in read_table("pci_ids.csv"):
        same = row["vendor"] == card.vendor and row["device"] == card.device
        if same and row["revision"] in ("", card.revision):
            return row["name"]
    if card.vendor == "1002" and (name := _libdrm_name(reader.text("/usr/share/libdrm/amdgpu.ids"), card)):
        return name
    for path in ("/usr/share/hwdata/pci.ids", "/usr/share/misc/pci.ids"):
        if name := pci_ids_name(reader.text(path), card.vendor, card.device):
            return name
    return None


def _libdrm_name(text: str, card: Card) -> str | None:
    for line in text.splitlines():
        parts = [part.strip() for part in line.split(",", 2)]
        if len(parts) == 3 and parts[0].lower() == card.device and parts[1].lower().zfill(2) == card.revision.zfill(2):
            return parts[2] or None
    return None


def pci_ids_name(text: str, vendor: str, device: str) -> str | None:
    """The marketing name in brackets, else the chip's, of a device in the format of ``pci.ids``."""
    start = text.find(f"\n{vendor}  ")
    if start < 0 or not device:
        return None
    for line in text[start + 1 :].splitlines()[1:]:
        if line and not line.startswith(("\t", "#")):
            return None
        if line.startswith(f"\t{device}  "):
            name = line[len(device) + 3 :].strip()
            return name.partition("[")[2].rstrip("]") or name or None
    return None


def row_of(name: str | None, memory_bytes: int | None) -> DeviceRow | None:
    """The device row of ``name``; of alternatives such as ``RX 6800/6800 XT / 6900 XT`` the one that fits the memory.

    Several that fit are several products, and none is chosen.
    """
    if not name:
        return None
    if row := devices.find(name, memory_bytes=memory_bytes):
        return row
    parts = [part.strip() for part in name.partition("[")[2].rstrip("]").split("/")] if "[" in name else name.split("/")
    if len(parts) < 2:
        return None
    family = " ".join(word for word in parts[0].split() if not any(c.isdigit() for c in word) and word != "XT")
    found = {
        row.device: row
        for part in parts
        for row in [devices.find(f"{family} {part.strip()}", memory_bytes=memory_bytes)]
        if row is not None
    }
    return next(iter(found.values())) if len(found) == 1 else None
