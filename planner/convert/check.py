"""Does llama.cpp split text as the checkpoint's own tokenizer does? Asked after every conversion.

A wrong tokenizer converts without an error and then answers nonsense, so token ids are compared on a fixed text.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from planner.convert.sentencepiece import UNIGRAM, read_sentencepiece
from planner.core.errors import InputError, MissingDependency

PLAIN = (
    "The quick brown fox jumps over 13 lazy dogs, doesn't it?",
    "In 1969 she'd paid $1,234.56 (plus 7.5% tax) for it - we'll see; they've said so!",
    "Größe, façade, naïve coöperation, Ærøskøbing, Łódź, İstanbul",
    "Съешь же ещё этих мягких французских булок, да выпей чаю 42",
    "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία",
    "人之初,性本善。性相近,習相遠。日本語のテキストと한국어 문장",
    "नमस्ते दुनिया, สวัสดีชาวโลก, שלום עולם, مرحبا بالعالم, გამარჯობა",
    "def f(x_1: int) -> str: return {'a': [x_1 ** 2, 0xFF, \"q\"]}[k] // 3 != y && z || ~w",
    "🦙 🚀 👩‍💻 ½ € ∑ → ✓ 1314151天~ ....!!!!???? ------=====",
)
"""Many scripts, digits, punctuation and emoji; single spaces only, nothing that NFKC would rewrite but ½."""
WHITESPACE = (
    "one  two   three    four",
    "a line\nanother\n\n\nthird\ttab \t mixed \n ",
    "class A:\n    if x:\n        return y  # four, eight\r\n",
)
NORMALIZED = ("e\u0301 and n\u0303 decomposed", "ﬁne ｆｕｌｌｗｉｄｔｈ ① x² …", "  two spaces in front")
"""Texts that normalizing tokenizers rewrite and llama.cpp does not; a difference is only noted.

Two spaces in front: the ``Metaspace`` of tokenizer.json adds none to a text that begins with one, SentencePiece does.
"""

Encode = Callable[[str], list[int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerCheck:
    """Outcome of comparing token ids."""

    same: bool | None
    """``None``: there is nothing to compare with."""
    detail: str
    """What was compared, and the first difference."""
    notes: tuple[str, ...] = ()
    """Differences that the source tokenizer's own normalization explains."""


def check_tokenizer(directory: Path, gguf: Path) -> TokenizerCheck:
    """Compare token ids of a test text: llama.cpp on ``gguf`` against the tokenizer in ``directory``.

    The source is ``tokenizer.json`` where the ``tokenizers`` package is installed, else ``tokenizer.model`` through
    ``sentencepiece``. No special tokens are added, and none is in the text.

    Raises:
        InputError: llama.cpp cannot load the file's vocabulary (``bad-gguf``).
        MissingDependency: llama-cpp-python is not installed.
    """
    source = _source(directory)
    if source is None:
        return TokenizerCheck(
            same=None,
            detail="neither `tokenizers` nor `sentencepiece` is installed, so token ids were not compared",
        )
    name, encode, rewrites = source
    notes = []
    with _Vocabulary(gguf) as vocabulary:
        for text in (*PLAIN, *WHITESPACE, *NORMALIZED):
            difference = _difference(text, encode(text), vocabulary.encode(text))
            if difference is None:
                continue
            if text in NORMALIZED or (text in WHITESPACE and rewrites) or (rewrites and "½" in text):
                notes.append(f"the tokenizer's own normalization is not in llama.cpp: {difference}")
                continue
            return TokenizerCheck(same=False, detail=f"against {name}: {difference}", notes=tuple(notes))
    count = len(PLAIN) + len(WHITESPACE)
    return TokenizerCheck(same=True, detail=f"{count} texts, same token ids as {name}", notes=tuple(notes))


def require_same_tokens(directory: Path, gguf: Path) -> TokenizerCheck:
    """``check_tokenizer``, with a difference as an error.

    Raises:
        InputError: the token ids differ (``tokenizer-differs``).
    """
    found = check_tokenizer(directory, gguf)
    if found.same is False:
        raise InputError(
            "llama.cpp splits text differently from the checkpoint's tokenizer",
            numbers=found.detail,
            hint="put the original tokenizer.model beside tokenizer.json, or pass --llama-cpp DIR",
            code="tokenizer-differs",
        )
    return found


def _difference(text: str, expected: list[int], found: list[int]) -> str | None:
    if expected == found:
        return None
    at = next(
        (i for i, (a, b) in enumerate(zip(expected, found, strict=False)) if a != b), min(len(expected), len(found))
    )
    return (
        f"{text[:40]!r} gives {len(found)} tokens, {len(expected)} expected; "
        f"from the {at + 1}th: {found[at : at + 5]} instead of {expected[at : at + 5]}"
    )


def _source(directory: Path) -> tuple[str, Encode, bool] | None:
    """(name, encoder, whether it rewrites whitespace) of the checkpoint's own tokenizer."""
    pieces, fast = directory / "tokenizer.model", directory / "tokenizer.json"
    if fast.is_file() and find_spec("tokenizers"):
        tokenizer = _fast_tokenizer(fast)
        return fast.name, lambda text: list(tokenizer.encode(text, add_special_tokens=False).ids), False
    if pieces.is_file() and find_spec("sentencepiece"):
        from sentencepiece import SentencePieceProcessor

        model = read_sentencepiece(pieces)
        processor = SentencePieceProcessor(model_file=str(pieces))
        rewrites = model.model_type != UNIGRAM and (model.remove_extra_whitespaces or bool(model.charsmap))
        return pieces.name, lambda text: list(processor.encode(text)), rewrites
    return None


def _fast_tokenizer(path: Path) -> Any:
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # noqa: BLE001 - the library raises no class of its own
        hint = "download tokenizer.json again; without it the ids are compared with tokenizer.model"
        raise InputError(f"{path.name} is no tokenizer", numbers=str(error), hint=hint, code="bad-tokenizer") from None


@cache
def _quiet() -> Any:
    """A callback that drops llama.cpp's log. llama.cpp keeps a pointer to it, so it lives as long as the process."""
    import llama_cpp

    return llama_cpp.llama_log_callback(lambda level, text, data: None)


class _Vocabulary:
    """llama.cpp's tokenizer of a GGUF file, its weights not loaded."""

    def __init__(self, gguf: Path) -> None:
        if find_spec("llama_cpp") is None:
            raise MissingDependency("llama-cpp-python is not installed", hint='`pip install "qplan[gguf]"`')
        import llama_cpp

        self._api: Any = llama_cpp
        llama_cpp.llama_log_set(_quiet(), None)
        llama_cpp.llama_backend_init()
        parameters = llama_cpp.llama_model_default_params()
        parameters.vocab_only = True
        self._model = llama_cpp.llama_model_load_from_file(str(gguf).encode(), parameters)
        if not self._model:
            raise InputError(f"llama.cpp cannot load the vocabulary of {gguf.name}", code="bad-gguf")
        self._vocab = llama_cpp.llama_model_get_vocab(self._model)

    def __enter__(self) -> _Vocabulary:
        return self

    def __exit__(self, *error: object) -> None:
        self._api.llama_model_free(self._model)

    def encode(self, text: str) -> list[int]:
        raw = text.encode("utf-8")
        room = 2 * len(raw) + 8  # at most one token a byte, and a space in front
        tokens = (self._api.llama_token * room)()
        count = self._api.llama_tokenize(self._vocab, raw, len(raw), tokens, room, False, False)
        return list(tokens[: max(count, 0)])
