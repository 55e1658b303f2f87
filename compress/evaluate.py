"""Accuracy of a torch model on a split.

In: a model and samples. Out: YOLOv5's own figures, the COCO figures, and the milliseconds that an image took.
Follows YOLOv5 v7.0's validation: rectangular batches half a stride wider than needed, multi-label NMS at confidence
0.001, boxes and labels compared in pixels of the original images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.accuracy import Accuracy, YoloMetrics, average_precision, coco_accuracy, coco_rows, match
from compress.compute.device import pick_device, to_device
from compress.compute.numerics import flush_denormals
from compress.compute.precision import computing_in, pick_precision
from compress.compute.threads import limit_threads
from compress.compute.timing import Stopwatch
from compress.config import PrecisionName
from compress.data.coco import read_annotations, to_coco
from compress.data.dataset import Sample
from compress.data.loader import ValBatch, val_batches
from compress.models import YOLOv5
from runtime.boxes import detections_from_rows, unletterbox, xywh_to_xyxy
from runtime.detections import Detections

Loss = Callable[[list[Tensor], Tensor], tuple[Tensor, Tensor]]
"""(raw maps, targets (n, 6)) -> (total, the three parts)."""
Detected = NDArray[np.float32]
"""(n, 6): x1 y1 x2 y2 score class, best first."""


class NmsSettings(NamedTuple):
    """Settings by which rows become boxes; the defaults are those of validation, not of deployment."""

    conf: float = 0.001
    iou: float = 0.6
    max_det: int = 300
    multi_label: bool = True


class Place(NamedTuple):
    """Where an image lies in its batch: resized / original width and height, the pad in pixels, and its own size."""

    gain_wh: tuple[float, float]
    pad_wh: tuple[float, float]
    size_hw: tuple[int, int]

    def to_original(self, boxes_xyxy: NDArray[np.float32], *, exact: bool = False) -> NDArray[np.float32]:
        """Boxes (n, 4) from pixels of the batch to those of the original image.

        YOLOv5 takes the height's gain for both axes, of labels as of detections. The width's may differ by the rounding
        to whole pixels: boxes at the right of an image of 1000x561, seen at 320 pixels, are then 3 pixels off. `exact`
        takes the gain of each axis.
        """
        (gain_w, gain_h), pad_w = self.gain_wh, self.pad_wh[0]
        if exact:
            boxes_xyxy = boxes_xyxy.copy()
            boxes_xyxy[:, 0::2] = (boxes_xyxy[:, 0::2] - pad_w) * np.float32(gain_h / gain_w) + pad_w
        return unletterbox(boxes_xyxy, gain_h, self.pad_wh, self.size_hw)


class ImageResult(NamedTuple):
    """One image's outcome."""

    sample: Sample
    place: Place
    found: Detected
    """In pixels of the batch."""
    labels: NDArray[np.float32]
    """(m, 5): class x1 y1 x2 y2, in pixels of the original image."""

    def boxes(self, *, exact: bool = False) -> Detected:
        """The detections in pixels of the original image.

        COCO's figures compare the `exact` boxes with labels that were never resized.
        """
        return np.concatenate([self.place.to_original(self.found[:, :4], exact=exact), self.found[:, 4:]], axis=1)


def fitness(map50: float, map50_95: float) -> float:
    """The figure by which YOLOv5 chooses the best epoch."""
    return 0.1 * map50 + 0.9 * map50_95


@dataclass(frozen=True)
class ValResult:
    """The figures of a validation."""

    yolo: YoloMetrics
    """Figures by YOLOv5's protocol."""
    coco: Accuracy | None
    """Figures by COCO's protocol; None if they were not wanted."""
    loss: tuple[float, float, float] | None
    """Mean box, objectness and class loss, if a loss was given."""
    speed_ms: Mapping[str, float]
    """Milliseconds per image: load (waiting for decoded, letterboxed images), preprocess, inference, nms."""
    images: int

    @property
    def fitness(self) -> float:
        return fitness(self.yolo.map50, self.yolo.map50_95)


def evaluate(
    model: YOLOv5,
    samples: Sequence[Sample],
    *,
    imgsz: int = 640,
    batch: int = 32,
    rect: bool = True,
    nms: NmsSettings | None = None,
    device: str | torch.device = "auto",
    precision: PrecisionName = "float32",
    workers: int = 0,
    loss: Loss | None = None,
    coco: bool = True,
    annotations: Path | None = None,
) -> ValResult:
    """Measure `model` (left as it is: a fused copy runs) on `samples`.

    `precision` is that of the network's arithmetic. `annotations` is a COCO JSON that replaces the text labels in the
    COCO figures (it has crowd regions; text labels do not).

    Raises UsageError when the model does not take images of `imgsz` pixels, UnavailableError when the device does not
    compute in the precision.
    """
    model.arch.require_image_size(imgsz)
    flush_denormals()
    limit_threads()
    where = device if isinstance(device, torch.device) else pick_device(device)
    network = to_device(model.fuse().eval().float(), where)
    runner = _Runner(network, network.decode, nms or NmsSettings(), where, pick_precision(precision, where), loss=loss)
    stride = max(model.strides)
    batches = val_batches(samples, imgsz=imgsz, batch=batch, stride=stride, rect=rect, workers=workers)
    return _figures(runner, batches, coco=(model.arch.names, annotations) if coco else None)


