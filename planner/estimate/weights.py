"""Where the bytes of a model's weights lie, and how many of them one token reads."""

from __future__ import annotations

from functools import cache, lru_cache
from itertools import accumulate

from planner.core.candidate import Placement, Variant
from planner.core.model import ModelSpec
from planner.core.units import pad
from planner.estimate.kv_cache import gpu_tensor_bytes
from planner.methods import get, gguf

HOST_ALIGNMENT_BYTES = 32
_LOOKED_UP = ("token_embd.weight", "per_layer_token_embd.weight")
"""Tables of which a token reads one row; llama.cpp keeps them in RAM."""
_OUTPUT_BEFORE_TABLE = frozenset({"gemma3n"})
"""Tied models whose output llama.cpp makes before the table: its report counts both in RAM (src/models/gemma3n.cpp)."""
_EXPERTS = tuple(f"ffn_{part}_{kind}." for part in ("up", "down", "gate", "gate_up") for kind in ("exps", "chexps"))
# What ggml's CPU back end stores a second time, interleaved for its kernels, by instruction set
# (ggml/src/ggml-cpu/repack.cpp, ggml_repack_get_optimal_repack_type). Rows come in eights, in fours on dotprod.
_REPACKED_AVX2 = frozenset({"Q4_0", "Q4_K", "IQ4_NL", "MXFP4"})
_REPACKED_AVX512 = _REPACKED_AVX2 | {"Q2_K"}
_REPACKED_NEON = frozenset({"Q4_0", "Q4_K", "Q5_K", "Q6_K", "Q8_0", "IQ4_NL", "MXFP4", "Q1_0"})


def tensor_bytes(model: ModelSpec, variant: Variant) -> tuple[int, ...]:
    """Bytes of each tensor of ``model.tensors`` in the artifact, without padding."""
    return get(variant.method).tensor_bytes(model, variant)


@lru_cache(maxsize=512)
def layer_bytes(model: ModelSpec, variant: Variant, on_gpu: bool) -> tuple[int, ...]:
    """Bytes in llama.cpp's buffers of each layer and, last, of the output (norm, matrix, shared frequencies apart).

    The token table is in neither; where it doubles as the output matrix, the output counts it once more on a GPU.
    Layers that only predict further tokens are not loaded by default (``load_mtp``) and count nothing.
    """
    table = [0] * (model.n_layer + 1)
    tied, twice = model.tied_embeddings, model.architecture in _OUTPUT_BEFORE_TABLE
    for name, layer, size in _placed(model, variant, on_gpu):
        if layer is not None:
            table[layer] += size
        elif name.startswith("output") or (tied and name == _LOOKED_UP[0] and (on_gpu or twice)):
            table[-1] += size
    return tuple(table)


@lru_cache(maxsize=512)
def expert_bytes(model: ModelSpec, variant: Variant, on_gpu: bool) -> tuple[int, ...]:
    """Of :func:`layer_bytes`, what each layer's routed experts take: what ``--n-cpu-moe`` moves to the host."""
    table = [0] * model.n_layer
    for name, layer, size in _placed(model, variant, on_gpu):
        if layer is not None and is_expert(name):
            table[layer] += size
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
    return count if count > model.n_layer + 1 - placement.gpu_layers else 0


@lru_cache(maxsize=512)
def _placed(model: ModelSpec, variant: Variant, on_gpu: bool) -> tuple[tuple[str, int | None, int], ...]:
    types, sizes = gguf.tensor_types(model, variant), gguf.tensor_bytes(model, variant)
    return tuple(
        (
            tensor.name,
            tensor.layer,
            gpu_tensor_bytes(size, type_, tensor.shape[0]) if on_gpu else pad(size, HOST_ALIGNMENT_BYTES),
        )
        for tensor, type_, size in zip(model.tensors, types, sizes, strict=True)
        if tensor.layer is None or tensor.layer < model.n_layer
    )


@lru_cache(maxsize=512)
def global_bytes(model: ModelSpec, variant: Variant) -> tuple[int, int]:
    """Bytes of the tables that always stay in RAM, and of what every device with layers holds (frequencies)."""
    tables = shared = 0
    for name, layer, size in _placed(model, variant, False):
        if layer is None and name in _LOOKED_UP:
            tables += size
        elif layer is None and not name.startswith("output"):
            shared += size
    return tables, shared


@lru_cache(maxsize=2048)
def repacked_bytes(model: ModelSpec, variant: Variant, host_layers: int, output: bool, simd: tuple[str, ...]) -> int:
    """Bytes that the CPU back end keeps interleaved for the first ``host_layers`` layers, and the output.

    Source: ggml/src/ggml-cpu/repack.cpp of llama.cpp as in llama-cpp-python 0.3.36.
    """
    types = _repacked_types(simd)
    total = 0
    for tensor, type_, size in zip(
        model.tensors, gguf.tensor_types(model, variant), gguf.tensor_bytes(model, variant), strict=True
    ):
        here = output and tensor.name == "output.weight" if tensor.layer is None else tensor.layer < host_layers
        if here and type_ in types and len(tensor.shape) > 1 and tensor.shape[1] % 8 == 0 and _multiplied(tensor.name):
            total += pad(size, HOST_ALIGNMENT_BYTES)
    return total


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
    """Bytes one token reads of the first 0, 1 … layers, of these layers' routed experts, and of the output."""
    layers, experts, output = [0.0] * model.n_layer, [0.0] * model.n_layer, 0.0
    tied = model.tied_embeddings
    for tensor, size in zip(model.tensors, tensor_bytes(model, variant), strict=True):
        layer = tensor.layer
        if layer is not None:
            if layer >= model.n_layer:
                continue  # predicts further tokens; not loaded by default
            read = size * model.routed_fraction(tensor)
            layers[layer] += read
            if is_expert(tensor.name):
                experts[layer] += read
        elif tensor.name not in _LOOKED_UP or (tied and tensor.name == _LOOKED_UP[0]):
            output += size
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
    host_layers = min(max(model.n_layer + 1 - placement.gpu_layers, 0), model.n_layer)
    host = sums[host_layers] + (output if placement.gpu_layers < 1 else 0.0)
    host += experts[max(expert_layers(model, placement), host_layers)] - experts[host_layers]
    return round(total - host), round(host)


def host_streamed_bytes(model: ModelSpec, variant: Variant, placement: Placement, batch: int) -> float:
    """Bytes of the host's weights that ``batch`` tokens touch, if each picks its experts independently."""
    host = float(bytes_read_per_token(model, variant, placement)[1])
    if model.mixture is None or variant.format != "gguf" or not host:
        return host
    _, experts, _ = _read_sums(model, variant)
    host_layers = min(max(model.n_layer + 1 - placement.gpu_layers, 0), model.n_layer)
    routed = experts[max(expert_layers(model, placement), host_layers)]
    share = model.mixture.expert_used_count / model.mixture.expert_count
    return host + routed / share * (1 - (1 - share) ** batch) - routed
