"""Bytes of llama.cpp's compute buffers per device: a replay of its graph allocator.

The graph is compiled for a few layers, per device and shape the first, a usual one and the last; the other layers
repeat the usual one's events with the sizes of their own weights. Compiled graphs and results are cached.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise

from planner.core.candidate import Placement, Variant
from planner.core.model import ModelSpec
from planner.estimate import kv_cache, weights
from planner.estimate.graph import GLOBAL, WeightKey
from planner.estimate.graph_alloc import OFFLOAD_MIN_BATCH, Rows, compile_graph, symbol_values
from planner.estimate.graph_layers import build
from planner.estimate.graph_pieces import Setting, rotates, sparse
from planner.estimate.graph_replay import Program, Step
from planner.formats.ggml import type_traits

VECTOR_KERNEL_MAX_TOKENS, VECTOR_KERNEL_TYPES = 2, ("Q4_0", "Q8_0")
"""Tokens of a sequence and types of a cache that flash attention reads without a copy in F16, from compute capability
8.9 on (``ggml_cuda_get_best_fattn_kernel``; older GPUs take one token) and with the kernels compiled by default."""
PIPELINE_COPIES = 4
"""Copies of the inputs when all layers lie on several GPUs (``GGML_SCHED_MAX_COPIES``)."""


@lru_cache(maxsize=256)
def _shape_kinds(model: ModelSpec) -> tuple[int, ...]:
    """Per layer: the first layer that builds the same graph, before a layer that reads its state early or does not."""
    roles: list[list[tuple[str, tuple[int, ...]]]] = [[] for _ in range(model.n_layer)]
    for tensor in model.tensors:
        layer = tensor.layer
        if layer is not None and layer < model.n_layer:
            roles[layer].append((tensor.name.split(".", 2)[2], tensor.shape))
    known: dict[object, int] = {}
    early = (*_recurrent(model)[1:], False)
    return tuple(
        known.setdefault((attention, rotates(model, layer), sparse(model, layer), early[layer], *sorted(own)), layer)
        for layer, (attention, own) in enumerate(zip(model.attention, roles, strict=True))
    )


@lru_cache(maxsize=256)
def _recurrent(model: ModelSpec) -> tuple[bool, ...]:
    return tuple(attention.kind == "recurrent" for attention in model.attention)


@lru_cache(maxsize=512)
def _copied_bytes(model: ModelSpec, variant: Variant) -> tuple[dict[str, int], ...]:
    """Per layer and, last, outside the layers: bytes of each weight in a GPU's buffer, by role."""
    tables: tuple[dict[str, int], ...] = tuple({} for _ in range(model.n_layer + 2))
    for (layer, role), size in zip(_roles(model), weights.buffer_bytes(model, variant, True), strict=True):
        tables[layer][role] = size
    return tables[:-1]


@lru_cache(maxsize=256)
def _roles(model: ModelSpec) -> tuple[tuple[int, str], ...]:
    """Per tensor: its layer (``n_layer`` outside the layers, one more for what is never run) and its role in it."""
    found = []
    for tensor in model.tensors:
        layer = tensor.layer
        if layer is None:
            found.append((model.n_layer, tensor.name))
        else:
            found.append((layer if layer < model.n_layer else model.n_layer + 1, tensor.name.split(".", 2)[2]))
    return tuple(found)


@lru_cache(maxsize=512)
def _kinds(model: ModelSpec, variant: Variant) -> tuple[int, ...]:
    """A number per layer; layers with the same number build the same graph from weights of the same sizes."""
    known: dict[object, int] = {}
    return tuple(
        known.setdefault((shape, tuple(table.items())), len(known))
        for shape, table in zip(_shape_kinds(model), _copied_bytes(model, variant), strict=False)
    )


