"""The flavour for OpenVINO in OpenVINO itself: with signed activations it computes wrong results, without a warning."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from compress.flavours import FLAVOURS
from compress.graph.ranges import calibrate
from compress.graph.session import exposing, open_session
from compress.graph.verify import nchw, unit_rgb
from runtime.backends import LoadOptions, LoadRequest, RawOutput, load_backend
from runtime.errors import InputError

openvino = pytest.importorskip("openvino")

LAYER = "stem.silu"
ONE_THREAD = LoadOptions(threads=1)


def outputs_of(model: onnx.ModelProto, images: np.ndarray) -> RawOutput:
    """By the backend of the runtime."""
    request = LoadRequest("openvino", Path("model.onnx"), {"model.onnx": model.SerializeToString()}, ONE_THREAD)
    return load_backend(request).run(images)


def test_openvino_computes_its_flavour_as_it_is_written(case, canvas):
    """One layer is compared, because rounding is chaotic: a value one step off changes all that comes behind it."""
    model = exposing(FLAVOURS["int8-openvino"].make(case.boxes(), calibrate(case.boxes(), [canvas], "minmax")), [LAYER])
    first = [output for output in model.graph.output if output.name == LAYER]
    others = [output for output in model.graph.output if output.name != LAYER]
    del model.graph.output[:]
    model.graph.output.extend(first + others)  # a backend reads the first
    expected = open_session(model, as_written=True).run([LAYER], {"canvas": canvas})[0]
    np.testing.assert_allclose(outputs_of(model, canvas).array, expected, atol=2e-3 * np.abs(expected).max())


def test_openvino_finds_the_same_best_box(case, canvas):
    model = FLAVOURS["int8-openvino"].make(case.boxes(), calibrate(case.boxes(), [canvas], "minmax"))
    expected = open_session(model, as_written=True).run(None, {"canvas": canvas})[0]
    assert abs(outputs_of(model, canvas).array[0, 0, 4] - expected[0, 0, 4]) < 0.05


def test_openvino_gets_no_file_with_signed_activations(case, canvas):
    model = FLAVOURS["int8-trt"].make(case.boxes(), calibrate(case.boxes(), [canvas], "minmax"))
    with pytest.raises(InputError, match="its activations are signed integers"):
        outputs_of(model, canvas)


def test_openvino_reads_the_graph_of_many_classes(make, canvas):
    """It once refused a cast of one part of a Split."""
    model = make(classes=20).boxes()
    expected = open_session(model).run(None, {"canvas": canvas})[0]
    np.testing.assert_allclose(outputs_of(model, canvas).array[0, :20, 4], expected[0, :20, 4], atol=1e-3)


@pytest.mark.parametrize("batch", [1, 2, 3, None])
def test_openvino_runs_rectangular_batches_as_torch_does(make, batch):
    case = make(size_hw=(96, 160))
    canvases = np.random.default_rng(0).integers(0, 256, (batch or 2, 96, 160, 3), dtype=np.uint8)
    rows = outputs_of(case.conventional(batch=batch), unit_rgb(nchw(canvases))).array
    boxes, cutoffs = outputs_of(case.boxes(batch=batch), canvases)
    expected, limits = open_session(case.boxes(batch=batch)).run(None, {"canvas": canvases})
    for index, canvas in enumerate(canvases):
        error = np.abs(rows[index] - case.rows(unit_rgb(nchw(canvas[None]))))
        assert error[:, :4].max() < 0.05
        assert error[:, 4:].max() < 1e-3
        np.testing.assert_allclose(boxes[index, :20, :4], expected[index, :20, :4], atol=0.05)
        np.testing.assert_allclose(boxes[index, :20, 4], expected[index, :20, 4], atol=1e-3)
        assert abs(cutoffs[index] - limits[index]) < 1e-3
