from __future__ import annotations

import contextlib
import copy
import gzip
import io
import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.accuracy import (
    average_precision,
    category_ids,
    coco_accuracy,
    coco_rows,
    detector_accuracy,
    jackknife_maps,
    match,
)
from runtime.card import Batches
from runtime.detections import Detections
from runtime.errors import InputError

COCO_KEYS = ("map50_95", "map50", "map75", "small", "medium", "large")


@pytest.fixture(scope="module")
def expected(reference: Path) -> dict[str, Any]:
    return json.loads((reference / "val_reference.json").read_text())


@pytest.fixture(scope="module")
def stats(reference: Path) -> dict[str, np.ndarray]:
    return dict(np.load(reference / "val_stats_v7_c128_640_b32.npz"))


@pytest.fixture(scope="module")
def coco128(shared: Path) -> dict[str, Any]:
    return json.loads((shared / "data/coco128/annotations/instances.json").read_text())


@pytest.fixture(scope="module")
def predictions(reference: Path) -> list[dict[str, Any]]:
    with gzip.open(reference / "val_predictions_v7_c128_640_b32.json.gz") as file:
        return json.load(file)


def pycocotools_accuracy(truth: dict[str, Any], found: list[dict[str, Any]], max_det: int) -> dict[str, float]:
    """The first six numbers of COCO's table and recall, by pycocotools; -1 if undefined."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = copy.deepcopy(truth)
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(copy.deepcopy(found)), "bbox")
        evaluation.params.maxDets = [1, 10, max_det]
        evaluation.evaluate()
        evaluation.accumulate()
    precision, recall = evaluation.eval["precision"][..., -1], evaluation.eval["recall"][..., 0, -1]
    cuts = (precision[..., 0], precision[:1, ..., 0], precision[5:6, ..., 0], *(precision[..., i] for i in (1, 2, 3)))
    values = [*cuts, recall]
    means = [float(v[v > -1].mean()) if (v > -1).any() else -1.0 for v in values]
    return dict(zip((*COCO_KEYS, "recall"), means, strict=True))


def truth_of(boxes: list[tuple[int, int, list[float], int]], images: int, classes: int) -> dict[str, Any]:
    """COCO annotations from (image, class, box xywh, iscrowd)."""
    return {
        "images": [{"id": i, "width": 640, "height": 640} for i in range(1, images + 1)],
        "categories": [{"id": k, "name": f"class {k}"} for k in range(classes)],
        "annotations": [
            {"id": n, "image_id": i, "category_id": k, "bbox": box, "area": box[2] * box[3], "iscrowd": crowd}
            for n, (i, k, box, crowd) in enumerate(boxes, 1)
        ],
    }


def made_up(seed: int, classes: int, crowd: float) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Labels and detections near them, with scores of two decimals so that many are equal."""
    rng = np.random.default_rng(seed)
    boxes, found = [], []
    for image in range(1, 9):
        for _ in range(rng.integers(0, 12)):
            kind, corner, size = int(rng.integers(classes)), rng.uniform(0, 400, 2), rng.uniform(4, 200, 2)
            boxes.append((image, kind, [*corner.tolist(), *size.tolist()], int(rng.random() < crowd)))
            for _ in range(rng.integers(0, 4)):
                near = np.concatenate([corner + rng.normal(0, 8, 2), size * rng.uniform(0.8, 1.2, 2)]).tolist()
                score = round(float(rng.random()), 2)
                found.append({"image_id": image, "category_id": kind, "bbox": near, "score": score})
    boxes.append((1, 0, [10.0, 10.0, 50.0, 50.0], 0))
    found.append({"image_id": 1, "category_id": 0, "bbox": [10.0, 10.0, 48.0, 50.0], "score": 0.5})
    return truth_of(boxes, images=8, classes=classes), found


# ---------------------------------------------------------------------------------------------------- YOLOv5's protocol


