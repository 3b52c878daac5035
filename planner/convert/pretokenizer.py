"""Which of llama.cpp's built-in pre-tokenizers splits text as a tokenizer.json says.

llama.cpp's converter hashes the token ids of a test text, which needs the tokenizer to run and knows only
vocabularies seen before. What a pre-tokenizer does stands in tokenizer.json, so here its *structure* is looked up
(``data/pretokenizers.csv``); a byte-level BPE of one's own is then as good as a published one.
"""

from __future__ import annotations

from typing import Any

from planner.core.data import read_table
from planner.core.errors import UnsupportedArchitecture

_TABLE = "pretokenizers.csv"
_MAX_DEPTH = 8
"""Nesting of ``Sequence`` steps; published ones nest once."""


def signature(step: object, depth: int = 0) -> str:
    """The splitting steps of a ``pre_tokenizer`` of tokenizer.json, in one line; parts with no effect left out."""
    if step is None:
        return "none"
    if not isinstance(step, dict) or depth > _MAX_DEPTH:
        return "unreadable"
    kind = step.get("type")
    if kind == "Sequence":
        inner = step.get("pretokenizers")
        return " + ".join(signature(part, depth + 1) for part in (inner if isinstance(inner, list) else [inner]))
    if kind == "ByteLevel":
        # use_regex was added in tokenizers 0.12 and is on where it is not mentioned
        words = ["regex"] * bool(step.get("use_regex", True)) + ["prefix"] * bool(step.get("add_prefix_space", True))
        return f"ByteLevel({','.join(words)})"
    if kind == "Split":
        pattern = step.get("pattern") or {}
        text = pattern.get("Regex") or pattern.get("String") if isinstance(pattern, dict) else pattern
        return f"Split({step.get('behavior')}{',invert' * bool(step.get('invert'))}:{text})"
    if kind == "Digits":
        return "Digits(individual)" if step.get("individual_digits") else "Digits()"
    if kind == "Punctuation":
        return f"Punctuation({step.get('behavior', 'Isolated')})"
    return f"{kind}()"


def pre_tokenizer_name(tokenizer: dict[str, Any], model_type: str) -> str:
    """llama.cpp's name (``tokenizer.ggml.pre``) for the pre-tokenizer of a tokenizer.json.

    Several names split alike; ``model_type`` chooses the one llama.cpp's converter writes for that family.

    Raises:
        UnsupportedArchitecture: no pre-tokenizer of llama.cpp is known to do the same (``unknown-pretokenizer``).
    """
    found = signature(tokenizer.get("pre_tokenizer"))
    model = tokenizer.get("model")
    ignores_merges = "yes" if isinstance(model, dict) and model.get("ignore_merges") else "no"
    for row in read_table(_TABLE):
        same = row["signature"] == found and row["ignore_merges"] in ("", ignores_merges)
        if same and row["model_type"] in ("", model_type):
            return row["pre"]
    raise UnsupportedArchitecture(
        "the tokenizer splits text in a way that no pre-tokenizer of llama.cpp is known to do",
        numbers=f"{found}, merges {'ignored for whole words' if ignores_merges == 'yes' else 'always used'}"[:600],
        hint="pass --llama-cpp DIR with a llama.cpp checkout, whose converter may know it",
        code="unknown-pretokenizer",
    )
