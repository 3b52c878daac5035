"""Gemma 3n: four predictions of the state beside each other, a low-rank bypass, and an input of its own per layer.

Source: src/models/gemma3n.cpp of llama.cpp as in llama-cpp-python 0.3.36.
"""

from __future__ import annotations

from planner.core.model import AttentionLayer
from planner.estimate.graph import GLOBAL, Node, Shape, leaf, view, weight
from planner.estimate.graph_attention import attention
from planner.estimate.graph_pieces import Pieces

_PREDICTIONS = 4
"""States beside each other (``n_altup``); the first one is the active one."""


class Gemma3n:
    """Builds the parts of Gemma 3n that other models lack."""

    def __init__(self, b: Pieces, embedded: Node, first_device: int, output_device: int) -> None:
        self.b = b
        self.embedded = embedded
        self.first_device, self.output_device = first_device, output_device
        self.wide: Shape = (b.model.n_embd, "u", _PREDICTIONS)
        self.rest: Shape = (b.model.n_embd, "u", _PREDICTIONS - 1)
        self.own_inputs = self._inputs_of_layers()
        self.entry = self._predictions()

    def _inputs_of_layers(self) -> Node:
        """The inputs of all layers, from a table of their own and from the embedding."""
        b, layers = self.b, self.b.model.n_layer
        rows = b.has["per_layer_token_embd.weight"][0]
        assert isinstance(rows, int)
        shape: Shape = (rows // layers, layers, "u")
        tokens = leaf(("u",), 4, is_input=True)
        table = weight((GLOBAL, "per_layer_token_embd.weight"), b.setting.host)
        looked_up = view("RESHAPE", shape, Node("GET_ROWS", (rows, "u"), (table, tokens)))
        looked_up = Node("SCALE", shape, (looked_up,))
        b.graph.expand(looked_up)
        projection = weight((GLOBAL, "per_layer_model_proj.weight"), self.first_device)
        projected = Node("MUL_MAT", (rows, "u"), (projection, self.embedded))
        projected = view("RESHAPE", shape, Node("SCALE", projected.shape, (projected,)))
        normed = Node("RMS_NORM", shape, (projected,))
        normed = Node("MUL", shape, (normed, weight((GLOBAL, "per_layer_proj_norm.weight"), self.first_device)))
        total = Node("SCALE", shape, (Node("ADD", shape, (normed, looked_up)),))
        turned: Shape = (shape[0], "u", layers)
        return Node("CONT", turned, (view("PERMUTE", turned, total),))

    def _predictions(self) -> Node:
        """The embedding and its projections, each as long as the embedding."""
        target = _magnitude(self.embedded)
        repeated = Node("REPEAT", self.rest, (self.embedded,))
        added = Node("MUL_MAT", self.rest, (self._outer("altup_proj.weight"), repeated))
        added = self._rescaled(added, target)
        return Node("CONCAT", self.wide, (self.embedded, added))

    def _outer(self, role: str) -> Node:
        return weight((GLOBAL, role), self.output_device)

    def _rescaled(self, node: Node, target: Node) -> Node:
        new = _magnitude(node)
        return Node("DIV", node.shape, (Node("MUL", node.shape, (node, target)), new))

    def layer(self, kept: AttentionLayer, entry: Node) -> Node:
        """One layer, on all predictions."""
        b = self.b
        predictions = self._predict(entry)
        active = self._slice(predictions)
        normed = b.norm(active, "attn_norm.weight")
        bypass = b.norm(b.linear(b.linear(normed, "laurel_l"), "laurel_r"), "laurel_post_norm.weight")
        bypass = Node("ADD", bypass.shape, (bypass, normed))
        current = b.norm(attention(b, kept, normed), "post_attention_norm.weight")
        current = Node("ADD", current.shape, (current, active))
        middle = Node("SCALE", current.shape, (Node("ADD", current.shape, (current, bypass)),))
        current = self._feed_forward(b.norm(middle, "ffn_norm.weight"))
        current = b.norm(current, "post_ffw_norm.weight")
        corrected = self._correct(predictions, Node("ADD", current.shape, (current, middle)))
        first = Node("MUL", middle.shape, (self._slice(corrected), b.weight("altup_correct_scale.weight")))
        gate = b.linear(first, "inp_gate")
        gate = Node("UNARY", gate.shape, (gate,))
        gate = Node("MUL", gate.shape, (gate, view("VIEW", gate.shape, self.own_inputs)))
        first = b.norm(b.linear(gate, "proj"), "post_norm.weight")
        rest = Node("ADD", self.rest, (view("VIEW", self.rest, corrected), first))
        return Node("CONCAT", self.wide, (self._slice(corrected), rest))

    def _slice(self, node: Node) -> Node:
        return view("VIEW", (self.b.model.n_embd, "u"), node)

    def _feed_forward(self, current: Node) -> Node:
        up, gate = self.b.linear(current, "ffn_up"), self.b.linear(current, "ffn_gate")
        if self.b.sparse:
            gate = self._largest(gate)
        gate = Node("UNARY", gate.shape, (gate,))
        return self.b.linear(Node("MUL", up.shape, (up, gate)), "ffn_down")

    def _largest(self, node: Node) -> Node:
        """Activations beyond a multiple of their spread (``gaussian_topk``)."""
        row: Shape = (1, "u")
        mean = Node("MEAN", row, (node,))
        squares = Node("SQR", node.shape, (Node("SUB", node.shape, (node, mean)),))
        spread = Node("SQRT", row, (Node("SCALE", row, (Node("SUM_ROWS", row, (squares,)),)),))
        limit = Node("ADD", row, (mean, Node("SCALE", row, (spread,))))
        return Node("UNARY", node.shape, (Node("SUB", node.shape, (node, limit)),))

    def _modalities(self, node: Node) -> Node:
        b = self.b
        normed = b.norm(node, "altup_router_norm.weight")
        routed = b.linear(Node("SCALE", normed.shape, (normed,)), "altup_router")
        return Node("UNARY", routed.shape, (routed,))

    def _predict(self, entry: Node) -> Node:
        coefficients = self.b.linear(self._modalities(self._slice(entry)), "altup_predict_coef")
        coefficients = view("RESHAPE", (_PREDICTIONS, _PREDICTIONS, "u"), coefficients)
        turned: Shape = (_PREDICTIONS, self.b.model.n_embd, "u")
        columns = Node("CONT", turned, (view("PERMUTE", turned, entry),))
        product = Node("MUL_MAT", (self.b.model.n_embd, _PREDICTIONS, "u"), (columns, coefficients))
        predicted = Node("CONT", self.wide, (view("PERMUTE", self.wide, product),))
        return Node("ADD", self.wide, (predicted, entry))

    def _correct(self, predictions: Node, activated: Node) -> Node:
        modalities = self._modalities(activated)
        innovation = Node("SUB", activated.shape, (activated, self._slice(predictions)))
        coefficients = self.b.linear(modalities, "altup_correct_coef")
        coefficients = Node("SCALE", coefficients.shape, (coefficients,))
        column: Shape = (1, "u", _PREDICTIONS)
        coefficients = Node("CONT", column, (view("TRANSPOSE", column, coefficients),))
        repeated = Node("REPEAT", self.wide, (innovation,))
        corrected = Node("MUL", self.wide, (repeated, coefficients))
        return Node("ADD", self.wide, (corrected, predictions))

    def merged(self, current: Node) -> Node:
        """The mean of all predictions, of the rows that get logits."""
        target = _magnitude(self._slice(current))
        rest = view("VIEW", self.rest, current)
        others = Node("MUL_MAT", self.rest, (self._outer("altup_unembd_proj.weight"), rest))
        others = self._rescaled(others, target)
        total = self._slice(current)
        for _ in range(_PREDICTIONS - 1):
            total = Node("ADD", total.shape, (total, self._slice(others)))
        return self.b.chosen_rows(Node("SCALE", total.shape, (total,)))


def _magnitude(node: Node) -> Node:
    row: Shape = (1, *node.shape[1:])
    return Node("SQRT", row, (Node("SUM_ROWS", row, (Node("SQR", node.shape, (node,)),)),))