def test_yolov5_figures_equal_the_reference_run(stats: dict[str, np.ndarray], expected: dict[str, Any]) -> None:
    run = expected["v7_c128_640_b32"]
    found = average_precision(stats["tp"], stats["conf"], stats["pred_cls"], stats["target_cls"])
    assert found.precision == pytest.approx(run["P"], abs=1e-6)
    assert found.recall == pytest.approx(run["R"], abs=1e-6)
    assert found.map50 == pytest.approx(run["mAP50"], abs=1e-6)
    assert found.map50_95 == pytest.approx(run["mAP50_95"], abs=1e-6)
    np.testing.assert_allclose(found.ap.mean(axis=0), run["per_iou"], atol=1e-6)


def test_yolov5_figures_of_each_class_equal_the_reference_run(
    stats: dict[str, np.ndarray], expected: dict[str, Any]
) -> None:
    found = average_precision(stats["tp"], stats["conf"], stats["pred_cls"], stats["target_cls"])
    rows = np.column_stack([found.class_precision, found.class_recall, found.ap[:, 0], found.ap.mean(axis=1)])
    table = expected["per_class_v7_c128_640_b32 (class: P,R,AP50,AP)"]
    assert [str(k) for k in found.class_ids] == list(table)
    np.testing.assert_allclose(rows, list(table.values()), atol=1e-6)


def test_matching_equals_the_reference_case(reference: Path) -> None:
    case = np.load(reference / "match_reference.npz")
    correct = match(case["detections_xyxy_conf_cls"], case["labels_cls_xyxy"], case["iou_thresholds"])
    np.testing.assert_array_equal(correct, case["correct"])


def test_a_detection_gets_no_second_choice() -> None:
    labels = np.array([[0, 0, 0, 10, 10], [0, 0, 0, 10, 12]], np.float32)
    detections = np.array([[0, 0, 10, 10, 0.9, 0], [0, 0, 10, 10.4, 0.8, 0]], np.float32)
    assert match(detections, labels)[:, 0].tolist() == [True, False]


def test_the_most_confident_detection_of_a_label_is_right_even_when_listed_last() -> None:
    labels = np.array([[0, 0, 0, 10, 10]], np.float32)
    detections = np.array([[0, 0, 10, 10, 0.2, 0], [0, 0, 10, 9, 0.8, 0]], np.float32)
    assert match(detections, labels)[:, 0].tolist() == [False, True]


@pytest.mark.parametrize(("detections", "labels"), [(0, 3), (3, 0), (0, 0)])
def test_matching_nothing_finds_nothing(detections: int, labels: int) -> None:
    correct = match(np.zeros((detections, 6), np.float32), np.zeros((labels, 5), np.float32))
    assert correct.shape == (detections, 10)
    assert not correct.any()


@given(st.integers(0, 2**31), st.integers(1, 30), st.integers(1, 10))
@settings(max_examples=40, deadline=None)
def test_a_label_is_never_found_twice(seed: int, n: int, m: int) -> None:
    rng = np.random.default_rng(seed)
    corners = rng.uniform(0, 20, (n + m, 2))
    boxes = np.concatenate([corners, corners + rng.uniform(5, 30, (n + m, 2))], axis=1)
    detections = np.column_stack([boxes[:n], rng.random(n), rng.integers(0, 2, n)]).astype(np.float32)
    labels = np.column_stack([rng.integers(0, 2, m), boxes[n:]]).astype(np.float32)
    correct = match(detections, labels)
    assert (correct.sum(axis=0) <= m).all()
    for kind in (0, 1):
        assert correct[detections[:, 5] == kind].sum(axis=0).max(initial=0) <= (labels[:, 0] == kind).sum()


def test_perfect_detections_have_an_ap_of_one() -> None:
    found = average_precision(np.ones((4, 10), bool), np.full(4, 0.9), np.arange(4) % 2, np.arange(4) % 2)
    assert found.map50_95 == pytest.approx(0.995)  # the last of 100 steps falls from 1 to 0: YOLOv5's known ceiling
    assert found.recall == pytest.approx(1.0)


