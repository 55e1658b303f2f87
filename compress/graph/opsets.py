"""Nodes in the forms of older operator sets. Everything else in `graph` writes those of opset 18 and later."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import onnx
from onnx import helper, numpy_helper

Constants = dict[str, onnx.TensorProto]
Rewrite = Callable[[onnx.NodeProto, Constants], list[onnx.NodeProto]]


class Change(NamedTuple):
    """`since` is the opset from which the newer form of an operator holds, `older` writes the one before."""

    since: int
    older: Rewrite


def for_opset(
    nodes: Sequence[onnx.NodeProto], constants: Mapping[str, onnx.TensorProto], opset: int
) -> tuple[list[onnx.NodeProto], Constants]:
    """The nodes as `opset` has them, and the constants that they read."""
    if not any(opset < CHANGES[node.op_type].since for node in nodes if node.op_type in CHANGES):
        return list(nodes), dict(constants)
    known, older = dict(constants), []
    for node in nodes:
        change = CHANGES.get(node.op_type)
        older += change.older(node, known) if change and opset < change.since else [node]
    used = {name for node in older for name in node.input}
    return older, {name: tensor for name, tensor in known.items() if name in used}


def _attribute(name: str) -> Rewrite:
    """Move the second input, a constant, into the attribute `name`."""

    def older(node: onnx.NodeProto, constants: Constants) -> list[onnx.NodeProto]:
        values = numpy_helper.to_array(constants[node.input[1]]).tolist()
        return [_copy(node, [node.input[0]], **{name: values})]

    return older


def _with_region(node: onnx.NodeProto, constants: Constants) -> list[onnx.NodeProto]:
    """Resize with its second input, which later opsets may leave out: an empty region."""
    region = numpy_helper.from_array(np.empty(0, np.float32), "resize.region")
    constants.setdefault(region.name, region)
    return [_copy(node, [node.input[0], region.name, *node.input[2:]])]


def _hard_swish(node: onnx.NodeProto, _: Constants) -> list[onnx.NodeProto]:
    """The product of x and HardSigmoid(x / 6 + 1/2)."""
    gate = f"{node.output[0]}.gate"
    return [
        helper.make_node("HardSigmoid", node.input, [gate], name=gate, alpha=1 / 6, beta=0.5),
        helper.make_node("Mul", [node.input[0], gate], node.output, name=node.name),
    ]


def _copy(node: onnx.NodeProto, inputs: Sequence[str], **attributes: Any) -> onnx.NodeProto:
    known = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    return helper.make_node(node.op_type, inputs, node.output, name=node.name, **known, **attributes)


CHANGES: Mapping[str, Change] = {
    "Split": Change(13, _attribute("split")),
    "Resize": Change(13, _with_region),
    "HardSwish": Change(14, _hard_swish),
    "ReduceMax": Change(18, _attribute("axes")),
    "ReduceMin": Change(18, _attribute("axes")),
}
