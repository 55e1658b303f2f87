"""FP16 for the body only: from the stem to the detect convolutions.

Preprocessing, decode and NMS stay FP32: an FP16 decode alone moves boxes by 0.23 px at 640. One cast enters the
body and one leaves each detect convolution.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from compress.graph.metadata import opset_of
from compress.graph.parts import GraphParts, sort_topologically
from compress.graph.ranges import body_model, measured
from runtime.errors import EdgestillError

FP16_MAX = float(np.finfo(np.float16).max)
_NOT_CAST = ("QuantizeLinear", "Shape", "Constant")


def body_to_fp16(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of `model` whose body computes in FP16; its inputs and outputs keep their types.

    Raises `EdgestillError` when the graph has no convolution or a weight is beyond FP16's 65504.
    """
    result = onnx.ModelProto()
    result.CopyFrom(model)
    _raise_opset_for_quantised(result)
    parts = GraphParts(result.graph)
    if not parts.convs:
        raise EdgestillError("the graph has no convolution to convert to FP16", "Give an exported YOLOv5 graph")
    body = parts.body
    _convert_constants(result.graph, parts, body)
    casts = [*_casts_in(parts, body), *_casts_out(result.graph, parts, body)]
    result.graph.node.extend(casts)
    sort_topologically(result.graph)
    del result.graph.value_info[:]
    onnx.checker.check_model(result, full_check=True)
    return result


def with_half_input(model: onnx.ModelProto) -> onnx.ModelProto:
    """As `body_to_fp16`, with an input of float16: what `--half` means to YOLOv5's tools. Nodes before the body read
    it as float32.

    Rows stay float32: float16 holds no steps finer than half a pixel above 512.
    """
    result = body_to_fp16(model)
    source = result.graph.input[0]
    casts = [node for node in result.graph.node if node.op_type == "Cast" and node.input[0] == source.name]
    for cast in casts:
        result.graph.node.remove(cast)
    float32 = f"{source.name}.to_fp32"
    reads = {source.name: float32, **{cast.output[0]: source.name for cast in casts}}
    for node in result.graph.node:
        node.input[:] = [reads.get(name, name) for name in node.input]
    if any(float32 in node.input for node in result.graph.node):  # the slices of a Focus are before the body
        widen = helper.make_node("Cast", [source.name], [float32], name=float32, to=TensorProto.FLOAT)
        result.graph.node.insert(0, widen)
    source.type.tensor_type.elem_type = TensorProto.FLOAT16
    onnx.checker.check_model(result, full_check=True)
    return result


def overflow(model: onnx.ModelProto, canvases: Iterable[np.ndarray]) -> str:
    """The activation of the FP32 `model` that FP16 cannot hold, and its value, as text; empty when all fit.

    Measured in FP32: ONNX Runtime computes FP16 graphs on a CPU in FP32, where nothing overflows. `canvases` are what
    the graph's input takes.
    """
    peaks = {name: observed.peak for name, observed in measured(body_model(model), canvases).items()}
    worst = max(peaks, key=lambda name: peaks[name])
    if peaks[worst] <= FP16_MAX:
        return ""
    return f"{worst!r} reaches {peaks[worst]:.3g}, and FP16 overflows above {FP16_MAX:g}"


def _raise_opset_for_quantised(model: onnx.ModelProto) -> None:
    """FP16 scales of QuantizeLinear need opset 19."""
    quantised = any(node.op_type == "QuantizeLinear" for node in model.graph.node)
    if quantised and opset_of(model) < 19:
        model.CopyFrom(onnx.version_converter.convert_version(model, 19))


def _is_resize_setting(node: onnx.NodeProto, position: int) -> bool:
    """ONNX allows no FP16 for the region, scales and sizes of Resize."""
    return node.op_type == "Resize" and position > 0


