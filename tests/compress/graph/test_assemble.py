from __future__ import annotations

import numpy as np
import onnx
import pytest

from compress.graph.network import fold_bgr_bytes
from compress.graph.nms import NmsShape
from compress.graph.parts import op_counts
from compress.graph.preprocess import FrameLetterbox, pixels_tensor
from compress.graph.session import exposing, open_session
from compress.graph.untrusted_onnx import ALLOWED, problems
from compress.graph.verify import check_boxes, check_rows
from runtime.image import letterbox


def detections(model: onnx.ModelProto, source: np.ndarray) -> np.ndarray:
    return open_session(model).run(None, {model.graph.input[0].name: source})[0][0]


def test_conventional_rows_equal_torch(case, canvas):
    agreement = check_rows(case.conventional(), [canvas], case.rows)
    assert agreement.max_box_error_px < 0.01
    assert agreement.max_score_error < 1e-5


def test_conventional_graph_takes_any_batch_and_yolov5_names(case):
    model = case.conventional()
    assert [value.name for value in (*model.graph.input, *model.graph.output)] == ["images", "output0"]
    images = np.random.default_rng(0).random((3, 3, 160, 160), np.float32)
    rows = open_session(model).run(None, {"images": images})[0]
    assert rows.shape == (3, case.head.rows, 5 + case.head.nc)
    np.testing.assert_allclose(rows[1], case.rows(images[1:2]), atol=2e-3)


def test_boxes_equal_torch_and_nms_equals_its_definition(case, canvas):
    agreement = check_boxes(case.boxes(), [canvas], case.rows, case.nms)
    assert agreement.max_box_error_px < 0.01
    assert agreement.max_score_error < 1e-5
    assert agreement.nms_differences == 0


def test_a_wrong_weight_is_seen(case, canvas):
    model = case.boxes()
    bias = next(tensor for tensor in model.graph.initializer if tensor.name.endswith(".box.bias"))
    bias.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(bias) + np.float32(0.05), bias.name))
    agreement = check_boxes(model, [canvas], case.rows, case.nms)
    assert agreement.max_box_error_px > 0.05


def test_wrong_nms_settings_are_seen(case, canvas):
    other = NmsShape(0.1, case.nms.candidates, case.nms.max_det, case.nms.iterations)
    assert check_boxes(case.boxes(), [canvas], case.rows, other).nms_differences > 0


def test_rows_come_best_first_and_empty_rows_are_zero_and_last(case, canvas):
    found = detections(case.boxes(), canvas)
    filled = found[:, 4] > 0
    count = int(filled.sum())
    assert 0 < count < len(found)
    assert filled[:count].all()
    assert (np.diff(found[:count, 4]) <= 0).all()
    assert not found[count:].any()


@pytest.mark.parametrize(
    ("candidates", "max_det"), [(20, 300), (300, 10), (100_000, 300)], ids=["padded", "cut", "more than rows"]
)
def test_candidates_and_max_det_are_independent(make, canvas, candidates, max_det):
    small = make(candidates=candidates, max_det=max_det)
    found = detections(small.boxes(), canvas)
    assert found.shape == (max_det, 6)
    assert check_boxes(small.boxes(), [canvas], small.rows, small.nms).nms_differences == 0


def test_one_class_needs_no_maximum(make, canvas):
    single = make(classes=1)
    agreement = check_boxes(single.boxes(), [canvas], single.rows, single.nms)
    assert agreement.max_score_error < 1e-5
    assert agreement.nms_differences == 0


@pytest.mark.parametrize("frame_hw", [(108, 192), (333, 77), (160, 160), (40, 30), (121, 160)])
def test_letterbox_in_the_graph_is_the_runtime_letterbox_within_one_level(case, frame_hw):
    model = case.boxes(frame_hw=frame_hw)
    frame = np.random.default_rng(1).integers(0, 256, (1, *frame_hw, 3), dtype=np.uint8)
    pixels = pixels_tensor(model)
    seen = open_session(exposing(model, [pixels])).run([pixels], {"frame": frame})[0]
    expected = letterbox(frame[0], (160, 160)).image.transpose(2, 0, 1)[None]
    assert np.abs(seen - expected.astype(np.float32)).max() <= 1


def test_frame_boxes_are_in_frame_pixels_and_inside(case):
    frame = np.random.default_rng(1).integers(0, 256, (1, 108, 192, 3), dtype=np.uint8)
    model = case.boxes(frame_hw=(108, 192))
    letterbox = FrameLetterbox((108, 192), (160, 160))
    agreement = check_boxes(model, [frame], case.rows, case.nms, letterbox)
    assert agreement.nms_differences == 0
    found = detections(model, frame)
    assert found[:, [0, 2]].max() <= 192
    assert found[:, [1, 3]].max() <= 108
    assert found[:, :4].min() >= 0
    assert found[:, 2].max() > 160


def test_cast_is_the_first_operator_and_the_scale_costs_nothing(case):
    model = case.boxes()
    assert model.graph.node[0].op_type == "Cast"
    assert list(model.graph.node[0].input) == ["canvas"]
    before_stem = [node.op_type for node in model.graph.node[:3]]
    assert before_stem == ["Cast", "Transpose", "Conv"]


def test_folding_is_refused_where_the_stem_is_no_single_convolution(case):
    doubled = case.traced.nodes[0]
    twice = type(case.traced)((doubled, *case.traced.nodes), case.traced.constants, case.traced.input, case.traced.maps)
    assert fold_bgr_bytes(twice) is None


def test_shipped_graphs_hold_allowed_operators_fixed_shapes_and_one_domain(case):
    for model in (case.boxes(), case.boxes(frame_hw=(108, 192))):
        assert not list(problems(model))
        assert set(op_counts(model.graph)) <= ALLOWED
        assert "NonMaxSuppression" not in op_counts(model.graph)
        assert [entry.domain for entry in model.opset_import] == [""]
        inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True).graph
        shapes = [value.type.tensor_type.shape for value in (*inferred.value_info, *inferred.output)]
        assert len(inferred.value_info) >= len(model.graph.node) - 1
        assert all(dim.HasField("dim_value") for shape in shapes for dim in shape.dim)


@pytest.mark.parametrize("opset", [17, 19, 21])
def test_every_opset_of_the_settings_runs(case, canvas, opset):
    np.testing.assert_allclose(detections(case.boxes(opset=opset), canvas), detections(case.boxes(), canvas), atol=1e-4)


def test_two_exports_are_byte_identical(make):
    first, second = (make().boxes().SerializeToString(deterministic=True) for _ in range(2))
    assert first == second
