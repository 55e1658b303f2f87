from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from compress.config import ExportConfig
from compress.graph.candidates import Validation, candidates_for, canvas_of
from compress.graph.metadata import read_card
from compress.graph.verify import best_class, nchw, unit_rgb
from compress.inputs import CONVENTIONAL, SHIPPED
from compress.models import Architecture, YOLOv5, describe, save_model
from compress.models.blocks import Conv
from compress.stages.export import export, rows_of
from runtime.boxes import detections_from_rows, unletterbox
from runtime.detector import Detector
from runtime.errors import EdgestillError, UsageError
from runtime.identity import OccupiedError
from runtime.image import read_image

SIZE = 160
NAMES = ("bolt", "nut", "it's a washer")


@dataclass(frozen=True)
class Student:
    path: Path
    network: YOLOv5
    data: Validation


def make_network(activation: str = "SiLU") -> YOLOv5:
    """Seeded, with statistics and a head that spread the scores, so that some boxes are certain."""
    torch.manual_seed(0)
    network = YOLOv5(Architecture.of_scale("p", NAMES, activation=activation))
    with torch.no_grad():
        for _ in range(20):
            network(torch.rand(4, 3, 5, 5).repeat_interleave(32, 2).repeat_interleave(32, 3))
        for conv in network.detect.m:
            torch.nn.init.normal_(conv.weight, 0, 0.5)
    return network.eval()


def make_images(folder: Path, count: int) -> list[Path]:
    folder.mkdir()
    rng = np.random.default_rng(0)
    paths = []
    for index in range(count):
        small = rng.integers(0, 256, (9, 12, 3), dtype=np.uint8)
        path = folder / f"{index}.png"
        cv2.imwrite(str(path), cv2.resize(small, (200 - 30 * (index % 2), 150), interpolation=cv2.INTER_CUBIC))
        paths.append(path)
    return paths


