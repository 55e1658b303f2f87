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
"""(n, 6): x1 y1 x2 y2 score class, in pixels of the original image, best first."""


class NmsSettings(NamedTuple):
    """Settings by which rows become boxes; the defaults are those of validation, not of deployment."""

    conf: float = 0.001
    iou: float = 0.6
    max_det: int = 300
    multi_label: bool = True


class ImageResult(NamedTuple):
    """One image's outcome, all in pixels of the original image."""

    sample: Sample
    boxes: Detected
    labels: NDArray[np.float32]
    """(m, 5): class x1 y1 x2 y2."""
    exact: Detected
    """The boxes, each axis by its own gain: COCO's figures compare them with labels that were never resized."""


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
    """The outcome for image `index` of the batch, in which `found` was detected, (n, 6) in pixels of the batch."""
    boxes, exact = found.copy(), found.copy()
    boxes[:, :4] = to_original(found[:, :4], batch, index)
    exact[:, :4] = to_original(found[:, :4], batch, index, exact=True)
    return ImageResult(batch.samples[index], boxes, batch_labels(batch, index), exact)


def to_original(
    boxes_xyxy: NDArray[np.float32], batch: ValBatch, index: int, *, exact: bool = False
) -> NDArray[np.float32]:
    """Boxes (n, 4) of one image, from pixels of the batch to those of the original image.

    YOLOv5 takes the height's gain for both axes, of labels as of detections. The width's may differ by the rounding to
    whole pixels: boxes at the right of an image of 1000x561, seen at 320 pixels, are then 3 pixels off. `exact` takes
    the gain of each axis.
    """
    (gain_w, gain_h), (pad_w, pad_h) = batch.gains_wh[index], batch.pads_wh[index]
    if exact:
        boxes_xyxy = boxes_xyxy.copy()
        boxes_xyxy[:, 0::2] = (boxes_xyxy[:, 0::2] - pad_w) * np.float32(gain_h / gain_w) + pad_w
    return unletterbox(boxes_xyxy, gain_h, (pad_w, pad_h), batch.samples[index].size_hw)


def batch_labels(batch: ValBatch, index: int) -> NDArray[np.float32]:
    """(m, 5) class x1 y1 x2 y2 of one image, in its original pixels.

    Recomputed from the batch's targets, as in YOLOv5: the clipping and rounding there decide matches at IoU 0.95.
    """
    height, width = batch.images.shape[2:]
    rows = batch.targets[batch.targets[:, 0] == index].numpy()
    boxes = xywh_to_xyxy(rows[:, 2:6] * np.array([width, height, width, height], np.float32))
    return np.concatenate([rows[:, 1:2], to_original(boxes, batch, index)], axis=1)


def yolo_metrics(found: Sequence[ImageResult]) -> YoloMetrics:
    """Precision, recall and AP by YOLOv5's matching and integration."""
    hits = [match(one.boxes, one.labels) for one in found]
    boxes = np.concatenate([one.boxes for one in found])
    return average_precision(
        np.concatenate(hits), boxes[:, 4], boxes[:, 5], np.concatenate([one.labels[:, 0] for one in found])
    )


def coco_metrics(found: Sequence[ImageResult], names: Sequence[str], annotations: Path | None = None) -> Accuracy:
    """AP by COCO's protocol, against the text labels or the given COCO JSON."""
    samples = [one.sample for one in found]
    truth = read_annotations(annotations, samples, names) if annotations else to_coco(samples, names)
    boxes = ((image_id, Detections.from_rows(one.exact)) for image_id, one in enumerate(found, 1))
    rows = [row for image_id, own in boxes for row in coco_rows(image_id, own, range(len(names)))]
    return coco_accuracy(truth, rows, names=names)
