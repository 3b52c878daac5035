"""What the graphs of all architectures are made of: inputs, weights, norms, linear layers, rotations.

What a layer computes is read off the tensors it has; the few differences that leave no tensor behind are listed by
architecture, here and in the modules that build the layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from planner.core.model import ModelSpec
from planner.estimate.graph import GLOBAL, Graph, Node, Shape, WeightKey, leaf, view, weight

_LAYER_NORM = ("command-r", "cohere2", "falcon", "starcoder2", "stablelm", "phi2", "gptneox")
"""Architectures whose norms subtract the mean, which llama.cpp does not do in place."""
_ROTATED_IN_WINDOW_ONLY = ("cohere2", "exaone4", "llama4")
_UNROTATED_EVERY = {"smollm3": 4}
"""Every so many layers one rotates nothing (``n_no_rope_layer_step``)."""
_UNROTATED_HYBRIDS = ("granitehybrid",)
"""Architectures that leave the order of tokens to their recurrent layers (``rope_finetuned``)."""
_FOUR_POSITIONS = ("qwen35", "qwen35moe", "qwen2vl", "qwen3vl")
"""Architectures that rotate by four positions of a token (``n_pos_per_embd``)."""
_SPARSE_LAYERS = {"gemma3n": 10}
"""First layers that keep only the largest activations (``n_layer_sparsity`` in src/models/gemma3n.cpp)."""
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


def rotates(model: ModelSpec, layer: int) -> bool:
    """Whether ``layer`` rotates Q and K by the position."""
    if model.architecture in _ROTATED_IN_WINDOW_ONLY:
        return model.attention[layer].kind == "sliding"
    if model.architecture in _UNROTATED_HYBRIDS and any(own.kind == "recurrent" for own in model.attention):
        return False
    step = _UNROTATED_EVERY.get(model.architecture)
    return step is None or (layer + 1) % step != 0


def sparse(model: ModelSpec, layer: int) -> bool:
    """Whether ``layer`` keeps only the largest activations of its feed-forward."""
    return layer < _SPARSE_LAYERS.get(model.architecture, 0)


@lru_cache(maxsize=256)
def shapes_by_role(model: ModelSpec) -> dict[int | None, dict[str, Shape]]:
    """Per layer, and ``None`` outside the layers: shapes by role. Shared, so never changed."""
    found: dict[int | None, dict[str, Shape]] = {None: {}}
    for tensor in model.tensors:
        role = tensor.name if tensor.layer is None else tensor.name.split(".", 2)[2]
        found.setdefault(tensor.layer, {})[role] = tensor.shape
    return found


class Pieces:
    """The graph so far, its inputs, and the layer that is being built."""

    def __init__(self, model: ModelSpec, setting: Setting) -> None:
        self.model = model
        self.setting = setting
        self.graph = Graph()
        self.architecture = model.architecture
        self.windowed = any(layer.kind == "sliding" for layer in model.attention)
        self.factors = next((t.name for t in model.tensors if t.name.startswith("rope_f")), None)
        self.frequencies: dict[int, Node] = {}
        self.weights: dict[tuple[WeightKey, int], Node] = {}
        self.has: dict[str, Shape] = {}
        """Shapes of the tensors of the layer, or of those outside."""
        self.device = self.expert_device = 0
        self.position, self.rotates, self.sparse = GLOBAL, True, False
        self.caches: dict[str, tuple[Node, Node]] = {}
        """K and V that a later layer without a cache of its own reads, by their kind of cells."""
        self._inputs()

    def _inputs(self) -> None:
        coordinates = 4 if self.architecture in _FOUR_POSITIONS else 1
        self.positions = leaf(("u",), 4 * coordinates, is_input=True)
        self.out_ids = leaf(("out",), 4, is_input=True)
        self.temperatures = leaf((1, 1, "u"), 4, is_input=True)
        state_ids = leaf(("s",), 4, is_input=True)
        self.states_at_hand, self.other_states = view("VIEW", ("s",), state_ids), view("VIEW", (0,), state_ids)
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

    def enter(self, layer: int | None, device: int, expert_device: int, position: int) -> None:
        """Go on with ``layer``, or with what is outside the layers.

        Args:
            position: which of the layers that are built it is.
        """
        self.has, self.device = shapes_by_role(self.model).get(layer, {}), device
        self.expert_device, self.position = expert_device, position
        self.rotates = layer is not None and rotates(self.model, layer)
        self.sparse = layer is not None and sparse(self.model, layer)

    def weight(self, role: str, device: int | None = None) -> Node:
        """The weight ``role`` of the layer, or of those outside; one tensor, however often it is used.

        Args:
            device: where it lies, if not with the layer.
        """
        place = ((self.position, role), self.device if device is None else device)
        if place not in self.weights:
            self.weights[place] = weight(*place)
        return self.weights[place]

    def norm(self, node: Node, role: str) -> Node:
        """``node`` normalized with the weight ``role``, and as it is where the layer has none."""
        if role not in self.has:
            return node
        op = "NORM" if self.architecture in _LAYER_NORM else "RMS_NORM"
        normed = Node("MUL", node.shape, (Node(op, node.shape, (node,)), self.weight(role)))
        bias = role.replace(".weight", ".bias")
        return Node("ADD", node.shape, (normed, self.weight(bias))) if bias in self.has else normed

    def linear(self, node: Node, role: str) -> Node:
        """``role.weight`` times ``node``, plus ``role.bias`` where there is one."""
        rows = self.has[f"{role}.weight"][1]
        made = Node("MUL_MAT", (rows, *node.shape[1:]), (self.weight(f"{role}.weight"), node))
        if f"{role}.bias" in self.has:
            made = Node("ADD", made.shape, (made, self.weight(f"{role}.bias")))
        return made

    def rope(self, node: Node) -> Node:
        """``node`` rotated by the positions."""
        # one tensor per device, shared by its layers
        factors = (
            (self.frequencies.setdefault(self.device, weight((GLOBAL, self.factors), self.device)),)
            if self.factors
            else ()
        )
        return Node("ROPE", node.shape, (node, self.positions, *factors))

    def chosen_rows(self, node: Node) -> Node:
        """The rows that get logits."""
        return Node("GET_ROWS", (node.shape[0], "out"), (node, self.out_ids))
