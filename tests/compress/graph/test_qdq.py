from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from compress.flavours import FLAVOURS
from compress.graph.calibration import METHODS, calibrate
from compress.graph.parts import GraphParts, op_counts, strip_unused_opsets
from compress.graph.session import open_session
from compress.graph.untrusted_onnx import problems
from runtime.errors import EdgestillError

INT8 = [name for name, flavour in FLAVOURS.items() if flavour.calibrated]
QDQ = ("QuantizeLinear", "DequantizeLinear")


@pytest.fixture(scope="module")
def canvases():
    return [np.random.default_rng(seed).integers(0, 256, (1, 160, 160, 3), dtype=np.uint8) for seed in range(3)]


@pytest.fixture(scope="module")
def flavours(case, canvases):
    ranges = calibrate(case.boxes(), canvases, "minmax")
    return {name: FLAVOURS[name].make(case.boxes(), ranges) for name in INT8}


@pytest.mark.parametrize("name", INT8)
def test_scores_survive_quantisation(case, canvases, flavours, name):
    full, integers = (open_session(m).run(None, {"canvas": canvases[0]})[0] for m in (case.boxes(), flavours[name]))
    assert integers[0, 0, 4] > 0.5
    assert abs(full[0, 0, 4] - integers[0, 0, 4]) < 0.1


@pytest.mark.parametrize("name", INT8)
def test_detect_decode_nms_and_preprocessing_hold_no_quantised_tensor(flavours, name):
    parts = GraphParts(flavours[name].graph)
    assert not [parts.nodes[i].name for i in parts.postprocessing if parts.nodes[i].op_type in QDQ]
    weights = {parts.nodes[i].input[1] for i in parts.detect_convs}
    assert weights <= parts.initializers
    assert flavours[name].graph.node[0].op_type == "Cast"


@pytest.mark.parametrize("name", INT8)
def test_every_other_convolution_reads_quantised_weights(flavours, name):
    parts = GraphParts(flavours[name].graph)
    for conv in set(parts.convs) - set(parts.detect_convs):
        assert parts.nodes[parts.producer[parts.nodes[conv].input[1]]].op_type == "DequantizeLinear"


def test_tensorrt_flavour_is_symmetric_signed_per_channel_with_float_bias(flavours):
    graph = flavours["int8-trt"].graph
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    zeros = [arrays[node.input[2]] for node in graph.node if node.op_type in QDQ]
    assert all(zero.dtype == np.int8 and not zero.any() for zero in zeros)
    assert "int32" not in {str(array.dtype) for array in arrays.values()}
    parts = GraphParts(graph)
    conv = parts.nodes[parts.convs[1]]
    scales = arrays[parts.nodes[parts.producer[conv.input[1]]].input[1]]
    assert scales.shape == (arrays[conv.input[2]].shape[0],)


def test_cpu_flavour_has_unsigned_activations(flavours):
    graph = flavours["int8-cpu"].graph
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    assert {str(arrays[node.input[2]].dtype) for node in graph.node if node.op_type == "QuantizeLinear"} == {"uint8"}


@pytest.mark.parametrize("name", INT8)
def test_only_the_default_domain_is_imported_and_every_operator_is_allowed(flavours, name):
    assert [entry.domain for entry in flavours[name].opset_import] == [""]
    assert not list(problems(flavours[name]))


@pytest.mark.parametrize("method", METHODS)
def test_every_method_calibrates_one_image_at_a_time(case, canvases, method):
    alive: list[int] = []

    def stream():
        for index, canvas in enumerate(canvases):
            alive.append(index)
            yield canvas

    ranges = calibrate(case.boxes(), stream(), method)
    assert alive == [0, 1, 2]
    low, high = ranges["canvas.nchw"].range_value
    assert -256 <= low <= 0.5
    assert 200 < high <= 256


def test_ranges_cover_all_images_not_the_last(case):
    dark, bright = (np.full((1, 160, 160, 3), value, np.uint8) for value in (10, 250))
    low, high = calibrate(case.boxes(), [bright, dark], "minmax")["canvas.nchw"].range_value
    assert (np.squeeze(low), np.squeeze(high)) == (10.0, 250.0)


def test_no_images_is_one_line(case):
    with pytest.raises(EdgestillError, match="no images to calibrate"):
        calibrate(case.boxes(), [], "minmax")


def test_unused_opsets_are_stripped_and_used_ones_kept(case):
    model = case.boxes()
    model.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
    strip_unused_opsets(model)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 19)]


def test_nothing_is_printed(case, canvases, capfd):
    calibrate(case.boxes(), canvases[:1], "percentile")
    assert capfd.readouterr().out == ""


def test_operator_counts_are_those_of_the_body(case, flavours):
    body = len(GraphParts(case.boxes().graph).convs) - 6
    counts = op_counts(flavours["int8-trt"].graph)
    assert counts["DequantizeLinear"] >= 2 * body