def evaluate_outputs(
    raw_maps: Callable[[Tensor], list[Tensor]],
    decode: Callable[[list[Tensor]], Tensor],
    samples: Sequence[Sample],
    *,
    imgsz: int,
    batch: int,
    stride: int,
    rect: bool,
    device: torch.device,
    workers: int = 0,
) -> ValResult:
    """Measure whatever gives raw maps for images, and rows in pixels for raw maps, by YOLOv5's protocol."""
    flush_denormals()
    limit_threads()
    runner = _Runner(raw_maps, decode, NmsSettings(), device, torch.float32, loss=None)
    batches = val_batches(samples, imgsz=imgsz, batch=batch, stride=stride, rect=rect, workers=workers)
    return _figures(runner, batches, coco=None)


def _figures(runner: _Runner, batches: Iterable[ValBatch], coco: tuple[Sequence[str], Path | None] | None) -> ValResult:
    """Run every batch. `coco` are class names and annotations, where COCO's figures are wanted."""
    found = [one for batch_found in map(runner, runner.timed(batches)) for one in batch_found]
    return ValResult(
        yolo=yolo_metrics(found),
        coco=coco_metrics(found, *coco) if coco else None,
        loss=runner.mean_loss,
        speed_ms={name: 1e3 * seconds / max(len(found), 1) for name, seconds in runner.watch.seconds.items()},
        images=len(found),
    )


class _Runner:
    """Runs batches through a network and NMS on one device, and adds up the time and the loss."""

    def __init__(
        self,
        raw_maps: Callable[[Tensor], list[Tensor]],
        decode: Callable[[list[Tensor]], Tensor],
        nms: NmsSettings,
        device: torch.device,
        dtype: torch.dtype,
        *,
        loss: Loss | None,
    ) -> None:
        self._raw_maps, self._decode = raw_maps, decode
        self._nms, self._device, self._dtype, self._loss = nms, device, dtype, loss
        self._losses: list[Tensor] = []
        self.watch = Stopwatch(device)

    def timed(self, batches: Iterable[ValBatch]) -> Iterator[ValBatch]:
        return self.watch.waits("load", batches)

    @torch.inference_mode()
    def __call__(self, batch: ValBatch) -> list[ImageResult]:
        with self.watch.phase("preprocess"):
            images = as_network_input(batch.images, self._device)
        with self.watch.phase("inference"):
            rows = self._forward(images, batch.targets).cpu().numpy()
        with self.watch.phase("nms"):
            found = [detections_from_rows(of_image, **self._nms._asdict()) for of_image in rows]
        return [image_result(boxes, batch, index) for index, boxes in enumerate(found)]

    def _forward(self, images: Tensor, targets: Tensor) -> Tensor:
        with computing_in(self._dtype, self._device):
            raw = self._raw_maps(images)
        raw = [level.float() for level in raw]
        if self._loss:
            self._losses.append(self._loss(raw, targets.to(self._device))[1])
        return self._decode(raw)

    @property
    def mean_loss(self) -> tuple[float, float, float] | None:
        if not self._losses:
            return None
        box, obj, cls = torch.stack(self._losses).mean(dim=0).tolist()
        return box, obj, cls


def as_network_input(images: Tensor, device: torch.device) -> Tensor:
    """uint8 (B, 3, H, W) RGB -> float32 0..1, channels last, on `device`."""
    return images.to(device, non_blocking=True).div(255).contiguous(memory_format=torch.channels_last)


def image_result(found: Detected, batch: ValBatch, index: int) -> ImageResult:
    """The outcome for image `index` of the batch, in which `found` was detected, (n, 6) in pixels of the batch.

    Labels are recomputed from the batch's targets, as in YOLOv5: the clipping and rounding there decide matches at IoU
    0.95.
    """
    sample = batch.samples[index]
    place = Place(batch.gains_wh[index], batch.pads_wh[index], sample.size_hw)
    height, width = batch.images.shape[2:]
    rows = batch.targets[batch.targets[:, 0] == index].numpy()
    labels_xyxy = xywh_to_xyxy(rows[:, 2:6] * np.array([width, height, width, height], np.float32))
    labels = np.concatenate([rows[:, 1:2], place.to_original(labels_xyxy)], axis=1)
    return ImageResult(sample, place, found, labels)


def yolo_metrics(found: Sequence[ImageResult]) -> YoloMetrics:
    """Precision, recall and AP by YOLOv5's matching and integration."""
    each = [one.boxes() for one in found]
    hits = [match(boxes, one.labels) for boxes, one in zip(each, found, strict=True)]
    boxes, labels = np.concatenate(each), np.concatenate([one.labels for one in found])
    return average_precision(np.concatenate(hits), boxes[:, 4], boxes[:, 5], labels[:, 0])


def coco_metrics(found: Sequence[ImageResult], names: Sequence[str], annotations: Path | None = None) -> Accuracy:
    """AP by COCO's protocol, against the text labels or the given COCO JSON."""
    samples = [one.sample for one in found]
    truth = read_annotations(annotations, samples, names) if annotations else to_coco(samples, names)
    boxes = ((image_id, Detections.from_rows(one.boxes(exact=True))) for image_id, one in enumerate(found, 1))
    rows = [row for image_id, own in boxes for row in coco_rows(image_id, own, range(len(names)))]
    return coco_accuracy(truth, rows, names=names)
