"""What ggml's scheduler and graph allocator make of a graph: which buffer holds what, and from when to when.

Operations are assigned to devices, the graph is split, and each tensor's allocation and release found. This needs no
sizes and is done once per kind of graph; :mod:`planner.estimate.graph_replay` then replays it with sizes.
Source: ggml/src/ggml-backend.cpp (``ggml_backend_sched_split_graph``), ggml/src/ggml-alloc.c and
``ggml_backend_cuda_graph_optimize`` of llama.cpp as in llama-cpp-python 0.3.36.
"""

from __future__ import annotations

from planner.estimate.graph import GLOBAL, IN_PLACE, SYMBOLS, VIEWS, Graph, Node, Terms, WeightKey, root_of
from planner.estimate.graph_replay import Program, Segment

_MAX_FUSED_EXPERTS = 15
"""Weighted sums over more experts are not fused (``MOE_WEIGHTED_REDUCTION_MAX_EXPERTS``)."""


OFFLOAD_MIN_BATCH = 32
"""Rows from which an operation on a weight in RAM runs on the GPU (``GGML_OP_OFFLOAD_MIN_BATCH`` of ggml-cuda)."""
_BATCH_FROM = {"MUL_MAT": (1, 2), "MUL_MAT_ID": (2, 3), "ROPE": (2, 3), "GET_ROWS": (4, 4)}
"""Which dimensions count as an operation's batch; all but the first of the others (``get_op_batch_size``)."""

Rows = tuple[int, int]
"""Rows of a micro-batch and rows that get logits, each no more than :data:`OFFLOAD_MIN_BATCH`."""


def compile_graph(graph: Graph, device_count: int, rows: Rows, copies: int = 1) -> Program:
    """The allocations of ``graph`` on ``device_count`` devices, of which the last is the host.

    Args:
        graph: operations in order, weights and caches with their homes.
        device_count: GPUs plus one.
        rows: what ``u`` and ``out`` are, as far as it matters: an operation of 32 rows or more whose weight lies on
            the host is run on a GPU all the same, with a copy of the weight (``offload_op``).
        copies: 4 where llama.cpp runs several GPUs as a pipeline, else 1.
    """
    devices = _assign(graph, device_count - 1, rows)
    return _Allocation(graph, devices, device_count, copies).run()


def _assign(graph: Graph, host: int, rows: Rows) -> dict[Node, int]:
    """Device of each node: where its weights are, then spreading from GPU nodes, then from the rest."""
    if not host:
        return dict.fromkeys((*graph.leafs, *graph.nodes), host)
    devices: dict[Node, int] = {}
    for node in graph.leafs:
        if node.home is not None:
            devices[node] = node.home
        elif node.is_input:
            devices[node] = host
    for node in graph.nodes:
        found = _preferred(node, host, rows)
        if found is not None:
            devices[node] = found
    work = [node for node in graph.nodes if node.op not in VIEWS]
    for order, spreads_host in ((work, False), (work[::-1], False), (work, True), (work[::-1], True)):
        current: int | None = None
        for node in order:
            if node in devices:
                current = devices[node] if spreads_host or devices[node] != host else None
            elif current is not None and (current == host or not node.host_only):
                devices[node] = current
    for node in graph.nodes:
        if node.host_only:
            devices.setdefault(node, host)
        if node.root is not None and node not in devices:
            devices[node] = devices[node.root]
        for source in node.src:
            if source not in devices:
                devices[source] = devices[source.root] if source.root is not None else devices[node]
    return devices


def _preferred(node: Node, host: int, rows: Rows) -> int | None:
    home = root_of(node).home
    if home is not None:
        return home
    if node.op in ("ROPE", "FLASH_ATTN_EXT"):
        return None
    for source in node.src:
        if source.weight is not None:
            wanted = source.home == host > 0 and _batch_size(node, rows) >= OFFLOAD_MIN_BATCH
            return 0 if wanted else source.home
    return None


def _batch_size(node: Node, rows: Rows) -> int:
    """``get_op_batch_size`` of ggml-cuda; a row has at least a cache's 256 cells where it is one of them."""
    first, last = _BATCH_FROM.get(node.op, (1, 4))
    size = int(node.op != "GET_ROWS")
    for dimension in node.shape[first:last]:
        if isinstance(dimension, str):
            size *= {"u": rows[0], "out": rows[1]}.get(dimension, OFFLOAD_MIN_BATCH)
        else:
            size *= dimension
    return size


