from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from compress.data import Dataset, load_data
from compress.data.dataset import Sample
from compress.data.index import index_dataset
from compress.data.loader import val_batches
from compress.evaluate import (
    ImageResult,
    coco_metrics,
    evaluate,
    image_result,
    yolo_metrics,
)
from compress.models.checkpoint import load_model
from compress.training.objective import detection_loss
from compress.training.prepare import new_model
from runtime.boxes import xywh_to_xyxy
from tests.compress.data.conftest import write_image


@pytest.fixture
def samples(tiny_data: Dataset) -> tuple[Sample, ...]:
    return tiny_data.splits["val"].samples


def perfect(samples: tuple[Sample, ...], imgsz: int = 64) -> list[ImageResult]:
    """Each label, where it is in the batch, as a detection of score 0.9."""
    (batch,) = val_batches(samples, imgsz=imgsz, batch=len(samples), stride=32)
    height, width = batch.images.shape[2:]
    found = []
    for index in range(len(batch.samples)):
        rows = batch.targets[batch.targets[:, 0] == index].numpy()
        boxes = xywh_to_xyxy(rows[:, 2:] * np.array([width, height, width, height], np.float32))
        detected = np.column_stack([boxes, np.full(len(rows), 0.9), rows[:, 1]]).astype(np.float32)
        found.append(image_result(detected, batch, index))
    return found


def blind(samples: tuple[Sample, ...]) -> list[ImageResult]:
    """Labels, and nothing detected."""
    nothing = np.zeros((0, 6), np.float32)
    return [one._replace(found=nothing) for one in perfect(samples)]


def test_labels_return_from_the_batch_to_original_pixels(samples: tuple[Sample, ...]) -> None:
    for one in blind(samples):
        height, width = one.sample.size_hw
        expected = xywh_to_xyxy(one.sample.labels[:, 1:]) * np.array([width, height, width, height], np.float32)
        np.testing.assert_allclose(one.labels[:, 1:], expected, atol=0.01)


def test_labels_as_detections_score_one_by_both_protocols(samples: tuple[Sample, ...], tiny_data: Dataset) -> None:
    found = perfect(samples)
    assert yolo_metrics(found).map50_95 == pytest.approx(0.995, abs=0.01)
    assert coco_metrics(found, tiny_data.names).map50_95 == pytest.approx(1.0)


def test_the_rounding_of_a_resized_image_costs_no_accuracy_by_cocos_protocol(tmp_path: Path) -> None:
    write_image(tmp_path / "wide.png", 1000, 561)
    corners = np.array([[0.02, 0.1], [0.5, 0.5], [0.97, 0.9]], np.float32)
    labels = np.column_stack([np.zeros(3), corners, np.full((3, 2), 0.02)]).astype(np.float32)
    wide = Sample(tmp_path / "wide.png", "wide.png", labels, (561, 1000), "")
    found = perfect((wide,), imgsz=320)  # 320 x 179: the axes' gains are 0.32 and 0.3191
    assert np.abs(found[0].boxes() - found[0].boxes(exact=True)).max() > 2
    assert coco_metrics(found, ("part",)).map50_95 == pytest.approx(1.0)
    assert yolo_metrics(found).map50_95 == pytest.approx(0.995, abs=0.01)


def test_nothing_detected_scores_zero(samples: tuple[Sample, ...], tiny_data: Dataset) -> None:
    found = blind(samples)
    assert yolo_metrics(found).map50 == 0
    assert coco_metrics(found, tiny_data.names).map50 == 0


def test_the_model_is_left_as_it_is_and_every_span_is_timed(samples: tuple[Sample, ...], tiny_data: Dataset) -> None:
    from compress.config import TrainConfig

    model = new_model(tiny_data.names, scale="p", weights=None, log=lambda _: None).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    loss = detection_loss(model, TrainConfig(imgsz=64))
    result = evaluate(model, samples, imgsz=64, batch=3, device="cpu", loss=loss)
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert set(result.speed_ms) == {"load", "preprocess", "inference", "nms"}
    assert result.images == len(samples)
    assert result.loss is not None
    assert all(value > 0 for value in result.loss)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("batch", "rect", "coco", "yolo"),
    [(32, True, (0.36532, 0.56777), (0.36088, 0.56013)), (8, False, (0.35825, 0.55527), (0.35458, 0.54966))],
    ids=["rect", "square"],
)
def test_yolov5n_on_coco128_scores_what_the_original_scores(
    batch: int, rect: bool, coco: tuple[float, float], yolo: tuple[float, float], weights: Path, shared: Path
) -> None:
    data = load_data(shared / "data" / "coco128" / "data.yaml")
    samples = index_dataset(data, ("val",)).splits["val"].samples
    result = evaluate(
        load_model(weights), samples, imgsz=640, batch=batch, rect=rect, device="cpu",
        annotations=shared / "data" / "coco128" / "annotations" / "instances.json",
    )  # fmt: skip
    assert (result.yolo.map50_95, result.yolo.map50) == pytest.approx(yolo, abs=2e-4)
    assert result.coco is not None
    assert (result.coco.map50_95, result.coco.map50) == pytest.approx(coco, abs=1e-3)