def test_no_detection_is_zero_and_no_label_is_zero() -> None:
    nothing = np.zeros((0, 10), bool)
    empty = np.zeros(0)
    assert average_precision(nothing, empty, empty, np.array([0, 1])).map50_95 == 0
    assert average_precision(nothing, empty, empty, empty).map50_95 == 0
    assert average_precision(np.zeros((2, 10), bool), np.ones(2), np.zeros(2), empty).precision == 0


# ---------------------------------------------------------------------------------------------------- COCO's protocol


def test_coco_figures_equal_the_reference_run(
    coco128: dict[str, Any], predictions: list[dict[str, Any]], expected: dict[str, Any]
) -> None:
    found = coco_accuracy(coco128, predictions)
    twelve = expected["v7_c128_640_b32"]["pycocotools_12"]
    assert [getattr(found, key) for key in COCO_KEYS] == pytest.approx(twelve[:6], abs=1e-12)
    assert found.recall == pytest.approx(twelve[8], abs=1e-12)
    assert (found.images, found.instances) == (128, 929)
    assert len(found.per_class) == 71


def test_the_arguments_are_left_as_they_were(coco128: dict[str, Any], predictions: list[dict[str, Any]]) -> None:
    truth, found = copy.deepcopy(coco128), copy.deepcopy(predictions[:50])
    coco_accuracy(truth, found)
    assert truth == coco128
    assert found == predictions[:50]


@pytest.mark.parametrize("max_det", [100, 300, 7])
@pytest.mark.parametrize(("classes", "crowd"), [(1, 0.0), (3, 0.2), (80, 0.1)])
def test_coco_figures_equal_pycocotools(classes: int, crowd: float, max_det: int) -> None:
    truth, found = made_up(classes, classes, crowd)
    ours, theirs = coco_accuracy(truth, found, max_det=max_det), pycocotools_accuracy(truth, found, max_det)
    for key, value in theirs.items():
        own = getattr(ours, key)
        assert (-1.0 if own is None else own) == pytest.approx(value, abs=1e-12), key


def test_more_detections_allowed_than_100_gives_a_valid_figure() -> None:
    boxes = [[5.0 * i, 0.0, 4.0, 4.0] for i in range(150)]
    truth = truth_of([(1, 0, box, 0) for box in boxes], images=1, classes=1)
    found = [{"image_id": 1, "category_id": 0, "bbox": box, "score": 0.9} for box in boxes]
    assert coco_accuracy(truth, found, max_det=300).map50_95 == pytest.approx(1.0)
    assert coco_accuracy(truth, found, max_det=100).map50_95 == pytest.approx(100 / 150, abs=0.01)


def test_no_detections_are_an_accuracy_of_zero() -> None:
    truth, _ = made_up(0, 2, 0.0)
    found = coco_accuracy(truth, [])
    assert (found.map50_95, found.map50, found.recall) == (0.0, 0.0, 0.0)
    assert set(found.per_class.values()) == {0.0}


def test_a_ground_truth_without_objects_has_no_accuracy() -> None:
    with pytest.raises(InputError, match="no labelled object"):
        coco_accuracy(truth_of([], images=2, classes=1), [])


def test_a_detection_of_an_unknown_image_is_refused() -> None:
    truth, _ = made_up(0, 2, 0.0)
    with pytest.raises(InputError, match="99"):
        coco_accuracy(truth, [{"image_id": 99, "category_id": 0, "bbox": [0, 0, 1, 1], "score": 0.5}])


def test_a_size_without_objects_is_none() -> None:
    truth = truth_of([(1, 0, [0.0, 0.0, 200.0, 200.0], 0)], images=1, classes=1)
    found = coco_accuracy(truth, [{"image_id": 1, "category_id": 0, "bbox": [0, 0, 200, 200], "score": 0.5}])
    assert (found.small, found.medium) == (None, None)
    assert found.large == pytest.approx(1.0)


def test_names_are_given_in_the_order_of_the_categories() -> None:
    truth = truth_of([(1, 1, [0.0, 0.0, 20.0, 20.0], 0)], images=1, classes=2)
    assert list(coco_accuracy(truth, [], names=["bolt", "nut"]).per_class) == ["nut"]
    with pytest.raises(InputError, match="1 class names for 2"):
        coco_accuracy(truth, [], names=["bolt"])


