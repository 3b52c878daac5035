"""One entry of a GGUF vocabulary, and llama.cpp's token types (``llama_token_type`` in llama.h)."""

from __future__ import annotations

from dataclasses import dataclass

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
_SPECIAL_TEXTS = ("<pad>", "<mask>", "<2mass>", "[@BOS@]")


@dataclass(frozen=True, slots=True)
class Piece:
    """A token: its text, score and type."""

    text: str
    score: float
    kind: int


def looks_special(text: str) -> bool:
    """A token some checkpoints forget to mark as special: ``does_token_look_special`` in conversion/base.py."""
    if text in _SPECIAL_TEXTS:
        return True
    return any(
        text.startswith(start) and text.endswith(end) for start, end in (("<|", "|>"), ("<｜", "｜>"), ("<unused", ">"))
    )
