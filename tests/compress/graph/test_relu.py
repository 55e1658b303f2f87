"""A student with ReLU: an integer convolution clips by itself, so its INT8 files compute no activation at all."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from compress.flavours import FLAVOURS
from compress.graph.assemble import boxes_graph
from compress.graph.network import trace
from compress.graph.nms import NmsShape
from compress.graph.parts import GraphParts
from compress.graph.ranges import calibrate
from compress.models import Architecture, YOLOv5
from compress.stages.export import RawMaps, head_shape

INT8 = [name for name, flavour in FLAVOURS.items() if flavour.scheme]
SIZE_HW = (64, 64)


@pytest.fixture(scope="module")
def files() -> dict[str, onnx.ModelProto]:
    """Every INT8 flavour of one student, by its name."""
    torch.manual_seed(0)
    network = YOLOv5(Architecture.of_scale("p", ("bolt", "nut"), activation="ReLU")).eval()
    traced = trace(RawMaps(network.fuse()), SIZE_HW)
    model = boxes_graph(traced, head_shape(network, SIZE_HW), NmsShape(0.6, 50, 50, 4), opset=19, metadata={})
    canvas = np.random.default_rng(0).integers(0, 256, (1, *SIZE_HW, 3), dtype=np.uint8)
    ranges = calibrate(model, [canvas], "minmax")
    return {name: FLAVOURS[name].make(model, ranges) for name in INT8}


def activated(parts: GraphParts) -> list[int]:
    """The convolutions that have an activation."""
    return [conv for conv in parts.convs if conv not in parts.detect_convs]


@pytest.mark.parametrize("name", INT8)
def test_nothing_lies_between_a_convolution_and_its_clip(files: dict[str, onnx.ModelProto], name: str) -> None:
    parts = GraphParts(files[name].graph)
    assert len(activated(parts)) == 57
    for conv in activated(parts):
        (after,) = parts.after(conv)
        assert parts.nodes[after].op_type == "Relu"


def test_onnx_runtime_computes_integer_convolutions_and_no_activation(
    files: dict[str, onnx.ModelProto], tmp_path: Path
) -> None:
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(tmp_path / "ran.onnx"), 3
    options.intra_op_num_threads = 1
    onnxruntime.InferenceSession(files["int8-ort"].SerializeToString(), options, providers=["CPUExecutionProvider"])
    parts = GraphParts(onnx.load(tmp_path / "ran.onnx").graph)
    body = [node for index, node in enumerate(parts.nodes) if index not in parts.postprocessing]
    counts = Counter(node.op_type for node in body)
    assert counts["QLinearConv"] == 57
    assert counts["Conv"] == len(parts.detect_convs) == 6
    assert not {"Relu", "QLinearSigmoid", "QLinearMul", "Sigmoid", "Mul"} & set(counts)


def test_openvino_computes_every_clip_inside_a_convolution(files: dict[str, onnx.ModelProto]) -> None:
    openvino = pytest.importorskip("openvino")
    model = files["int8-openvino"]
    parts = GraphParts(model.graph)
    clips = {parts.nodes[parts.after(conv)[0]].name for conv in activated(parts)}
    core = openvino.Core()
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    ran = core.compile_model(core.read_model(model.SerializeToString()), "CPU", settings).get_runtime_model()
    kinds = Counter(
        layer.get_rt_info()["layerType"].value
        for layer in ran.get_ops()
        if clips & set(layer.get_rt_info()["originalLayersNames"].value.split(","))
    )
    assert set(kinds) == {"Convolution"}  # where its output is quantised, too, the rounding clips and no name is left