class _Allocation:
    """Splits, copies and lifetimes."""

    def __init__(self, graph: Graph, devices: dict[Node, int], device_count: int, copies: int) -> None:
        self.graph = graph
        self.devices = devices
        self.host = device_count - 1
        self.copies = copies
        self.order: list[tuple[Node, int, bool]] = []
        """Nodes with their device as the allocator sees them; true for copies and other helpers."""
        self.sources: dict[Node, tuple[Node, ...]] = {}
        self.copy_of: dict[Node, Node] = {}
        self.early: list[tuple[Node, int]] = []
        self.pinned: set[Node] = set()
        self.events: list[dict[int, list[int]]] = [{} for _ in range(device_count)]
        """Per device and position of a layer."""
        self.position = GLOBAL
        self.gone: dict[int, int] = {}
        self.slots: dict[Node, tuple[int, int]] = {}
        self.sizes: list[Terms] = []
        self.weights: list[tuple[int, WeightKey]] = []
        self.children: dict[Node, int] = {}
        self.views: dict[Node, int] = {}

    def run(self) -> Program:
        split_count = self._split()
        self._count()
        for node, device in self.early:
            self._allocate(node, device)
        for node in self.graph.leafs:
            self._allocate(node, self.devices.get(node, self.host))
        slots, children = self.slots, self.children
        for node, device, helper in self.order:
            if node.position > self.position:
                self.position = node.position
            sources = self.sources[node]
            for source in sources:
                if source.root is None and source not in slots:
                    self._allocate(source, device)
            if node.root is None and (not helper or node in self.copy_of):
                self._allocate(node, device)
            for source in sources:
                left = children[source] = children[source] - 1
                if not left:
                    self._release(source)
        segments = tuple(self._segments(device) for device in range(len(self.events)))
        return Program(segments, tuple(self.sizes), split_count)

    def _segments(self, device: int) -> tuple[Segment, ...]:
        events = self.events[device]
        copied = dict(self.weights)
        found = []
        for position in range(GLOBAL, self.position + 1):
            own = events.get(position, [])
            slots = [event for event in own if event >= 0]
            before = events.get(position - 1, [])
            # what lives on for longer than the next layer (masks, positions) is found by its own number
            carried_in = [e for e in before if e >= 0 and position > 0 and self.gone.get(e) == position]
            carried_out = [slot for slot in slots if position >= 0 and self.gone.get(slot) == position + 1]
            weights = tuple((slot, copied[slot]) for slot in slots if slot in copied)
            found.append(Segment(tuple(own), weights, tuple(carried_in), tuple(carried_out)))
        return tuple(found)

    def _split(self) -> int:
        if not self.host:
            self.order = [(node, 0, False) for node in self.graph.nodes]
            self.sources = {node: tuple([s for s in node.src if s.home is None]) for node in self.graph.nodes}
            return 1
        splits: list[tuple[int, list[Node], list[Node]]] = []
        copied: dict[tuple[Node, int], Node] = {}
        for node in self.graph.nodes:
            device = self.devices[node]
            if node.op in VIEWS:
                self.sources[node] = tuple([source for source in node.src if source.home is None])
                if not splits:
                    splits.append((-1, [], []))
                splits[-1][1].append(node)
                continue
            if splits and splits[-1][0] == -1:
                splits[-1] = (device, splits[-1][1], splits[-1][2])
            # a new split for each copied weight lets its memory be used again
            fresh = bool(splits) and bool(splits[-1][2]) and any(s.weight and s.home != device for s in node.src)
            if not splits or splits[-1][0] != device or fresh:
                splits.append((device, [], []))
            splits[-1][1].append(node)
            # weights and caches that lie here were allocated before, and stay
            local = [self._local(source, device, splits[-1][2], copied) for source in node.src]
            self.sources[node] = tuple([source for source in local if source.home is None])
        for device, nodes, inputs in splits:
            self._emit(device, nodes, inputs, copied)
        return len(splits)

    def _local(self, source: Node, device: int, inputs: list[Node], copied: dict[tuple[Node, int], Node]) -> Node:
        """``source``, or its copy where ``device`` cannot read it; the host's memory counts as such a case."""
        home = (source.root or source).home
        if (self.devices[source] if home is None else home) == device:
            return source
        if (source, device) not in copied:
            copy = Node("NONE", source.shape, width=source.width)
            copy.size, copy.weight, copy.padding = source.size, source.weight, source.padding
            copied[source, device] = copy
            self.copy_of[copy] = source
            inputs.append(source)
        return copied[source, device]

    def _emit(self, device: int, nodes: list[Node], inputs: list[Node], copied: dict[tuple[Node, int], Node]) -> None:
        for source in inputs:
            copy = copied[source, device]
            keep = Node("NONE", ())
            self.sources[keep], self.sources[copy] = (source,), ()
            keep.position = copy.position = nodes[0].position
            self.order += [(keep, self.devices[source], True), (copy, device, True)]
            if self.copies > 1:
                self._pin(copy, device)
        kept = _fusions(nodes, self.sources) if device != self.host else {}
        for node in nodes:
            self.order.append((node, self.devices[node], False))
            if node in kept:
                keep = Node("NONE", ())
                self.sources[keep] = kept[node]
                self.order.append((keep, device, True))

    def _pin(self, copy: Node, device: int) -> None:
        """A pipeline keeps every copy, several times over."""
        self.pinned.add(copy)
        self.early.append((copy, device))
        for _ in range(self.copies - 1):
            twin = Node("NONE", copy.shape, width=copy.width)
            twin.size, twin.weight = copy.size, copy.weight
            self.pinned.add(twin)
            self.early.append((twin, device))

    def _count(self) -> None:
        if self.copies > 1:
            for node in [leaf for leaf in self.graph.leafs if leaf.is_input]:
                self._pin(node, self.host)
        for node, _, helper in self.order:
            if node.root is not None and not helper:
                self.views[node.root] = self.views.get(node.root, 0) + 1
            for source in self.sources[node]:
                self.children[source] = self.children.get(source, 0) + 1

    def _allocate(self, node: Node, device: int) -> None:
        if node in self.slots or node.root is not None or node.home is not None:
            return
        if node.op in IN_PLACE and self._reuse(node):
            return
        slot = len(self.sizes)
        extra: Terms = ()
        if device != self.host:
            extra = node.scratch + node.padding
            if node.scratch_apart and self.sources[node][2] in self.copy_of:
                extra += node.scratch_apart
        self.sizes.append((*node.size, *extra))
        if node.weight is not None:
            self.weights.append((slot, node.weight))
        self.slots[node] = (slot, device)
        self.events[device].setdefault(self.position, []).append(slot)

    def _reuse(self, node: Node) -> bool:
        for parent in self.sources[node]:
            own = self.slots.get(parent)
            if own is None or own[0] < 0 or parent.is_output or parent in self.pinned or parent.root is not None:
                continue
            same = parent.width == node.width and _trimmed(parent) == _trimmed(node)
            if same and self.children[parent] == 1 and not self.views.get(parent):
                self.slots[node] = own
                self.slots[parent] = (-1, own[1])
                return True
        return False

    def _release(self, source: Node) -> None:
        if self.views.get(source):
            return
        if source.root is None:
            self._free(source)
            return
        self.views[source.root] -= 1
        if not self.views[source.root] and not self.children.get(source.root):
            self._free(source.root)

    def _free(self, node: Node) -> None:
        slot, device = self.slots.get(node, (-1, 0))
        if slot >= 0 and not node.is_output and node not in self.pinned:
            self.gone[slot] = self.position
            self.events[device].setdefault(self.position, []).append(~slot)
            self.slots[node] = (-1, device)


