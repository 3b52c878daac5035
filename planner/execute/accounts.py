"""llama.cpp's own accounts of its buffers, to the byte: ``llama_get_memory_breakdown``.

It returns a ``std::map`` by value, which no C interface offers (src/llama-ext.h says so itself), so its nodes are read
as libstdc++ lays them out on x86-64 Linux. Whoever calls this holds the result against the log.
"""

from __future__ import annotations

import ctypes
import platform
import sys
from dataclasses import dataclass
from typing import Any

SYMBOL = "_Z26llama_get_memory_breakdownPK13llama_context"
MOST_ENTRIES = 64
"""Buffer types of one context: a few per device."""
_MAP_BYTES = 48
_ROOT, _COUNT = 16, 40
"""Offsets in ``std::map``: comparison (8), then the header node (color 8, parent, left, right), then the count."""
_LEFT, _RIGHT, _ENTRY = 16, 24, 32
"""Offsets in a node: color (8), parent, left, right, then the pair of pointer and three ``size_t``."""


class AccountsUnreadable(Exception):
    """Another platform, or another llama.cpp."""


@dataclass(frozen=True, slots=True)
class BufferAccount:
    """Bytes by buffer type (the address of a ``ggml_backend_buffer_type``)."""

    buffer_type: int
    model_bytes: int
    context_bytes: int
    compute_bytes: int


def read_accounts(library: Any, context: Any) -> tuple[BufferAccount, ...]:
    """The accounts of a ``llama_context``; only in a child process, as a wrong layout ends it.

    Args:
        library: llama.cpp as a ``ctypes.CDLL``.

    Raises:
        AccountsUnreadable: this platform passes and lays out a ``std::map`` in another way, or the symbol is gone.
    """
    if sys.platform != "linux" or platform.machine() != "x86_64":
        raise AccountsUnreadable(f"not known how on {sys.platform} {platform.machine()}")
    function = getattr(library, SYMBOL, None)
    if function is None:
        raise AccountsUnreadable("llama_get_memory_breakdown is gone")
    # a class returned by value: its address is the first argument (Itanium C++ ABI)
    function.argtypes, function.restype = (ctypes.c_void_p, ctypes.c_void_p), ctypes.c_void_p
    made = ctypes.create_string_buffer(_MAP_BYTES)
    function(ctypes.addressof(made), context)
    address = ctypes.addressof(made)
    count = _word(address + _COUNT)
    if not 0 < count <= MOST_ENTRIES:
        raise AccountsUnreadable(f"{count} entries")
    return _entries(_word(address + _ROOT), count)


def _entries(root: int, count: int) -> tuple[BufferAccount, ...]:
    found: list[BufferAccount] = []
    waiting = [root]
    while waiting:
        node = waiting.pop()
        if not node:
            continue
        if len(found) == count:
            raise AccountsUnreadable("more nodes than entries")
        found.append(BufferAccount(*(_word(node + _ENTRY + 8 * i) for i in range(4))))
        waiting += [_word(node + _LEFT), _word(node + _RIGHT)]
    if len(found) != count:
        raise AccountsUnreadable("fewer nodes than entries")
    return tuple(found)


def _word(address: int) -> int:
    return ctypes.c_uint64.from_address(address).value
