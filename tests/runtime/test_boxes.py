from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from runtime import boxes as module
from runtime.boxes import (
    best_first,
    detections_from_rows,
    float32_below,
    nms,
    unletterbox,
    xywh_to_xyxy,
    xyxy_to_xywh,
)

RUNS = [f"im{image}_{size}" for image in (127, 544, 72, 309) for size in (640, 320)]
DETECT = {"conf": 0.25, "iou": 0.45, "max_det": 1000}
SETTINGS = {"nms_c25_i45": DETECT, "nms_c25_i45_agnostic": DETECT | {"agnostic": True}}


def pairwise_iou(a, b):
    """(N, M) overlaps of boxes (N, 4) and (M, 4), by the definition; 0 where both are empty."""
    a, b = a[:, None], b[None]
    sides = np.clip(np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2]), 0, None)
    area_a, area_b = (np.prod(x[..., 2:] - x[..., :2], axis=-1) for x in (a, b))
    shared = sides.prod(axis=-1)
    union = area_a + area_b - shared
    return np.divide(shared, union, out=np.zeros_like(shared), where=union != 0)


def greedy(boxes, scores, classes, iou, max_det, agnostic=False):
    """The definition: best first, one box at a time, overlap in float32 on class-shifted boxes."""
    order = np.argsort(-scores, kind="stable")[:30_000]
    offset = np.zeros_like(scores) if agnostic else classes.astype(np.float32) * np.float32(7680)
    shifted = boxes + offset[:, None]
    kept = []
    for index in order:
        if len(kept) == max_det:
            break
        overlaps = pairwise_iou(shifted[index][None], shifted[kept].reshape(-1, 4))[0]
        if not (overlaps.astype(np.float64) > iou).any():
            kept.append(index)
    return np.array(kept, np.intp)


