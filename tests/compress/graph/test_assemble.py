from __future__ import annotations

import cv2
import numpy as np
import onnx
import pytest

from compress.graph.builder import FLOAT, GraphBuilder
from compress.graph.decode import decode_candidates
from compress.graph.head import HeadShape
from compress.graph.network import fold_bgr_bytes
from compress.graph.nms import NmsShape
from compress.graph.nms import detections as detections_of
from compress.graph.parts import op_counts
from compress.graph.preprocess import FrameLetterbox, pixels_tensor
from compress.graph.session import exposing, open_session
from compress.graph.untrusted_onnx import ALLOWED, problems
from compress.graph.verify import best_class, check_boxes, check_rows, nchw, unit_rgb
from runtime.image import letterbox

SIZE = 160


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (1, height, width, 3), dtype=np.uint8)


def detections(model: onnx.ModelProto, source: np.ndarray) -> np.ndarray:
    return open_session(model).run(None, {model.graph.input[0].name: source})[0][0]


def test_conventional_rows_equal_torch(case, canvas):
    agreement = check_rows(case.conventional(), [canvas], case.rows)
    assert agreement.max_box_error_px < 0.01
    assert agreement.max_score_error < 1e-5


@pytest.mark.parametrize("opset", [12, 19])
def test_an_open_conventional_graph_takes_any_batch_and_any_size(case, opset):
    model = case.conventional(batch=None, opset=opset)
    assert [value.name for value in (*model.graph.input, *model.graph.output)] == ["images", "output0"]
    assert dims(model) == [["batch", 3, "height", "width"], ["batch", "anchors", 10]]
    sizes = [(160, 160), (96, 224), (32, 32)]
    agreement = check_rows(model, [noise(*size, seed) for size in sizes for seed in range(3)], case.rows)
    assert agreement.images == 9
    assert agreement.max_box_error_px < 0.01
    assert agreement.max_score_error < 1e-5


def dims(model: onnx.ModelProto) -> list[list[int | str]]:
    values = (*model.graph.input, *model.graph.output)
    return [[side.dim_param or side.dim_value for side in value.type.tensor_type.shape.dim] for value in values]


@pytest.mark.parametrize("classes", [1, 5, 20])
@pytest.mark.parametrize("batch", [1, 3, None])
def test_rectangular_batches_equal_torch(make, classes, batch):
    case = make(classes=classes, size_hw=(96, 160))
    canvases = [noise(96, 160, seed) for seed in range(6)]
    rows = check_rows(case.conventional(batch=batch), canvases, case.rows)
    boxes = check_boxes(case.boxes(batch=batch), canvases, case.rows, case.nms)
    for agreement in (rows, boxes):
        assert (agreement.images, agreement.nms_differences) == (6, 0)
        assert agreement.max_box_error_px < 0.01
        assert agreement.max_score_error < 1e-5


@pytest.mark.parametrize("batch", [4, None])
@pytest.mark.parametrize("frame_hw", [None, (108, 192)])
def test_each_image_of_a_batch_has_what_it_has_alone_bit_for_bit(make, batch, frame_hw):
    case = make(candidates=400)
    images = np.concatenate([noise(*(frame_hw or (SIZE, SIZE)), seed) for seed in range(4)])
    images[1] = 114
    one, many = (open_session(case.boxes(batch=count, frame_hw=frame_hw)) for count in (1, batch))
    name = one.get_inputs()[0].name
    found, cutoffs = many.run(None, {name: images})
    assert len(set(cutoffs.tolist())) == 4
    for index, image in enumerate(images):
        boxes, cutoff = one.run(None, {name: image[None]})
        np.testing.assert_array_equal(found[index], boxes[0])
        assert cutoffs[index] == cutoff[0]


@pytest.mark.parametrize("classes", [5, 20])
@pytest.mark.parametrize("batch", [3, None])
def test_a_crowded_image_takes_no_room_from_an_empty_one_beside_it(case, classes, batch):
    """The crowd reaches the limits of NMS, the empty image finds nothing, and one has a single box."""
    head = HeadShape(classes, case.head.anchors_px, case.head.strides, case.head.size_hw)
    builder, nms = GraphBuilder(), NmsShape(0.6, 300, 100, 8)
    maps = [(f"box{level}", f"cls{level}") for level in range(3)]
    detected = detections_of(builder, decode_candidates(builder, maps, head, 300), 300, nms)
    shapes = {
        name: [batch or "batch", 3 * lines, height, width]
        for pair, (height, width) in zip(maps, head.grids_hw, strict=True)
        for name, lines in zip(pair, (5, classes), strict=True)
    }
    inputs = {name: (FLOAT, shape) for name, shape in shapes.items()}
    sides = [batch or "batch", 100, 6], [batch or "batch"]
    model = builder.build(inputs, {name: (FLOAT, shape) for name, shape in zip(detected, sides, strict=True)}, {})
    rng = np.random.default_rng(0)
    feed = {name: rng.normal(0, 1, (3, *shape[1:])).astype(np.float32) for name, shape in shapes.items()}
    for box, _ in maps:
        feed[box][1:, 12:] = -80  # objectness
    feed["box1"][2, 12, 4, 5] = 80
    found, cutoffs = open_session(model).run(None, feed)
    counts = (found[..., 4] > 0.01).sum(axis=1)
    assert counts.tolist() == [100, 0, 1]
    assert cutoffs[0] > 0.3 > 1e-6 > cutoffs[1:].max()


