"""Attention over a KV cache, as ``build_attn`` of src/llama-graph.cpp orders it."""

from __future__ import annotations

from planner.core.model import AttentionLayer
from planner.estimate.graph import Node, Shape, cached_terms, cut, divided, leaf, multiplied, root_of, terms, view
from planner.estimate.graph_pieces import Pieces
from planner.estimate.kv_cache import CUDA_ROW_PADDING

_SOFT_CAPPED = ("gemma2",)
_NORMALIZED_VALUES = ("gemma3n",)
_KERNEL_DIMS = frozenset(
    {(d, d) for d in (40, 64, 72, 80, 96, 112, 128, 256, 512)} | {(192, 128), (320, 256), (576, 512)}
)
"""Lengths of K and V that flash attention has a CUDA kernel for (``ggml_cuda_get_best_fattn_kernel``)."""
_VECTOR_KERNEL_DIMS = (64, 128, 256)
"""Lengths of a head that the vector kernel is compiled for (``ggml_cuda_get_fattn_vec_case``)."""


def attention(b: Pieces, layer: AttentionLayer, current: Node) -> Node:
    """Attention of ``layer`` with its projections."""
    heads, heads_kv = layer.head_count, layer.head_count_kv
    cells = "kvs" if layer.kind == "sliding" else "kv"
    if not layer.owns_kv_cache:
        q = view("RESHAPE", (layer.k_dim, heads, "u"), b.linear(current, "attn_q"))
        q = b.rope(b.norm(q, "attn_q_norm.weight"))
        q = _turned(q, b.k_turns[cells])
        b.graph.expand(q)
        k_cache, v_cache = (_window(b, cache, layer.k_dim, heads_kv, cells) for cache in b.caches[cells])
        return b.linear(_turned(_attend(b, q, k_cache, v_cache, cells, heads), b.v_turns[cells]), "attn_output")
    q, k, v, gate = _queries_keys_values(b, layer, current)
    q, k = _turned(q, b.k_turns[cells]), _turned(k, b.k_turns[cells])
    v = _turned(v, b.v_turns[cells])
    for node in (q, k, v) if b.windowed else (q, v, k):
        b.graph.expand(node)
    k_cache = _store(b, k, layer.k_dim, heads_kv, cells, b.k_rows[cells])
    v_cache = _store(b, v, layer.v_dim, heads_kv, cells, b.v_rows[cells])
    b.caches[cells] = root_of(k_cache), root_of(v_cache)
    result = _turned(_attend(b, q, k_cache, v_cache, cells, heads), b.v_turns[cells])
    if gate is not None:
        result = Node("MUL", result.shape, (result, Node("UNARY", gate.shape, (gate,))))
    return b.linear(result, "attn_output")


def _queries_keys_values(b: Pieces, layer: AttentionLayer, current: Node) -> tuple[Node, Node, Node, Node | None]:
    """Q, K and V, normed and rotated, and the gate of the result where there is one."""
    heads, heads_kv = layer.head_count, layer.head_count_kv
    q_shape: Shape = (layer.k_dim, heads, "u")
    k_shape: Shape = (layer.k_dim, heads_kv, "u")
    v_shape: Shape = (layer.v_dim, heads_kv, "u")
    gate = None
    if "attn_qkv.weight" in b.has:
        fused = b.linear(current, "attn_qkv")
        q, k, v = (cut(shape, fused) for shape in (q_shape, k_shape, v_shape))
    else:
        q, k, v = (b.linear(current, name) for name in ("attn_q", "attn_k", "attn_v"))
        if b.has.get("attn_q_norm.weight") == (layer.k_dim * heads,):
            q, k = b.norm(q, "attn_q_norm.weight"), b.norm(k, "attn_k_norm.weight")
        if q.shape[0] == 2 * layer.k_dim * heads:
            gate = Node("CONT", (layer.k_dim * heads, "u"), (view("VIEW", q_shape, q),))
        q, k, v = view("RESHAPE", q_shape, q), view("RESHAPE", k_shape, k), view("RESHAPE", v_shape, v)
    if b.has.get("attn_q_norm.weight", (0,))[0] == layer.k_dim:
        q, k = b.norm(q, "attn_q_norm.weight"), b.norm(k, "attn_k_norm.weight")
    if b.architecture in _NORMALIZED_VALUES:
        v = Node("RMS_NORM", v.shape, (v,))
    if b.rotates:
        q, k = b.rope(q), b.rope(k)
    elif b.architecture == "llama4":
        q = Node("MUL", q.shape, (q, b.temperatures))
    if b.rotates and b.normed_after_rope:
        q, k = (Node("RMS_NORM", node.shape, (node,)) for node in (q, k))
    return q, k, v, gate


def _turned(node: Node, matrix: Node | None) -> Node:
    if matrix is None:
        return node
    rows = matrix.shape[0]
    flat: Shape = (rows, *divided(node.shape, rows))
    turned = Node("MUL_MAT", flat, (matrix, view("RESHAPE", flat, node)))
    return view("RESHAPE", node.shape, turned)


def _store(b: Pieces, node: Node, dim: int, heads: int, cells: str, rows: Node) -> Node:
    """Write ``node`` into the cache; the view of the cache that attention reads."""
    cache = leaf((dim * heads, cells), 2, home=b.device)
    flat = view("VIEW", (dim * heads, "u"), node)
    flat.size = node.size
    if not b.setting.flash_attention and rows in b.v_rows.values():
        whole = node.row_stride is None
        wide: Shape = (dim * heads, "u")
        rows_of_v = view("RESHAPE", wide, node) if whole else Node("CONT", wide, (node,))
        flat = view("RESHAPE", (1, dim * heads, "u"), rows_of_v)
        stored = Node("SET_ROWS", (), (flat, rows, view("RESHAPE", (1, dim * heads, cells), cache)))
    else:
        stored = Node("SET_ROWS", (), (flat, rows, cache))
    stored.root = cache
    b.graph.expand(stored)
    return _window(b, cache, dim, heads, cells)


