"""A saved KV cache of few tokens made one of many by repeating them: a deep cache without reading a long prompt.

Layout of a sequence's state, llama-cpp-python 0.3.36, little-endian (``llama_kv_cache::state_write`` in
https://github.com/ggml-org/llama.cpp/blob/master/src/llama-kv-cache.cpp): magic, sequence; streams, cells; of each cell
its position, the number of its sequences (1) and the sequence; then whether V is transposed, and the layers; of each
layer the type and bytes of a row of K, and the rows; the same of V. Anything else (caches of two kinds, recurrent
states, positions in two dimensions) is not repeated.
"""

from __future__ import annotations

import struct

_HEAD = struct.Struct("<IiII")
_CELL = struct.Struct("<iIi")
_LAYERS = struct.Struct("<II")
_ROWS = struct.Struct("<iQ")


def tiled(state: bytes | bytearray, count: int) -> bytearray | None:
    """The state with ``count`` cells at positions from 0 on, rows repeated in turn; ``None`` for another layout.

    Args:
        state: as ``llama_state_seq_get_data`` gives it.
        count: cells, at least those that are there.
    """
    try:
        return _tiled(memoryview(state), count)
    except struct.error:
        return None


def _tiled(state: memoryview, count: int) -> bytearray | None:
    magic, sequence, streams, cells = _HEAD.unpack_from(state, 0)
    if streams != 1 or not 0 < cells <= count:
        return None
    at = _HEAD.size
    for _ in range(cells):
        _, sequences, _ = _CELL.unpack_from(state, at)
        if sequences != 1:
            return None
        at += _CELL.size
    transposed, layers = _LAYERS.unpack_from(state, at)
    at += _LAYERS.size
    if transposed:
        return None
    made = bytearray(_HEAD.pack(magic, sequence, streams, count))
    for position in range(count):
        made += _CELL.pack(position, 1, sequence)
    made += _LAYERS.pack(transposed, layers)
    for _ in range(2 * layers):  # K of all layers, then V
        type_, row_bytes = _ROWS.unpack_from(state, at)
        at += _ROWS.size
        rows = state[at : at + cells * row_bytes]
        if len(rows) < cells * row_bytes:
            return None
        at += len(rows)
        made += _ROWS.pack(type_, row_bytes)
        whole, part = divmod(count, cells)
        made += bytes(rows) * whole + rows[: part * row_bytes]
    return made if at == len(state) else None
