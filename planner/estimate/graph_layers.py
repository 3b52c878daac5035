"""The operations of a decoder layer by layer, as llama.cpp's ``build_…`` functions order them.

One builder serves all architectures: what a layer computes is read off the tensors it has (fused or separate
QKV, biases, norms of Q and K, post-norms, experts, shared experts, latent attention), and the few differences that
leave no tensor behind are listed by architecture.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from planner.core.model import AttentionLayer, ModelSpec
from planner.estimate.graph import (
    GLOBAL,
    Graph,
    Node,
    Shape,
    cached_terms,
    cut,
    divided,
    leaf,
    multiplied,
    terms,
    view,
    weight,
)
from planner.estimate.kv_cache import CUDA_ROW_PADDING

_SCALED_INPUT = ("gemma", "gemma2", "gemma3", "gemma3n", "gemma4")
_SOFT_CAPPED = ("gemma2",)
_RESIDUAL_FIRST = ("phi3", "phimoe")
"""Architectures that add the residual to the result, not the result to the residual."""
_ROWS_CHOSEN_LAST = ("gpt-oss",)
"""Architectures that pick the rows with logits after the last layer, not inside it."""
_NORMALIZED_EXPERTS = ("llama", "qwen3moe", "phimoe", "olmoe", "qwen2moe", "granitemoe")
_WEIGHTED_BEFORE_EXPERTS = ("llama4",)
"""Experts whose input is weighted, not their result; they are chosen by logits."""
_LAYER_NORM = ("command-r", "cohere2", "falcon", "starcoder2", "stablelm", "phi2", "gptneox")
"""Architectures whose norms subtract the mean, which llama.cpp does not do in place."""
_RESIDUAL_BEFORE_ATTENTION = ("command-r", "cohere2")
"""Parallel layers that add the residual before the attention's result."""
_ATTENTION_BEFORE_FFN = ("phi2",)
"""Parallel layers that add the feed-forward's result to the attention's, which is therefore finished first."""
_GATE_BY_DIVISION = ("qwen2moe",)
"""Architectures that write the sigmoid of a shared expert's gate as a division (``silu(x) / x``)."""
_ROWS_CHOSEN_AFTER_NORM = ("qwen35", "qwen35moe", "qwen3next")
"""Architectures whose normed last state is kept for the layers that predict further tokens."""
_ROTATED_IN_WINDOW_ONLY = ("cohere2", "exaone4", "llama4")
_UNROTATED_EVERY = {"smollm3": 4}
"""Every so many layers one rotates nothing (``n_no_rope_layer_step``)."""
_VECTOR_KERNEL_DIMS = (64, 128, 256)
"""Lengths of a head that the vector kernel is compiled for (``ggml_cuda_get_fattn_vec_case``)."""
_HADAMARD_ROWS = 64
_MAVERICK_EXPERTS = 128
"""Llama 4 normalizes Q and K after rotating them, but for this model (``use_kq_norm`` in src/models/llama4.cpp)."""


@dataclass(frozen=True, slots=True)
class Setting:
    """What shapes the graph besides the model. Hashable: compiled graphs are kept by it."""

    flash_attention: bool
    kv_block_weights: int
    """Weights to a block of the cache's type, 1 for a plain one. Its bytes are a symbol."""
    kv_half: bool
    """The cache is F16, which kernels read as it is."""
    vector_kernel: bool
    """So few tokens of a cache of such a type that a GPU reads it as it is, for heads of the usual lengths."""
    devices: tuple[tuple[int, int, int], ...]
    """``(layer, device, device of its routed experts)`` for the layers that stand for all others, in order."""
    host: int
    """Index of the host: the number of GPUs."""
    output_device: int


@lru_cache(maxsize=256)
def _shapes(model: ModelSpec) -> dict[int, dict[str, Shape]]:
    """Per layer: shapes by role. Shared, so never changed."""
    found: dict[int, dict[str, Shape]] = {}
    for tensor in model.tensors:
        layer = tensor.layer
        if layer is not None:
            found.setdefault(layer, {})[tensor.name.split(".", 2)[2]] = tensor.shape
    return found


def rotates(model: ModelSpec, layer: int) -> bool:
    """Whether ``layer`` rotates Q and K by the position."""
    if model.architecture in _ROTATED_IN_WINDOW_ONLY:
        return model.attention[layer].kind == "sliding"
    step = _UNROTATED_EVERY.get(model.architecture)
    return step is None or (layer + 1) % step != 0


