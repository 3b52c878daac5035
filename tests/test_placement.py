"""The offload search: exact, and what-if answers that agree with the estimate."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.core.candidate import Placement
from planner.core.hardware import Cpu, Gpu, HardwareProfile, Memory
from planner.core.model import ModelSpec
from planner.core.units import GIB
from planner.estimate.memory import memory
from planner.estimate.placement import fits, longest_context, most_gpu_layers, shortage, what_if
from planner.methods import gguf
from planner.models import catalog

MARGIN = 0.06


def machine(gib: float, count: int = 1, ram: int = 64) -> HardwareProfile:
    return HardwareProfile(
        name="test",
        os="linux",
        cpu=Cpu(model="cpu", architecture="x86_64"),
        memory=Memory(total_bytes=ram * GIB),
        gpus=tuple(
            Gpu(name=f"GPU {i}", vendor="nvidia", backend="cuda", memory_total_bytes=int(gib * GIB))
            for i in range(count)
        ),
    )


def model(name: str) -> ModelSpec:
    found = catalog.lookup(name)
    assert found is not None
    return found


def scanned(name: str, type_: str, hardware: HardwareProfile, placement: Placement) -> int:
    """The most layers that fit, by trying all."""
    spec, variant, count = model(name), gguf.variant(type_), len(hardware.gpus)
    held = [0]
    for layers in range(1, spec.n_layer + 2):
        asked = dataclasses.replace(placement, gpu_layers=layers, gpu_count=count)
        if fits(memory(spec, variant, asked, hardware), MARGIN):
            held.append(layers)
    return max(held)


@given(
    st.sampled_from(("llama-2-13b", "qwen3-30b-a3b", "gemma-3-12b", "deepseek-v2-lite", "gpt-oss-20b")),
    st.sampled_from(("Q4_K_M", "Q8_0")),
    st.floats(3, 26),
    st.sampled_from((2048, 8192, 32768)),
    st.sampled_from((1, 2)),
)
@settings(max_examples=25, deadline=None)
def test_the_search_finds_what_a_scan_finds(name: str, type_: str, gib: float, context: int, count: int) -> None:
    hardware, placement = machine(gib, count), Placement(context=context)
    found = most_gpu_layers(model(name), gguf.variant(type_), placement, hardware, MARGIN)
    assert found == scanned(name, type_, hardware, placement)


def test_nothing_fits_where_the_host_has_no_room() -> None:
    variant = gguf.variant("Q8_0")
    assert most_gpu_layers(model("llama-2-70b"), variant, Placement(context=4096), machine(8, ram=16), MARGIN) is None


def test_without_a_gpu_no_layer_is_offloaded() -> None:
    hardware = dataclasses.replace(machine(8), gpus=())
    assert most_gpu_layers(model("llama-2-7b"), gguf.variant("Q4_0"), Placement(context=512), hardware, MARGIN) == 0


@pytest.mark.parametrize("name", ["llama-3.1-8b", "gemma-3-12b"])
def test_the_longest_context_fits_and_the_next_does_not(name: str) -> None:
    spec, variant, hardware = model(name), gguf.variant("Q4_K_M"), machine(11)
    placement = Placement(context=1, gpu_layers=spec.n_layer + 1, gpu_count=1)
    found = longest_context(spec, variant, placement, hardware, MARGIN)
    assert found is not None and found % 256 == 0
    assert fits(memory(spec, variant, dataclasses.replace(placement, context=found), hardware), MARGIN)
    if found + 256 <= spec.n_ctx_train:
        assert not fits(memory(spec, variant, dataclasses.replace(placement, context=found + 256), hardware), MARGIN)


def test_a_shortage_names_the_device_and_the_bytes() -> None:
    spec, variant, hardware = model("llama-2-13b"), gguf.variant("Q8_0"), machine(8)
    used = memory(spec, variant, Placement(context=4096, gpu_layers=41, gpu_count=1), hardware)
    lack = shortage(used, MARGIN)
    assert lack is not None
    assert lack.device == "GPU 0"
    assert lack.lacking_bytes == used.devices[0].total_bytes - int(8 * GIB * (1 - MARGIN))
    assert shortage(used, -10.0) is None


def test_a_smaller_cache_never_fits_fewer_layers() -> None:
    options = what_if(model("llama-3.1-8b"), gguf.variant("Q8_0"), Placement(context=1), machine(8), MARGIN)
    by = {(option.context, option.kv_type): option.gpu_layers for option in options}
    assert all(by[context, "q8_0"] >= by[context, "f16"] for context in (4096, 8192, 16384, 32768))  # type: ignore[operator]
    assert by[4096, "f16"] > by[32768, "f16"]  # type: ignore[operator]
