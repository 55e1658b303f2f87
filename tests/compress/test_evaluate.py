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
    batch_labels,
    coco_metrics,
    evaluate,
    yolo_metrics,
)
from compress.models.checkpoint import load_model
from compress.training.objective import detection_loss
from compress.training.prepare import new_model
from runtime.boxes import xywh_to_xyxy


@pytest.fixture
def samples(tiny_data: Dataset) -> tuple[Sample, ...]:
    return tiny_data.splits["val"].samples


def perfect(samples: tuple[Sample, ...]) -> list[ImageResult]:
    """Each label as a detection of score 0.9."""
    return [one._replace(boxes=np.insert(one.labels[:, [1, 2, 3, 4, 0]], 4, 0.9, axis=1)) for one in blind(samples)]


def blind(samples: tuple[Sample, ...]) -> list[ImageResult]:
    """Labels, and nothing detected."""
    (batch,) = val_batches(samples, imgsz=64, batch=len(samples), stride=32)
    nothing = np.zeros((0, 6), np.float32)
    return [ImageResult(sample, nothing, batch_labels(batch, i)) for i, sample in enumerate(batch.samples)]


def test_labels_return_from_the_batch_to_original_pixels(samples: tuple[Sample, ...]) -> None:
    for one in blind(samples):
        height, width = one.sample.size_hw
        expected = xywh_to_xyxy(one.sample.labels[:, 1:]) * np.array([width, height, width, height], np.float32)
        np.testing.assert_allclose(one.labels[:, 1:], expected, atol=0.01)


def test_labels_as_detections_score_one_by_both_protocols(samples: tuple[Sample, ...], tiny_data: Dataset) -> None:
    found = perfect(samples)
    assert yolo_metrics(found).map50_95 == pytest.approx(0.995, abs=0.01)
    assert coco_metrics(found, tiny_data.names).map50_95 == pytest.approx(1.0)


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