def own_truth(network: YOLOv5, paths: list[Path]) -> Validation:
    """Ground truth that the network finds: its own best boxes."""
    run, annotations = rows_of(network), []
    for image_id, path in enumerate(paths, 1):
        canvas, placement = canvas_of(path, (SIZE, SIZE))
        found = detections_from_rows(run(unit_rgb(nchw(canvas))), conf=0.3, iou=0.6, max_det=12)
        boxes = unletterbox(found[:, :4], placement.gain, placement.pad_wh, placement.frame_hw).astype(float)
        for (x1, y1, x2, y2), label in zip(boxes.tolist(), found[:, 5], strict=True):
            annotations.append(
                {"id": len(annotations) + 1, "image_id": image_id, "category_id": int(label), "iscrowd": 0,
                 "bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1)}
            )  # fmt: skip
    images = [{"id": i, "file_name": p.name, "height": 150, "width": 200} for i, p in enumerate(paths, 1)]
    categories = [{"id": i, "name": name} for i, name in enumerate(NAMES)]
    truth = {"images": images, "annotations": annotations, "categories": categories}
    return Validation(list(enumerate(paths, 1)), truth)


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Student:
    folder = tmp_path_factory.mktemp("student")
    network = make_network()
    save_model(network, folder / "student.safetensors", {})
    return Student(folder / "student.safetensors", network, own_truth(network, make_images(folder / "images", 6)))


@pytest.fixture(scope="module")
def exported(student: Student, tmp_path_factory: pytest.TempPathFactory) -> Any:
    lines: list[str] = []
    out = tmp_path_factory.mktemp("export")
    result = export(ExportConfig(), model=student.path, out=out, imgsz=SIZE, data=student.data, log=lines.append)
    return result, lines


def test_both_files_agree_with_torch_and_the_report_says_so(exported):
    result, lines = exported
    for agreement in (result.boxes, result.rows):
        assert agreement.max_box_error_px < 0.05
        assert agreement.max_score_error < 1e-3
        assert agreement.nms_differences == 0
    assert sum("against torch" in line for line in lines) == 2
    assert set(result.to_json()["agreement"]) == {SHIPPED, CONVENTIONAL}


@pytest.mark.parametrize(("activation", "operator"), [("ReLU", "Relu"), ("LeakyReLU", "LeakyRelu")])
def test_another_activation_is_exported_as_it_is(tmp_path, activation, operator):
    save_model(make_network(activation), tmp_path / "student.safetensors", {})
    model = tmp_path / "student.safetensors"
    result = export(ExportConfig(), model=model, out=tmp_path / "out", imgsz=SIZE, log=lambda _: None)
    assert result.boxes.max_box_error_px < 0.05
    body = [node.op_type for node in onnx.load(result.yolov5_onnx).graph.node]
    assert body.count(operator) == sum(isinstance(block, Conv) for block in make_network().modules())


def test_the_shipped_graph_is_canvas_to_boxes(exported):
    session = onnxruntime.InferenceSession(exported[0].model_onnx)
    (image,), (boxes, cutoff) = session.get_inputs(), session.get_outputs()
    assert (image.type, image.shape) == ("tensor(uint8)", [1, SIZE, SIZE, 3])
    assert (boxes.type, boxes.shape) == ("tensor(float)", [1, 300, 6])
    assert (cutoff.name, cutoff.type, cutoff.shape) == ("cutoff", "tensor(float)", [1])


def test_the_conventional_graph_is_what_yolov5_writes(exported):
    session = onnxruntime.InferenceSession(exported[0].yolov5_onnx)
    (image,), (rows,) = session.get_inputs(), session.get_outputs()
    assert (image.name, image.type, image.shape) == ("images", "tensor(float)", [1, 3, SIZE, SIZE])
    assert (rows.name, rows.shape) == ("output0", [1, 1575, 8])
    metadata = session.get_modelmeta().custom_metadata_map
    assert metadata["stride"] == "32"
    assert ast.literal_eval(metadata["names"]) == dict(enumerate(NAMES))


def test_the_card_inside_says_what_the_graph_does(exported):
    result = exported[0]
    card = read_card(onnx.load(result.model_onnx), SHIPPED)
    assert card == result.card
    assert (card.input, card.output, card.size_hw, card.max_det) == ("canvas", "boxes", (SIZE, SIZE), 300)
    assert (card.names, card.nms_iterations, card.precision) == (NAMES, ExportConfig().nms_iterations, "fp32")
    rows = read_card(onnx.load(result.yolov5_onnx), CONVENTIONAL)
    assert (rows.input, rows.output, rows.batches) == ("tensor", "rows", (1, 1))


def shapes(path: Path) -> list[list[int | str]]:
    session = onnxruntime.InferenceSession(path)
    return [value.shape for value in (*session.get_inputs(), *session.get_outputs())]


RECTANGLE = (96, 160)
IN_BATCHES = {
    "fixed": ({"batch": 3}, (3, 3), [[3, 96, 160, 3], [3, 300, 6], [3]], [[3, 3, 96, 160], [3, 945, 8]]),
    "open": (
        {"dynamic": True}, (1, None),
        [["batch", 96, 160, 3], ["batch", 300, 6], ["batch"]],
        [["batch", 3, "height", "width"], ["batch", "anchors", 8]],
    ),
}  # fmt: skip


@pytest.fixture(scope="module", params=IN_BATCHES)
def in_batches(student: Student, tmp_path_factory: pytest.TempPathFactory, request: Any) -> Any:
    settings, *expected = IN_BATCHES[request.param]
    config, out = ExportConfig(imgsz=RECTANGLE, **settings), tmp_path_factory.mktemp("batches")
    return export(config, model=student.path, out=out, imgsz=SIZE, data=student.data, log=lambda _: None), expected


def test_rectangular_batches_agree_with_torch_and_their_shapes_are_in_file_and_card(in_batches):
    result, (batches, boxes, rows) = in_batches
    assert shapes(result.model_onnx) == boxes
    assert shapes(result.yolov5_onnx) == rows
    for agreement in (result.boxes, result.rows):
        assert agreement.images >= 6
        assert agreement.max_box_error_px < 0.05
        assert agreement.max_score_error < 1e-3
        assert agreement.nms_differences == 0
    assert (result.card.size_hw, result.card.batches) == (RECTANGLE, batches)
    assert result.room.images == 6


def test_a_detector_finds_in_a_list_what_it_finds_in_its_frames(student, in_batches):
    """By both files; the frames differ in size, and are more than one call takes and no whole number of calls."""
    frames = [read_image(path) for _, path in student.data.images][:5]
    found = {}
    for path in (in_batches[0].model_onnx, in_batches[0].yolov5_onnx):
        with Detector.load(path) as detector:
            found[path] = detector(frames)
            assert [one.to_list() for one in found[path]] == [detector(frame).to_list() for frame in frames]
    assert len(found[path]) == 5
    assert sum(map(len, found[path])) > 10


@pytest.mark.parametrize("settings", [{"batch": 2}, {"dynamic": True}])
def test_frames_in_batches_are_letterboxed_inside(student, tmp_path, settings):
    config = ExportConfig(frame=(108, 192), imgsz=RECTANGLE, candidates=100, **settings)
    result = export(config, model=student.path, out=tmp_path, imgsz=SIZE, data=student.data, log=lambda _: None)
    assert result.boxes.nms_differences == 0
    frames = [cv2.resize(read_image(path), (192, 108)) for _, path in student.data.images][:3]
    with Detector.load(result.model_onnx) as detector:
        assert [one.to_list() for one in detector(frames)] == [detector(frame).to_list() for frame in frames]


@pytest.mark.parametrize("dynamic", [False, True])
def test_half_is_a_float16_input_and_body_with_rows_in_float32(student, tmp_path, dynamic):
    lines: list[str] = []
    config = ExportConfig(half=True, opset=12, dynamic=dynamic)
    result = export(config, model=student.path, out=tmp_path, imgsz=SIZE, data=student.data, log=lines.append)
    session = onnxruntime.InferenceSession(result.yolov5_onnx)
    (images,), (rows,) = session.get_inputs(), session.get_outputs()
    assert (images.type, rows.type) == ("tensor(float16)", "tensor(float)")
    assert sum("in float16 against torch" in line for line in lines) == 1
    assert result.yolov5_onnx.stat().st_size < 0.7 * result.model_onnx.stat().st_size
    frame = read_image(student.data.images[0][1])
    with Detector.load(result.yolov5_onnx, conf=0.25) as half, Detector.load(result.model_onnx, conf=0.25) as full:
        assert half.card.precision == "fp16"
        nearest = np.abs(full(frame).xyxy[:, None] - half(frame).xyxy).max(axis=2).min(axis=1)
    assert np.median(nearest) < 0.5


def test_a_network_that_overflows_float16_is_not_written_in_half(tmp_path):
    network = make_network()
    with torch.no_grad():
        next(tensor for name, tensor in network.named_parameters() if name.endswith("bn.weight")).mul_(1e6)
    save_model(network, tmp_path / "loud.safetensors", {})
    config = ExportConfig(half=True, max_box_error=1e9, max_score_error=1)
    with pytest.raises(EdgestillError, match="overflows above 65504"):
        export(config, model=tmp_path / "loud.safetensors", out=tmp_path / "out", imgsz=64, log=lambda _: None)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("opset", "shipped"), [(12, 17), (21, 20)])
