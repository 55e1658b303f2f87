"""Convert a torch network to ONNX nodes, by `torch.export` and a table of the operators that YOLOv5 uses.

In: a fused network in eval mode that returns the raw maps. Out: `NetworkGraph`, ONNX nodes and NumPy constants.
torch's own ONNX exporters are not used: the old one is deprecated, the new one renames and reorders nodes with
every release, and equal weights must give equal bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
import torch
from onnx import helper
from torch import nn

from compress.graph.builder import GraphBuilder
from runtime.errors import EdgestillError

INPUT = "images"
"""Name of the network's input, as YOLOv5's own exports have it."""


@dataclass(frozen=True)
class NetworkGraph:
    """The network without preprocessing and decode.

    `input` is float32 RGB 0..1 (B,3,H,W), `maps` are float32 (B, na·(5+nc), H/s, W/s), one for each level.
    """

    nodes: tuple[onnx.NodeProto, ...]
    constants: Mapping[str, np.ndarray]
    input: str
    maps: tuple[str, ...]


def trace(module: nn.Module, size_hw: tuple[int, int]) -> NetworkGraph:
    """The graph of a torch network whose forward returns the list of raw maps.

    Raises `EdgestillError` naming the operator when the network uses one outside the table.
    """
    program = torch.export.export(module.eval(), (torch.zeros(1, 3, *size_hw),), strict=False)
    program.graph.eliminate_dead_code()
    signature = program.graph_signature
    stored = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    state = {**program.state_dict, **program.constants}
    builder = GraphBuilder()
    names: dict[Any, str] = {}
    constants: dict[str, np.ndarray] = {}
    for node in program.graph.nodes:
        if node.op == "placeholder":
            names[node] = stored.get(node.name, INPUT)
        elif node.op == "call_function":
            _emit(builder, node, names)
        elif node.op == "output":
            maps = tuple(names[value] for value in node.args[0])
    for name in dict.fromkeys(used for node in builder.nodes for used in node.input if used in state):
        constants[name] = state[name].detach().to(torch.float32).cpu().numpy()
    made = {name: onnx.numpy_helper.to_array(tensor) for name, tensor in builder.constants.items()}
    return NetworkGraph(tuple(builder.nodes), {**constants, **made}, INPUT, maps)


def _emit(builder: GraphBuilder, node: Any, names: dict[Any, str]) -> None:
    kind = str(node.target).removeprefix("aten.").split(".")[0]
    if kind not in OPERATORS:
        raise EdgestillError(
            f"the network uses torch operator {kind!r}, which the exporter does not know",
            f"Known: {', '.join(sorted(OPERATORS))}",
        )
    OPERATORS[kind](builder, node, names)


def _output(node: Any, names: dict[Any, str], name: str | None = None) -> str:
    names[node] = name or f"{node.name}"
    return names[node]


def _pair(value: Any) -> list[int]:
    return [value, value] if isinstance(value, int) else list(value) * (2 if len(value) == 1 else 1)


def _arg(node: Any, index: int, default: Any) -> Any:
    return node.args[index] if len(node.args) > index else default


def _conv(builder: GraphBuilder, node: Any, names: dict[Any, str]) -> None:
    image, weight, bias, stride, padding, dilation, groups = (
        _arg(node, i, d) for i, d in enumerate((None, None, None, 1, 0, 1, 1))
    )
    inputs = [names[value] for value in (image, weight, bias) if value is not None]
    builder.op(
        "Conv",
        *inputs,
        name=_output(node, names, names[weight].removesuffix(".weight")),
        kernel_shape=list(weight.meta["val"].shape[2:]),
        strides=_pair(stride),
        pads=_pair(padding) * 2,
        dilations=_pair(dilation),
        group=groups,
    )


def _silu(builder: GraphBuilder, node: Any, names: dict[Any, str]) -> None:
    source = names[node.args[0]]
    gate = builder.op("Sigmoid", source, name=f"{source}.sigmoid")
    builder.op("Mul", source, gate, name=_output(node, names, f"{source}.silu"))


def _max_pool(builder: GraphBuilder, node: Any, names: dict[Any, str]) -> None:
    kernel = _pair(node.args[1])
    builder.op(
        "MaxPool",
        names[node.args[0]],
        name=_output(node, names),
        kernel_shape=kernel,
        strides=_pair(_arg(node, 2, None) or kernel),
        pads=_pair(_arg(node, 3, 0)) * 2,
    )


def _upsample(builder: GraphBuilder, node: Any, names: dict[Any, str]) -> None:
    source, target = (value.meta["val"].shape[2:] for value in (node.args[0], node))
    factors = [t / s for t, s in zip(target, source, strict=True)]
    scales = builder.floats("upsample.scales." + "x".join(f"{f:g}" for f in factors), [1.0, 1.0, *factors])
    builder.op(
        "Resize",
        names[node.args[0]],
        "",
        scales,
        name=_output(node, names),
        mode="nearest",
        coordinate_transformation_mode="asymmetric",
        nearest_mode="floor",
    )


def _cat(builder: GraphBuilder, node: Any, names: dict[Any, str]) -> None:
    axis = int(_arg(node, 1, 0))
    builder.op("Concat", *(names[value] for value in node.args[0]), name=_output(node, names), axis=axis)


def _slice(builder: GraphBuilder, node: Any, names: dict[Any, str]) -> None:
    axis, start, end, step = (_arg(node, i, d) for i, d in ((1, 0), (2, 0), (3, None), (4, 1)))
    end = np.iinfo(np.int64).max if end is None else end
    window = [builder.ints(f"slice.{value}", [value]) for value in (start or 0, end, axis, step)]
    builder.op("Slice", names[node.args[0]], *window, name=_output(node, names))


def _unary(kind: str, **attributes: float) -> Callable[[GraphBuilder, Any, dict[Any, str]], None]:
    def emit(builder: GraphBuilder, node: Any, names: dict[Any, str]) -> None:
        builder.op(kind, names[node.args[0]], name=_output(node, names), **attributes)

    return emit


def _leaky_relu(builder: GraphBuilder, node: Any, names: dict[Any, str]) -> None:
    slope = float(_arg(node, 1, 0.01))
    builder.op("LeakyRelu", names[node.args[0]], name=_output(node, names), alpha=slope)


def _binary(kind: str) -> Callable[[GraphBuilder, Any, dict[Any, str]], None]:
    def emit(builder: GraphBuilder, node: Any, names: dict[Any, str]) -> None:
        operands = [names[v] if v in names else builder.floats(f"scalar.{float(v)!r}", float(v)) for v in node.args[:2]]
        builder.op(kind, *operands, name=_output(node, names))

    return emit


def _alias(_: GraphBuilder, node: Any, names: dict[Any, str]) -> None:
    names[node] = names[node.args[0]]


OPERATORS: dict[str, Callable[[GraphBuilder, Any, dict[Any, str]], None]] = {
    "conv2d": _conv,
    "silu": _silu,
    "silu_": _silu,
    "max_pool2d": _max_pool,
    "upsample_nearest2d": _upsample,
    "cat": _cat,
    "slice": _slice,
    "leaky_relu": _leaky_relu,
    "leaky_relu_": _leaky_relu,
    "hardswish": _unary("HardSwish"),
    "hardswish_": _unary("HardSwish"),
    "relu": _unary("Relu"),
    "relu_": _unary("Relu"),
    "sigmoid": _unary("Sigmoid"),
    "add": _binary("Add"),
    "add_": _binary("Add"),
    "mul": _binary("Mul"),
    "contiguous": _alias,
    "detach": _alias,
}


def rename_input(network: NetworkGraph, name: str) -> NetworkGraph:
    """The same network reading another tensor."""
    return replace(network, nodes=tuple(_reading(node, {network.input: name}) for node in network.nodes), input=name)


def _reading(node: onnx.NodeProto, renamed: Mapping[str, str]) -> onnx.NodeProto:
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    for index, name in enumerate(node.input):
        copy.input[index] = renamed.get(name, name)
    return copy


def fold_bgr_bytes(network: NetworkGraph) -> NetworkGraph | None:
    """The network with a stem that reads BGR 0..255 instead of RGB 0..1; None when the stem is not one convolution.

    Exact up to rounding: a convolution is linear, and its zero padding is zero in either scale.
    """
    readers = [node for node in network.nodes if network.input in node.input]
    if len(readers) != 1 or readers[0].op_type != "Conv":
        return None
    name = readers[0].input[1]
    if sum(name in node.input for node in network.nodes) != 1 or network.constants[name].shape[1] != 3:
        return None
    folded = (network.constants[name][:, ::-1].astype(np.float64) / 255.0).astype(np.float32)
    return replace(network, constants={**network.constants, name: folded})


def split_detect(network: NetworkGraph, anchors_per_level: int) -> tuple[NetworkGraph, tuple[tuple[str, str], ...]]:
    """Split each detect convolution in two: boxes with objectness (na·5 channels), and classes (na·nc channels).

    The same weights in another order. It saves the copy of the class map (7.7 MB at 640 and 80 classes) that
    slicing objectness out of the joint map costs. Returns the network and the (box, class) map names of each level.
    """
    constants = dict(network.constants)
    nodes: list[onnx.NodeProto] = []
    pairs: dict[str, tuple[str, str]] = {}
    for node in network.nodes:
        if node.output[0] not in network.maps:
            nodes.append(node)
            continue
        weight, bias = (constants.pop(name) for name in node.input[1:3])
        parts = _split_channels(weight, bias, anchors_per_level)
        names = (f"{node.output[0]}.box", f"{node.output[0]}.cls")
        for name, (part_weight, part_bias) in zip(names, parts, strict=True):
            constants[f"{name}.weight"], constants[f"{name}.bias"] = part_weight, part_bias
            nodes.append(_conv_like(node, name))
        pairs[node.output[0]] = names
    split = tuple(pairs[name] for name in network.maps)
    return NetworkGraph(tuple(nodes), constants, network.input, tuple(name for pair in split for name in pair)), split


def _split_channels(weight: np.ndarray, bias: np.ndarray, na: int) -> Sequence[tuple[np.ndarray, np.ndarray]]:
    by_anchor, biases = weight.reshape(na, -1, *weight.shape[1:]), bias.reshape(na, -1)
    return [
        (by_anchor[:, part].reshape(-1, *weight.shape[1:]), biases[:, part].reshape(-1))
        for part in (slice(0, 5), slice(5, None))
    ]


def _conv_like(node: onnx.NodeProto, name: str) -> onnx.NodeProto:
    attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    return helper.make_node("Conv", [node.input[0], f"{name}.weight", f"{name}.bias"], [name], name=name, **attributes)
