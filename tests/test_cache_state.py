"""A saved KV cache repeated to a greater depth: the layout, and what llama.cpp makes of it."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.verify.cache_state import tiled

MAGIC = 0xA7


def state(rows: list[list[bytes]], cells: int) -> bytes:
    """A state of the layout: ``rows[block]`` are the cells' rows of K of all layers, then of V."""
    made = struct.pack("<IiII", MAGIC, 0, 1, cells)
    made += b"".join(struct.pack("<iIi", position, 1, 0) for position in range(cells))
    made += struct.pack("<II", 0, len(rows) // 2)
    for block in rows:
        made += struct.pack("<iQ", 1, len(block[0])) + b"".join(block)
    return made


@given(layers=st.integers(1, 3), cells=st.integers(1, 9), more=st.integers(0, 20), width=st.integers(1, 6))
def test_rows_repeat_in_turn(layers: int, cells: int, more: int, width: int) -> None:
    rows = [[bytes([16 * block + cell] * width) for cell in range(cells)] for block in range(2 * layers)]
    wanted = [[block[i % cells] for i in range(cells + more)] for block in rows]
    assert tiled(state(rows, cells), cells + more) == state(wanted, cells + more)


def test_another_layout_is_left_alone() -> None:
    good = state([[b"ab"], [b"cd"]], 1)
    assert tiled(good, 1) == good
    assert tiled(good + b"x", 4) is None
    assert tiled(good[:-1], 4) is None
    assert tiled(b"", 4) is None
    transposed = good[:28] + struct.pack("<I", 1) + good[32:]
    assert tiled(transposed, 4) is None


@pytest.mark.slow
def test_llama_cpp_goes_on_from_a_repeated_cache(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    from planner.estimate import slices
    from planner.verify.slice_runs import open_slice

    spec = slices.plain(slices.THIN, 2)
    with open_slice(spec, slices.pure_types(spec, "Q8_0"), context=512, threads=1, repack=False) as made:
        assert made.fill(400)
        held = made.context.state()
        assert held is not None and tiled(held, 400) == held
        made.decode(3)
        assert made.filled == 403
        made.back_to(10)
        assert made.fill(300)
        made.read(20)
        assert made.filled == 320
