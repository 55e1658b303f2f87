"""Against numbers that YOLOv5 v7.0 computed; its draws come from Python's `random`, which the tests replay."""

from __future__ import annotations

import json
import random
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compress.config import AugmentConfig
from compress.data import augment, load_data
from compress.data.augment import Warp
from compress.data.dataset import Sample
from compress.data.index import index_dataset
from compress.data.train_dataset import TrainDataset

OFF = AugmentConfig(
    hsv_h=0, hsv_s=0, hsv_v=0, degrees=0, translate=0, scale=0, shear=0, perspective=0, fliplr=0, mosaic=0
)


@pytest.fixture(scope="module")
def numbers(reference: Path) -> dict[str, Any]:
    return json.loads((reference / "data_reference.json").read_text())


def noise() -> np.ndarray:
    """The image that the reference warped and jittered."""
    return np.random.RandomState(0).randint(0, 255, (480, 640, 3), dtype=np.uint8)


def replayed_warp(rng: random.Random, args: dict[str, Any]) -> Warp:
    """The reference's draws, in its order."""
    p, degrees, scale = args["perspective"], args["degrees"], args["scale"]
    shear, translate = args["shear"], args["translate"]
    px, py = rng.uniform(-p, p), rng.uniform(-p, p)
    angle, size = rng.uniform(-degrees, degrees), rng.uniform(1 - scale, 1 + scale)
    sx, sy = rng.uniform(-shear, shear), rng.uniform(-shear, shear)
    tx, ty = rng.uniform(0.5 - translate, 0.5 + translate), rng.uniform(0.5 - translate, 0.5 + translate)
    return Warp(px, py, angle, size, sx, sy, tx, ty)


@pytest.mark.parametrize("case", range(5))
def test_warp_matrices_and_boxes_are_those_of_yolov5(numbers: dict[str, Any], case: int) -> None:
    one = numbers["random_perspective"]["cases"][case]
    warp = replayed_warp(random.Random(one["seed"]), one["args"])
    out_hw = (one["dsize"][1], one["dsize"][0])
    matrix = augment.warp_matrix(warp, (480, 640), out_hw)
    expected = np.array(one["M"])
    np.testing.assert_allclose(matrix[: len(expected)], expected, rtol=1e-12, atol=1e-9)
    boxes = np.array(numbers["random_perspective"]["targets_in"], np.float32)
    warped = augment.warp_boxes(boxes, matrix, out_hw, warp.scale)
    np.testing.assert_allclose(warped, np.array(one["targets_out"]).reshape(-1, 5), atol=2e-4)


def test_a_box_across_the_horizon_of_a_perspective_is_left_out() -> None:
    matrix = augment.warp_matrix(augment.Warp(perspective_x=0.001), (2560, 2560), (1280, 1280))
    boxes = np.array([[0, 200, 900, 350, 1100], [1, 1200, 1200, 1400, 1400]], np.float32)
    assert matrix[2] @ (200, 900, 1) < 0 < matrix[2] @ (350, 900, 1)
    assert augment.warp_boxes(boxes, matrix, (1280, 1280), 1.0)[:, 0].tolist() == [1]


@pytest.mark.parametrize("case", range(5))
def test_warped_pixels_are_those_of_yolov5_under_opencv_5(numbers: dict[str, Any], case: int) -> None:
    import cv2

    if not cv2.__version__.startswith("5."):
        pytest.skip("the reference checksums are those of OpenCV 5")
    one = numbers["random_perspective"]["cases"][case]
    image = noise()
    out_hw = (one["dsize"][1], one["dsize"][0])
    matrix = augment.warp_matrix(replayed_warp(random.Random(one["seed"]), one["args"]), (480, 640), out_hw)
    assert zlib.crc32(augment.warp_image(image, matrix, out_hw).tobytes()) == one["crc32_opencv5"]


def test_hsv_jitter_is_that_of_yolov5(numbers: dict[str, Any]) -> None:
    one = numbers["hsv"]
    rng = np.random.RandomState(one["np_seed"])
    gains = rng.uniform(-1, 1, 3) * one["gains_hsv"] + 1
    np.testing.assert_allclose(gains, one["r"])
    image = noise()
    assert zlib.crc32(image.tobytes()) == one["crc32_in"]
    jittered = augment.jitter_hsv(image, tuple(gains.tolist()))
    assert (int(jittered.sum()), zlib.crc32(jittered.tobytes())) == (one["sum_out"], one["crc32_out"])


def reference_samples(shared: Path, one: dict[str, Any]) -> list[Sample]:
    by_name = {
        s.image.name: s
        for s in index_dataset(load_data(shared / "data/coco128/data.yaml"), ("val",)).splits["val"].samples
    }
    return [by_name[name] for name in one["files"]]


