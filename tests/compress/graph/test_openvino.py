"""The flavour for OpenVINO in OpenVINO itself: with signed activations it computes wrong results, without a warning."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from compress.flavours import FLAVOURS
from compress.graph.ranges import calibrate
from compress.graph.session import exposing, open_session
from compress.graph.verify import nchw, unit_rgb

openvino = pytest.importorskip("openvino")

LAYER = "stem.silu"


def outputs_of(model: onnx.ModelProto, canvas: np.ndarray) -> list[np.ndarray]:
    """All outputs, in copies: OpenVINO's own arrays end with its request, and it reads bytes in place."""
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    data = model.SerializeToString()
    compiled = openvino.compile_model(openvino.Core().read_model(data), "CPU", settings)
    request = compiled.create_infer_request()
    return [np.array(values) for values in request.infer([canvas]).values()]


def test_openvino_computes_its_flavour_as_it_is_written(case, canvas):
    """One layer is compared, because rounding is chaotic: a value one step off changes all that comes behind it."""
    model = exposing(FLAVOURS["int8-openvino"].make(case.boxes(), calibrate(case.boxes(), [canvas], "minmax")), [LAYER])
    expected = open_session(model, as_written=True).run([LAYER], {"canvas": canvas})[0]
    np.testing.assert_allclose(outputs_of(model, canvas)[-1], expected, atol=2e-3 * np.abs(expected).max())


def test_openvino_finds_the_same_best_box(case, canvas):
    model = FLAVOURS["int8-openvino"].make(case.boxes(), calibrate(case.boxes(), [canvas], "minmax"))
    expected = open_session(model, as_written=True).run(None, {"canvas": canvas})[0]
    assert abs(outputs_of(model, canvas)[0][0, 0, 4] - expected[0, 0, 4]) < 0.05


def test_openvino_reads_the_graph_of_many_classes(make, canvas):
    """It once refused a cast of one part of a Split."""
    model = make(classes=20).boxes()
    expected = open_session(model).run(None, {"canvas": canvas})[0]
    np.testing.assert_allclose(outputs_of(model, canvas)[0][0, :20, 4], expected[0, :20, 4], atol=1e-3)


@pytest.mark.parametrize("batch", [1, 3, None])
def test_openvino_runs_rectangular_batches_as_torch_does(make, batch):
    case = make(size_hw=(96, 160))
    canvases = np.random.default_rng(0).integers(0, 256, (batch or 2, 96, 160, 3), dtype=np.uint8)
    (rows,) = outputs_of(case.conventional(batch=batch), unit_rgb(nchw(canvases)))
    boxes, cutoffs = outputs_of(case.boxes(batch=batch), canvases)
    expected, limits = open_session(case.boxes(batch=batch)).run(None, {"canvas": canvases})
    for index, canvas in enumerate(canvases):
        error = np.abs(rows[index] - case.rows(unit_rgb(nchw(canvas[None]))))
        assert error[:, :4].max() < 0.05
        assert error[:, 4:].max() < 1e-3
        np.testing.assert_allclose(boxes[index, :20, :4], expected[index, :20, :4], atol=0.05)
        np.testing.assert_allclose(boxes[index, :20, 4], expected[index, :20, 4], atol=1e-3)
        assert abs(cutoffs[index] - limits[index]) < 1e-3
