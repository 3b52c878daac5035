"""Bytes of llama.cpp's compute buffers per device: a replay of its graph allocator.

A graph of a few layers stands for the whole model, as a layer's tensors are all freed before the next one's: per
device the first two layers of each kind, and the last. Compiled graphs and results are cached; a replay takes
less than a millisecond.
"""

from __future__ import annotations

from functools import lru_cache

from planner.core.candidate import Placement, Variant
from planner.core.model import ModelSpec
from planner.estimate import kv_cache
from planner.estimate.graph import GLOBAL, WeightKey
from planner.estimate.graph_alloc import Program, compile_graph, symbol_values
from planner.estimate.graph_layers import LayerBuilder, Setting
from planner.methods import gguf

OFFLOAD_MIN_BATCH = 32
"""Rows from which an operation on a weight in RAM runs on the GPU (``GGML_OP_OFFLOAD_MIN_BATCH`` of ggml-cuda)."""
HOST_FIRST, HOST_LAST = 12, 3
"""Layers on the host that are replayed, at its start and end."""
PIPELINE_COPIES = 4
"""Copies of the inputs when all layers lie on several GPUs (``GGML_SCHED_MAX_COPIES``)."""


@lru_cache(maxsize=256)
def _shape_kinds(model: ModelSpec) -> tuple[int, ...]:
    """Per layer: the first layer that builds the same graph."""
    roles: list[list[tuple[str, tuple[int, ...]]]] = [[] for _ in range(model.n_layer)]
    for tensor in model.tensors:
        layer = tensor.layer
        if layer is not None and layer < model.n_layer:
            roles[layer].append((tensor.name.split(".", 2)[2], tensor.shape))
    known: dict[object, int] = {}
    return tuple(
        known.setdefault((attention, tuple(sorted(own))), layer)
        for layer, (attention, own) in enumerate(zip(model.attention, roles, strict=True))
    )


@lru_cache(maxsize=512)
def _copied_bytes(model: ModelSpec, variant: Variant) -> tuple[dict[str, int], ...]:
    """Per layer and, last, outside the layers: bytes of each weight in a GPU's buffer, by role."""
    tables: tuple[dict[str, int], ...] = tuple({} for _ in range(model.n_layer + 1))
    types, sizes = gguf.tensor_types(model, variant), gguf.tensor_bytes(model, variant)
    for tensor, type_, size in zip(model.tensors, types, sizes, strict=True):
        layer = tensor.layer
        if layer is not None and layer >= model.n_layer:
            continue
        role = tensor.name if layer is None else tensor.name.split(".", 2)[2]
        tables[-1 if layer is None else layer][role] = kv_cache.gpu_tensor_bytes(size, type_, tensor.shape[0])
    return tables


@lru_cache(maxsize=512)
def _kinds(model: ModelSpec, variant: Variant) -> tuple[int, ...]:
    """A number per layer; layers with the same number build the same graph from weights of the same sizes."""
    known: dict[object, int] = {}
    return tuple(
        known.setdefault((shape, tuple(sorted(table.items()))), len(known))
        for shape, table in zip(_shape_kinds(model), _copied_bytes(model, variant), strict=False)
    )


@lru_cache(maxsize=4096)
def representatives(kinds: tuple[int, ...], devices: tuple[int, ...], host: int) -> tuple[int, ...]:
    """Layers that stand for all others: per GPU and kind the first two and the last, and every layer of the host.

    On the host each layer's weights pass through the GPU's buffer, and the gaps they leave take many layers to
    settle; layers on a GPU settle at once.
    """
    members: dict[tuple[int, int], list[int]] = {}
    on_host = [layer for layer, device in enumerate(devices) if device == host]
    chosen = {*on_host[:HOST_FIRST], *on_host[-HOST_LAST:]}
    for layer, key in enumerate(zip(devices, kinds, strict=True)):
        members.setdefault(key, []).append(layer)
    chosen.update(layer for own in members.values() for layer in (*own[:2], own[-1]))
    return tuple(sorted(chosen))


@lru_cache(maxsize=1024)
def _program(model: ModelSpec, setting: Setting, offloaded: frozenset[str], copies: int) -> Program:
    return compile_graph(LayerBuilder(model, setting).build(), setting.host + 1, offloaded, copies)


def compute_bytes(
    model: ModelSpec, variant: Variant, placement: Placement, devices: tuple[int, ...], gpu_count: int
) -> tuple[int, ...]:
    """Bytes of the compute buffer of each GPU and, last, of the host.

    Args:
        devices: device of each layer and, last, of the output; the host is ``gpu_count``.
        gpu_count: number of GPUs.
    """
    return _compute_bytes(
        model,
        variant,
        kv_cache.micro_batch(placement),
        kv_cache.cells(placement),
        _window(model, placement),
        placement.kv_type.upper(),
        placement.flash_attention,
        placement.batch,
        devices,
        gpu_count,
    )


def _window(model: ModelSpec, placement: Placement) -> int:
    windows = [layer.window for layer in model.attention if layer.kind == "sliding" and layer.window is not None]
    return kv_cache.window_cells(max(windows), placement) if windows else 0


@lru_cache(maxsize=16384)
def _compute_bytes(
    model: ModelSpec,
    variant: Variant,
    ubatch: int,
    cells: int,
    window: int,
    kv_type: str,
    flash_attention: bool,
    batch: int,
    devices: tuple[int, ...],
    gpu_count: int,
) -> tuple[int, ...]:
    out = min(ubatch, batch)
    layers = representatives(_kinds(model, variant), devices[:-1], gpu_count)
    shapes = _shape_kinds(model)
    setting = Setting(
        flash_attention=flash_attention,
        type_k=kv_type,
        type_v=kv_type,
        devices=tuple((shapes[layer], devices[layer]) for layer in layers),
        host=gpu_count,
        output_device=devices[-1],
    )
    rows = (("u", ubatch), ("out", out))
    offloaded = frozenset(name for name, count in rows if count >= OFFLOAD_MIN_BATCH and gpu_count)
    pipeline = gpu_count > 1 and gpu_count not in devices
    program = _program(model, setting, offloaded, PIPELINE_COPIES if pipeline else 1)
    tables = _copied_bytes(model, variant)

    def weight_bytes(key: WeightKey) -> int:
        position, role = key
        return tables[-1 if position == GLOBAL else layers[position]].get(role, 0)

    return program.peaks(symbol_values(ubatch, out, cells, window), weight_bytes)
