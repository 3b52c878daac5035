"""BPE vocabularies of tokenizer.json: byte-level ones as they are, byte-fallback ones turned back into pieces."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from planner.convert.pieces import BYTE, CONTROL, NORMAL, UNKNOWN, USER_DEFINED, Piece, looks_special
from planner.convert.special import dicts
from planner.core.errors import InputError, UnsupportedArchitecture

_BYTE_PIECE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_PREPEND = {"always": True, "first": True, "never": False}


def _bad(problem: str, numbers: str = "") -> InputError:
    return InputError(f"tokenizer.json: {problem}", numbers=numbers[:300], code="bad-tokenizer")


def _model(tokenizer: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, int]]:
    model = tokenizer.get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(model, dict) or model.get("type") != "BPE" or not isinstance(vocab, dict):
        kind = model.get("type") if isinstance(model, dict) else None
        raise UnsupportedArchitecture(
            "the tokenizer is of a kind that is not converted",
            numbers=f"tokenizer.json has a model of type {kind!r}; BPE is converted",
            hint="pass --llama-cpp DIR with a llama.cpp checkout, whose converter may know it",
            code="unsupported-tokenizer",
        )
    if not all(isinstance(number, int) and number >= 0 for number in vocab.values()):
        raise _bad("a token has no id")
    return model, vocab


def merge_pairs(tokenizer: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The merges in order; both spellings are read (``"a b"``, and ``["a", "b"]`` since tokenizers 0.20).

    Raises:
        InputError: they are malformed (``bad-tokenizer``).
    """
    model, _ = _model(tokenizer)
    pairs = []
    merges = model.get("merges")
    for merge in merges if isinstance(merges, list) else ():
        parts = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(parts, list) or len(parts) != 2 or not all(isinstance(part, str) for part in parts):
            raise _bad("a merge is not a pair", repr(merge))
        pairs.append((parts[0], parts[1]))
    if not pairs:
        raise _bad("it has no merges")
    return pairs


def merge_lines(tokenizer: Mapping[str, Any]) -> list[str]:
    """The merges as GGUF stores them: two tokens with a space between; a space inside a token is spelled ``Ġ``."""
    return [" ".join(part.replace(" ", "Ġ") for part in pair) for pair in merge_pairs(tokenizer)]


def byte_level_pieces(
    tokenizer: Mapping[str, Any], stated: Mapping[str, Any], size: int
) -> tuple[dict[int, Piece], int]:
    """Tokens of a byte-level BPE by id, and how many lie at or beyond ``size`` (left out).

    Raises:
        InputError: malformed (``bad-tokenizer``).
        UnsupportedArchitecture: a setting llama.cpp has no equivalent for (``unsupported-tokenizer``).
    """
    model, vocab = _model(tokenizer)
    odd = [name for name in ("continuing_subword_prefix", "end_of_word_suffix", "dropout") if model.get(name)]
    normalizer = tokenizer.get("normalizer")
    kinds = [part.get("type") for part in _steps(normalizer, "normalizers")]
    odd += [f"normalizer {kind}" for kind in kinds if kind != "NFC"]
    if odd:
        raise UnsupportedArchitecture(
            "the tokenizer has settings that llama.cpp does not",
            numbers=", ".join(odd),
            hint="pass --llama-cpp DIR with a llama.cpp checkout, whose converter may know it",
            code="unsupported-tokenizer",
        )
    pieces = {number: Piece(text, 0.0, NORMAL) for text, number in vocab.items()}
    for number, text, special in _all_added(tokenizer, stated):
        if special or looks_special(text):
            pieces[number] = Piece(text, 0.0, CONTROL)
        else:
            pieces[number] = Piece(text.replace("▁", " "), 0.0, USER_DEFINED)
    beyond = [number for number in pieces if number >= size]
    return {number: piece for number, piece in pieces.items() if number < size}, len(beyond)


def _all_added(tokenizer: Mapping[str, Any], stated: Mapping[str, Any]) -> list[tuple[int, str, bool]]:
    found: dict[int, tuple[str, bool]] = {}
    decoder = stated.get("added_tokens_decoder")
    for key, token in decoder.items() if isinstance(decoder, dict) else ():
        if key.isdecimal() and isinstance(token, dict) and isinstance(token.get("content"), str):
            found[int(key)] = (token["content"], bool(token.get("special")))
    added = tokenizer.get("added_tokens") or []
    for token in added if isinstance(added, list) else [added]:
        if not isinstance(token, dict) or not isinstance(token.get("id"), int):
            raise _bad("an added token has no id", repr(token))
        found[token["id"]] = (str(token.get("content")), bool(token.get("special")))
    return [(number, text, special) for number, (text, special) in sorted(found.items())]