class LayerBuilder:
    """Builds the graph of a few layers of ``model``."""

    def __init__(self, model: ModelSpec, setting: Setting) -> None:
        self.model = model
        self.setting = setting
        self.graph = Graph()
        self.architecture = model.architecture
        self.shapes = _shapes(model)
        self.factors = next((t.name for t in model.tensors if t.name.startswith("rope_f")), None)
        self.outside: dict[str, Shape] = {t.name: t.shape for t in model.tensors if t.layer is None}
        self.windowed = any(layer.kind == "sliding" for layer in model.attention)
        self.has: dict[str, Shape] = {}
        self.device = self.expert_device = 0
        self.position, self.rotates = GLOBAL, True
        self.frequencies: dict[int, Node] = {}

    def build(self) -> Graph:
        """The graph, from token embedding to logits."""
        current = self._input()
        self._inputs()
        last = len(self.setting.devices) - 1
        for position, (layer, device, expert_device) in enumerate(self.setting.devices):
            self.has, self.device, self.position = self.shapes.get(layer, {}), device, position
            self.expert_device = expert_device
            self.rotates = rotates(self.model, layer)
            chosen = position == last and self.architecture not in (*_ROWS_CHOSEN_LAST, *_ROWS_CHOSEN_AFTER_NORM)
            current = self._layer(self.model.attention[layer], current, chosen)
        if self.architecture in _ROWS_CHOSEN_LAST:
            current.is_output = True
            current = self._chosen(current)
        self._output(current)
        return self.graph

    # Inputs and outputs

    def _input(self) -> Node:
        n_embd, host = self.model.n_embd, self.setting.host
        tokens, embeddings = leaf(("u",), 4, is_input=True), leaf((n_embd, "u"), 4, is_input=True)
        rows = Node("GET_ROWS", (n_embd, "u"), (weight((GLOBAL, "token_embd.weight"), host), tokens))
        self.graph.expand(rows)
        self.graph.expand(embeddings)
        return Node("SCALE", rows.shape, (rows,)) if self.architecture in _SCALED_INPUT else rows

    def _inputs(self) -> None:
        self.positions = leaf(("u",), 4, is_input=True)
        self.out_ids = leaf(("out",), 4, is_input=True)
        self.temperatures = leaf((1, 1, "u"), 4, is_input=True)
        mixture = self.model.mixture
        self.normed_after_rope = (
            self.architecture == "llama4" and mixture is not None and mixture.expert_count != _MAVERICK_EXPERTS
        )
        width = 2 if self.setting.flash_attention else 4
        widest = max((a.head_count_kv * a.v_dim for a in self.model.attention), default=0)
        v_rows: Shape = ("u",) if self.setting.flash_attention else ("u", widest)
        self.masks, self.k_rows, self.v_rows, self.k_turns, self.v_turns = {}, {}, {}, {}, {}
        for cells in ("kv", "kvs") if self.windowed else ("kv",):
            self.masks[cells] = leaf((cells, "u"), width, is_input=True)
            self.k_rows[cells] = leaf(("u",), 8, is_input=True)
            self.v_rows[cells] = leaf(v_rows, 8, is_input=True)
            self.k_turns[cells] = self._turn(largest=True)
            self.v_turns[cells] = None if self.model.mla else self._turn(largest=False)

    def _turn(self, *, largest: bool) -> Node | None:
        """A Hadamard matrix: llama.cpp rotates K and V before it quantizes them into the cache."""
        dims = {layer.k_dim if largest else layer.v_dim for layer in self.model.attention if layer.k_dim}
        if self.setting.kv_block_weights == 1 or len(dims) != 1:
            return None
        (dim,) = dims
        rows = _HADAMARD_ROWS
        if dim % rows:
            return None
        while largest and dim % (2 * rows) == 0:
            rows *= 2
        return leaf((rows, rows), 4, is_input=True)

    def _output(self, current: Node) -> None:
        self.has, self.device, self.position = self.outside, self.setting.output_device, GLOBAL
        current = self._norm(current, "output_norm.weight")
        if self.architecture in _ROWS_CHOSEN_AFTER_NORM:
            current.is_output = True
            current = self._chosen(current)
        role = "token_embd.weight" if self.model.tied_embeddings else "output.weight"
        logits = Node("MUL_MAT", (self.model.n_vocab, "out"), (self._weight(role), current))
        if "output.bias" in self.has:
            logits = Node("ADD", logits.shape, (logits, self._weight("output.bias")))
        self.graph.expand(logits)

    # Pieces

    def _weight(self, role: str) -> Node:
        return weight((self.position, role), self.device)

    def _norm(self, node: Node, role: str) -> Node:
        if role not in self.has:
            return node
        op = "NORM" if self.architecture in _LAYER_NORM else "RMS_NORM"
        normed = Node("MUL", node.shape, (Node(op, node.shape, (node,)), self._weight(role)))
        bias = role.replace(".weight", ".bias")
        return Node("ADD", node.shape, (normed, self._weight(bias))) if bias in self.has else normed

    def _linear(self, node: Node, role: str) -> Node:
        """``role.weight`` times ``node``, plus ``role.bias`` where there is one."""
        rows = self.has[f"{role}.weight"][1]
        made = Node("MUL_MAT", (rows, *node.shape[1:]), (self._weight(f"{role}.weight"), node))
        if f"{role}.bias" in self.has:
            made = Node("ADD", made.shape, (made, self._weight(f"{role}.bias")))
        return made

    def _rope(self, node: Node) -> Node:
        # one tensor per device, shared by its layers
        factors = (
            (self.frequencies.setdefault(self.device, weight((GLOBAL, self.factors), self.device)),)
            if self.factors
            else ()
        )
        return Node("ROPE", node.shape, (node, self.positions, *factors))

    def _layer(self, attention: AttentionLayer, entry: Node, chosen: bool) -> Node:
        normed = current = self._norm(entry, "attn_norm.weight")
        if attention.kind in ("full", "sliding"):
            current = self._mla(attention, current) if self.model.mla else self._attention(attention, current)
        residual = entry
        post_normed = "post_ffw_norm.weight" in self.has
        parallel = not post_normed and self.has.keys().isdisjoint({"ffn_norm.weight", "post_attention_norm.weight"})
        if chosen:
            current, residual = self._chosen(current), self._chosen(entry)
            normed = self._chosen(normed) if parallel else normed
        if parallel and "ffn_down.weight" in self.has:
            return self._parallel(normed, current, residual)
        if post_normed:
            current = self._norm(current, "post_attention_norm.weight")
        middle = Node("ADD", current.shape, (current, residual))
        norm = "ffn_norm.weight" if post_normed or "ffn_norm.weight" in self.has else "post_attention_norm.weight"
        current = self._norm(middle, norm)
        current = self._experts(current) if "ffn_gate_inp.weight" in self.has else self._ffn(current, "")
        current = self._norm(current, "post_ffw_norm.weight")
        operands = (middle, current) if self.architecture in _RESIDUAL_FIRST else (current, middle)
        return Node("ADD", current.shape, operands)

    def _chosen(self, node: Node) -> Node:
        """The rows that get logits."""
        return Node("GET_ROWS", (node.shape[0], "out"), (node, self.out_ids))

    def _parallel(self, normed: Node, attended: Node, residual: Node) -> Node:
        """Attention and feed-forward on the same normed input, added up at the end."""
        current = self._ffn(normed, "")
        if self.architecture in _ATTENTION_BEFORE_FFN:
            terms_of_sum = [attended, current, residual]
        elif self.architecture in _RESIDUAL_BEFORE_ATTENTION:
            terms_of_sum = [current, residual, attended]
        else:
            terms_of_sum = [current, attended, residual]
        total = terms_of_sum[0]
        for node in terms_of_sum[1:]:
            total = Node("ADD", total.shape, (total, node))
        return total

    # Attention

    def _attention(self, attention: AttentionLayer, current: Node) -> Node:
        heads, heads_kv = attention.head_count, attention.head_count_kv
        q_shape: Shape = (attention.k_dim, heads, "u")
        k_shape: Shape = (attention.k_dim, heads_kv, "u")
        v_shape: Shape = (attention.v_dim, heads_kv, "u")
        if "attn_qkv.weight" in self.has:
            fused = self._linear(current, "attn_qkv")
            q, k, v = (cut(shape, fused) for shape in (q_shape, k_shape, v_shape))
        else:
            q, k, v = (self._linear(current, name) for name in ("attn_q", "attn_k", "attn_v"))
            if self.has.get("attn_q_norm.weight") == (attention.k_dim * heads,):
                q, k = self._norm(q, "attn_q_norm.weight"), self._norm(k, "attn_k_norm.weight")
            q, k, v = view("RESHAPE", q_shape, q), view("RESHAPE", k_shape, k), view("RESHAPE", v_shape, v)
        if self.has.get("attn_q_norm.weight", (0,))[0] == attention.k_dim:
            q, k = self._norm(q, "attn_q_norm.weight"), self._norm(k, "attn_k_norm.weight")
        if self.rotates:
            q, k = self._rope(q), self._rope(k)
        elif self.architecture == "llama4":
            q = Node("MUL", q.shape, (q, self.temperatures))
        if self.rotates and self.normed_after_rope:
            q, k = (Node("RMS_NORM", node.shape, (node,)) for node in (q, k))
        cells = "kvs" if attention.kind == "sliding" else "kv"
        q, k = self._turned(q, self.k_turns[cells]), self._turned(k, self.k_turns[cells])
        v = self._turned(v, self.v_turns[cells])
        for node in (q, k, v) if self.windowed else (q, v, k):
            self.graph.expand(node)
        k_cache = self._store(k, attention.k_dim, heads_kv, cells, self.k_rows[cells])
        v_cache = self._store(v, attention.v_dim, heads_kv, cells, self.v_rows[cells])
        result = self._attend(q, k_cache, v_cache, cells, heads)
        return self._linear(self._turned(result, self.v_turns[cells]), "attn_output")

    def _turned(self, node: Node, matrix: Node | None) -> Node:
        if matrix is None:
            return node
        rows = matrix.shape[0]
        flat: Shape = (rows, *divided(node.shape, rows))
        turned = Node("MUL_MAT", flat, (matrix, view("RESHAPE", flat, node)))
        return view("RESHAPE", node.shape, turned)

    def _store(self, node: Node, dim: int, heads: int, cells: str, rows: Node) -> Node:
        """Write ``node`` into the cache; the view of the cache that attention reads."""
        cache = leaf((dim * heads, cells), 2, home=self.device)
        flat = view("VIEW", (dim * heads, "u"), node)
        flat.size = node.size
        if not self.setting.flash_attention and rows in self.v_rows.values():
            whole = node.row_stride is None
            wide: Shape = (dim * heads, "u")
            rows_of_v = view("RESHAPE", wide, node) if whole else Node("CONT", wide, (node,))
            flat = view("RESHAPE", (1, dim * heads, "u"), rows_of_v)
            stored = Node("SET_ROWS", (), (flat, rows, view("RESHAPE", (1, dim * heads, cells), cache)))
        else:
            stored = Node("SET_ROWS", (), (flat, rows, cache))
        stored.root = cache
        self.graph.expand(stored)
        return self._window(cache, dim, heads, cells)

    def _window(self, cache: Node, dim: int, heads: int, cells: str) -> Node:
        seen = view("PERMUTE", (dim, cells, heads), view("VIEW", (dim, heads, cells), cache))
        block = self.setting.kv_block_weights
        seen.size = cached_terms(cells, dim * heads // block)
        if block > 1 and dim % CUDA_ROW_PADDING:
            seen.padding = cached_terms(None, (CUDA_ROW_PADDING - dim % CUDA_ROW_PADDING) // block)
        seen.width = 2 if block == 1 else 0
        return seen

    def _attend(self, q: Node, k: Node, v: Node, cells: str, heads: int, v_up: str | None = None) -> Node:
        """``build_attn_mha``: flash attention, or scores, soft-max and their product with V."""
        mask = self.masks[cells]
        v_dim = v.shape[0]
        q = view("PERMUTE", (q.shape[0], "u", heads), view("VIEW", q.shape, q))
        sinks = (self._weight("attn_sinks.weight"),) if "attn_sinks.weight" in self.has else ()
        if self.setting.flash_attention:
            result = Node("FLASH_ATTN_EXT", (v_dim, heads, "u"), (q, k, v, mask, *sinks))
            result.scratch = self._half_copies(k, v)
            result.scratch_apart = terms(v.shape, 2) if self.model.mla and not self.setting.kv_half else ()
            if v_up is not None:
                up = self.has[v_up][1]
                turned = view("PERMUTE", (v_dim, "u", heads), result)
                product = Node("MUL_MAT", (up, "u", heads), (self._weight(v_up), turned))
                result = Node("CONT", (up, heads, "u"), (view("PERMUTE", (up, heads, "u"), product),))
            merged = view("RESHAPE", (multiplied(result.shape[0], heads), "u"), result)
        else:
            scores = Node("MUL_MAT", (cells, "u", heads), (k, q))
            if self.architecture in _SOFT_CAPPED:
                for op in ("SCALE", "UNARY", "SCALE"):
                    scores = Node(op, scores.shape, (scores,))
            scores = Node("SOFT_MAX", scores.shape, (scores, mask, *sinks))
            if self.model.mla:
                across = view("TRANSPOSE", (cells, v_dim), v)
                across.size = v.size
                v = Node("CONT", (cells, v_dim), (across,), width=2)
            result = Node("MUL_MAT", (v_dim, "u", heads), (v, scores))
            if v_up is not None:
                result = Node("MUL_MAT", (self.has[v_up][1], "u", heads), (self._weight(v_up), result))
            wide = multiplied(result.shape[0], heads)
            merged = Node("CONT", (wide, "u"), (view("PERMUTE", (result.shape[0], heads, "u"), result),))
        self.graph.expand(merged)
        return merged

    def _half_copies(self, k: Node, v: Node) -> tuple[tuple[int, int], ...]:
        """Flash attention kernels expand a quantized cache to F16 behind their result."""
        if self.setting.kv_half or (self.setting.vector_kernel and k.shape[0] in _VECTOR_KERNEL_DIMS):
            return ()
        return terms(k.shape, 2) if self.model.mla else terms(k.shape, 2) + terms(v.shape, 2)

    def _mla(self, attention: AttentionLayer, current: Node) -> Node:
        """Latent attention with the projections absorbed (``src/models/deepseek2.cpp``)."""
        heads, wide = attention.head_count, attention.k_dim
        if "attn_q_a.weight" in self.has:
            q = self._linear(self._norm(self._linear(current, "attn_q_a"), "attn_q_a_norm.weight"), "attn_q_b")
        else:
            q = self._linear(current, "attn_q")
        nope, rank = self.has["attn_k_b.weight"][0], self.has["attn_k_b.weight"][1]
        assert isinstance(nope, int) and isinstance(rank, int)
        rope = wide - rank
        q = view("RESHAPE", (nope + rope, heads, "u"), q)
        both = self._linear(current, "attn_kv_a_mqa")
        k_rope = self._rope(view("VIEW", (rope, 1, "u"), both))
        latent = self._norm(view("VIEW", (rank, "u"), both), "attn_kv_a_norm.weight")
        q_rope = self._rope(view("VIEW", (rope, heads, "u"), q))
        q_nope = view("PERMUTE", (nope, "u", heads), view("VIEW", (nope, heads, "u"), q))
        absorbed = Node("MUL_MAT", (rank, "u", heads), (self._weight("attn_k_b.weight"), q_nope))
        q = Node("CONCAT", (wide, heads, "u"), (view("PERMUTE", (rank, heads, "u"), absorbed), q_rope))
        v = view("RESHAPE", (rank, 1, "u"), latent)
        k = Node("CONCAT", (wide, 1, "u"), (v, k_rope))
        for node in (q, v, k):
            self.graph.expand(node)
        k_cache = self._store(k, wide, 1, "kv", self.k_rows["kv"])
        v_cache = view("PERMUTE", (rank, "kv", 1), k_cache)
        # the first ``rank`` values of each row of K: its last row ends sooner
        cut = cached_terms(None, (rank - wide) // self.setting.kv_block_weights)
        v_cache.size, v_cache.width = k_cache.size + cut, k_cache.width
        return self._linear(self._attend(q, k_cache, v_cache, "kv", heads, "attn_v_b.weight"), "attn_output")

    # Feed-forward

    def _ffn(self, current: Node, suffix: str) -> Node:
        up = self._linear(current, f"ffn_up{suffix}")
        rows = self.has[f"ffn_down{suffix}.weight"][0]
        shape: Shape = (rows, *current.shape[1:])
        if f"ffn_gate{suffix}.weight" in self.has:
            active = Node("GLU", shape, (self._linear(current, f"ffn_gate{suffix}"), up))
        else:
            active = Node("GLU" if up.shape[0] != rows else "UNARY", shape, (up,))
        return self._linear(active, f"ffn_down{suffix}")

    def _experts(self, current: Node) -> Node:
        mixture = self.model.mixture
        assert mixture is not None
        used, batch = mixture.expert_used_count, current.shape[1]
        chosen, weights = self._route(current, mixture.expert_count, used)
        self.graph.expand(weights)
        tall = view("RESHAPE", (self.model.n_embd, 1, batch), current)
        before = self.architecture in _WEIGHTED_BEFORE_EXPERTS
        if before:
            repeated = Node("REPEAT", (self.model.n_embd, used, batch), (tall,))
            tall = Node("MUL", repeated.shape, (repeated, weights))
        up = self._expert_linear(tall, "ffn_up_exps", chosen, used, batch)
        gate = self._expert_linear(tall, "ffn_gate_exps", chosen, used, batch)
        active = Node("GLU", up.shape, (gate, up))
        down = self._expert_linear(active, "ffn_down_exps", chosen, used, batch)
        weighted = down if before else Node("MUL", down.shape, (down, weights))
        self.graph.expand(weighted)
        parts = [view("VIEW", (self.model.n_embd, batch), weighted) for _ in range(used)]
        for part in parts:
            self.graph.expand(part)
        total = parts[0]
        for part in parts[1:]:
            total = Node("ADD", part.shape, (total, part))
            self.graph.expand(total)
        if used == 1:
            total = Node("CONT", total.shape, (total,))
        if "ffn_up_shexp.weight" in self.has:
            total = Node("ADD", total.shape, (total, self._shared_expert(current)))
        return total

    def _shared_expert(self, current: Node) -> Node:
        shared = self._ffn(current, "_shexp")
        if "ffn_gate_inp_shexp.weight" not in self.has:
            return shared
        shape: Shape = (1, current.shape[1])
        logit = Node("MUL_MAT", shape, (self._weight("ffn_gate_inp_shexp.weight"), current))
        gate = Node("UNARY", shape, (logit,))
        if self.architecture in _GATE_BY_DIVISION:
            gate = Node("DIV", shape, (gate, logit))
        return Node("MUL", shared.shape, (shared, gate))

    def _route(self, current: Node, expert_count: int, used: int) -> tuple[Node, Node]:
        """Which experts, and with what weights."""
        batch = current.shape[1]
        logits = self._linear(current, "ffn_gate_inp")
        late = self.architecture == "gpt-oss"
        biased = "exp_probs_b.bias" in self.has
        early = self.architecture in _WEIGHTED_BEFORE_EXPERTS
        function = "UNARY" if biased or early else "SOFT_MAX"
        probabilities = logits if late else Node(function, logits.shape, (logits,))
        scored = logits if early else probabilities
        if biased:
            scored = Node("ADD", logits.shape, (probabilities, self._weight("exp_probs_b.bias")))
        chosen = view("VIEW", (used, batch), Node("ARGSORT", logits.shape, (scored,)))
        weights = Node("GET_ROWS", (1, used, batch), (view("RESHAPE", (1, expert_count, batch), probabilities), chosen))
        if late:
            flat = Node("SOFT_MAX", (used, batch), (view("RESHAPE", (used, batch), weights),))
            return chosen, view("RESHAPE", (1, used, batch), flat)
        if biased or self.architecture in _NORMALIZED_EXPERTS:
            flat = view("RESHAPE", (used, batch), weights)
            total = Node("CLAMP", (1, batch), (Node("SUM_ROWS", (1, batch), (flat,)),))
            weights = view("RESHAPE", (1, used, batch), Node("DIV", (used, batch), (flat, total)))
        if biased:
            weights = Node("SCALE", weights.shape, (weights,))
        return chosen, weights

    def _expert_linear(self, node: Node, role: str, chosen: Node, used: int, batch: int | str) -> Node:
        rows = self.has[f"{role}.weight"][1]
        experts = weight((self.position, f"{role}.weight"), self.expert_device)
        made = Node("MUL_MAT_ID", (rows, used, batch), (experts, node, chosen))
        if f"{role}.bias" in self.has:
            bias = weight((self.position, f"{role}.bias"), self.expert_device)
            made = Node("ADD_ID", made.shape, (made, bias, chosen))
        return made
