"""One pass from a safetensors checkpoint to quantized GGUF files: read a block, quantize it, write it, forget it.

Whole files are byte-identical to those of ``llama_model_quantize`` on the checkpoint's 16-bit GGUF file. Of bfloat16
weights that file is BF16, which holds them exactly; all others go through F16, as with llama.cpp's own converter.

Light to import; what does the work is imported when it is first named.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from planner.quantize.engine import QuantizeResult, quantize_checkpoint
    from planner.quantize.kernels import demands_importance
    from planner.quantize.targets import Target

__all__ = ["QuantizeResult", "Target", "demands_importance", "quantize_checkpoint"]

_LATER = {
    "QuantizeResult": "engine",
    "Target": "targets",
    "demands_importance": "kernels",
    "quantize_checkpoint": "engine",
}


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return getattr(import_module(f"planner.quantize.{_LATER[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
