"""Where the bytes of a model's weights lie, and how many of them one token reads."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import accumulate

from planner.core.candidate import Placement, Variant
from planner.core.model import ModelSpec
from planner.core.units import pad
from planner.estimate.kv_cache import gpu_tensor_bytes
from planner.formats.ggml import type_traits
from planner.methods import get, gguf

HOST_ALIGNMENT_BYTES = 32
_LOOKED_UP = ("token_embd.weight", "per_layer_token_embd.weight")
"""Tables of which a token reads one row; llama.cpp keeps them in RAM."""
_WITH_OUTPUT, _WITH_FIRST_LAYER = ("output", "altup_"), ("per_layer_model_proj", "per_layer_proj_norm")
"""Tensors outside the layers that lie where the output and the first layer do (``LLM_TENSOR_INFOS``)."""
_OUTPUT_BEFORE_TABLE = frozenset({"gemma3n"})
"""Tied models whose output llama.cpp makes before the table: its report counts both in RAM (src/models/gemma3n.cpp)."""
_EXPERTS = tuple(f"ffn_{part}_{kind}." for part in ("up", "down", "gate", "gate_up") for kind in ("exps", "chexps"))
# What ggml's CPU back end stores a second time, interleaved for its kernels, by instruction set
# (ggml/src/ggml-cpu/repack.cpp, ggml_repack_get_optimal_repack_type). Rows come in eights, in fours on dotprod.
_REPACKED_AVX2 = frozenset({"Q4_0", "Q4_K", "IQ4_NL", "MXFP4"})
_REPACKED_AVX512 = _REPACKED_AVX2 | {"Q2_K"}
# AMX is asked before the interleaved kernels, for all but experts, and keeps these types, with bytes added per block of
# some (ggml/src/ggml-cpu/amx: common.h, mmq.cpp and amx.cpp); F16 it copies as it is.
_AMX_ADDED_BYTES = {"Q4_0": 0, "Q4_1": 0, "Q8_0": 4, "Q4_K": 4, "Q5_K": 4, "Q6_K": 0, "IQ4_XS": 2, "F16": 0}
_REPACKED_NEON = frozenset({"Q4_0", "Q4_K", "Q5_K", "Q6_K", "Q8_0", "IQ4_NL", "MXFP4", "Q1_0"})


def tensor_bytes(model: ModelSpec, variant: Variant) -> tuple[int, ...]:
    """Bytes of each tensor of ``model.tensors`` in the artifact, without padding."""
    return get(variant.method).tensor_bytes(model, variant)


@dataclass(frozen=True, slots=True)
class _Slots:
    """Where each tensor of a model counts: worked out once, as every type of it asks."""

    of_tensor: tuple[int, ...]
    """Its layer; ``n_layer`` the output, then the tables that stay in RAM, then what every device with layers holds.

    Last, layers that only predict further tokens: not loaded by default (``load_mtp``), so they count nowhere."""
    experts: tuple[int, ...]
    """Indexes of routed experts."""
    routed: tuple[float, ...]
    """Share of each tensor that one token uses."""
    tied: int | None
    """Index of the token table where it doubles as the output matrix."""


@lru_cache(maxsize=512)
def _slots(model: ModelSpec) -> _Slots:
    last, slots, experts, tied = model.n_layer - 1, [], [], None
    for index, tensor in enumerate(model.tensors):
        name, layer = tensor.name, tensor.layer
        if layer is not None:
            slots.append(layer if layer <= last else last + 4)
            if layer <= last and is_expert(name):
                experts.append(index)
        elif name in _LOOKED_UP:
            slots.append(last + 2)
        elif name.startswith(_WITH_FIRST_LAYER):
            slots.append(0)
        else:
            slots.append(last + 1 if name.startswith(_WITH_OUTPUT) else last + 3)
        if name == _LOOKED_UP[0] and model.tied_embeddings:
            tied = index
    routed = tuple(model.routed_fraction(tensor) for tensor in model.tensors)
    return _Slots(tuple(slots), tuple(experts), routed, tied)


@lru_cache(maxsize=64)
def buffer_bytes(model: ModelSpec, variant: Variant, on_gpu: bool) -> tuple[int, ...]:
    """Bytes of each tensor of ``model.tensors`` in one of llama.cpp's buffers, with its padding."""
    sizes = gguf.tensor_bytes(model, variant)
    if not on_gpu:
        return tuple([-(-size // HOST_ALIGNMENT_BYTES) * HOST_ALIGNMENT_BYTES for size in sizes])
    types = gguf.tensor_types(model, variant)
    rows = [tensor.shape[0] for tensor in model.tensors]
    return tuple(map(gpu_tensor_bytes, sizes, types, rows))


@lru_cache(maxsize=512)
def _by_slot(model: ModelSpec, variant: Variant, on_gpu: bool) -> tuple[int, ...]:
    table = [0] * (model.n_layer + 4)
    for slot, size in zip(_slots(model).of_tensor, buffer_bytes(model, variant, on_gpu), strict=True):
        table[slot] += size
    return tuple(table)


def layer_bytes(model: ModelSpec, variant: Variant, on_gpu: bool) -> tuple[int, ...]:
    """Bytes in llama.cpp's buffers of each layer and, last, of the output (norm, matrix, shared frequencies apart).

    The token table is in neither; where it doubles as the output matrix, the output counts it once more on a GPU.
    """
    table, tied = _by_slot(model, variant, on_gpu)[: model.n_layer + 1], _slots(model).tied
    if tied is None or not (on_gpu or model.architecture in _OUTPUT_BEFORE_TABLE):
        return table
    return (*table[:-1], table[-1] + buffer_bytes(model, variant, on_gpu)[tied])


def expert_bytes(model: ModelSpec, variant: Variant, on_gpu: bool) -> tuple[int, ...]:
    """Of :func:`layer_bytes`, what each layer's routed experts take: what ``--n-cpu-moe`` moves to the host."""
    table, slots = [0] * model.n_layer, _slots(model)
    sizes = buffer_bytes(model, variant, on_gpu) if slots.experts else ()
    for index in slots.experts:
        table[slots.of_tensor[index]] += sizes[index]
    return tuple(table)


@lru_cache(maxsize=512)
def layer_sums(model: ModelSpec, variant: Variant, on_gpu: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Sums over the first 0, 1 … layers (the output last) of :func:`layer_bytes`, and of :func:`expert_bytes`."""
    return (
        tuple(accumulate(layer_bytes(model, variant, on_gpu), initial=0)),
        tuple(accumulate((*expert_bytes(model, variant, on_gpu), 0), initial=0)),
    )


@cache
def is_expert(name: str) -> bool:
    """Whether a tensor is one that llama.cpp's ``--n-cpu-moe`` moves: routed experts with their biases.

    Source: ``LLM_FFN_EXPS_REGEX`` in common/common.h of llama.cpp as in llama-cpp-python 0.3.36.
    """
    return name.startswith("blk.") and name.split(".", 2)[2].startswith(_EXPERTS)


def expert_layers(model: ModelSpec, placement: Placement) -> int:
    """Layers, counted from the first, whose experts ``placement`` keeps in RAM although a GPU may hold the layer.

    0 where that moves nothing: no experts, no GPU, or those layers are in RAM anyway.
    """
    count = min(placement.cpu_expert_layers, model.n_layer)
    if model.mixture is None or placement.gpu_layers <= 0:
        return 0
    return count if count > model.offloadable_count - placement.gpu_layers else 0


def global_bytes(model: ModelSpec, variant: Variant, on_gpu: bool = False) -> tuple[int, int]:
    """Bytes of the tables that always stay in RAM, and of what every device with layers holds (frequencies)."""
    tables, shared = _by_slot(model, variant, on_gpu)[model.n_layer + 1 : model.n_layer + 3]
    return tables, shared


@lru_cache(maxsize=2048)
def repacked_bytes(model: ModelSpec, variant: Variant, host_layers: int, output: bool, simd: tuple[str, ...]) -> int:
    """Bytes that the CPU back end keeps interleaved for the first ``host_layers`` layers, and the output.

    Source: ggml/src/ggml-cpu/repack.cpp and amx/ of llama.cpp as in llama-cpp-python 0.3.36.
    """
    types, amx = _repacked_types(simd), {"amx_int8", "avx512_vnni"} <= set(simd)
    of_tensor, sizes = gguf.tensor_types(model, variant), gguf.tensor_bytes(model, variant)
    total = 0
    for index, layer, rows, expert in _interleavable(model):
        if not (output if layer is None else layer < host_layers):
            continue
        type_, size = of_tensor[index], sizes[index]
        if amx and type_ in _AMX_ADDED_BYTES and rows % 32 == 0 and not expert:
            added = _AMX_ADDED_BYTES[type_] * (size // type_traits(type_).block_bytes)
            total += pad(size + added, HOST_ALIGNMENT_BYTES)
        elif type_ in types:
            total += pad(size, HOST_ALIGNMENT_BYTES)
    return total


@lru_cache(maxsize=256)
def _interleavable(model: ModelSpec) -> tuple[tuple[int, int | None, int, bool], ...]:
    """``(index, layer, rows, whether an expert)`` of matrices that some kernel interleaves; the output has no layer."""
    found = []
    for index, tensor in enumerate(model.tensors):
        inside = tensor.layer is not None or tensor.name == "output.weight"
        if inside and len(tensor.shape) > 1 and not tensor.shape[1] % 8 and _multiplied(tensor.name):
            found.append((index, tensor.layer, tensor.shape[1], is_expert(tensor.name)))
    return tuple(found)


def _multiplied(name: str) -> bool:
    """Latent attention's per-head matrices are multiplied in batches, which no interleaved kernel does."""
    return not name.endswith(("attn_k_b.weight", "attn_v_b.weight"))


def _repacked_types(simd: tuple[str, ...]) -> frozenset[str]:
    if any(flag.startswith("avx512") for flag in simd):
        return _REPACKED_AVX512
    if "avx2" in simd:
        return _REPACKED_AVX2
    return _REPACKED_NEON if "neon" in simd or "dotprod" in simd else frozenset()


@lru_cache(maxsize=512)
def _read_sums(model: ModelSpec, variant: Variant) -> tuple[tuple[float, ...], tuple[float, ...], float]:
    """Bytes one token reads of the first 0, 1 … layers, of these layers' routed experts, and of the output.

    Frequencies count with the output, a looked-up table not at all.
    """
    slots, sizes = _slots(model), tensor_bytes(model, variant)
    table = [0.0] * (model.n_layer + 4)
    for slot, size, share in zip(slots.of_tensor, sizes, slots.routed, strict=True):
        table[slot] += size * share
    experts = [0.0] * model.n_layer
    for index in slots.experts:
        experts[slots.of_tensor[index]] += sizes[index] * slots.routed[index]
    output = table[model.n_layer] + table[model.n_layer + 2] + (0 if slots.tied is None else sizes[slots.tied])
    layers = table[: model.n_layer]
    return tuple(accumulate(layers, initial=0.0)), tuple(accumulate(experts, initial=0.0)), output


def bytes_read_per_token(model: ModelSpec, variant: Variant, placement: Placement) -> tuple[int, int]:
    """Bytes of weights that one token reads from the GPUs' memory and from the host's: ``(gpu, host)``.

    A routed expert counts by its share, a looked-up table not at all, the output with the GPU from
    ``gpu_layers`` 1 on. Other methods than GGUF read everything where they run.
    """
    sums, experts, output = _read_sums(model, variant)
    total = sums[-1] + output
    if variant.format != "gguf":
        return (round(total), 0) if placement.gpu_count or placement.gpu_layers else (0, round(total))
    host_layers = min(max(model.offloadable_count - placement.gpu_layers, 0), model.n_layer)
    host = sums[host_layers] + (output if placement.gpu_layers < 1 else 0.0)
    host += experts[max(expert_layers(model, placement), host_layers)] - experts[host_layers]
    return round(total - host), round(host)


def host_streamed_bytes(model: ModelSpec, variant: Variant, placement: Placement, batch: int) -> float:
    """Bytes of the host's weights that ``batch`` tokens touch, if each picks its experts independently."""
    host = float(bytes_read_per_token(model, variant, placement)[1])
    if model.mixture is None or variant.format != "gguf" or not host:
        return host
    _, experts, _ = _read_sums(model, variant)
    host_layers = min(max(model.offloadable_count - placement.gpu_layers, 0), model.n_layer)
    routed = experts[max(expert_layers(model, placement), host_layers)]
    share = model.mixture.expert_used_count / model.mixture.expert_count
    return host + routed / share * (1 - (1 - share) ** batch) - routed
