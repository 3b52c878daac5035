"""Bytes, GiB and tokens per second: the only place where a unit is parsed or printed.

Inside qplan every size is a whole number of bytes and every rate is per second.
GiB (2**30) exists here and on paper; a vendor's GB (10**9) is converted when its row is read.
"""

from __future__ import annotations

import re

from planner.core.errors import UsageError

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30

_SCALE = {
    "": 1,
    "b": 1,
    "kib": KIB,
    "mib": MIB,
    "gib": GIB,
    "tib": 1 << 40,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "k": KIB,
    "m": MIB,
    "g": GIB,
    "t": 1 << 40,
}
_SIZE_DIGITS = 30
"""More digits than any memory's size has; a float holds them all."""
_BYTES = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*")


def parse_bytes(text: str) -> int:
    """Bytes in ``text``: ``10GiB``, ``10GB``, ``512M``, ``1073741824``.

    ``G`` alone means GiB, as memory is sold in powers of two.

    Raises:
        UsageError: ``text`` is no size.
    """
    match = _BYTES.fullmatch(text)
    scale = _SCALE.get(match[2].lower()) if match else None
    if match is None or scale is None or len(match[1]) > _SIZE_DIGITS:
        raise UsageError(
            f"{text[:40]!r} is not a size",
            hint="write a number and a unit, as in 10GiB, 512MiB or 24GB",
            code="bad-size",
        )
    return round(float(match[1]) * scale)


def pad(value: int, multiple: int) -> int:
    """``value`` rounded up to a whole ``multiple`` (both in the same unit)."""
    return -(-value // multiple) * multiple


def format_bytes(value: int | float | None, digits: int = 1) -> str:
    """``value`` bytes for a person: ``7.4 GiB``, ``512 MiB``, ``unknown``."""
    if value is None:
        return "unknown"
    sign, value = ("-", -value) if value < 0 else ("", value)
    for name, scale in (("TiB", 1 << 40), ("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if value >= scale:
            shown = value / scale
            return f"{sign}{shown:.{digits if shown < 100 else 0}f} {name}"
    return f"{sign}{value:.0f} B"


def format_rate(value: float | None) -> str:
    """Tokens per second with three significant digits: ``48.3``, ``1,240``, ``unknown``."""
    if value is None:
        return "unknown"
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def format_seconds(value: float | None) -> str:
    """A duration for a person: ``42 s``, ``3 min 20 s``, ``1 h 5 min``."""
    if value is None:
        return "unknown"
    if value < 10:
        return f"{value:.1f} s"
    whole = round(value)
    if whole < 60:
        return f"{whole} s"
    minutes, seconds = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {seconds} s" if seconds else f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min"


def format_count(value: int | float) -> str:
    """A parameter or token count: ``13.0 B``, ``8.4 M``, ``512``."""
    for name, scale in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if value >= scale:
            return f"{value / scale:.1f} {name}"
    return f"{value:.0f}"