def _steps(step: object, inner: str) -> list[dict[str, Any]]:
    """The steps of a normalizer or pre-tokenizer, a ``Sequence`` opened."""
    if not isinstance(step, dict):
        return []
    if step.get("type") == "Sequence":
        return dicts(step.get(inner))
    return [step]


def pieces_from_merges(tokenizer: Mapping[str, Any]) -> tuple[dict[int, Piece], bool]:
    """Pieces with scores of a byte-fallback BPE, by id, and whether a space is put in front of a text.

    llama.cpp merges the neighbours whose *union* has the best score; tokenizer.json lists *pairs* by rank. The two
    agree where the pairs are what transformers makes of a SentencePiece model: for each piece, every split into two
    pieces, all at one rank. Then a piece's score is minus its place in that order. Anything else is refused.

    Raises:
        InputError: llama.cpp would merge otherwise (``tokenizer-not-reproducible``), or malformed.
    """
    model, vocab = _model(tokenizer)
    prefix = _space_handling(tokenizer)
    pairs = merge_pairs(tokenizer)
    order: dict[str, int] = {}
    for rank, (left, right) in enumerate(pairs):
        order.setdefault(left + right, rank)
    _check_closed(pairs, vocab, order)
    ranked = sorted(order, key=lambda text: order[text])
    ids = [vocab[text] for text in ranked]
    # SentencePiece numbers pieces by score, so an increasing order gives back the very scores it stored
    first = ids[0] if ids == sorted(ids) else None
    scores = {text: float(-(vocab[text] - first) if first is not None else -place) for place, text in enumerate(ranked)}
    unknown, pieces = model.get("unk_token"), {}
    for text, number in vocab.items():
        if _BYTE_PIECE.fullmatch(text):
            pieces[number] = Piece(text, 0.0, BYTE)
        elif text == unknown:
            pieces[number] = Piece(text, 0.0, UNKNOWN)
        else:
            single = float(-(number - first)) if first is not None and number >= first else float(-len(ranked))
            pieces[number] = Piece(text, scores.get(text, single), NORMAL)
    return pieces, prefix


def _refuse(problem: str, numbers: str = "") -> InputError:
    return InputError(
        f"llama.cpp would split text differently from this tokenizer: {problem}",
        numbers=numbers[:300],
        hint="put the model's tokenizer.model beside tokenizer.json; the original repository has it",
        code="tokenizer-not-reproducible",
    )


def _space_handling(tokenizer: Mapping[str, Any]) -> bool:
    """Whether a space is put in front of a text; refuses anything but spaces → U+2581."""
    prefix, replaced = False, False
    for step in _steps(tokenizer.get("normalizer"), "normalizers"):
        if step.get("type") == "Prepend" and step.get("prepend") == "▁":
            prefix = True
        elif step.get("type") == "Replace" and step.get("content") == "▁":
            replaced = True
        else:
            raise _refuse("it has a normalizer of its own", str(step))
    for step in _steps(tokenizer.get("pre_tokenizer"), "pretokenizers"):
        whole = step.get("type") == "Split" and step.get("pattern") == {"String": " "}
        if step.get("type") == "Metaspace" and not step.get("split", True) and step.get("replacement") == "▁":
            default = "always" if step.get("add_prefix_space", True) else "never"
            prefix, replaced = _PREPEND.get(step.get("prepend_scheme", default), True), True
        elif not (whole and replaced):
            # after spaces became U+2581 there is no " " left to split at
            raise _refuse("it splits text before merging", str(step))
    if not replaced:
        raise _refuse("it does not write spaces as U+2581")
    return prefix


def _check_closed(pairs: list[tuple[str, str]], vocab: Mapping[str, int], order: Mapping[str, int]) -> None:
    listed = set(pairs)
    missing = [text for text in order if text not in vocab]
    if missing:
        raise _bad("a merge makes a token that is not in the vocabulary", repr(missing[0]))
    last: dict[str, int] = {}
    for rank, (left, right) in enumerate(pairs):
        text = left + right
        if text in last and last[text] != rank - 1:
            raise _refuse("the ways to make a token have different ranks", repr(text))
        last[text] = rank
    for text in vocab:
        if _BYTE_PIECE.fullmatch(text):
            continue
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left in vocab and right in vocab and (left, right) not in listed and _reachable(left, right, order):
                raise _refuse("a way to make a token is not among its merges", f"{left!r} + {right!r}")


def _reachable(left: str, right: str, order: Mapping[str, int]) -> bool:
    """Both halves can come up while merging: single characters, or products of merges."""
    return all(len(part) == 1 or part in order for part in (left, right))
