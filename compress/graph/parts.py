"""Find the parts of a YOLOv5 graph by its connections, never by node name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from functools import cached_property

import onnx


class GraphParts:
    """Producers, consumers and the parts of one graph. Nodes are their index in `graph.node`."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.graph = graph
        self.nodes = list(graph.node)
        self.producer = {name: i for i, node in enumerate(self.nodes) for name in node.output if name}
        self.initializers = {tensor.name for tensor in graph.initializer}
        self.consumers: dict[str, list[int]] = {}
        for i, node in enumerate(self.nodes):
            for name in dict.fromkeys(node.input):
                self.consumers.setdefault(name, []).append(i)

    def after(self, index: int) -> list[int]:
        return [i for name in self.nodes[index].output for i in self.consumers.get(name, ())]

    def before(self, index: int) -> list[int]:
        return [self.producer[name] for name in self.nodes[index].input if name in self.producer]

    @cached_property
    def convs(self) -> tuple[int, ...]:
        return tuple(i for i, node in enumerate(self.nodes) if node.op_type == "Conv")

    @cached_property
    def detect_convs(self) -> tuple[int, ...]:
        """Convolutions that no convolution follows: the last layer of each level."""
        inner = _closure([i for conv in self.convs for i in self.before(conv)], self.before)
        return tuple(i for i in self.convs if i not in inner)

    @cached_property
    def postprocessing(self) -> frozenset[int]:
        """Everything after a detect convolution: decode and NMS."""
        return frozenset(_closure(self.detect_convs, self.after) - set(self.detect_convs))

    @cached_property
    def preprocessing(self) -> frozenset[int]:
        """Everything that no convolution precedes: casts, layout and letterbox, weight and shape constants."""
        return frozenset(range(len(self.nodes))) - _closure(self.convs, self.after)

    @cached_property
    def body(self) -> frozenset[int]:
        """From the first to the detect convolutions, with all that only they read: the part that may lose precision.

        A constant, quantise or dequantise node belongs to the body if all its readers do; readers come first in the
        search, so the Q of a weight follows its DQ. The stem's input is cast before its Q.
        """
        inside = _closure(self.detect_convs, self.before) & _closure(self.convs[:1], self.after)
        for i in sorted(set(range(len(self.nodes))) - inside, reverse=True):
            readers = self.after(i)
            joins = self._is_constant(i) or self.nodes[i].op_type in ("QuantizeLinear", "DequantizeLinear")
            if joins and readers and inside.issuperset(readers):
                inside.add(i)
        return frozenset(inside)

    def _is_constant(self, index: int) -> bool:
        return all(not name or name in self.initializers for name in self.nodes[index].input)


def _closure(start: Iterable[int], step: Callable[[int], Iterable[int]]) -> set[int]:
    found, todo = set(start), list(start)
    while todo:
        fresh = [i for i in step(todo.pop()) if i not in found]
        found.update(fresh)
        todo.extend(fresh)
    return found


def op_counts(graph: onnx.GraphProto) -> Counter[str]:
    return Counter(node.op_type for node in graph.node)


def sort_topologically(graph: onnx.GraphProto) -> None:
    """Reorder nodes so that each comes after its producers, otherwise keeping their order."""
    parts = GraphParts(graph)
    placed: set[int] = set()
    order: list[int] = []

    def place(root: int) -> None:
        stack = [root]
        while stack:
            missing = [i for i in parts.before(stack[-1]) if i not in placed]
            if missing:
                stack.extend(missing)
                continue
            index = stack.pop()
            if index not in placed:
                placed.add(index)
                order.append(index)

    for i in range(len(parts.nodes)):
        place(i)
    copies = [onnx.NodeProto.FromString(parts.nodes[i].SerializeToString()) for i in order]
    del graph.node[:]
    graph.node.extend(copies)