def test_the_opset_is_that_of_the_conventional_file_and_the_shipped_one_has_17_to_20(student, tmp_path, opset, shipped):
    result = export(ExportConfig(opset=opset), model=student.path, out=tmp_path, imgsz=64, log=lambda _: None)
    models = [onnx.load(path) for path in (result.yolov5_onnx, result.model_onnx)]
    assert [model.opset_import[0].version for model in models] == [opset, shipped]
    assert [read_card(model, "").provenance["opset"] for model in models] == [opset, shipped]


def test_the_batch_is_no_part_of_the_identity_and_the_shape_is(student, exported, tmp_path):
    found = [
        export(ExportConfig(**settings), model=student.path, out=tmp_path / name, imgsz=SIZE, log=lambda _: None).card
        for name, settings in {"batch": {"batch": 2}, "shape": {"imgsz": RECTANGLE}}.items()
    ]
    assert [card.identity == exported[0].card.identity for card in found] == [True, False]


def test_boxes_are_the_host_nms_of_torch_rows(student, exported):
    """The finished boxes of the file are those of decode and greedy NMS on the host, except for ties."""
    canvas, _ = canvas_of(student.data.images[0][1], (SIZE, SIZE))
    session = onnxruntime.InferenceSession(exported[0].model_onnx)
    found = session.run(None, {"canvas": canvas})[0][0]
    rows = rows_of(student.network)(unit_rgb(nchw(canvas)))
    candidates = np.argsort(-best_class(rows)[0], kind="stable")[: exported[0].card.candidates]
    expected = detections_from_rows(rows[candidates], conf=0.3, iou=0.6, max_det=300)
    assert len(expected) > 3
    found = found[found[:, 4] > 0.3]
    distance = np.abs(found[:, None] - expected).max(axis=2)
    # two boxes of this net tie to 1e-7, and rounding decides which of them goes; `verify` checks the NMS exactly
    assert abs(len(found) - len(expected)) <= 1
    assert (distance.min(axis=0) < 0.01).mean() > 0.85


