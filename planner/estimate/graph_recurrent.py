"""Layers that keep a state of fixed size: Mamba 2 and the gated delta net, the latter with its fused kernel.

Source: src/models/mamba-base.cpp, delta-net-base.cpp, qwen35.cpp, qwen3next.cpp and ``build_rs`` in
src/llama-graph.cpp of llama.cpp as in llama-cpp-python 0.3.36.
"""

from __future__ import annotations

from planner.estimate.graph import Node, Shape, Terms, cut, leaf, terms, view
from planner.estimate.graph_pieces import Pieces

_REPEATED_KEYS = ("qwen3next",)
"""Architectures that repeat Q and K for each head of V, which the kernel would do itself."""
_FLOAT = 4


def recurrent(b: Pieces, current: Node) -> Node:
    """The recurrent block of a layer, by the tensors it has."""
    return _mamba2(b, current) if "ssm_in.weight" in b.has else _delta_net(b, current)


def _length(b: Pieces, role: str, dimension: int) -> int:
    length = b.has[role][dimension]
    assert isinstance(length, int)
    return length


def _state(b: Pieces, size: int, node: Node | None = None) -> tuple[Node, Node]:
    """A state's cache and its values of the sequences at hand, read by ``node`` or row by row (``build_rs``)."""
    cache = leaf((size, "s"), _FLOAT, home=b.device)
    _into(b, "SCALE", cache)
    if node is None:
        node = Node("GET_ROWS", (size, "s"), (view("RESHAPE", cache.shape, cache), b.states_at_hand))
    else:
        node.src = (view("RESHAPE", cache.shape, cache), *node.src, b.states_at_hand)
    b.graph.expand(node)
    # states of sequences that are not at hand; there are none in the graph that llama.cpp reserves memory for
    others = Node("GET_ROWS", (0,), (view("RESHAPE", cache.shape, cache), b.other_states))
    _into(b, "CPY", cache, others)
    return cache, node


def _into(b: Pieces, op: str, cache: Node, *values: Node) -> None:
    """Write ``values`` into ``cache``, or change it in place."""
    made = Node(op, (), (*values, view("VIEW", cache.shape, cache)))
    made.root = cache
    b.graph.expand(made)


def _convolution(b: Pieces, mixed: Node, channels: int) -> Node:
    """The last inputs and these, of which the last are kept; the convolution itself is computed later."""
    kept = _length(b, "ssm_conv1d.weight", 0) - 1
    cache, before = _state(b, kept * channels)
    joined = Node(
        "CONCAT", (channels, "u"), (view("RESHAPE", before.shape, before), view("TRANSPOSE", mixed.shape, mixed))
    )
    joined.size = _tokens_and_sequences(channels, kept * channels)
    last = view("VIEW", (kept, channels, "s"), joined)
    # every row's end, so a copy of it takes almost the whole
    last.size = (*joined.size, *terms(("u",), -_FLOAT))
    _into(b, "CPY", cache, last)
    return joined


def _tokens_and_sequences(per_token: int, per_sequence: int) -> Terms:
    return (*terms((per_token, "u"), _FLOAT), *terms((per_sequence, "s"), _FLOAT))


