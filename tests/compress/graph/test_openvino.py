"""The flavour for OpenVINO in OpenVINO itself: with signed activations it computes wrong results, without a warning."""

from __future__ import annotations

import numpy as np
import pytest

from compress.flavours import FLAVOURS
from compress.graph.ranges import calibrate
from compress.graph.session import exposing, open_session

openvino = pytest.importorskip("openvino")

LAYER = "stem.silu"


def test_openvino_computes_its_flavour_as_it_is_written(case):
    """One layer is compared, because rounding is chaotic: a value one step off changes all that comes behind it."""
    canvas = np.random.default_rng(0).integers(0, 256, (1, 160, 160, 3), dtype=np.uint8)
    model = FLAVOURS["int8-openvino"].make(case.boxes(), calibrate(case.boxes(), [canvas], "minmax"))
    expected = open_session(exposing(model, [LAYER]), as_written=True).run([LAYER], {"canvas": canvas})[0]
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    read = openvino.Core().read_model(exposing(model, [LAYER]).SerializeToString())
    found = openvino.compile_model(read, "CPU", settings)([canvas])[-1]
    np.testing.assert_allclose(found, expected, atol=2e-3 * np.abs(expected).max())


def test_openvino_finds_the_same_best_box(case):
    canvas = np.random.default_rng(0).integers(0, 256, (1, 160, 160, 3), dtype=np.uint8)
    model = FLAVOURS["int8-openvino"].make(case.boxes(), calibrate(case.boxes(), [canvas], "minmax"))
    expected = open_session(model, as_written=True).run(None, {"canvas": canvas})[0]
    read = openvino.Core().read_model(model.SerializeToString())
    found = openvino.compile_model(read, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})([canvas])[0]
    assert abs(found[0, 0, 4] - expected[0, 0, 4]) < 0.05


def test_openvino_reads_the_graph_of_many_classes(make):
    """It once refused a cast of one part of a Split."""
    model = make(classes=20).boxes()
    canvas = np.random.default_rng(0).integers(0, 256, (1, 160, 160, 3), dtype=np.uint8)
    read = openvino.Core().read_model(model.SerializeToString())
    found = openvino.compile_model(read, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})([canvas])[0]
    expected = open_session(model).run(None, {"canvas": canvas})[0]
    np.testing.assert_allclose(found[0, :20, 4], expected[0, :20, 4], atol=1e-3)
