from __future__ import annotations

import math

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from compress.graph.parts import GraphParts
from compress.graph.placement import layer_name, layers
from compress.graph.ranges import calibrate
from compress.graph.sensitivity import LayerError, rank_layers, remaining_error, squared_error
from compress.schemes import SCHEMES


@pytest.fixture(scope="module")
def canvases():
    return [np.random.default_rng(seed).integers(0, 256, (1, 160, 160, 3), dtype=np.uint8) for seed in range(2)]


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=list(SCHEMES))
def test_every_quantised_layer_is_ranked_once_worst_first(case, canvases, scheme):
    model = case.boxes()
    ranked = rank_layers(model, calibrate(model, canvases, "minmax"), scheme, canvases)
    assert {layer.name for layer in ranked} == set(layers(GraphParts(model.graph), scheme))
    errors = [layer.error for layer in ranked]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] > 0


def test_a_layer_with_an_outlier_among_its_weights_is_the_worst(case, canvases):
    model = onnx.ModelProto.FromString(case.boxes().SerializeToString())
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == "down.1.weight")
    weights = numpy_helper.to_array(tensor).copy()
    weights[:, 0, 0, 0] = 20 * np.abs(weights).max()
    tensor.CopyFrom(numpy_helper.from_array(weights, tensor.name))
    ranked = rank_layers(model, calibrate(model, canvases, "minmax"), SCHEMES["openvino"], canvases)
    assert ranked[0].name == "down.1"


def test_errors_add_up_in_squares_without_the_layers_in_float():
    ranked = (LayerError("a", 3.0), LayerError("b", 4.0), LayerError("c", 12.0))
    assert remaining_error(ranked, ()) == 13.0
    assert remaining_error(ranked, ("c",)) == 5.0


def test_equal_maps_have_no_error_and_cells_count_by_their_objectness():
    boxes, classes = np.zeros((1, 5, 1, 2), np.float32), np.zeros((1, 3, 1, 2), np.float32)
    boxes[0, 4] = [[-20.0, 20.0]]  # background, object
    assert squared_error([boxes, classes], [boxes, classes]) == 0
    in_background, in_object = boxes.copy(), boxes.copy()
    in_background[0, 0, 0, 0] = in_object[0, 0, 0, 1] = 1.0
    assert squared_error([boxes, classes], [in_background, classes]) < 1e-6
    assert math.isclose(squared_error([boxes, classes], [in_object, classes]), 0.1, rel_tol=1e-6)


def test_names_are_those_of_the_network_s_layers():
    assert layer_name("network.model.2.cv1.conv") == "2.cv1"
