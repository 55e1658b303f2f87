from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from compress.graph.fp16 import body_to_fp16, with_half_input
from compress.graph.network import trace
from compress.graph.parts import GraphParts, op_counts, sort_topologically
from compress.graph.qdq import quantised
from compress.graph.ranges import calibrate
from compress.graph.session import open_session
from compress.models.blocks import Focus
from compress.schemes import SCHEMES
from runtime.errors import EdgestillError


def run(model: onnx.ModelProto, source: np.ndarray, optimise: bool = True) -> np.ndarray:
    return open_session(model, optimise=optimise).run(None, {model.graph.input[0].name: source})[0]


def casts(model: onnx.ModelProto) -> int:
    return op_counts(model.graph)["Cast"]


def test_one_cast_enters_and_one_leaves_each_detect_convolution(case):
    for model, convs in ((case.conventional(), 3), (case.boxes(), 6)):
        assert len(GraphParts(model.graph).detect_convs) == convs
        assert casts(body_to_fp16(model)) - casts(model) == 1 + convs


def test_body_is_half_decode_is_single_and_io_is_kept(case):
    half = body_to_fp16(case.boxes())
    types = {v.name: v.type.tensor_type.elem_type for v in onnx.shape_inference.infer_shapes(half).graph.value_info}
    parts = GraphParts(half.graph)
    assert all(types[parts.nodes[i].output[0]] == TensorProto.FLOAT16 for i in parts.convs)
    assert types["candidates.low"] == types["candidates.score"] == types["nms.0.bound"] == TensorProto.FLOAT
    assert half.graph.input[0].type.tensor_type.elem_type == TensorProto.UINT8
    assert half.graph.output[0].type.tensor_type.elem_type == TensorProto.FLOAT


def test_scores_stay_near_and_the_file_shrinks(case, canvas):
    full, half = case.boxes(), body_to_fp16(case.boxes())
    assert abs(run(full, canvas)[0, 0, 4] - run(half, canvas)[0, 0, 4]) < 0.01
    weights = [
        sum(numpy_helper.to_array(t).nbytes for t in m.graph.initializer if ".weight" in t.name) for m in (full, half)
    ]
    assert weights[1] * 2 == weights[0]


def test_a_body_tensor_that_is_a_graph_output_keeps_its_name_and_type(case, canvas):
    model = case.boxes()
    name = "stem.silu"
    model.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 8, 80, 80]))
    half = body_to_fp16(model)
    value = open_session(half).run([name], {"canvas": canvas})[0]
    assert value.dtype == np.float32
    np.testing.assert_allclose(value, open_session(model).run([name], {"canvas": canvas})[0], atol=0.02)


def test_a_constant_shared_with_the_decode_is_copied(case, canvas):
    model = case.boxes()
    scale = next(node for node in model.graph.node if node.op_type == "Mul" and "mul" in node.name)
    shared = next(name for name in scale.input if name.startswith("scalar"))
    next(node for node in model.graph.node if node.name == "decode.half").input[1] = shared
    half = body_to_fp16(model)
    kinds = {tensor.name: tensor.data_type for tensor in half.graph.initializer}
    assert (kinds[shared], kinds[f"{shared}.fp16"]) == (TensorProto.FLOAT, TensorProto.FLOAT16)
    assert run(half, canvas).shape == (1, 300, 6)


@pytest.mark.parametrize("pairs_on_weights", [False, True], ids=["stored integers", "Q and DQ on float weights"])
def test_quantised_bodies_become_half_with_no_cast_on_the_weights(case, canvas, pairs_on_weights):
    model = case.boxes()
    scheme = replace(SCHEMES["tensorrt"], half_body=False, float_stem=False)
    integers = quantised(model, calibrate(model, [canvas], "minmax"), scheme)
    if pairs_on_weights:
        quantise_float_weights(integers)
    half = body_to_fp16(integers)
    assert casts(half) - casts(integers) == 7
    entering = next(node for node in half.graph.node if node.name == "canvas.nchw.to_fp16")
    assert [n.op_type for n in half.graph.node if entering.output[0] in n.input] == ["QuantizeLinear"]
    a, b = (run(m, canvas, optimise=False) for m in (integers, half))
    assert abs(a[0, 0, 4] - b[0, 0, 4]) < 0.01


def test_a_half_input_is_read_as_float_by_the_slices_of_a_focus(case, make, canvas):
    network = make().network
    network.stem = Focus(3, 8, nn.SiLU)
    network.stem.conv = nn.Conv2d(12, 8, 3, padding=1)
    focused = replace(case, network=network, traced=trace(network.eval(), case.head.size_hw)).conventional()
    images = canvas.transpose(0, 3, 1, 2).astype(np.float32) / 255
    half = with_half_input(focused)
    assert half.graph.input[0].type.tensor_type.elem_type == TensorProto.FLOAT16
    assert casts(half) == casts(body_to_fp16(focused)) + 1
    np.testing.assert_allclose(run(half, images.astype(np.float16))[..., 4:], run(focused, images)[..., 4:], atol=0.05)


def test_the_stem_reads_a_half_input_without_a_cast(case):
    model = case.conventional()
    assert casts(with_half_input(model)) == casts(body_to_fp16(model)) - 1


def quantise_float_weights(model: onnx.ModelProto) -> None:
    """Store float weights with a Q before their DQ, as other tools write them."""
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    for node in [node for node in model.graph.node if node.input[0] in arrays and node.op_type == "DequantizeLinear"]:
        stored, scale, zero = node.input
        factors = arrays[scale].reshape(-1, *[1] * (arrays[stored].ndim - 1))
        name = f"{stored}.float"
        model.graph.initializer.append(numpy_helper.from_array((arrays[stored] * factors).astype(np.float32), name))
        quantise = helper.make_node("QuantizeLinear", [name, scale, zero], [f"{name}.q"], name=f"{name}.q", axis=0)
        model.graph.node.append(quantise)
        node.input[0] = f"{name}.q"
    sort_topologically(model.graph)


def test_a_weight_beyond_fp16_is_refused(case):
    model = case.boxes()
    weight = next(tensor for tensor in model.graph.initializer if tensor.name == "mix.weight")
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * np.float32(1e7), weight.name))
    with pytest.raises(EdgestillError, match="beyond FP16"):
        body_to_fp16(model)


def test_a_graph_without_convolutions_is_refused():
    node = helper.make_node("Relu", ["x"], ["y"])
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("x", "y")]
    with pytest.raises(EdgestillError, match="no convolution"):
        body_to_fp16(helper.make_model(helper.make_graph([node], "g", values[:1], values[1:])))


def test_sorting_restores_any_order(case):
    model = case.boxes()
    nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes[::-1])
    sort_topologically(model.graph)
    onnx.checker.check_model(model, full_check=True)
