"""Feed-forward layers, dense and with experts (``build_ffn`` and ``build_moe_ffn`` of src/llama-graph.cpp)."""

from __future__ import annotations

from planner.estimate.graph import Node, Shape, cut, view
from planner.estimate.graph_pieces import Pieces

_NORMALIZED_EXPERTS = (
    "llama", "qwen3moe", "phimoe", "olmoe", "qwen2moe", "granitemoe", "granitehybrid", "qwen35moe", "qwen3next",
)  # fmt: skip
_WEIGHTED_BEFORE_EXPERTS = ("llama4",)
"""Experts whose input is weighted, not their result; they are chosen by logits."""
_GATE_BY_DIVISION = ("qwen2moe",)
"""Architectures that write the sigmoid of a shared expert's gate as a division (``silu(x) / x``)."""


def feed_forward(b: Pieces, current: Node, suffix: str = "") -> Node:
    """Up, gate, activation and down."""
    up = b.linear(current, f"ffn_up{suffix}")
    rows = b.has[f"ffn_down{suffix}.weight"][0]
    shape: Shape = (rows, *current.shape[1:])
    if f"ffn_gate{suffix}.weight" in b.has:
        active = Node("GLU", shape, (b.linear(current, f"ffn_gate{suffix}"), up))
    else:
        active = Node("GLU" if up.shape[0] != rows else "UNARY", shape, (up,))
    return b.linear(active, f"ffn_down{suffix}")


def experts(b: Pieces, current: Node) -> Node:
    """Routed experts, and the shared one where there is one."""
    mixture = b.model.mixture
    assert mixture is not None
    used, batch = mixture.expert_used_count, current.shape[1]
    chosen, weights = _route(b, current, mixture.expert_count, used)
    b.graph.expand(weights)
    tall = view("RESHAPE", (b.model.n_embd, 1, batch), current)
    before = b.architecture in _WEIGHTED_BEFORE_EXPERTS
    if before:
        repeated = Node("REPEAT", (b.model.n_embd, used, batch), (tall,))
        tall = Node("MUL", repeated.shape, (repeated, weights))
    up = _expert_linear(b, tall, "ffn_up_exps", chosen, used, batch)
    gate = _expert_linear(b, tall, "ffn_gate_exps", chosen, used, batch)
    active = Node("GLU", up.shape, (gate, up))
    down = _expert_linear(b, active, "ffn_down_exps", chosen, used, batch)
    weighted = down if before else Node("MUL", down.shape, (down, weights))
    b.graph.expand(weighted)
    parts = [view("VIEW", (b.model.n_embd, batch), weighted) for _ in range(used)]
    for part in parts:
        b.graph.expand(part)
    total = parts[0]
    for part in parts[1:]:
        total = Node("ADD", part.shape, (total, part))
        b.graph.expand(total)
    if used == 1:
        total = Node("CONT", total.shape, (total,))
    if "ffn_up_shexp.weight" in b.has:
        total = Node("ADD", total.shape, (total, _shared_expert(b, current)))
    return total


def _shared_expert(b: Pieces, current: Node) -> Node:
    shared = feed_forward(b, current, "_shexp")
    if "ffn_gate_inp_shexp.weight" not in b.has:
        return shared
    shape: Shape = (1, current.shape[1])
    logit = Node("MUL_MAT", shape, (b.weight("ffn_gate_inp_shexp.weight"), current))
    gate = Node("UNARY", shape, (logit,))
    if b.architecture in _GATE_BY_DIVISION:
        gate = Node("DIV", shape, (gate, logit))
    return Node("MUL", shared.shape, (shared, gate))


def _route(b: Pieces, current: Node, expert_count: int, used: int) -> tuple[Node, Node]:
    """Which experts, and with what weights."""
    batch = current.shape[1]
    logits = b.linear(current, "ffn_gate_inp")
    late = b.architecture == "gpt-oss"
    biased = "exp_probs_b.bias" in b.has
    early = b.architecture in _WEIGHTED_BEFORE_EXPERTS
    function = "UNARY" if biased or early else "SOFT_MAX"
    probabilities = logits if late else Node(function, logits.shape, (logits,))
    scored = logits if early else probabilities
    if biased:
        scored = Node("ADD", logits.shape, (probabilities, b.weight("exp_probs_b.bias")))
    chosen = cut((used, batch), Node("ARGSORT", logits.shape, (scored,)))
    weights = Node("GET_ROWS", (1, used, batch), (view("RESHAPE", (1, expert_count, batch), probabilities), chosen))
    if late:
        flat = Node("SOFT_MAX", (used, batch), (view("RESHAPE", (used, batch), weights),))
        return chosen, view("RESHAPE", (1, used, batch), flat)
    if biased or b.architecture in _NORMALIZED_EXPERTS:
        flat = view("RESHAPE", (used, batch), weights)
        total = Node("CLAMP", (1, batch), (Node("SUM_ROWS", (1, batch), (flat,)),))
        weights = view("RESHAPE", (1, used, batch), Node("DIV", (used, batch), (flat, total)))
    if biased:
        weights = Node("SCALE", weights.shape, (weights,))
    return chosen, weights


def _expert_linear(b: Pieces, node: Node, role: str, chosen: Node, used: int, batch: int | str) -> Node:
    rows = b.has[f"{role}.weight"][1]
    held = b.weight(f"{role}.weight", b.expert_device)
    made = Node("MUL_MAT_ID", (rows, used, batch), (held, node, chosen))
    if f"{role}.bias" in b.has:
        bias = b.weight(f"{role}.bias", b.expert_device)
        made = Node("ADD_ID", made.shape, (made, bias, chosen))
    return made