def scene(rng, count, classes=3, extent=300.0):
    centre = rng.uniform(0, extent, (max(1, count // 8), 2))[rng.integers(0, max(1, count // 8), count)]
    xy = centre + rng.normal(0, 8, (count, 2))
    wh = rng.uniform(4, 60, (count, 2))
    boxes = np.concatenate([xy - wh / 2, xy + wh / 2], 1).astype(np.float32)
    scores = rng.choice(np.linspace(0.01, 1, 50), count).astype(np.float32)  # many ties
    return boxes, scores, rng.integers(0, classes, count)


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("name", SETTINGS)
def test_nms_is_bit_equal_to_the_reference(reference, run, name):
    with np.load(reference / f"{run}.npz") as stored:
        in_row_order = np.argsort(stored["top200_obj_rows"])  # every row over conf 0.25 is among these
        found = detections_from_rows(stored["top200_decoded"][in_row_order], **SETTINGS[name])
        assert np.array_equal(found, stored[name])


def test_multi_label_nms_is_bit_equal_to_the_reference(reference):
    with np.load(reference / "im127_320.npz") as stored:
        found = detections_from_rows(stored["decoded"][0], conf=0.001, iou=0.6, max_det=300, multi_label=True)
        assert np.array_equal(found, stored["nms_c001_i60_multi"])


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("name", [*SETTINGS, "nms_c001_i60_multi"])
def test_boxes_return_to_the_original_image_as_in_the_reference(reference, run, name):
    images = json.loads((reference / "inference_reference.json").read_text())["images"]
    number, size = run[2:].split("_")
    height, width, _ = images[number]["decoded_bgr_shape"]
    gain = min(int(size) / height, int(size) / width)
    pad_wh = (int(size) - width * gain) / 2, (int(size) - height * gain) / 2
    with np.load(reference / f"{run}.npz") as stored:
        back = unletterbox(stored[name][:, :4], gain, pad_wh, (height, width))
        assert np.abs(back - stored[f"{name}_native"][:, :4]).max(initial=0) <= 1e-4


def test_unletterbox_agrees_with_the_recorded_cases(reference):
    for case in json.loads((reference / "data_reference.json").read_text())["scale_boxes"]:
        (canvas_height, canvas_width), (height, width) = case["img1"], case["img0"]
        gain = min(canvas_height / height, canvas_width / width)
        pad_wh = (canvas_width - width * gain) / 2, (canvas_height - height * gain) / 2
        if "ratio_pad" in case:
            gain, pad_wh = case["ratio_pad"][0][0], tuple(case["ratio_pad"][1])
        back = unletterbox(np.array(case["inp"], np.float32), gain, pad_wh, (height, width))
        assert back.tolist() == case["out"]


@pytest.mark.parametrize("agnostic", [False, True])
@pytest.mark.parametrize(("count", "max_det"), [(0, 10), (1, 10), (7, 3), (300, 300), (900, 20), (5000, 300)])
def test_nms_equals_the_greedy_definition(count, max_det, agnostic):
    rng = np.random.default_rng(count)
    for iou in (0.0, 0.45, 0.6):
        boxes, scores, classes = scene(rng, count)
        kept = nms(boxes, scores, classes, iou=iou, max_det=max_det, agnostic=agnostic)
        assert kept.tolist() == greedy(boxes, scores, classes, iou, max_det, agnostic).tolist()


def test_nms_looks_past_the_first_candidates_when_they_do_not_suffice():
    rng = np.random.default_rng(0)
    crowd = np.tile(np.array([[0, 0, 10, 10]], np.float32), (3000, 1))  # these leave one box
    boxes = np.concatenate([crowd, scene(rng, 500)[0] + 100])
    scores = np.concatenate([np.full(3000, 0.9), rng.uniform(0.1, 0.5, 500)]).astype(np.float32)
    classes = np.zeros(3500, int)
    kept = nms(boxes, scores, classes, iou=0.5, max_det=100)
    assert len(kept) > 50
    assert kept.tolist() == greedy(boxes, scores, classes, 0.5, 100).tolist()


def test_a_chain_of_suppressions_is_resolved_in_order():
    """Each box overlaps the next over the limit and no other, so every second one stays: the deepest chain there is."""
    left = np.arange(200, dtype=np.float32) * 3
    boxes = np.stack([left, np.zeros(200, np.float32), left + 10, np.full(200, 10, np.float32)], 1)
    scores = np.linspace(1, 0.1, 200, dtype=np.float32)
    assert nms(boxes, scores, np.zeros(200), iou=0.5, max_det=300).tolist() == list(range(0, 200, 2))


def test_the_threshold_is_strict():
    boxes = np.array([[0, 0, 10, 10], [0, 0, 10, 5]], np.float32)  # overlap exactly one half
    assert len(nms(boxes, np.array([0.9, 0.8], np.float32), np.zeros(2), iou=0.5, max_det=9)) == 2
    assert len(nms(boxes, np.array([0.9, 0.8], np.float32), np.zeros(2), iou=0.49, max_det=9)) == 1


def test_huge_boxes_of_two_classes_meet_as_in_the_original():
    """Shifting by 7680 px keeps classes apart only for boxes smaller than that; the original has the same limit."""
    boxes = np.array([[0, 0, 20_000, 20_000], [-7680, -7680, 12_320, 12_320]], np.float32)
    scores, classes = np.array([0.9, 0.8], np.float32), np.array([0, 1])
    assert nms(boxes, scores, classes, iou=0.6, max_det=9).tolist() == [0]


def test_empty_boxes_suppress_nothing():
    boxes = np.zeros((3, 4), np.float32)
    assert len(nms(boxes, np.ones(3, np.float32), np.zeros(3), iou=0.5, max_det=9)) == 3


@given(st.floats(0, 1))
def test_comparing_with_float32_below_is_comparing_with_the_double(value):
    below = float32_below(value)
    assert float(below) <= value
    assert float(np.nextafter(below, np.float32(np.inf))) > value


@given(hnp.arrays(np.float32, st.integers(0, 60), elements=st.sampled_from([0.0, 0.25, 0.5, 1.0])), st.integers(1, 70))
def test_best_first_is_the_head_of_a_stable_sort(scores, count):
    assert best_first(scores, count).tolist() == np.argsort(-scores, kind="stable")[:count].tolist()


def rows_of(*rows: tuple[float, ...]) -> np.ndarray:
    return np.array(rows, np.float32)


def test_single_label_takes_the_best_class_and_multi_label_each_over_conf():
    rows = rows_of((50, 50, 20, 20, 0.9, 0.5, 0.8), (90, 90, 20, 20, 0.2, 1, 1))
    single = detections_from_rows(rows, conf=0.25, iou=0.5)
    assert single[:, 4:].tolist() == [[pytest.approx(0.72), 1]]
    multi = detections_from_rows(rows, conf=0.25, iou=0.5, multi_label=True)
    assert multi[:, 5].tolist() == [1, 0]
    assert single[0, :4].tolist() == [40, 40, 60, 60]


def test_both_thresholds_are_strict_and_apply_to_objectness_too():
    assert len(detections_from_rows(rows_of((50, 50, 20, 20, 0.25, 1.0)), conf=0.25, iou=0.5)) == 0
    assert len(detections_from_rows(rows_of((50, 50, 20, 20, 0.5, 0.5)), conf=0.25, iou=0.5)) == 0
    assert len(detections_from_rows(rows_of((50, 50, 20, 20, 0.5, 0.51)), conf=0.25, iou=0.5)) == 1


def test_equal_classes_give_the_lowest_and_a_class_filter_comes_before_suppression():
    rows = rows_of((50, 50, 20, 20, 1, 0.5, 0.5), (51, 50, 20, 20, 1, 0.1, 0.4))
    assert detections_from_rows(rows, conf=0.25, iou=0.5)[:, 5].tolist() == [0, 1]
    assert detections_from_rows(rows, conf=0.25, iou=0.5, agnostic=True)[:, 5].tolist() == [0]
    assert detections_from_rows(rows, conf=0.25, iou=0.5, agnostic=True, classes=[1])[:, 5].tolist() == [1]


@pytest.mark.parametrize("columns", [6, 85])
def test_no_rows_give_no_boxes(columns):
    for multi_label in (False, True):
        empty = detections_from_rows(np.zeros((0, columns), np.float32), conf=0.1, iou=0.5, multi_label=multi_label)
        assert (empty.shape, empty.dtype) == ((0, 6), np.float32)


boxes_strategy = hnp.arrays(np.float32, (5, 4), elements=st.floats(0, 500, width=32))


@settings(deadline=None)
@given(boxes_strategy)
def test_converting_there_and_back_is_identity(raw):
    corners = np.concatenate([np.minimum(raw[:, :2], raw[:, 2:]), np.maximum(raw[:, :2], raw[:, 2:])], 1)
    assert np.allclose(xywh_to_xyxy(xyxy_to_xywh(corners)), corners, atol=1e-3)


def test_unletterbox_clips_to_the_frame_and_takes_no_boxes():
    assert unletterbox(np.array([[-9, -9, 999, 999]]), 1.0, (0, 0), (48, 64)).tolist() == [[0, 0, 64, 48]]
    assert unletterbox(np.empty((0, 4)), 0.5, (3.0, 4.0), (48, 64)).shape == (0, 4)


def test_the_block_size_changes_nothing(monkeypatch):
    boxes, scores, classes = scene(np.random.default_rng(5), 1500)
    expected = nms(boxes, scores, classes, iou=0.5, max_det=200).tolist()
    for block, first in ((1, 1), (7, 30), (5000, 5000)):
        monkeypatch.setattr(module, "BLOCK", block)
        monkeypatch.setattr(module, "FIRST_CANDIDATES", first)
        assert nms(boxes, scores, classes, iou=0.5, max_det=200).tolist() == expected