def test_the_same_checkpoint_gives_the_same_bytes(student, exported, tmp_path):
    again = export(ExportConfig(), model=student.path, out=tmp_path, imgsz=SIZE, data=student.data, log=lambda _: None)
    assert again.model_onnx.read_bytes() == exported[0].model_onnx.read_bytes()
    assert again.yolov5_onnx.read_bytes() == exported[0].yolov5_onnx.read_bytes()


@pytest.mark.parametrize("limit", ["max_box_error", "max_score_error"])
def test_a_difference_beyond_the_tolerance_writes_nothing(student, tmp_path, limit):
    config = ExportConfig(**{limit: 1e-12})
    with pytest.raises(EdgestillError, match="against torch") as caught:
        export(config, model=student.path, out=tmp_path / "out", imgsz=SIZE, log=lambda _: None)
    assert f"export.{limit}" in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("imgsz", "better"), [(None, "Use 192x192"), ((384, 650), "Use 384x672"), ((1, 32), "32x32")])
def test_an_image_size_off_the_stride_names_the_next_one(student, tmp_path, imgsz, better):
    with pytest.raises(UsageError, match=better):
        export(ExportConfig(imgsz=imgsz), model=student.path, out=tmp_path, imgsz=161)


def test_a_frame_graph_takes_the_camera_frame(student, tmp_path):
    config = ExportConfig(frame=(108, 192), candidates=100)
    result = export(config, model=student.path, out=tmp_path, imgsz=SIZE, data=student.data, log=lambda _: None)
    assert (result.card.input, result.card.frame_hw, result.card.candidates) == ("frame", (108, 192), 100)
    session = onnxruntime.InferenceSession(result.model_onnx)
    assert session.get_inputs()[0].shape == [1, 108, 192, 3]
    assert result.boxes.nms_differences == 0


def test_without_images_the_check_runs_on_noise(student, tmp_path):
    result = export(ExportConfig(), model=student.path, out=tmp_path, imgsz=SIZE, log=lambda _: None)
    assert result.room is None
    assert (result.card.candidates, result.boxes.images) == (320, 1)


@pytest.mark.parametrize(
    ("rows", "wanted", "expected"),
    [(6300, 0, 320), (25200, 0, 1024), (102_000, 0, 3839), (6300, 100, 100), (63, 0, 63), (63, 500, 63)],
)
def test_candidates_follow_the_number_of_rows_unless_they_are_set(rows, wanted, expected):
    assert candidates_for(rows, wanted) == expected


def test_the_limits_are_tried_on_the_images_and_told(student, tmp_path):
    lines: list[str] = []
    config = ExportConfig(candidates=5)
    result = export(config, model=student.path, out=tmp_path, imgsz=SIZE, data=student.data, log=lines.append)
    assert (result.room.images, result.room.conf) == (6, 0.25)
    assert result.room.reached > 0
    assert result.room.highest_cutoff > 0.25
    assert sum(f"reached on {result.room.reached} of 6 images" in line for line in lines) == 1
    assert result.to_json()["room"]["reached"] == result.room.reached