@lru_cache(maxsize=4096)
def _plan(
    shapes: tuple[int, ...],
    kinds: tuple[int, ...],
    recurrent: tuple[bool, ...],
    devices: tuple[int, ...],
    host: int,
    expert_layers: int,
) -> tuple[tuple[tuple[int, int, int], ...], tuple[Step, ...]]:
    """The layers to compile, as ``(layer, device, experts' device)``, and the step of every layer of the model.

    Per pair of devices and shape the first layer, a usual one and the last are compiled; the others are like the usual
    one. Where weights are copied to a GPU, a layer before one that reads something for the first time is not usual: its
    last operations are computed together with the next layer's first ones, and it copies the next layer's inputs.
    Recurrent layers read their state before the one before them is finished, so no layer gets another neighbour there.
    """
    members: dict[tuple[int, int, int], list[int]] = {}
    experts = (*(host for _ in devices[:expert_layers]), *devices[expert_layers:])
    keys = tuple(zip(shapes, devices, experts, strict=True))
    for layer, key in enumerate(keys):
        members.setdefault(key, []).append(layer)
    before = {own[0] - 1 for own in members.values()} | {len(keys) - 2}
    unusual = {i for i in before if i >= 0 and (keys[i][1] == host > 0 or keys[i][1] != keys[i][2])}
    usual: dict[tuple[int, int, int], int] = {}
    chosen: list[int] = []
    for key, own in members.items():
        usual[key] = next((layer for layer in own[1:-1] if layer not in unusual), own[0])
        chosen += sorted({own[0], usual[key], own[-1], *unusual.intersection(own)})
    chosen.sort()
    pairs = pairwise(chosen)
    chosen = sorted({*chosen, *(after - 1 for layer, after in pairs if recurrent[layer + 1] != recurrent[after])})
    position = {layer: at for at, layer in enumerate(chosen)}
    steps = [Step(0, GLOBAL)]
    for layer, key in enumerate(keys):
        repeated = layer not in position
        segment = position[usual[key] if repeated else layer] + 1
        last = steps[-1]
        if repeated and (last.segment, last.kind) == (segment, kinds[layer]):
            steps[-1] = Step(segment, last.layer, last.kind, last.count + 1)
        else:
            steps.append(Step(segment, layer, kinds[layer] if repeated else None))
    return tuple(keys[layer] for layer in chosen), tuple(steps)


@lru_cache(maxsize=1024)
def _program(model: ModelSpec, setting: Setting, rows: Rows, copies: int) -> Program:
    return compile_graph(build(model, setting), setting.host + 1, rows, copies)


def compute_bytes(
    model: ModelSpec, variant: Variant, placement: Placement, devices: tuple[int, ...], gpu_count: int
) -> tuple[int, ...]:
    """Bytes of the compute buffer of each GPU and, last, of the host.

    Args:
        devices: device of each layer and, last, of the output; the host is ``gpu_count``.
        gpu_count: number of GPUs.
    """
    experts = weights.expert_layers(model, placement)
    # only weights that lie in RAM beside a GPU are copied; else their types do not matter
    copied = gpu_count > 0 and (gpu_count in devices[:-1] or experts > 0)
    return _compute_bytes(
        model,
        variant if copied else None,
        kv_cache.micro_batch(placement),
        placement.sequences,
        kv_cache.cells(placement),
        _window(model, placement),
        placement.kv_type.upper(),
        placement.flash_attention,
        placement.batch,
        devices,
        gpu_count,
        experts,
    )


def _window(model: ModelSpec, placement: Placement) -> int:
    windows = [layer.window for layer in model.attention if layer.kind == "sliding" and layer.window is not None]
    return kv_cache.window_cells(max(windows), placement) if windows else 0


@lru_cache(maxsize=16384)
def _compute_bytes(
    model: ModelSpec,
    variant: Variant | None,
    ubatch: int,
    sequences: int,
    cells: int,
    window: int,
    kv_type: str,
    flash_attention: bool,
    batch: int,
    devices: tuple[int, ...],
    gpu_count: int,
    expert_layers: int,
) -> tuple[int, ...]:
    out, traits = min(ubatch, batch), type_traits(kv_type)
    tokens = -(-ubatch // sequences) * sequences  # as many of each sequence (``llama_context::graph_reserve``)
    shapes = _shape_kinds(model)
    kinds = shapes if variant is None else _kinds(model, variant)
    compiled, steps = _plan(shapes, kinds, _recurrent(model), devices[:-1], gpu_count, expert_layers)
    setting = Setting(
        flash_attention=flash_attention,
        kv_block_weights=traits.block_weights,
        kv_half=kv_type == "F16",
        vector_kernel=tokens // sequences <= VECTOR_KERNEL_MAX_TOKENS and kv_type in VECTOR_KERNEL_TYPES,
        devices=compiled,
        host=gpu_count,
        output_device=devices[-1],
    )
    rows = (min(tokens, OFFLOAD_MIN_BATCH), min(out, OFFLOAD_MIN_BATCH))
    # llama.cpp has no pipeline where tensors were moved by name (``has_tensor_overrides``)
    pipeline = gpu_count > 1 and gpu_count not in devices and not expert_layers
    program = _program(model, setting, rows, PIPELINE_COPIES if pipeline else 1)
    tables = _copied_bytes(model, variant) if variant is not None else ()

    def weight_bytes(layer: int, key: WeightKey) -> int:
        position, role = key
        return tables[-1 if position == GLOBAL else layer].get(role, 0) if tables else 0

    return program.peaks(symbol_values(tokens, out, cells, window, traits.block_bytes, sequences), steps, weight_bytes)