def _convert_constants(graph: onnx.GraphProto, parts: GraphParts, body: frozenset[int]) -> None:
    tensors = {tensor.name: tensor for tensor in graph.initializer if tensor.data_type == TensorProto.FLOAT}
    outputs = {value.name for value in graph.output}
    for name, tensor in tensors.items():
        readers = parts.consumers.get(name, [])
        wanted = [(parts.nodes[i], at) for i in readers if i in body for at in _positions(parts.nodes[i], name)]
        if not wanted:
            continue
        shared = len(wanted) < sum(list(parts.nodes[i].input).count(name) for i in readers)
        half = _to_half(tensor, f"{name}.fp16" if shared or name in outputs else name)
        if half.name == name:
            tensor.CopyFrom(half)
            continue
        graph.initializer.append(half)
        for node, at in wanted:
            node.input[at] = half.name
    for i in body:
        _convert_constant_node(parts.nodes[i])


def _positions(node: onnx.NodeProto, name: str) -> list[int]:
    return [at for at, value in enumerate(node.input) if value == name and not _is_resize_setting(node, at)]


def _convert_constant_node(node: onnx.NodeProto) -> None:
    for attribute in node.attribute if node.op_type == "Constant" else ():
        if attribute.name == "value" and attribute.t.data_type == TensorProto.FLOAT:
            attribute.t.CopyFrom(_to_half(attribute.t, attribute.t.name))


def _to_half(tensor: onnx.TensorProto, name: str) -> onnx.TensorProto:
    values = numpy_helper.to_array(tensor)
    if values.size and np.abs(values).max() > FP16_MAX:
        raise EdgestillError(
            f"{tensor.name!r} holds {np.abs(values).max():.3g}, beyond FP16's {FP16_MAX:g}",
            "Leave fp16 out of the flavours",
        )
    return numpy_helper.from_array(values.astype(np.float16), name)


def _casts_in(parts: GraphParts, body: frozenset[int]) -> list[onnx.NodeProto]:
    """One cast for each tensor that enters the body; all its readers in the body then read the cast."""
    entering: dict[str, list[tuple[onnx.NodeProto, int]]] = {}
    for i in sorted(body):
        node = parts.nodes[i]
        for at, name in enumerate(node.input):
            if name and _enters(parts, body, node, at, name):
                entering.setdefault(name, []).append((node, at))
    casts = []
    for name, readers in entering.items():
        half = f"{name}.to_fp16"
        casts.append(helper.make_node("Cast", [name], [half], name=half, to=TensorProto.FLOAT16))
        for node, at in readers:
            node.input[at] = half
    return casts


def _enters(parts: GraphParts, body: frozenset[int], node: onnx.NodeProto, at: int, name: str) -> bool:
    if name in parts.initializers or name.endswith(".fp16") or _is_resize_setting(node, at):
        return False
    if name not in parts.producer:
        return True
    maker = parts.producer[name]
    return maker not in body and parts.nodes[maker].op_type not in ("Constant", "Shape", "Gather", "QuantizeLinear")


def _casts_out(graph: onnx.GraphProto, parts: GraphParts, body: frozenset[int]) -> list[onnx.NodeProto]:
    """One cast for each body tensor that is read outside, or that is an output of the graph."""
    published = {value.name for value in graph.output}
    casts = []
    for i in sorted(body):
        node = parts.nodes[i]
        for at, name in enumerate(node.output):
            outside = [j for j in parts.consumers.get(name, ()) if j not in body]
            if node.op_type in _NOT_CAST or not (outside or name in published):
                continue
            casts.append(_cast_out(parts, body, node, at, outside, name in published))
    return casts


def _cast_out(
    parts: GraphParts, body: frozenset[int], node: onnx.NodeProto, at: int, outside: list[int], published: bool
) -> onnx.NodeProto:
    """The cast of one tensor to FP32. A graph output keeps its name, so there the tensor of the body is renamed."""
    name = node.output[at]
    half, full = (f"{name}.fp16_value", name) if published else (name, f"{name}.to_fp32")
    readers = [j for j in parts.consumers.get(name, ()) if j in body] if published else outside
    for j in readers:
        for position, value in enumerate(parts.nodes[j].input):
            if value == name:
                parts.nodes[j].input[position] = half if published else full
    node.output[at] = half
    return helper.make_node("Cast", [half], [full], name=f"{name}.to_fp32", to=TensorProto.FLOAT)
