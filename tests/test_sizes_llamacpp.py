"""Types and compute buffers against llama.cpp itself, on files that have every shape and no weights."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from planner.core.candidate import Placement
from planner.core.hardware import Cpu, HardwareProfile, Memory
from planner.core.model import ModelSpec
from planner.core.units import MIB
from planner.estimate.memory import memory
from planner.execute.stub import write_stub
from planner.methods import gguf, gguf_mix
from planner.models import catalog

llama_cpp = pytest.importorskip("llama_cpp")

MODELS = (
    "tinyllama-1.1b", "mixtral-8x7b", "qwen2.5-0.5b", "qwen3-4b", "qwen3-30b-a3b", "gemma-2-9b", "gemma-3-4b", "phi-4",
    "phi-3.5-moe", "deepseek-v2-lite", "deepseek-v3", "gpt-oss-20b", "command-r7b", "falcon-7b", "olmo-2-1b",
    "starcoder2-3b", "stablelm-2-12b", "glm-4-9b-0414", "glm-4.5-air", "granite-3.1-1b-a400m", "exaone-4.0-32b",
)  # fmt: skip
TYPES = ("Q4_0", "Q4_K_M", "Q3_K_L", "IQ3_XS", "IQ2_M", "IQ4_XS", "Q2_K", "MXFP4_MOE", "TQ1_0", "IQ3_XXS")
HOST = HardwareProfile(name="cpu", os="linux", cpu=Cpu(model="cpu", architecture="x86_64"), memory=Memory())


def spec_of(name: str) -> ModelSpec:
    found = catalog.lookup(name)
    assert found is not None
    return found


# llama.cpp keeps the pointer, so the callback must outlive every call
SILENT = llama_cpp.llama_log_callback(lambda *_: None)


@contextmanager
def heard() -> Iterator[list[str]]:
    """What llama.cpp logs meanwhile."""
    lines: list[str] = []

    @llama_cpp.llama_log_callback
    def collect(level: int, text: bytes, _: object) -> None:
        lines.append(text.decode(errors="replace"))

    llama_cpp.llama_backend_init()
    llama_cpp.llama_log_set(collect, ctypes.c_void_p(0))
    try:
        yield lines
    finally:
        llama_cpp.llama_log_set(SILENT, ctypes.c_void_p(0))


@pytest.fixture
def stub(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[tuple[ModelSpec, Path]]:
    spec, path = spec_of(request.param), tmp_path / "stub.gguf"
    write_stub(spec, path)
    yield spec, path
    path.unlink()


@pytest.mark.slow
@pytest.mark.parametrize("stub", MODELS, indirect=True)
def test_sizes_are_those_of_a_dry_run(stub: tuple[ModelSpec, Path], tmp_path: Path) -> None:
    spec, path = stub
    for type_ in TYPES:
        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype, params.dry_run, params.nthread = gguf_mix.file_type(type_).id, True, 1
        with heard() as lines:
            code = llama_cpp.llama_model_quantize(
                str(path).encode(), str(tmp_path / "out.gguf").encode(), ctypes.byref(params)
            )
        assert code == 0, "".join(lines[-3:])
        told = float(re.findall(r"quant size +=? *([\d.]+) MiB", "".join(lines))[-1])
        size = gguf.size(spec, gguf.variant(type_, imatrix=False))
        assert size.tensor_bytes / MIB == pytest.approx(told, abs=0.006), type_


@pytest.mark.slow
@pytest.mark.parametrize("stub", MODELS, indirect=True)
@pytest.mark.parametrize(("flash", "context"), [(True, 4096), (False, 4096), (True, 32768)])
def test_compute_buffers_are_those_of_a_load_without_allocation(
    stub: tuple[ModelSpec, Path], flash: bool, context: int
) -> None:
    spec, path = stub
    params = llama_cpp.llama_model_default_params()
    params.no_alloc, params.load_mode = True, 0
    settings = llama_cpp.llama_context_default_params()
    settings.n_ctx, settings.n_batch, settings.n_ubatch = context, 2048, 512
    settings.flash_attn_type, settings.swa_full = int(flash), False
    with heard() as lines:
        loaded = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
        made = llama_cpp.llama_init_from_model(loaded, settings)
        llama_cpp.llama_free(made)
        llama_cpp.llama_model_free(loaded)
    log = "".join(lines)
    told = float(re.findall(r"CPU compute buffer size = +([\d.]+)", log)[-1])
    cache = sum(float(found) for found in re.findall(r"size = +([\d.]+) MiB \(", log))
    host = memory(spec, gguf.variant("F16"), Placement(context=context, flash_attention=flash), HOST).host
    assert host.compute_bytes / MIB == pytest.approx(told, abs=0.006)
    assert host.kv_cache_bytes / MIB == pytest.approx(cache, abs=0.02)
