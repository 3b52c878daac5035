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
from planner.estimate.offload import best_offload
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


def uneven(one: float, two: float) -> HardwareProfile:
    """Two GPUs of different memory."""
    hardware = machine(one, 2)
    second = dataclasses.replace(hardware.gpus[1], memory_total_bytes=int(two * GIB))
    return dataclasses.replace(hardware, gpus=(hardware.gpus[0], second))


def model(name: str) -> ModelSpec:
    found = catalog.lookup(name)
    assert found is not None
    return found


def held(spec: ModelSpec, type_: str, hardware: HardwareProfile, placement: Placement) -> bool:
    """Whether a placement fits, with llama.cpp's own split or any of whole layers between two GPUs."""
    layers = placement.gpu_layers
    splits: list[tuple[float, ...]] = [(), *((float(a), float(layers - a)) for a in range(layers + 1))]
    asked = (dataclasses.replace(placement, tensor_split=split) for split in splits[: 1 if layers == 0 else None])
    if len(hardware.gpus) != 2:
        return fits(memory(spec, gguf.variant(type_), placement, hardware), MARGIN)
    return any(fits(memory(spec, gguf.variant(type_), each, hardware), MARGIN) for each in asked)


def scanned(spec: ModelSpec, type_: str, hardware: HardwareProfile, placement: Placement) -> int:
    """The most layers that fit, by trying all from the top."""
    count = len(hardware.gpus)
    for layers in range(spec.n_layer + 1, 0, -1):
        asked = dataclasses.replace(placement, gpu_layers=layers, gpu_count=count)
        if held(spec, type_, hardware, asked):
            return layers
    return 0


MIXED = ("deepseek-v2-lite", "olmoe-1b-7b", "gpt-oss-20b", "qwen3-30b-a3b")


@given(
    st.sampled_from(("llama-2-13b", "qwen3-30b-a3b", "gemma-3-12b", "deepseek-v2-lite", "gpt-oss-20b")),
    st.sampled_from(("Q4_K_M", "Q8_0")),
    st.floats(3, 26),
    st.sampled_from((2048, 8192, 32768)),
)
@settings(max_examples=25, deadline=None)
def test_the_search_finds_what_a_scan_finds(name: str, type_: str, gib: float, context: int) -> None:
    hardware, placement = machine(gib), Placement(context=context)
    found = most_gpu_layers(model(name), gguf.variant(type_), placement, hardware, MARGIN)
    assert found == scanned(model(name), type_, hardware, placement)


@given(
    st.sampled_from(("tinyllama-1.1b", "llama-3.2-1b", "gemma-3-1b")),
    st.floats(0.8, 2.5),
    st.floats(0.8, 2.5),
    st.sampled_from((2048, 16384)),
)
@settings(max_examples=12, deadline=None)
def test_no_split_of_two_gpus_holds_more_than_the_one_found(name: str, one: float, two: float, context: int) -> None:
    hardware, placement = uneven(one, two), Placement(context=context)
    found = most_gpu_layers(model(name), gguf.variant("F16"), placement, hardware, MARGIN)
    assert found == scanned(model(name), "F16", hardware, placement)


@given(st.sampled_from(MIXED), st.sampled_from(("Q4_K_M", "Q8_0")), st.floats(2, 36), st.sampled_from((4096, 32768)))
@settings(max_examples=25, deadline=None)
def test_the_fewest_layers_leave_their_experts_in_ram(name: str, type_: str, gib: float, context: int) -> None:
    spec, hardware = model(name), machine(gib)
    full = Placement(context=context, gpu_layers=spec.n_layer + 1, gpu_count=1)
    enough = [
        n
        for n in range(spec.n_layer + 1)
        if held(spec, type_, hardware, dataclasses.replace(full, cpu_expert_layers=n))
    ]
    found = best_offload(spec, gguf.variant(type_), Placement(context=context), hardware, MARGIN)
    assert found is not None
    if enough:
        assert (found.gpu_layers, found.cpu_expert_layers) == (full.gpu_layers, enough[0])
    else:
        assert found.gpu_layers == scanned(spec, type_, hardware, dataclasses.replace(full, cpu_expert_layers=999))


@given(st.sampled_from((*MIXED, "llama-2-13b")), st.floats(4, 16), st.floats(4, 16), st.sampled_from((4096, 32768)))
@settings(max_examples=25, deadline=None)
def test_what_is_found_fits(name: str, one: float, two: float, context: int) -> None:
    spec, variant, hardware = model(name), gguf.variant("Q4_K_M"), uneven(one, two)
    found = best_offload(spec, variant, Placement(context=context), hardware, MARGIN)
    assert found is not None
    assert fits(memory(spec, variant, found, hardware), MARGIN)
    if found.tensor_split:
        assert sum(found.tensor_split) == found.gpu_layers


def test_an_uneven_split_holds_what_llamacpps_own_does_not() -> None:
    spec, variant, hardware = model("qwen3-30b-a3b"), gguf.variant("Q4_K_M"), uneven(6, 10)
    found = best_offload(spec, variant, Placement(context=8192), hardware, MARGIN)
    assert found is not None and found.tensor_split and found.cpu_expert_layers
    own = memory(spec, variant, dataclasses.replace(found, tensor_split=()), hardware)
    assert not fits(own, MARGIN)


def test_memory_that_is_shared_has_no_room_for_experts_elsewhere() -> None:
    hardware = machine(12)
    shared = dataclasses.replace(hardware, gpus=(dataclasses.replace(hardware.gpus[0], unified_memory=True),))
    found = best_offload(model("qwen3-30b-a3b"), gguf.variant("Q4_K_M"), Placement(context=4096), shared, MARGIN)
    assert found is None or found.cpu_expert_layers == 0


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