def _mamba2(b: Pieces, current: Node) -> Node:
    channels, inner = _length(b, "ssm_conv1d.weight", 1), _length(b, "ssm_out.weight", 0)
    heads, groups = _length(b, "ssm_a", -1), _length(b, "ssm_norm.weight", -1)
    state = (channels - inner) // (2 * groups)
    head_shape: Shape = (inner // heads, heads, "u")
    # the projection is first used by the convolution, after the old inputs were read
    projected = b.linear(current, "ssm_in")
    joined = _convolution(b, view("VIEW", (channels, "u"), projected), channels)
    mixed = Node("SSM_CONV", (channels, "u"), (joined, b.weight("ssm_conv1d.weight")))
    if "ssm_conv1d.bias" in b.has:
        mixed = Node("ADD", mixed.shape, (mixed, b.weight("ssm_conv1d.bias")))
    mixed = Node("UNARY", mixed.shape, (mixed,))
    x = cut(head_shape, mixed)
    b_and_c = (cut((state, groups, "u"), mixed) for _ in range(2))
    steps = Node("CONT", (heads, "u"), (cut((heads, "u"), projected),))
    steps = Node("ADD", steps.shape, (steps, b.weight("ssm_dt.bias")))
    scan = Node("SSM_SCAN", (1,), (x, steps, b.weight("ssm_a"), *b_and_c))
    scan.size = _tokens_and_sequences(inner, state * inner)
    cache, scan = _state(b, state * inner, scan)
    _into(b, "CPY", cache, view("VIEW", (state * inner, "s"), scan))
    skipped = Node("MUL", head_shape, (x, b.weight("ssm_d")))
    y = Node("ADD", head_shape, (view("VIEW", head_shape, scan), skipped))
    gate = Node("CONT", head_shape, (cut(head_shape, projected),))
    y = Node("GLU", head_shape, (gate, y))
    y = b.norm(view("RESHAPE", (inner // groups, groups, "u"), y), "ssm_norm.weight")
    return b.linear(view("RESHAPE", (inner, "u"), y), "ssm_out")


def _delta_net(b: Pieces, current: Node) -> Node:
    channels, inner = _length(b, "ssm_conv1d.weight", 1), _length(b, "ssm_out.weight", 0)
    dim = _length(b, "ssm_norm.weight", 0)
    heads, heads_k = inner // dim, (channels - inner) // (2 * dim)
    mixed, outer_gate = b.linear(current, "attn_qkv"), b.linear(current, "attn_gate")
    decay, share = _decay_and_share(b, current, heads)
    joined = _convolution(b, mixed, channels)
    cache, state = _state(b, dim * dim * heads)
    convolved = Node("SSM_CONV", (channels, "u"), (joined, b.weight("ssm_conv1d.weight")))
    convolved = Node("UNARY", convolved.shape, (convolved,))
    q, k = (_unit_length(cut((dim, heads_k, "u"), convolved)) for _ in range(2))
    if b.architecture in _REPEATED_KEYS and heads != heads_k:
        q, k = (Node("REPEAT", (dim, heads, "u"), (node,)) for node in (q, k))
    v = cut((dim, heads, "u"), convolved)
    sources = (q, k, v, decay, share, view("RESHAPE", state.shape, state))
    net = Node("GATED_DELTA_NET", (inner, "u"), sources)
    net.size = _tokens_and_sequences(inner, dim * dim * heads)
    _into(b, "CPY", cache, view("VIEW", (dim * dim * heads, "s"), net))
    output = b.norm(view("VIEW", (dim, heads, "u"), net), "ssm_norm.weight")
    gate = Node("UNARY", output.shape, (view("RESHAPE", output.shape, outer_gate),))
    gated = Node("MUL", output.shape, (output, gate))
    result = b.linear(view("RESHAPE", (inner, "u"), gated), "ssm_out")
    return view("RESHAPE", result.shape, result)


def _unit_length(node: Node) -> Node:
    scaled = Node("RMS_NORM", node.shape, (node,))
    return Node("SCALE", node.shape, (scaled,))


def _decay_and_share(b: Pieces, current: Node, heads: int) -> tuple[Node, Node]:
    """How much of the state is forgotten, and how much of the new values it takes, for every head."""
    shape: Shape = (heads, "u")
    if "ssm_ba.weight" in b.has:
        both = b.linear(current, "ssm_ba")
        share, decay = (Node("CONT", shape, (view("VIEW", shape, both),)) for _ in range(2))
    else:
        # views, so what follows is not computed in their place
        share, decay = (view("RESHAPE", shape, b.linear(current, name)) for name in ("ssm_beta", "ssm_alpha"))
    share = Node("UNARY", shape, (share,))
    decay = Node("UNARY", shape, (Node("ADD", shape, (decay, b.weight("ssm_dt.bias"))),))
    decay = Node("MUL", shape, (decay, b.weight("ssm_a")))
    return view("RESHAPE", shape, decay), view("RESHAPE", shape, share)
