from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from compress.flavours import FLAVOURS
from compress.graph.assemble import boxes_graph
from compress.graph.network import trace
from compress.graph.nms import NmsShape
from compress.graph.parts import GraphParts, op_counts
from compress.graph.placement import ACTIVATIONS, Placement, layers, place
from compress.graph.qdq import nudged, quantised
from compress.graph.ranges import calibrate
from compress.graph.session import open_session
from compress.graph.untrusted_onnx import problems
from compress.models import Architecture, YOLOv5
from compress.schemes import SCHEMES, seven_bit_weights
from compress.stages.export import SHIPPED_OPSETS, RawMaps, head_shape

INT8 = [name for name, flavour in FLAVOURS.items() if flavour.scheme]
QDQ = ("QuantizeLinear", "DequantizeLinear")


@pytest.fixture(scope="module")
def canvases():
    return [np.random.default_rng(seed).integers(0, 256, (1, 160, 160, 3), dtype=np.uint8) for seed in range(3)]


@pytest.fixture(scope="module")
def ranges(case, canvases):
    return calibrate(case.boxes(), canvases, "minmax")


@pytest.fixture(scope="module")
def flavours(case, ranges):
    return {name: FLAVOURS[name].make(case.boxes(), ranges) for name in INT8}


def arrays_of(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def maker(parts: GraphParts, name: str) -> onnx.NodeProto:
    return parts.nodes[parts.producer[name]]


def body_convs(parts: GraphParts, name: str) -> list[onnx.NodeProto]:
    """The convolutions that the flavour quantises."""
    return [parts.nodes[i] for i in layers_of(parts, name)]


def layers_of(parts: GraphParts, name: str) -> list[int]:
    stem = parts.convs[:1] if FLAVOURS[name].scheme.float_stem else ()
    return [i for i in parts.convs if i not in (*parts.detect_convs, *stem)]


@pytest.mark.parametrize("name", INT8)
def test_scores_survive_quantisation(case, canvases, flavours, name):
    full, integers = (open_session(m).run(None, {"canvas": canvases[0]})[0] for m in (case.boxes(), flavours[name]))
    assert integers[0, 0, 4] > 0.5
    assert abs(full[0, 0, 4] - integers[0, 0, 4]) < 0.1


@pytest.mark.parametrize("opset", SHIPPED_OPSETS)
@pytest.mark.parametrize("name", INT8)
def test_onnx_runtime_loads_every_form_in_the_opsets_that_are_shipped(case, ranges, canvases, name, opset):
    model = FLAVOURS[name].make(case.boxes(opset=opset), ranges)
    for as_written in (True, False):
        assert open_session(model, as_written=as_written).run(None, {"canvas": canvases[0]})[0][0, 0, 4] > 0.5


@pytest.mark.parametrize("name", INT8)
def test_detect_decode_nms_and_preprocessing_hold_no_quantised_tensor(flavours, name):
    parts = GraphParts(flavours[name].graph)
    assert not [parts.nodes[i].name for i in parts.postprocessing if parts.nodes[i].op_type in QDQ]
    assert {parts.nodes[i].input[1] for i in parts.detect_convs} <= parts.initializers


@pytest.mark.parametrize("name", INT8)
def test_every_other_convolution_reads_one_quantised_input_and_quantised_weights(flavours, name):
    parts = GraphParts(flavours[name].graph)
    for conv in body_convs(parts, name):
        assert [maker(parts, value).op_type for value in conv.input[:2]] == ["DequantizeLinear"] * 2
        assert maker(parts, conv.input[1]).attribute[0].i == 0


@pytest.mark.parametrize("name", INT8)
def test_every_tensor_has_one_scale(flavours, name):
    graph = flavours[name].graph
    sources = [node.input[0] for node in graph.node if node.op_type == "QuantizeLinear"]
    assert len(sources) == len(set(sources))


@pytest.mark.parametrize("name", ["int8-trt", "int8-openvino"])
def test_nothing_is_quantised_between_a_convolution_and_its_activation(flavours, name):
    parts = GraphParts(flavours[name].graph)
    for i in parts.convs:
        readers = [parts.nodes[j].op_type for j in parts.after(i)]
        assert set(readers) <= {*ACTIVATIONS, "Add", "Cast", "Reshape", "Transpose"}, readers


@pytest.mark.parametrize("name", ["int8-trt", "int8-openvino"])
def test_additions_pools_and_resizes_read_quantised_tensors_and_concats_do_not(flavours, name):
    parts = GraphParts(flavours[name].graph)
    body = [node for i, node in enumerate(parts.nodes) if i not in parts.postprocessing | parts.preprocessing]
    for node in body:
        sources = [maker(parts, value).op_type for value in node.input if value in parts.producer]
        if node.op_type in ("Add", "MaxPool", "Resize"):
            assert set(sources) == {"DequantizeLinear"}, node.name
        if node.op_type == "Concat":
            assert "DequantizeLinear" not in sources, node.name


@pytest.mark.parametrize("name", INT8)
def test_a_pool_and_a_resize_give_their_input_s_scale_on(case, flavours, name):
    parts = GraphParts(case.boxes().graph)
    placement = place(parts, FLAVOURS[name].scheme)
    for node in (node for node in parts.nodes if node.op_type in ("MaxPool", "Resize")):
        if node.output[0] in placement.readers:
            assert placement.ranged_by[node.output[0]] == placement.ranged_by[node.input[0]]


@pytest.mark.parametrize("float_layers", [(), ("17.cv3",)])
@pytest.mark.parametrize("activation", ["SiLU", "LeakyReLU"])
def test_detect_convolutions_read_floats_that_integer_convolutions_made(activation, float_layers):
    torch.manual_seed(0)
    network = YOLOv5(Architecture.of_scale("p", ("bolt", "nut"), activation=activation)).eval()
    traced = trace(RawMaps(network.fuse()), (64, 64))
    model = boxes_graph(traced, head_shape(network, (64, 64)), NmsShape(0.6, 50, 50, 4), opset=19, metadata={})
    parts = GraphParts(model.graph)
    placement = place(parts, SCHEMES["onnxruntime"], float_layers)
    read = {reader for readers in placement.readers.values() for reader, _ in readers}
    assert not read & set(parts.detect_convs)
    ends = {parts.nodes[i].input[0] for i in parts.detect_convs}
    assert len(ends & set(placement.readers)) == 2, "what goes down the neck is quantised for its convolutions"
    chosen = [
        node.output[0] for node in parts.nodes if node.name.endswith(("17.cv3.conv", "20.cv3.conv", "23.cv3.conv"))
    ]
    assert len(set(chosen) & set(placement.readers)) == 3 - len(float_layers)


def test_the_tensorrt_flavour_is_symmetric_signed_per_channel_with_float_bias_and_a_half_body(flavours):
    graph = flavours["int8-trt"].graph
    arrays = arrays_of(flavours["int8-trt"])
    zeros = [arrays[node.input[2]] for node in graph.node if node.op_type in QDQ]
    assert all(zero.dtype == np.int8 and not zero.any() for zero in zeros)
    assert "int32" not in {str(array.dtype) for array in arrays.values()}
    parts = GraphParts(graph)
    conv = parts.nodes[parts.convs[1]]
    scales = arrays[maker(parts, conv.input[1]).input[1]]
    assert (scales.dtype, scales.shape) == (np.float16, (arrays[conv.input[2]].shape[0],))
    assert scales.min() >= np.finfo(np.float16).tiny
    assert parts.nodes[0].op_type == "Cast"


def test_its_integers_agree_with_the_scales_that_the_file_holds(case, flavours):
    exact, arrays, parts = (
        arrays_of(case.boxes()),
        arrays_of(flavours["int8-trt"]),
        GraphParts(flavours["int8-trt"].graph),
    )
    for conv in body_convs(parts, "int8-trt"):
        stored, scale, _ = maker(parts, conv.input[1]).input
        step = arrays[scale].astype(np.float32).reshape(-1, 1, 1, 1)
        error = np.abs(arrays[stored] * step - exact[stored.removesuffix(".quantised")])
        assert (error <= 0.5001 * step).mean() > 0.99  # rounding of the largest weight's scale to FP16 may cut it off


@pytest.mark.parametrize("name", ["int8-openvino", "int8-ort"])
def test_flavours_for_x86_have_unsigned_activations(flavours, name):
    graph, arrays = flavours[name].graph, arrays_of(flavours[name])
    assert {str(arrays[node.input[2]].dtype) for node in graph.node if node.op_type == "QuantizeLinear"} == {"uint8"}


@pytest.mark.parametrize("name", ["openvino", "onnxruntime"])
def test_seven_bit_weights_sum_two_products_in_16_bits_without_cutting_them_off(case, ranges, name):
    """As the kernels of x86 CPUs without VNNI do it."""
    model = quantised(case.boxes(), ranges, seven_bit_weights(SCHEMES[name]))
    parts, arrays = GraphParts(model.graph), arrays_of(model)
    convs = [parts.nodes[i] for i in parts.convs if i not in parts.detect_convs]
    weights = [arrays[maker(parts, conv.input[1]).input[0]].astype(np.int64) for conv in convs]
    assert max(np.abs(weight).max() for weight in weights) * 2 * 255 <= np.iinfo(np.int16).max
    assert max(np.abs(weight).max() for weight in weights) > 60


def test_signed_activations_need_no_seven_bit_weights():
    assert seven_bit_weights(SCHEMES["tensorrt"]) == SCHEMES["tensorrt"]


def test_the_ort_flavour_runs_every_body_convolution_as_an_integer_kernel(flavours, tmp_path):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.log_severity_level = 3
    model = flavours["int8-ort"]
    onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    counts = op_counts(onnx.load(tmp_path / "optimised.onnx").graph)
    assert counts["QLinearConv"] == len(layers_of(GraphParts(model.graph), "int8-ort"))


def test_a_stem_over_blocks_of_pixels_gives_the_same_bits(case, canvases, ranges):
    plain, blocks = (
        quantised(case.boxes(), ranges, replace(SCHEMES["onnxruntime"], space_to_depth=rewritten))
        for rewritten in (False, True)
    )
    parts = GraphParts(blocks.graph)
    stem = parts.nodes[parts.convs[0]]
    assert arrays_of(blocks)[maker(parts, stem.input[1]).input[0]].shape == (8, 12, 3, 3)
    for canvas in canvases:
        a, b = (open_session(model).run(None, {"canvas": canvas})[0] for model in (plain, blocks))
        np.testing.assert_array_equal(a, b)


def test_a_frame_that_needs_no_letterbox_goes_into_blocks_too(case, ranges, canvases):
    whole, framed = (
        quantised(model, ranges, SCHEMES["onnxruntime"]) for model in (case.boxes(), case.boxes(frame_hw=(160, 160)))
    )
    a = open_session(whole).run(None, {"canvas": canvases[0]})[0]
    b = open_session(framed).run(None, {"frame": canvases[0]})[0]
    np.testing.assert_array_equal(a[..., 4], b[..., 4])


def test_a_stem_with_signed_bytes_stays_as_it_is(case, ranges):
    signed = quantised(case.boxes(), ranges, replace(SCHEMES["onnxruntime"], unsigned=False))
    parts = GraphParts(signed.graph)
    assert parts.nodes[parts.convs[0]].input[0] == "canvas.nchw.dequantised"


def test_a_stem_behind_a_letterbox_stays_as_it_is(case, ranges):
    model = case.boxes(frame_hw=(120, 200))
    found = calibrate(model, [np.zeros((1, 120, 200, 3), np.uint8)], "minmax")
    stem = GraphParts(quantised(model, found, SCHEMES["onnxruntime"]).graph)
    assert list(next(a.ints for a in stem.nodes[stem.convs[0]].attribute if a.name == "kernel_shape")) == [6, 6]


@pytest.mark.parametrize("name", INT8)
def test_a_layer_in_float_reads_and_multiplies_floats(case, ranges, name):
    known = list(layers(GraphParts(case.boxes().graph), FLAVOURS[name].scheme))
    whole, less = (FLAVOURS[name].make(case.boxes(), ranges, float_layers=some) for some in ((), known[1:2]))
    parts = GraphParts(less.graph)
    conv = next(node for node in parts.nodes if node.name == known[1])
    assert maker(parts, conv.input[0]).op_type != "DequantizeLinear"
    assert conv.input[1] in parts.initializers
    assert op_counts(less.graph)["QuantizeLinear"] < op_counts(whole.graph)["QuantizeLinear"]


@pytest.mark.parametrize("name", INT8)
def test_draws_differ_in_one_scale_alone(case, ranges, name):
    first, second = (arrays_of(FLAVOURS[name].make(case.boxes(), ranges, draw=draw)) for draw in (0, 1))
    changed = [key for key in first if not np.array_equal(first[key], second[key])]
    scales = [key for key in changed if first[key].dtype != np.int32 and first[key].ndim == 0]
    assert len(scales) == 1, changed
    assert first[scales[0]] != second[scales[0]]
    assert abs(float(second[scales[0]] / first[scales[0]]) - 1) < 2e-3


def test_draws_lie_on_both_sides_of_the_file():
    assert [nudged(1.0, draw, 0.5) for draw in range(5)] == [1.0, 1.5, 0.5, 2.0, 0.0]


@pytest.mark.parametrize("name", INT8)
def test_only_the_default_domain_is_imported_and_every_operator_is_allowed(flavours, name):
    assert [entry.domain for entry in flavours[name].opset_import] == [""]
    assert not list(problems(flavours[name]))


@pytest.mark.parametrize("name", INT8)
def test_the_same_ranges_give_the_same_bytes(case, ranges, flavours, name):
    again = FLAVOURS[name].make(case.boxes(), ranges)
    assert again.SerializeToString(deterministic=True) == flavours[name].SerializeToString(deterministic=True)


@pytest.mark.parametrize("name", INT8)
def test_one_layer_alone_is_what_a_layer_in_float_leaves_out(case, name):
    """Its own input, weights and inner tensors; its output is the input of the next."""
    parts, scheme = GraphParts(case.boxes().graph), FLAVOURS[name].scheme
    whole = place(parts, scheme)
    for layer, conv in layers(parts, scheme).items():
        alone, less = place(parts, scheme, only=layer), place(parts, scheme, [layer])
        assert alone.convs == (conv,)
        assert set(whole.convs) - set(less.convs) == {conv}
        gone = pairs(whole) - pairs(less)
        assert pairs(alone) <= gone
        assert {reader for _, (reader, _) in gone - pairs(alone)} <= set(parts.detect_convs)


def pairs(placement: Placement) -> set[tuple[str, tuple[int, int]]]:
    """(Tensor, its reader) of everything that is read dequantised."""
    return {(tensor, reader) for tensor, readers in placement.readers.items() for reader in readers}
