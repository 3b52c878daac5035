"""Hugging Face checkpoints to GGUF: the 16-bit file every llama.cpp quantization starts from.

Light to import: planning asks ``can_convert``. What does the work is imported when it is first named.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from planner.convert.support import can_convert, supported_model_types

if TYPE_CHECKING:
    from planner.convert.check import TokenizerCheck, check_tokenizer, require_same_tokens
    from planner.convert.external import convert_with_script, find_script
    from planner.convert.write import Conversion, ConvertResult, convert_checkpoint, prepare

__all__ = [
    "Conversion",
    "ConvertResult",
    "TokenizerCheck",
    "can_convert",
    "check_tokenizer",
    "convert_checkpoint",
    "convert_with_script",
    "find_script",
    "prepare",
    "require_same_tokens",
    "supported_model_types",
]

_LATER = {
    "TokenizerCheck": "check",
    "check_tokenizer": "check",
    "require_same_tokens": "check",
    "convert_with_script": "external",
    "find_script": "external",
    "Conversion": "write",
    "ConvertResult": "write",
    "convert_checkpoint": "write",
    "prepare": "write",
}


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return getattr(import_module(f"planner.convert.{_LATER[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
