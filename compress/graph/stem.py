"""The stem as a convolution over blocks of 2x2 pixels: ONNX Runtime's integer kernels are slow with 3 channels.

With weights W of size 2k, stride 2 and padding 2p, over an image of C channels, it is the convolution of size k,
stride 1 and padding p over the 4C channels (row in block, column in block, channel):

    W'[o, (row, column, channel), a, b] = W[o, channel, 2a + row, 2b + column]

It computes the same numbers, and takes the bytes of the canvas as they are: their scale is 1 and their zero point 0.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from compress.graph.assemble import CANVAS
from compress.graph.parts import GraphParts, sort_topologically
from compress.graph.preprocess import CANVAS_PIXELS

BLOCKS = f"{CANVAS}.blocks"


def space_to_depth(model: onnx.ModelProto) -> None:
    """Rewrite, in place, the stem of a Q/DQ graph that reads a canvas; other stems stay as they are."""
    parts = GraphParts(model.graph)
    quantise = next(
        (node for node in parts.nodes if node.op_type == "QuantizeLinear" and node.input[0] == CANVAS_PIXELS), None
    )
    stem = parts.nodes[parts.convs[0]]
    if quantise is None or not _fits(parts, quantise, stem):
        return
    dequantise = parts.nodes[parts.consumers[quantise.output[0]][0]]
    channels_last = _blocks(model.graph)
    moved = helper.make_node("Transpose", [channels_last], [BLOCKS], name=BLOCKS, perm=[0, 3, 1, 2])
    model.graph.node.append(moved)
    dequantise.input[0] = BLOCKS
    weight = parts.nodes[parts.producer[stem.input[1]]].input[0]
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == weight)
    tensor.CopyFrom(numpy_helper.from_array(block_weights(numpy_helper.to_array(tensor)), weight))
    for attribute in stem.attribute:
        if attribute.name in ("kernel_shape", "pads", "strides"):
            attribute.ints[:] = [value // 2 for value in attribute.ints]
    removed = {quantise.name, *(parts.nodes[i].name for i in _only_for(parts, quantise))}
    kept = [
        onnx.NodeProto.FromString(node.SerializeToString()) for node in model.graph.node if node.name not in removed
    ]
    del model.graph.node[:]
    model.graph.node.extend(kept)
    sort_topologically(model.graph)


def block_weights(weights: np.ndarray) -> np.ndarray:
    """(O, C, 2k, 2k) -> (O, 4C, k, k)."""
    outputs, channels, height, width = weights.shape
    split = weights.reshape(outputs, channels, height // 2, 2, width // 2, 2)
    return np.ascontiguousarray(split.transpose(0, 3, 5, 1, 2, 4)).reshape(
        outputs, 4 * channels, height // 2, width // 2
    )


def _fits(parts: GraphParts, quantise: onnx.NodeProto, stem: onnx.NodeProto) -> bool:
    """Whether the quantised bytes go into one quantised convolution of even size, stride 2 and even padding."""
    readers = parts.consumers[quantise.output[0]]
    after = [i for reader in readers for i in parts.after(reader)]
    zero_point = next(tensor for tensor in parts.graph.initializer if tensor.name == quantise.input[2])
    settings = {attribute.name: list(attribute.ints) for attribute in stem.attribute if attribute.ints}
    height, width = _side(parts.graph, 1), _side(parts.graph, 2)
    return (
        after == [parts.convs[0]]
        and zero_point.data_type == TensorProto.UINT8
        and stem.input[1] in parts.producer
        and settings["strides"] == [2, 2]
        and settings["dilations"] == [1, 1]
        and not any(value % 2 for value in (*settings["kernel_shape"], *settings["pads"], height, width))
    )


def _side(graph: onnx.GraphProto, axis: int) -> int:
    return int(graph.input[0].type.tensor_type.shape.dim[axis].dim_value)


def _blocks(graph: onnx.GraphProto) -> str:
    """Nodes from the uint8 input (B,H,W,3) to its blocks, uint8 (B,H/2,W/2,12)."""
    height, width = _side(graph, 1) // 2, _side(graph, 2) // 2
    names = [f"{CANVAS}.{part}" for part in ("split", "grouped", "blocks_last")]
    shapes = {f"{names[0]}.shape": [0, height, 2, width, 2, 3], f"{names[2]}.shape": [0, height, width, 12]}
    graph.initializer.extend(
        numpy_helper.from_array(np.asarray(shape, np.int64), name) for name, shape in shapes.items()
    )
    graph.node.extend(
        (
            helper.make_node("Reshape", [graph.input[0].name, f"{names[0]}.shape"], [names[0]], name=names[0]),
            helper.make_node("Transpose", [names[0]], [names[1]], name=names[1], perm=[0, 1, 3, 2, 4, 5]),
            helper.make_node("Reshape", [names[1], f"{names[2]}.shape"], [names[2]], name=names[2]),
        )
    )
    return names[2]


def _only_for(parts: GraphParts, node: onnx.NodeProto) -> list[int]:
    """The chain of nodes before this one that nothing else reads."""
    chain: list[int] = []
    name = node.input[0]
    while name in parts.producer and len(parts.consumers[name]) == 1:
        chain.append(parts.producer[name])
        name = parts.nodes[chain[-1]].input[0]
    return chain
