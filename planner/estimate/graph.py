"""llama.cpp's compute graph as far as its memory goes: which tensors live when, with sizes in symbols.

The graph of a whole model repeats one or two kinds of layer, so it is built here for a few layers of each kind.
Sizes are sums of ``coefficient * symbol`` over :data:`SYMBOLS`, so that one graph serves every context length.
Source: src/llama-graph.cpp, src/llama-kv-cache.cpp and src/models/ of llama.cpp as in llama-cpp-python 0.3.36.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache

Dimension = int | str
Shape = tuple[Dimension, ...]
Terms = tuple[tuple[int, int], ...]
"""``(coefficient, index of a symbol)`` pairs; bytes once the symbols have values."""

WeightKey = tuple[int, str]
GLOBAL = -1
"""Position of a weight outside the layers."""

SYMBOLS = ("1", "u", "out", "kv", "kvs", "u*kv", "u*kvs", "b", "kv*b", "kvs*b", "s")
"""``u`` tokens of a micro-batch, ``out`` rows that get logits, ``kv`` cells of the cache, ``kvs`` of the window's,
``b`` bytes of a block of the cache's type, ``s`` sequences."""
_INDEX = {symbol: index for index, symbol in enumerate(SYMBOLS)}

VIEWS = frozenset({"VIEW", "RESHAPE", "PERMUTE", "TRANSPOSE"})
IN_PLACE = frozenset(
    {"ADD", "ADD_ID", "SUB", "MUL", "DIV", "SQR", "SQRT", "SCALE", "UNARY", "ROPE", "RMS_NORM", "CLAMP", "SOFT_MAX"}
)
"""Operations that may overwrite an operand (``ggml_op_can_inplace``)."""


class Node:
    """A tensor of the graph: an operation's result, a view, a weight, a cache or an input."""

    # few nodes differ from these, and a graph has hundreds
    root: Node | None = None
    """What a view looks into."""
    home: int | None = None
    """Device that holds it before the graph runs (weights and caches)."""
    weight: WeightKey | None = None
    """Position of the layer and role of a weight, as ``(3, "ffn_down.weight")``."""
    is_input = False
    host_only = False
    """No GPU kernel computes it."""
    is_output = False
    """Read after the graph has run, so never freed or overwritten."""
    row_stride: int | None = None
    """Elements from one row of a cut to the next, where they are more than its own."""
    position = GLOBAL
    """Position of the latest layer that it depends on."""
    scratch: Terms = ()
    """What a GPU kernel appends to its result."""
    scratch_apart: Terms = ()
    """The same, where V is no longer a view of K because both were copied to this GPU."""
    padding: Terms = ()
    """What a GPU appends to a quantized row."""
    stated_size: Terms | None = None
    """Bytes, where they do not follow from shape and width."""

    def __init__(self, op: str, shape: Shape, src: tuple[Node, ...] = (), *, width: int = 4) -> None:
        self.op = op
        self.shape = shape
        self.src = src
        self.width = width

    @property
    def size(self) -> Terms:
        """Bytes; asked of the few tensors that are allocated or copied."""
        return terms(self.shape, self.width) if self.stated_size is None else self.stated_size

    @size.setter
    def size(self, size: Terms) -> None:
        self.stated_size = size


@lru_cache(maxsize=4096)
def terms(shape: Shape, width: int) -> Terms:
    """Bytes of ``shape`` with ``width`` bytes per element."""
    coefficient, symbols = width, []
    for dimension in shape:
        if isinstance(dimension, int):
            coefficient *= dimension
        else:
            symbols.append(dimension)
    name = "*".join(sorted(symbols, key=lambda symbol: symbol != "u")) if symbols else "1"
    return ((coefficient, _INDEX[name]),)


def cached_terms(cells: str | None, blocks: int) -> Terms:
    """Bytes of ``blocks`` blocks of the cache's type, in each of its ``cells`` or once."""
    return ((blocks, _INDEX["b" if cells is None else f"{cells}*b"]),)


def root_of(node: Node) -> Node:
    """The tensor that owns the memory of ``node``."""
    return node.root or node


@dataclass(slots=True)
class Graph:
    """Nodes in execution order; weights, caches and inputs are leaves."""

    nodes: list[Node] = field(default_factory=list)
    leafs: list[Node] = field(default_factory=list)
    seen: set[Node] = field(default_factory=set)

    def expand(self, node: Node) -> None:
        """Add ``node`` after everything it depends on, operands from left to right."""
        if node in self.seen:
            return
        self.seen.add(node)
        latest = node.position
        for source in node.src:
            if source not in self.seen:
                self.expand(source)
            position = source.weight[0] if source.weight else source.position
            if position > latest:
                latest = position
        node.position = latest
        (self.nodes if node.op != "NONE" else self.leafs).append(node)


def view(op: str, shape: Shape, node: Node) -> Node:
    """A view (``VIEW``, ``RESHAPE``, ``PERMUTE``) of ``node``."""
    made = Node(op, shape, (node,), width=node.width)
    made.root = root_of(node)
    return made


def cut(shape: Shape, node: Node) -> Node:
    """A view of some of each row of ``node``; as a copy takes it, it ends with its own part of the last row."""
    made = view("VIEW", shape, node)
    own = 1
    for dimension in shape:
        own *= dimension if isinstance(dimension, int) else 1
    made.row_stride = multiplied(node.shape[0], 1)
    made.size = (*terms((made.row_stride, *node.shape[1:]), node.width), (node.width * (own - made.row_stride), 0))
    return made


def leaf(shape: Shape, width: int, *, home: int | None = None, is_input: bool = False) -> Node:
    """An input, or a cache that lies on the device ``home``."""
    made = Node("NONE", shape, width=width)
    made.home, made.is_input = home, is_input
    return made


def weight(key: WeightKey, home: int) -> Node:
    """A weight on the device ``home``."""
    made = Node("NONE", (0,))
    made.weight, made.home = key, home
    return made


def multiplied(a: Dimension, b: int) -> int:
    """``a * b`` for a dimension that is a number."""
    assert isinstance(a, int)
    return a * b


def divided(shape: Shape, rows: Dimension) -> Shape:
    """The dimensions after ``rows`` when ``shape`` is cut into rows of that length."""
    numbers = [d for d in shape if isinstance(d, int)]
    symbols = [d for d in shape if isinstance(d, str)]
    total = 1
    for number in numbers:
        total *= number
    assert isinstance(rows, int)
    return (total // rows, *symbols)
