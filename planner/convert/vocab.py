"""A checkpoint's tokenizer as GGUF metadata: SentencePiece models and byte-level or byte-fallback BPE."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from planner.convert.bpe import byte_level_pieces, merge_lines, pieces_from_merges
from planner.convert.config import Config
from planner.convert.families import Family
from planner.convert.keyvalue import KeyValue, array, flag, string, u32
from planner.convert.pieces import CONTROL, UNKNOWN, UNUSED, USER_DEFINED, Piece, looks_special
from planner.convert.pretokenizer import pre_tokenizer_name
from planner.convert.sentencepiece import UNIGRAM, SentencePieceModel, read_sentencepiece
from planner.convert.special import dicts, optional_object, special_tokens
from planner.core.errors import InputError

_PADDING_SCORE, _ADDED_SCORE = -10000.0, -1000.0
"""Scores llama.cpp's converter gives to unused ids and to added tokens (conversion/base.py)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """Tokenizer metadata of a GGUF file."""

    entries: list[KeyValue]
    notes: tuple[str, ...] = ()


def read_vocabulary(directory: Path, config: Config, family: Family) -> Vocabulary:
    """The tokenizer of the checkpoint in ``directory``.

    ``tokenizer.model`` is preferred; a ``tokenizer.json`` is read where it is byte-level BPE, or BPE with byte
    fallback whose merges are those of a SentencePiece model.

    Raises:
        InputError: no tokenizer (``no-tokenizer``), a malformed one (``bad-tokenizer``), or one that llama.cpp would
            run differently (``tokenizer-not-reproducible``).
        UnsupportedArchitecture: of a kind llama.cpp has no tokenizer for (``unknown-pretokenizer``,
            ``unsupported-tokenizer``).
    """
    stated = optional_object(directory / "tokenizer_config.json") or {}
    tokenizer = optional_object(directory / "tokenizer.json")
    pieces_file = directory / "tokenizer.model"
    byte_level = tokenizer is not None and _is_byte_level(tokenizer)
    if pieces_file.is_file() and not (byte_level and stated.get("tokenizer_class") == "GPT2Tokenizer"):
        try:
            return _from_sentencepiece(directory, read_sentencepiece(pieces_file), config, family, stated, tokenizer)
        except InputError as error:
            # some checkpoints name a tiktoken file tokenizer.model; their tokenizer.json tells the same
            if error.code != "bad-tokenizer" or not byte_level:
                raise
    if tokenizer is None:
        raise InputError(
            f"{str(directory)!r} has no tokenizer",
            numbers="neither tokenizer.model nor tokenizer.json is there",
            hint="download the checkpoint's tokenizer files too",
            code="no-tokenizer",
        )
    if byte_level:
        return _from_byte_level(directory, tokenizer, config, family, stated)
    return _from_merges(directory, tokenizer, config, family, stated)


def _is_byte_level(tokenizer: Mapping[str, Any]) -> bool:
    model = tokenizer.get("model")
    return isinstance(model, dict) and model.get("type") == "BPE" and not model.get("byte_fallback")


def _prefix_entry(family: Family, stated: Mapping[str, Any]) -> list[KeyValue]:
    value = stated.get("add_prefix_space")
    wanted = family.writes_space_prefix and isinstance(value, bool)
    return [flag("tokenizer.ggml.add_space_prefix", bool(value))] if wanted else []


def _padded(pieces: dict[int, Piece], size: int) -> list[Piece]:
    return [pieces.get(number) or Piece(f"[PAD{number}]", _PADDING_SCORE, UNUSED) for number in range(size)]


def _entries(model: str, pre: str, pieces: list[Piece], *, scores: bool) -> list[KeyValue]:
    entries = [
        string("tokenizer.ggml.model", model),
        string("tokenizer.ggml.pre", pre),
        array("tokenizer.ggml.tokens", [piece.text for piece in pieces]),
    ]
    if scores:
        entries.append(array("tokenizer.ggml.scores", [piece.score for piece in pieces]))
    return [*entries, array("tokenizer.ggml.token_type", [piece.kind for piece in pieces])]


def _from_sentencepiece(
    directory: Path,
    model: SentencePieceModel,
    config: Config,
    family: Family,
    stated: Mapping[str, Any],
    tokenizer: Mapping[str, Any] | None,
) -> Vocabulary:
    size = config.integer("vocab_size")
    pieces = {number: _clean(Piece(*piece)) for number, piece in enumerate(model.pieces) if number < size}
    notes = []
    if len(model.pieces) > size:
        notes.append(f"{len(model.pieces) - size} pieces of tokenizer.model beyond vocab_size {size} are left out")
    for number, text, special in _added_tokens(directory, stated, tokenizer, len(model.pieces)):
        if number < size:
            pieces[number] = _added_piece(text, special, plain=family.architecture == "phi3")
    listed = _padded(pieces, size)
    unigram = model.model_type == UNIGRAM
    entries = _prefix_entry(family, stated) + _entries("t5" if unigram else "llama", "default", listed, scores=True)
    extra = special_tokens(directory, config.values, vocab_size=size)
    unknown = next((number for number, piece in enumerate(model.pieces) if piece[2] == UNKNOWN), 0)
    keys = {entry.key for entry in extra}
    if unknown and "tokenizer.ggml.unknown_token_id" not in keys:
        extra.append(u32("tokenizer.ggml.unknown_token_id", unknown))
    if unigram:
        extra += _unigram_entries(model, keys, unknown)
    elif model.charsmap:
        notes.append("tokenizer.model normalizes characters (NFKC); llama.cpp takes them as they are")
    if not unigram and model.remove_extra_whitespaces:
        notes.append("tokenizer.model merges repeated spaces; llama.cpp keeps them")
    prefix = _space_prefix(model, family, stated)
    if prefix is not None:
        extra.append(flag("tokenizer.ggml.add_space_prefix", prefix))
    return Vocabulary(entries=entries + extra, notes=tuple(notes))