@pytest.mark.slow
def test_the_official_checkpoint_keeps_its_map_on_coco128(shared: Path, weights: Path, tmp_path: Path):
    from benchmarks.accuracy import coco_accuracy
    from compress.data import load_data
    from compress.data.coco import to_coco
    from compress.data.index import index_dataset
    from compress.models import load_model

    data = load_data(shared / "data" / "coco128" / "data.yaml")
    samples = index_dataset(data, ("val",)).splits["val"].samples
    validation = Validation([(i, s.image) for i, s in enumerate(samples, 1)], to_coco(samples, data.names))
    result = export(ExportConfig(), model=weights, out=tmp_path, imgsz=640, data=validation, log=print)
    run = rows_of(load_model(weights))
    session = onnxruntime.InferenceSession(result.model_onnx)

    def accuracy(infer: Any) -> float:
        found = []
        for image_id, path in validation.images:
            canvas, placement = canvas_of(path, (640, 640))
            boxes = infer(canvas)
            boxes = boxes[boxes[:, 4] > 0.001]
            places = unletterbox(boxes[:, :4], placement.gain, placement.pad_wh, placement.frame_hw).astype(float)
            found += [
                {"image_id": image_id, "category_id": int(c), "bbox": [x1, y1, x2 - x1, y2 - y1], "score": float(s)}
                for (x1, y1, x2, y2), s, c in zip(places.tolist(), boxes[:, 4], boxes[:, 5], strict=True)
            ]
        return coco_accuracy(validation.ground_truth, found, max_det=300, names=data.names).map50_95

    torch_map = accuracy(lambda c: detections_from_rows(run(unit_rgb(nchw(c))), conf=0.001, iou=0.6, max_det=300))
    file_map = accuracy(lambda c: session.run(None, {"canvas": c})[0][0])
    assert abs(torch_map - file_map) <= 0.005
    assert torch_map == pytest.approx(0.3527, abs=0.001)


def listing(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("changes", [{"iou": 0.45}, {"max_det": 100}, {"frame": (108, 192)}, {"nms_iterations": 3}])
def test_another_model_is_not_exported_over_one_that_lies_there(student, exported, tmp_path, monkeypatch, changes):
    """Its flavours and plans may lie there too, and would then be of neither."""
    before = listing(exported[0].model_onnx.parent)
    monkeypatch.setattr("compress.stages.export.trace", lambda *_: pytest.fail("traced"))
    with pytest.raises(OccupiedError, match=next(iter(changes))):
        export(ExportConfig(**changes), model=student.path, out=exported[0].model_onnx.parent, imgsz=SIZE)
    assert listing(exported[0].model_onnx.parent) == before


def test_another_number_of_candidates_is_another_model(student, exported):
    folder = exported[0].model_onnx.parent
    before = listing(folder)
    config = ExportConfig(candidates=exported[0].card.candidates + 1)
    with pytest.raises(OccupiedError, match="candidates"):
        export(config, model=student.path, out=folder, imgsz=SIZE, log=lambda _: None)
    assert listing(folder) == before


def test_other_weights_of_the_same_name_are_another_model(student, exported, tmp_path):
    network = make_network()
    with torch.no_grad():
        network.detect.m[0].bias[0] += 1e-3
    save_model(network, tmp_path / "student.safetensors", {})
    with pytest.raises(OccupiedError, match="other weights"):
        export(ExportConfig(), model=tmp_path / "student.safetensors", out=exported[0].model_onnx.parent, imgsz=SIZE)


def test_files_that_edgestill_did_not_write_are_not_replaced(student, exported, tmp_path):
    foreign = onnx.load(exported[0].yolov5_onnx)
    del foreign.metadata_props[:]
    onnx.save(foreign, tmp_path / SHIPPED)
    with pytest.raises(OccupiedError, match="no file that edgestill wrote"):
        export(ExportConfig(), model=student.path, out=tmp_path, imgsz=SIZE)


def test_both_files_have_the_digest_of_the_checkpoints_network(student, exported):
    result = exported[0]
    cards = [read_card(onnx.load(path), path.name) for path in (result.model_onnx, result.yolov5_onnx)]
    assert {card.weights for card in cards} == {describe(student.path)["weights"]}
    assert cards[0].identity != cards[1].identity, "their NMS differs"