def _trimmed(node: Node) -> tuple[object, ...]:
    shape = node.shape
    while shape and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def _fusions(nodes: list[Node], sources: dict[Node, tuple[Node, ...]]) -> dict[Node, tuple[Node, ...]]:
    """Operands that the CUDA back end keeps until the end of a weighted sum of experts, which it fuses.

    The tables of the choice of experts, which it may keep as well (``ggml_cuda_should_use_topk_moe``), are left out:
    an H100's report shows them and the tables published with the version do not; they are some 0.1 % of a total.
    """
    kept: dict[Node, tuple[Node, ...]] = {}
    for i, node in enumerate(nodes):
        if node.op != "MUL" or len(node.shape) != 3 or [each.op for each in nodes[i + 1 : i + 2]] != ["VIEW"]:
            continue
        used = node.shape[1]
        if isinstance(used, int) and 2 <= used <= _MAX_FUSED_EXPERTS and i + 2 * used - 1 < len(nodes):
            kept[nodes[i + 2 * used - 1]] = sources[node]
    return kept


def symbol_values(u: int, out: int, kv: int, kvs: int, b: int, streams: int = 1) -> tuple[int, ...]:
    """Values of :data:`SYMBOLS`, in their order.

    Args:
        kv: cells of one stream of the cache, which a token of that stream sees.
        kvs: the same of the window's cache.
        streams: caches beside each other; what is read of them is read of all at once.
    """
    kv_all, kvs_all = kv * streams, kvs * streams
    values = (1, u, out, kv_all, kvs_all, u * kv, u * kvs, b, kv_all * b, kvs_all * b, streams)
    assert len(values) == len(SYMBOLS)
    return values
