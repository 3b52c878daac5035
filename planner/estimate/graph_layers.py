"""The operations of a decoder layer by layer, as llama.cpp's ``build_…`` functions order them.

One builder serves all architectures: what a layer computes is read off the tensors it has (fused or separate
QKV, biases, norms of Q and K, post-norms, experts, shared experts, latent attention, recurrent states), and the few
differences that leave no tensor behind are listed by architecture.
"""

from __future__ import annotations

from planner.core.model import AttentionLayer, ModelSpec
from planner.estimate.graph import GLOBAL, Graph, Node, leaf, weight
from planner.estimate.graph_attention import attention, latent_attention
from planner.estimate.graph_experts import experts, feed_forward
from planner.estimate.graph_gemma3n import Gemma3n
from planner.estimate.graph_pieces import Pieces, Setting
from planner.estimate.graph_recurrent import recurrent

_SCALED_INPUT = ("gemma", "gemma2", "gemma3", "gemma3n", "gemma4")
_RESIDUAL_FIRST = ("phi3", "phimoe")
"""Architectures that add the residual to the result, not the result to the residual."""
_ROWS_CHOSEN_LAST = ("gpt-oss",)
"""Architectures that pick the rows with logits after the last layer, not inside it."""
_ROWS_CHOSEN_AFTER_NORM = ("qwen35", "qwen35moe", "qwen3next")
"""Architectures whose normed last state is kept for the layers that predict further tokens."""
_NORMED_EARLY = ("qwen35", "qwen35moe", "qwen3next")
"""Architectures whose layers compute the norm before they read any state."""
_RESIDUAL_BEFORE_ATTENTION = ("command-r", "cohere2")
"""Parallel layers that add the residual before the attention's result."""
_ATTENTION_BEFORE_FFN = ("phi2",)
"""Parallel layers that add the feed-forward's result to the attention's, which is therefore finished first."""


def build(model: ModelSpec, setting: Setting) -> Graph:
    """The graph of a few layers of ``model``, from token embedding to logits."""
    b = Pieces(model, setting)
    b.enter(None, setting.host, setting.host, GLOBAL)
    current = _input(b)
    special = None
    if model.architecture == "gemma3n":
        first = setting.devices[0][1] if setting.devices else setting.host
        special = Gemma3n(b, current, first, setting.output_device)
        current = special.entry
    last = len(setting.devices) - 1
    inside = special is None and model.architecture not in (*_ROWS_CHOSEN_LAST, *_ROWS_CHOSEN_AFTER_NORM)
    for position, (layer, device, expert_device) in enumerate(setting.devices):
        b.enter(layer, device, expert_device, position)
        kept = model.attention[layer]
        current = special.layer(kept, current) if special else _layer(b, kept, current, inside and position == last)
    if special:
        current = special.merged(current)
    if model.architecture in _ROWS_CHOSEN_LAST:
        current.is_output = True
        current = b.chosen_rows(current)
    b.enter(None, setting.output_device, setting.output_device, GLOBAL)
    _output(b, current)
    return b.graph


def _input(b: Pieces) -> Node:
    n_embd, host = b.model.n_embd, b.setting.host
    tokens, embeddings = leaf(("u",), 4, is_input=True), leaf((n_embd, "u"), 4, is_input=True)
    rows = Node("GET_ROWS", (n_embd, "u"), (weight((GLOBAL, "token_embd.weight"), host), tokens))
    b.graph.expand(rows)
    b.graph.expand(embeddings)
    return Node("SCALE", rows.shape, (rows,)) if b.architecture in _SCALED_INPUT else rows


def _output(b: Pieces, current: Node) -> None:
    current = b.norm(current, "output_norm.weight")
    if b.architecture in _ROWS_CHOSEN_AFTER_NORM:
        current.is_output = True
        current = b.chosen_rows(current)
    role = "token_embd.weight" if b.model.tied_embeddings else "output.weight"
    logits = Node("MUL_MAT", (b.model.n_vocab, "out"), (b.weight(role), current))
    if "output.bias" in b.has:
        logits = Node("ADD", logits.shape, (logits, b.weight("output.bias")))
    b.graph.expand(logits)


def _layer(b: Pieces, kept: AttentionLayer, entry: Node, chosen: bool) -> Node:
    normed = current = b.norm(entry, "attn_norm.weight")
    if "attn_norm_2.weight" in b.has:
        current = b.norm(entry, "attn_norm_2.weight")
    if b.architecture in _NORMED_EARLY:
        b.graph.expand(normed)
    if kept.kind in ("full", "sliding"):
        current = latent_attention(b, kept, current) if b.model.mla else attention(b, kept, current)
    elif kept.kind == "recurrent":
        current = recurrent(b, current)
    residual = entry
    post_normed = "post_ffw_norm.weight" in b.has
    parallel = not post_normed and b.has.keys().isdisjoint({"ffn_norm.weight", "post_attention_norm.weight"})
    if chosen:
        current, residual = b.chosen_rows(current), b.chosen_rows(entry)
        normed = b.chosen_rows(normed) if parallel else normed
    if parallel and "ffn_down.weight" in b.has:
        return _parallel(b, normed, current, residual)
    if post_normed:
        current = b.norm(current, "post_attention_norm.weight")
    middle = Node("ADD", current.shape, (current, residual))
    norm = "ffn_norm.weight" if post_normed or "ffn_norm.weight" in b.has else "post_attention_norm.weight"
    current = b.norm(middle, norm)
    current = experts(b, current) if "ffn_gate_inp.weight" in b.has else feed_forward(b, current)
    current = b.norm(current, "post_ffw_norm.weight")
    operands = (middle, current) if b.architecture in _RESIDUAL_FIRST else (current, middle)
    return Node("ADD", current.shape, operands)


def _parallel(b: Pieces, normed: Node, attended: Node, residual: Node) -> Node:
    """Attention and feed-forward on the same normed input, added up at the end."""
    current = feed_forward(b, normed)
    if b.architecture in _ATTENTION_BEFORE_FFN:
        terms_of_sum = [attended, current, residual]
    elif b.architecture in _RESIDUAL_BEFORE_ATTENTION:
        terms_of_sum = [current, residual, attended]
    else:
        terms_of_sum = [current, attended, residual]
    total = terms_of_sum[0]
    for node in terms_of_sum[1:]:
        total = Node("ADD", total.shape, (total, node))
    return total
