"""Two steps to compare one pass with, and checkpoints of every family without torch. Needs llama-cpp-python."""

from __future__ import annotations

import ctypes
import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from planner import models
from planner.convert import convert_checkpoint
from planner.methods import gguf, gguf_mix
from planner.quantize import Target
from planner.workflow.applying import tensor_types
from tests.convert_fixtures import quiet_llama_cpp

ROOT = Path(__file__).resolve().parent.parent
SHAPE: dict[str, Any] = {
    "vocab_size": 2048,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
}


def checkpoints() -> ModuleType:
    """The benchmark's module that writes random checkpoints."""
    spec = importlib.util.spec_from_file_location("checkpoints", ROOT / "benchmarks" / "checkpoints.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def target(directory: Path, output: Path, type_: str, importance: Mapping[str, Any] | None = None) -> Target:
    """``output`` as ``type_`` of the checkpoint in ``directory``."""
    return Target(
        output=output,
        file_type=gguf_mix.file_type(type_).id,
        types=tensor_types(directory, gguf.variant(type_, None, importance is not None)),
        importance=importance,
    )


def two_steps(
    directory: Path, output: Path, type_: str, *, out_type: str = "auto", importance: Mapping[str, Any] | None = None
) -> bytes:
    """The bytes of convert → ``llama_model_quantize``; the 16-bit file is made once per folder."""
    between = output.with_name(f"two-steps-{out_type}.gguf")
    if not between.exists():
        convert_checkpoint(directory, between, out_type=out_type, model_name=directory.name)
    quantize_file(between, output, type_, importance)
    return output.read_bytes()


def quantize_file(source: Path, output: Path, type_: str, importance: Mapping[str, Any] | None = None) -> None:
    """``llama_model_quantize``, with an importance matrix as its C interface takes one."""
    import llama_cpp

    llama_cpp.llama_log_set(quiet_llama_cpp(), None)
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = gguf_mix.file_type(type_).id, 2
    if importance is not None:
        entries = (llama_cpp.llama_model_imatrix_data * (len(importance) + 1))()
        for entry, (name, values) in zip(entries, importance.items(), strict=False):
            entry.name, entry.size = name.encode(), values.size
            entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        params.imatrix = ctypes.cast(entries, ctypes.POINTER(llama_cpp.llama_model_imatrix_data))
    assert llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(output), ctypes.byref(params)) == 0


def random_importance(directory: Path, seed: int = 0) -> dict[str, Any]:
    """Positive weights of every matrix's columns, an expert stack's per expert, some columns never seen."""
    draw, found = np.random.default_rng(seed), {}
    for tensor in models.resolve(str(directory)).tensors:
        if len(tensor.shape) > 1:
            count = tensor.shape[0] * (tensor.shape[2] if len(tensor.shape) > 2 else 1)
            found[tensor.name] = draw.exponential(1.0, count).astype(np.float32) ** 2
    return found