@pytest.mark.parametrize("case", range(3))
def test_mosaics_are_those_of_yolov5(numbers: dict[str, Any], shared: Path, case: int) -> None:
    one = numbers["mosaic"][case]
    samples = reference_samples(shared, one)
    args = {"degrees": 0.0, "translate": 0.1, "scale": 0.5, "shear": 0.0, "perspective": 0.0} | one["over"]
    rng = random.Random(one["seed"])
    centre_y, centre_x = (int(rng.uniform(160, 480)) for _ in range(2))
    assert (centre_y, centre_x) == (one["yc"], one["xc"])
    indices = [one["index"], *rng.choices(range(4), k=3)]
    rng.shuffle(indices)
    assert [samples[i].image.name for i in indices] == one["order"]
    warp = replayed_warp(rng, args)

    dataset = TrainDataset(samples, 320, OFF)
    mosaic = augment.Mosaic((centre_x, centre_y), (indices[0], indices[1], indices[2], indices[3]), warp)
    plan = augment.AugmentPlan(mosaic, None, Warp(), (1.0, 1.0, 1.0), flip_ud=False, flip_lr=False)
    image, boxes = augment.compose(plan, dataset.load, one["index"], 320)
    assert image.shape == (320, 320, 3)
    np.testing.assert_allclose(boxes, one["labels_xyxy_pixels"], atol=1e-3)


def test_the_plan_of_an_item_depends_on_seed_epoch_and_index_alone() -> None:
    def plan(seed: int, epoch: int, index: int) -> augment.AugmentPlan:
        return augment.draw_plan(AugmentConfig(), seed=seed, epoch=epoch, index=index, count=9, imgsz=64)

    assert plan(1, 2, 3) == plan(1, 2, 3)
    assert len({plan(*key) for key in ((1, 2, 3), (0, 2, 3), (1, 1, 3), (1, 2, 4), (-1, 2, 3))}) == 5


def test_draws_stay_within_their_settings_and_the_own_image_is_in_the_mosaic() -> None:
    config = AugmentConfig(mixup=1.0, degrees=10, shear=3, perspective=0.001, flipud=0.5)
    for index in range(200):
        plan = augment.draw_plan(config, seed=0, epoch=0, index=index % 7, count=7, imgsz=64)
        assert plan.mosaic is not None
        assert plan.mixup is not None
        assert index % 7 in plan.mosaic.indices
        assert all(32 <= value < 96 for value in plan.mosaic.centre_xy)
        warp = plan.mosaic.warp
        assert 0.5 <= warp.scale <= 1.5
        assert abs(warp.angle) <= 10
        assert 0.4 <= warp.translate_x <= 0.6
        assert 0 < plan.mixup.share < 1
        assert abs(plan.hsv[0] - 1) <= 0.015


def test_without_augmentation_the_plan_is_neutral() -> None:
    plan = augment.draw_plan(OFF, seed=5, epoch=1, index=2, count=3, imgsz=64)
    assert plan == augment.AugmentPlan(None, None, Warp(), (1.0, 1.0, 1.0), False, False)


def test_boxes_that_became_thin_small_or_mostly_hidden_are_left_out() -> None:
    boxes = np.array(
        [[0, 10, 10, 30, 30], [1, 95, 95, 125, 125], [2, 50, 50, 51, 90], [3, -50, 0, -10, 40]], np.float32
    )
    kept = augment.warp_boxes(boxes, np.eye(3), (100, 100), 1.0)
    np.testing.assert_array_equal(kept, [[0, 10, 10, 30, 30]])


def test_pixels_and_normalised_labels_are_inverse() -> None:
    labels = np.array([[3, 0.5, 0.4, 0.2, 0.3]], np.float32)
    np.testing.assert_allclose(augment.to_normalised(augment.to_pixels(labels, 200, 100), 200, 100), labels, atol=1e-6)


def test_flips_move_image_and_labels_together() -> None:
    image = np.zeros((10, 20, 3), np.uint8)
    image[1, 2] = 255
    labels = np.array([[0, 2.5 / 20, 1.5 / 10, 0.05, 0.1]], np.float32)
    flipped, moved = augment.flip(image, labels, up_down=True, left_right=True)
    y, x = np.argwhere(flipped.any(2))[0]
    np.testing.assert_allclose(moved[0, 1:3], [(x + 0.5) / 20, (y + 0.5) / 10], atol=1e-6)


def test_mixup_blends_pixels_and_joins_boxes() -> None:
    first, second = np.full((2, 2, 3), 100, np.uint8), np.full((2, 2, 3), 201, np.uint8)
    boxes = np.ones((1, 5), np.float32)
    image, together = augment.mix(first, boxes, second, 2 * boxes, 0.5)
    assert image.dtype == np.uint8
    assert (image == 150).all()
    assert together[:, 0].tolist() == [1, 2]
