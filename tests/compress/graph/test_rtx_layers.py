"""The layers that TensorRT-RTX makes of the shipped graph of YOLOv5n, to see when a change of the graph or of the
placement costs a fusion. It builds on a CPU; the counts are those of version 1.7, for compute capability 8.6.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from compress.flavours import FLAVOURS
from compress.graph.assemble import boxes_graph
from compress.graph.network import trace
from compress.graph.nms import NmsShape
from compress.graph.ranges import calibrate
from compress.models import Architecture, YOLOv5
from compress.stages.export import RawMaps, head_shape
from runtime.engine import BuildRequest, build_plan
from runtime.errors import UsageError
from runtime.layers import EngineLayer, convolution_types, moved_bytes, moves_more

rtx = pytest.importorskip("tensorrt_rtx")
pytestmark = pytest.mark.skipif(not rtx.__version__.startswith("1.7."), reason="the counts are those of 1.7")

SIZE = 128
NAMES = tuple(map(str, range(80)))
FUSED = ("__myl_CorrSilu", "__myl_FcAddSilu")
"""Kernels that compute a convolution and its activation; "CorrSiluAdd" adds the shortcut, too."""


@pytest.fixture(scope="module")
def make() -> Callable[[int], onnx.ModelProto]:
    """Makes the graph for a batch."""
    torch.manual_seed(0)
    network = YOLOv5(Architecture.of_scale("n", NAMES)).eval()
    traced, head = trace(RawMaps(network.fuse()), (SIZE, SIZE)), head_shape(network, (SIZE, SIZE))
    return lambda batch: boxes_graph(traced, head, NmsShape(0.6, 300, 300, 8), opset=19, metadata={}, batch=batch)


@pytest.fixture(scope="module")
def graph(make: Callable[[int], onnx.ModelProto]) -> onnx.ModelProto:
    return make(1)


@pytest.fixture(scope="module")
def built(graph: onnx.ModelProto, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[EngineLayer, ...]]:
    """Layers by flavour. INT8 is built under the name of the builder that takes it."""
    canvas = np.random.default_rng(0).integers(0, 256, (1, SIZE, SIZE, 3), dtype=np.uint8)
    models = {
        "fp16": FLAVOURS["fp16"].make(graph),
        "int8-trt": FLAVOURS["int8-trt"].make(graph, calibrate(graph, [canvas], "minmax")),
    }
    folder = tmp_path_factory.mktemp("rtx")
    return {name: layers_of(model, folder / f"{name}.onnx", "tensorrt") for name, model in models.items()}


def layers_of(model: Any, path: Path, backend: str) -> tuple[EngineLayer, ...]:
    onnx.save(model, path)
    return build_plan(rtx, BuildRequest(str(path), backend, ("sm86",))).layers


def fused(layers: tuple[EngineLayer, ...]) -> list[EngineLayer]:
    return [layer for layer in layers if layer.name.startswith(FUSED)]


def test_fp16_fuses_every_convolution_with_its_activation(built):
    layers = built["fp16"]
    assert len(layers) == 110
    assert convolution_types(layers) == {"Half -> Half": 57 + 6}, "57 of the network, 6 of the detect head"
    assert len(fused(layers)) == 57
    assert sum("SiluAdd" in layer.name for layer in layers) == 7
    assert moved_bytes(layers) == pytest.approx(6.05e6, rel=0.01)


def test_products_of_nms_in_batches_are_no_convolutions(make, tmp_path):
    layers = layers_of(FLAVOURS["fp16"].make(make(2)), tmp_path / "two.onnx", "tensorrt_rtx")
    assert any("__myl_Fc" in layer.name and "nms.0.0.hits" in layer.operators for layer in layers)
    assert convolution_types(layers) == {"Half -> Half": 57 + 6}


def test_int8_writes_fp32_behind_each_convolution_and_so_moves_more(built):
    layers = built["int8-trt"]
    assert len(layers) == 153
    assert convolution_types(layers) == {"Int8 -> Float": 56, "Half -> Half": 1 + 6}, "the stem stays in FP16"
    assert fused(layers) == []
    assert moved_bytes(layers) == pytest.approx(8.32e6, rel=0.01)
    assert moves_more(layers, built["fp16"]) == "its INT8 moves 8.3 MB a call, FP16 moves 6.0"


def test_int8_is_refused_before_it_is_built(graph, tmp_path):
    canvas = np.zeros((1, SIZE, SIZE, 3), np.uint8)
    model = FLAVOURS["int8-trt"].make(graph, calibrate(graph, [canvas], "minmax"))
    with pytest.raises(UsageError, match=r"a\.onnx is INT8: TensorRT-RTX fuses no INT8 convolution") as caught:
        layers_of(model, tmp_path / "a.onnx", "tensorrt_rtx")
    assert caught.value.hint == "Build model.fp16.onnx"
