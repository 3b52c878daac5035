"""The family a model's quality is looked up by, by the catalog or guessed from its name."""

from __future__ import annotations

import re
from collections.abc import Iterable

# First match wins. A group that matched is the version: "Meta-Llama-3.1-8B" → llama-3.1.
_NAMES: tuple[tuple[str, str], ...] = (
    (r"code-?llama", "codellama"),
    (r"tiny-?llama", "tinyllama"),
    (r"llama-?v?(\d(?:\.\d)?)(?![\d.]*b)", "llama-{}"),
    (r"llama-?(?:7|13|30|33|65)b", "llama-1"),
    (r"vicuna", "vicuna"),
    (r"mixtral", "mixtral"),
    (r"ministral", "ministral"),
    (r"mistral-(nemo|small|large)", "mistral-{}"),
    (r"mistral", "mistral"),
    (r"qwen-?3-next", "qwen3-next"),
    (r"qwen-?(\d(?:\.\d)?)(?![\d.]*b)", "qwen{}"),
    (r"gemma-?(\d)n", "gemma-{}n"),
    (r"gemma-?(\d)(?![\d.]*b)", "gemma-{}"),
    (r"gemma", "gemma"),
    (r"phi-?(\d(?:\.\d)?)(?![\d.]*b)", "phi-{}"),
    (r"deepseek-?(?:coder-?)?v(\d)", "deepseek-v{}"),
    (r"gpt-?oss", "gpt-oss"),
    (r"granite-?(\d)", "granite-{}"),
    (r"olmo-?(\d)", "olmo-{}"),
    (r"glm-?(\d(?:\.\d)?)", "glm-{}"),
)
# Where the name says nothing: what only one family has.
_LLAMA_VOCABULARIES = {128256: "llama-3", 32000: "llama-2"}
_ARCHITECTURES = {
    "cohere2": "command-r",
    "exaone4": "exaone-4",
    "gemma2": "gemma-2",
    "gemma3": "gemma-3",
    "gemma3n": "gemma-3n",
    "glm4": "glm-4",
    "glm4moe": "glm-4.5",
    "granitehybrid": "granite-4",
    "llama4": "llama-4",
    "olmo2": "olmo-2",
    "phi2": "phi-2",
    "phi3": "phi-3",
    "qwen3moe": "qwen3",
    "qwen3next": "qwen3-next",
    "stablelm": "stablelm-2",
}


def guess_family(names: Iterable[str], architecture: str, n_vocab: int) -> str | None:
    """``llama-2``, ``llama-3.1``, ``qwen2.5`` … for the first of ``names`` that tells; ``None`` if nothing does.

    A model of llama's architecture is told by its vocabulary: Llama 3's 128,256 tokens, Llama 2's 32,000.
    """
    from planner.models import catalog

    for name in names:
        plain = re.sub(r"[\s_]+", "-", name.strip().lower()).removesuffix(".gguf")
        known = catalog.lookup(plain) or catalog.lookup(plain.rpartition("/")[2])
        if known is not None:
            return known.family
        for pattern, family in _NAMES:
            if match := re.search(pattern, plain):
                return family.format(*match.groups())
    return _LLAMA_VOCABULARIES.get(n_vocab) if architecture == "llama" else _ARCHITECTURES.get(architecture)