@pytest.mark.parametrize("batch", [1, 2, None])
def test_where_nothing_is_left_out_each_image_has_a_cutoff_of_0(make, batch):
    everything = make(candidates=100_000, max_det=100_000)
    images = np.concatenate([noise(SIZE, SIZE, seed) for seed in range(batch or 3)])
    found, cutoffs = open_session(everything.boxes(batch=batch)).run(None, {"canvas": images})
    assert found.shape == (len(images), 100_000, 6)
    assert cutoffs.tolist() == [0] * len(images)


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
    ("candidates", "max_det"),
    [(20, 300), (300, 10), (1000, 300), (100_000, 300)],
    ids=["padded", "cut", "several rounds", "more than rows"],
)
def test_candidates_and_max_det_are_independent(make, canvas, candidates, max_det):
    small = make(candidates=candidates, max_det=max_det)
    found = detections(small.boxes(), canvas)
    assert found.shape == (max_det, 6)
    assert check_boxes(small.boxes(), [canvas], small.rows, small.nms).nms_differences == 0


@pytest.mark.parametrize("classes", [1, 2, 16, 17, 18, 80], ids="{} classes".format)
def test_any_number_of_classes_is_read_right(make, canvas, classes):
    """One needs no maximum, and from 17 on they are read in groups where the number has divisors."""
    other = make(classes=classes)
    agreement = check_boxes(other.boxes(), [canvas], other.rows, other.nms)
    assert agreement.max_box_error_px < 0.01
    assert agreement.max_score_error < 1e-5
    assert agreement.nms_differences == 0


@pytest.mark.parametrize("classes", [3, 20])
def test_the_lowest_of_equal_classes_is_taken(make, canvas, classes):
    tied = make(classes=classes)
    model = tied.boxes()
    for tensor in model.graph.initializer:
        if ".cls." in tensor.name:
            tensor.CopyFrom(onnx.numpy_helper.from_array(0 * onnx.numpy_helper.to_array(tensor), tensor.name))
    assert not detections(model, canvas)[:, 5].any()


def test_the_cutoff_is_the_best_score_that_was_left_out(make, canvas):
    case = make(candidates=200)
    cutoff = open_session(case.boxes()).run(["cutoff"], {"canvas": canvas})[0]
    scores = np.sort(best_class(case.rows(unit_rgb(nchw(canvas))))[0])[::-1]
    assert cutoff.shape == (1,)
    assert cutoff[0] == pytest.approx(scores[200], abs=1e-5)
    everything = make(candidates=100_000, max_det=100_000)
    assert open_session(everything.boxes()).run(["cutoff"], {"canvas": canvas})[0] == 0


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
    for model in (case.boxes(), case.boxes(frame_hw=(108, 192), batch=2)):
        assert not list(problems(model))
        assert set(op_counts(model.graph)) <= ALLOWED
        assert "NonMaxSuppression" not in op_counts(model.graph)
        assert [entry.domain for entry in model.opset_import] == [""]
        inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True).graph
        shapes = [value.type.tensor_type.shape for value in (*inferred.value_info, *inferred.output)]
        assert len(inferred.value_info) >= len(model.graph.node) - 1
        assert all(dim.HasField("dim_value") for shape in shapes for dim in shape.dim)


@pytest.mark.parametrize("opset", [17, 18, 19, 21])
def test_every_opset_of_the_shipped_graph_runs(case, canvas, opset):
    np.testing.assert_allclose(detections(case.boxes(opset=opset), canvas), detections(case.boxes(), canvas), atol=1e-4)


@pytest.mark.parametrize("opset", range(12, 22))
def test_every_opset_of_the_conventional_graph_runs(case, canvas, opset):
    model = case.conventional(opset=opset)
    assert [entry.version for entry in model.opset_import] == [opset]
    images = unit_rgb(nchw(canvas))
    rows = [open_session(one).run(None, {"images": images})[0] for one in (model, case.conventional())]
    np.testing.assert_allclose(*rows, atol=1e-4)


def test_the_conventional_graph_holds_nothing_to_fold(case):
    graph = case.conventional().graph
    constants = {tensor.name for tensor in graph.initializer}
    assert not any(constants.issuperset(node.input) for node in graph.node)
    assert not {"Constant", "Identity", "Shape", "Gather"} & {node.op_type for node in graph.node}
    assert constants <= {name for node in graph.node for name in node.input}


@pytest.mark.parametrize("opset", [12, 19])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("size_hw", [(SIZE, SIZE), (96, 160)], ids=["square", "rectangular"])
def test_opencv_reads_the_conventional_graph(make, tmp_path, opset, batch, size_hw):
    case = make(size_hw=size_hw)
    onnx.save(case.conventional(opset=opset, batch=batch), tmp_path / "rows.onnx")
    net = cv2.dnn.readNetFromONNX(str(tmp_path / "rows.onnx"))
    canvases = np.concatenate([noise(*size_hw, seed) for seed in range(batch)])
    net.setInput(cv2.dnn.blobFromImages(list(canvases), 1 / 255, swapRB=True))
    found = net.forward().reshape(batch, case.head.rows, case.head.no)
    for image, rows in zip(canvases, found, strict=True):
        error = np.abs(rows - case.rows(unit_rgb(nchw(image[None]))))
        assert error[:, :4].max() < 0.05
        assert error[:, 4:].max() < 1e-3


def test_two_exports_are_byte_identical(make):
    first, second = (make().boxes().SerializeToString(deterministic=True) for _ in range(2))
    assert first == second