def _window(b: Pieces, cache: Node, dim: int, heads: int, cells: str) -> Node:
    seen = view("PERMUTE", (dim, cells, heads), view("VIEW", (dim, heads, cells), cache))
    block = b.setting.kv_block_weights
    seen.size = cached_terms(cells, dim * heads // block)
    if block > 1 and dim % CUDA_ROW_PADDING:
        seen.padding = cached_terms(None, (CUDA_ROW_PADDING - dim % CUDA_ROW_PADDING) // block)
    seen.width = 2 if block == 1 else 0
    return seen


def _attend(b: Pieces, q: Node, k: Node, v: Node, cells: str, heads: int, v_up: str | None = None) -> Node:
    """``build_attn_mha``: flash attention, or scores, soft-max and their product with V."""
    mask = b.masks[cells]
    v_dim = v.shape[0]
    q = view("PERMUTE", (q.shape[0], "u", heads), view("VIEW", q.shape, q))
    sinks = (b.weight("attn_sinks.weight"),) if "attn_sinks.weight" in b.has else ()
    if b.setting.flash_attention:
        result = Node("FLASH_ATTN_EXT", (v_dim, heads, "u"), (q, k, v, mask, *sinks))
        result.host_only = (k.shape[0], v_dim) not in _KERNEL_DIMS
        result.scratch = _half_copies(b, k, v)
        result.scratch_apart = terms(v.shape, 2) if b.model.mla and not b.setting.kv_half else ()
        if v_up is not None:
            up = b.has[v_up][1]
            turned = view("PERMUTE", (v_dim, "u", heads), result)
            product = Node("MUL_MAT", (up, "u", heads), (b.weight(v_up), turned))
            result = Node("CONT", (up, heads, "u"), (view("PERMUTE", (up, heads, "u"), product),))
        merged = view("RESHAPE", (multiplied(result.shape[0], heads), "u"), result)
    else:
        scores = Node("MUL_MAT", (cells, "u", heads), (k, q))
        if b.architecture in _SOFT_CAPPED:
            for op in ("SCALE", "UNARY", "SCALE"):
                scores = Node(op, scores.shape, (scores,))
        scores = Node("SOFT_MAX", scores.shape, (scores, mask, *sinks))
        if b.model.mla:
            across = view("TRANSPOSE", (cells, v_dim), v)
            across.size = v.size
            v = Node("CONT", (cells, v_dim), (across,), width=2)
        result = Node("MUL_MAT", (v_dim, "u", heads), (v, scores))
        if v_up is not None:
            result = Node("MUL_MAT", (b.has[v_up][1], "u", heads), (b.weight(v_up), result))
        wide = multiplied(result.shape[0], heads)
        merged = Node("CONT", (wide, "u"), (view("PERMUTE", (result.shape[0], heads, "u"), result),))
    b.graph.expand(merged)
    return merged


def _half_copies(b: Pieces, k: Node, v: Node) -> tuple[tuple[int, int], ...]:
    """Flash attention kernels expand a quantized cache to F16 behind their result."""
    if b.setting.kv_half or (b.setting.vector_kernel and k.shape[0] in _VECTOR_KERNEL_DIMS):
        return ()
    return terms(k.shape, 2) if b.model.mla else terms(k.shape, 2) + terms(v.shape, 2)


def latent_attention(b: Pieces, layer: AttentionLayer, current: Node) -> Node:
    """Latent attention with the projections absorbed (``src/models/deepseek2.cpp``)."""
    heads, wide = layer.head_count, layer.k_dim
    if "attn_q_a.weight" in b.has:
        q = b.linear(b.norm(b.linear(current, "attn_q_a"), "attn_q_a_norm.weight"), "attn_q_b")
    else:
        q = b.linear(current, "attn_q")
    nope, rank = b.has["attn_k_b.weight"][0], b.has["attn_k_b.weight"][1]
    assert isinstance(nope, int) and isinstance(rank, int)
    rope = wide - rank
    q = view("RESHAPE", (nope + rope, heads, "u"), q)
    both = b.linear(current, "attn_kv_a_mqa")
    k_rope = b.rope(view("VIEW", (rope, 1, "u"), both))
    latent = b.norm(view("VIEW", (rank, "u"), both), "attn_kv_a_norm.weight")
    q_rope = b.rope(view("VIEW", (rope, heads, "u"), q))
    q_nope = view("PERMUTE", (nope, "u", heads), view("VIEW", (nope, heads, "u"), q))
    absorbed = Node("MUL_MAT", (rank, "u", heads), (b.weight("attn_k_b.weight"), q_nope))
    q = Node("CONCAT", (wide, heads, "u"), (view("PERMUTE", (rank, heads, "u"), absorbed), q_rope))
    v = view("RESHAPE", (rank, 1, "u"), latent)
    k = Node("CONCAT", (wide, 1, "u"), (v, k_rope))
    for node in (q, v, k):
        b.graph.expand(node)
    k_cache = _store(b, k, wide, 1, "kv", b.k_rows["kv"])
    v_cache = view("PERMUTE", (rank, "kv", 1), k_cache)
    # the first ``rank`` values of each row of K: its last row ends sooner
    cut = cached_terms(None, (rank - wide) // b.setting.kv_block_weights)
    v_cache.size, v_cache.width = k_cache.size + cut, k_cache.width
    return b.linear(_attend(b, q, k_cache, v_cache, "kv", heads, "attn_v_b.weight"), "attn_output")