def _clean(piece: Piece) -> Piece:
    # llama.cpp matches user-defined pieces in the raw text, before spaces become U+2581
    return replace(piece, text=piece.text.replace("▁", " ")) if piece.kind == USER_DEFINED else piece


def _space_prefix(model: SentencePieceModel, family: Family, stated: Mapping[str, Any]) -> bool | None:
    if family.space_prefix is not None:
        return family.space_prefix
    if model.model_type == UNIGRAM:
        return model.add_dummy_prefix
    # llama.cpp adds the space unless told otherwise
    return False if not model.add_dummy_prefix and stated.get("add_prefix_space") is None else None


def _unigram_entries(model: SentencePieceModel, keys: set[str], unknown: int) -> list[KeyValue]:
    """Settings of llama.cpp's unigram tokenizer, whose own defaults are those of T5."""
    entries = [flag("tokenizer.ggml.remove_extra_whitespaces", model.remove_extra_whitespaces)]
    if not unknown:
        entries.append(u32("tokenizer.ggml.unknown_token_id", 0))
    if model.charsmap:
        entries.append(KeyValue("tokenizer.ggml.precompiled_charsmap", "bytes", model.charsmap))
    for name, default in (("add_bos_token", True), ("add_eos_token", False)):
        if f"tokenizer.ggml.{name}" not in keys:
            entries.append(flag(f"tokenizer.ggml.{name}", default))
    return entries


def _added_tokens(
    directory: Path, stated: Mapping[str, Any], tokenizer: Mapping[str, Any] | None, piece_count: int
) -> list[tuple[int, str, bool | None]]:
    """(id, text, special) of tokens beside the pieces: added_tokens.json, then tokenizer_config.json's list.

    Where that list is absent (transformers 5 leaves it out), tokenizer.json's tokens beyond the pieces.
    """
    found: list[tuple[int, str, bool | None]] = []
    for text, number in (optional_object(directory / "added_tokens.json") or {}).items():
        if isinstance(number, int):
            found.append((number, text, None))
    listed = stated.get("added_tokens_decoder")
    if isinstance(listed, dict):
        for key, token in listed.items():
            if key.isdecimal() and isinstance(token, dict) and isinstance(token.get("content"), str):
                found.append((int(key), token["content"], bool(token.get("special"))))
        return found
    for token in dicts((tokenizer or {}).get("added_tokens")):
        if isinstance(token.get("id"), int) and token["id"] >= piece_count:
            found.append((token["id"], str(token.get("content")), bool(token.get("special"))))
    return found


def _added_piece(text: str, special: bool | None, *, plain: bool) -> Piece:
    if special is None:
        return Piece(text, _ADDED_SCORE, USER_DEFINED)
    if special or (looks_special(text) and not plain):
        return Piece(text, _ADDED_SCORE, CONTROL)
    return Piece(text if plain else text.replace("▁", " "), _ADDED_SCORE, USER_DEFINED)


def _from_byte_level(
    directory: Path, tokenizer: dict[str, Any], config: Config, family: Family, stated: Mapping[str, Any]
) -> Vocabulary:
    size = config.integer("vocab_size")
    pieces, beyond = byte_level_pieces(tokenizer, stated, size)
    pre = pre_tokenizer_name(tokenizer, config.model_type)
    entries = _prefix_entry(family, stated) + _entries("gpt2", pre, _padded(pieces, size), scores=False)
    entries.append(array("tokenizer.ggml.merges", merge_lines(tokenizer)))
    entries += special_tokens(directory, config.values, vocab_size=size)
    if family.writes_space_prefix and size == 49152:
        # conversion/llama.py: code models of this vocabulary (granite, starcoder) want no BOS
        entries.append(flag("tokenizer.ggml.add_bos_token", False))
    notes = [f"{beyond} tokens beyond vocab_size {size} are left out"] if beyond else []
    if tokenizer.get("normalizer"):
        notes.append("the tokenizer normalizes characters (NFC); llama.cpp takes them as they are")
    return Vocabulary(entries=entries, notes=tuple(notes))


def _from_merges(
    directory: Path, tokenizer: dict[str, Any], config: Config, family: Family, stated: Mapping[str, Any]
) -> Vocabulary:
    """A byte-fallback BPE without its tokenizer.model: SentencePiece scores are recovered from the merges."""
    size = config.integer("vocab_size")
    pieces, prefix = pieces_from_merges(tokenizer)
    for number, text, special in _added_tokens(directory, stated, tokenizer, 0):
        old = pieces.get(number)
        if old is not None and old.kind == UNKNOWN:
            continue
        added = _added_piece(text, special, plain=False)
        pieces[number] = replace(added, score=old.score) if old is not None and old.text == text else added
    pieces = {number: piece for number, piece in pieces.items() if number < size}
    entries = _prefix_entry(family, stated) + _entries("llama", "default", _padded(pieces, size), scores=True)
    entries += special_tokens(directory, config.values, vocab_size=size)
    entries.append(flag("tokenizer.ggml.add_space_prefix", prefix))
    unknown = next((number for number, piece in sorted(pieces.items()) if piece.kind == UNKNOWN), 0)
    if unknown and "tokenizer.ggml.unknown_token_id" not in {entry.key for entry in entries}:
        entries.append(u32("tokenizer.ggml.unknown_token_id", unknown))
    return Vocabulary(
        entries=entries,
        notes=("tokenizer.model is absent: SentencePiece scores were recovered from tokenizer.json's merges",),
    )