# ---------------------------------------------------------------------------------------------------- a whole detector


class KnowingDetector:
    """Returns the labels of the frame whose first pixel is the image's number."""

    card = SimpleNamespace(names=("nut", "bolt"), batches=Batches(2, 2))

    def __init__(self, boxes: dict[int, list[list[float]]]) -> None:
        self.boxes, self.confs, self.calls = boxes, set(), []

    def preprocess(self, frames: Sequence[np.ndarray]) -> list[int]:
        self.calls.append(len(frames))
        return [int(frame[0, 0, 0]) for frame in frames]

    def infer(self, prepared: list[int]) -> list[np.ndarray]:
        return [np.array(self.boxes[one], np.float32).reshape(-1, 6) for one in prepared]

    def postprocess(self, raw: list[np.ndarray], prepared: list[int], conf: float | None = None) -> list[Detections]:
        self.confs.add(conf)
        return [Detections.from_rows(rows) for rows in raw]


def test_a_detector_that_knows_the_labels_is_perfect(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        cv2.imwrite(str(tmp_path / f"{number}.png"), np.full((64, 64, 3), number, np.uint8))
    truth = truth_of([(1, 0, [1.0, 2.0, 30.0, 40.0], 0), (2, 1, [5.0, 5.0, 50.0, 50.0], 0)], images=3, classes=2)
    truth["categories"] = [{"id": 0, "name": "bolt"}, {"id": 1, "name": "nut"}]
    detector = KnowingDetector({1: [[1, 2, 31, 42, 0.9, 1]], 2: [[5, 5, 55, 55, 0.9, 0]], 3: []})
    found = detector_accuracy(detector, [(n, tmp_path / f"{n}.png") for n in (1, 2, 3)], truth)
    assert found.map50_95 == pytest.approx(1.0)
    assert found.images == 3
    assert detector.calls == [2, 1], "calls of the model's batch"
    assert detector.confs == {0.001}


def test_coco_rows_hold_left_top_width_height() -> None:
    (row,) = coco_rows(3, Detections.from_rows(np.array([[10, 20, 40, 60, 0.5, 1]], np.float32)), [4, 1])
    assert row == {"image_id": 3, "category_id": 1, "bbox": [10, 20, 30, 40], "score": 0.5}


def test_a_class_that_the_annotations_lack_is_named() -> None:
    with pytest.raises(InputError, match="washer"):
        category_ids(["bolt", "washer"], [{"id": 3, "name": "bolt"}])


def one_object_an_image(
    count: int, found: Sequence[int], empty: int = 0
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Ground truth of `count` images with an object, then `empty` without; detections in those of `found`."""
    box = [10.0, 10.0, 40.0, 40.0]
    truth = {
        "images": [{"id": index} for index in range(count + empty)],
        "categories": [{"id": 0, "name": "bolt"}],
        "annotations": [
            {"id": index + 1, "image_id": index, "category_id": 0, "bbox": box, "area": 1600.0}
            for index in range(count)
        ],
    }
    return truth, [{"image_id": index, "category_id": 0, "bbox": box, "score": 0.9} for index in found]


def test_leaving_out_groups_gives_the_accuracy_of_the_others() -> None:
    truth, detections = one_object_an_image(4, found=[0, 1, 2])
    whole, *left_out = jackknife_maps(truth, detections, groups=4)
    assert whole == pytest.approx(0.75, abs=0.01)
    assert left_out == pytest.approx([2 / 3, 2 / 3, 2 / 3, 1.0], abs=0.01)


def test_no_group_leaves_images_without_objects_alone() -> None:
    truth, detections = one_object_an_image(2, found=[0, 1], empty=9)
    assert len(jackknife_maps(truth, detections)) == 3
    assert len(jackknife_maps(*one_object_an_image(1, found=[0], empty=3))) == 1
