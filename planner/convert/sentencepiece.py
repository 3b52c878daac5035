"""``tokenizer.model`` files: the pieces, scores and settings of a SentencePiece model, without the library.

The file is a protocol buffer (sentencepiece_model.proto of google/sentencepiece). Only these fields are read:
``ModelProto``: 1 pieces, 2 trainer_spec, 3 normalizer_spec; ``SentencePiece``: 1 piece, 2 score, 3 type;
``TrainerSpec``: 3 model_type; ``NormalizerSpec``: 2 precompiled_charsmap, 3 add_dummy_prefix,
4 remove_extra_whitespaces.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from planner.core.errors import InputError

UNIGRAM, BPE = 1, 2
MAX_MODEL_BYTES = 256 * 10**6
"""Sanity bound; Gemma's, the largest published, has 4.7 MB."""
_FIXED = {1: 8, 5: 4}


@dataclass(frozen=True, slots=True, kw_only=True)
class SentencePieceModel:
    """What a GGUF file needs of a SentencePiece model."""

    pieces: tuple[tuple[str, float, int], ...]
    """(text, score, type) by id; types as in the proto, which are GGUF's token types too."""
    model_type: int
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool
    charsmap: bytes
    """How it rewrites characters (NFKC) before splitting; empty: not at all."""


def read_sentencepiece(path: Path) -> SentencePieceModel:
    """The SentencePiece model in ``path``.

    Raises:
        InputError: it is unreadable or no SentencePiece model (``bad-tokenizer``).
    """
    try:
        if path.stat().st_size > MAX_MODEL_BYTES:
            raise InputError(f"{path.name} is too large to be a SentencePiece model", code="bad-tokenizer")
        return _parse(path.read_bytes())
    except (OSError, ValueError, IndexError, struct.error) as error:
        raise InputError(
            f"{path.name} is no SentencePiece model",
            numbers=str(error)[:200],
            hint="download tokenizer.model again",
            code="bad-tokenizer",
        ) from None


def _parse(raw: bytes) -> SentencePieceModel:
    pieces: list[tuple[str, float, int]] = []
    trainer: dict[int, int | bytes] = {}
    normalizer: dict[int, int | bytes] = {}
    for number, value in _fields(raw):
        if number == 1 and isinstance(value, bytes):
            pieces.append(_piece(dict(_fields(value))))
        elif number == 2 and isinstance(value, bytes):
            trainer = dict(_fields(value))
        elif number == 3 and isinstance(value, bytes):
            normalizer = dict(_fields(value))
    if not pieces:
        raise ValueError("it has no pieces")
    # the proto's defaults: unigram, both whitespace settings on
    model_type = trainer.get(3, UNIGRAM)
    return SentencePieceModel(
        pieces=tuple(pieces),
        model_type=model_type if isinstance(model_type, int) else UNIGRAM,
        add_dummy_prefix=bool(normalizer.get(3, 1)),
        remove_extra_whitespaces=bool(normalizer.get(4, 1)),
        charsmap=charsmap if isinstance(charsmap := normalizer.get(2, b""), bytes) else b"",
    )


def _piece(fields: dict[int, int | bytes]) -> tuple[str, float, int]:
    text, score, kind = fields.get(1, b""), fields.get(2, b"\0\0\0\0"), fields.get(3, 1)
    if not isinstance(text, bytes) or not isinstance(score, bytes) or not isinstance(kind, int):
        raise ValueError("a piece has a field of the wrong type")
    return text.decode("utf-8"), struct.unpack("<f", score)[0], kind


def _fields(raw: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(field number, value) of one protocol buffer message; varints as numbers, all else as bytes."""
    position = 0
    while position < len(raw):
        tag, position = _varint(raw, position)
        number, wire = tag >> 3, tag & 7
        if wire == 0:
            value, position = _varint(raw, position)
            yield number, value
            continue
        if wire == 2:
            size, position = _varint(raw, position)
        elif wire in _FIXED:
            size = _FIXED[wire]
        else:
            raise ValueError(f"wire type {wire} at byte {position}")
        if position + size > len(raw):
            raise ValueError(f"field {number} ends at byte {position + size} of {len(raw)}")
        yield number, raw[position : position + size]
        position += size


def _varint(raw: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = raw[position]
        value |= (byte & 0x7F) << shift
        position, shift = position + 1, shift + 7
        if byte < 0x80:
            return value, position
        if shift > 63:
            raise ValueError(f"a number of more than 64 bits at byte {position}")
