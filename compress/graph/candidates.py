"""The number of candidates, rows that enter NMS, is measured: the fewest that lose almost no mAP.

The network runs once an image, NMS on the host once for each number that is tried. In: images with their COCO ground
truth. Out: mAP50-95 for each number, and how often one more iteration of Cluster-NMS, or exact greedy NMS, would have
kept other boxes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.accuracy import coco_accuracy, coco_rows
from compress.graph.nms import cluster_nms
from compress.graph.verify import best_class, corners
from runtime.boxes import nms, unletterbox
from runtime.image import letterbox, read_image

CHOICES = (100, 200, 300, 500, 1000)
MIN_SCORE = 0.001
"""Detections below it are not evaluated, as in validation."""


class Placement(NamedTuple):
    """Where the letterboxed image lies on its canvas; `pad_wh` in canvas pixels."""

    gain: float
    pad_wh: tuple[float, float]
    frame_hw: tuple[int, int]


class RankedRows(NamedTuple):
    """The K best rows of one image before NMS, best first: boxes (K,4) in canvas pixels, scores (K,), classes (K,)."""

    boxes_xyxy: np.ndarray
    scores: np.ndarray
    classes: np.ndarray
    placement: Placement


@dataclass(frozen=True)
class Validation:
    """Images with their id in `ground_truth`, a COCO dictionary with category id = class index."""

    images: Sequence[tuple[int, Path]]
    ground_truth: Mapping[str, Any]


@dataclass(frozen=True)
class CandidateStudy:
    """mAP50-95 by number of candidates, the chosen number, and the agreement of the unrolled NMS there."""

    map50_95: Mapping[int, float]
    chosen: int
    images: int
    images_changed_by_one_more_iteration: int
    images_changed_by_greedy: int

    def to_json(self) -> dict[str, Any]:
        return {**self.__dict__, "map50_95": {str(k): v for k, v in self.map50_95.items()}}


def canvas_of(path: Path, size_hw: tuple[int, int]) -> tuple[np.ndarray, Placement]:
    """An image file -> uint8 BGR canvas (1,S,S,3) by the runtime's letterbox, and where the image lies on it."""
    frame = read_image(path)
    image, gain, pad_wh = letterbox(frame, size_hw)
    height, width = frame.shape[:2]
    return image[None], Placement(gain, pad_wh, (height, width))


def ranked_rows(
    run: Callable[[np.ndarray], np.ndarray], paths: Iterable[Path], size_hw: tuple[int, int], most: int
) -> list[RankedRows]:
    """The `most` best rows of each image; `run` maps a canvas to decoded rows (N, 5+nc)."""
    found = []
    for path in paths:
        canvas, placement = canvas_of(path, size_hw)
        decoded = run(canvas)
        scores, classes = best_class(decoded)
        order = np.argsort(-scores, kind="stable")[:most]
        found.append(RankedRows(corners(decoded[order, :4]), scores[order], classes[order], placement))
    return found


def study_candidates(
    found: Sequence[RankedRows],
    data: Validation,
    names: Sequence[str],
    *,
    iou: float,
    max_det: int,
    iterations: int,
    tolerance: float,
    fixed: int = 0,
) -> CandidateStudy:
    """The fewest candidates that lose at most `tolerance` mAP50-95 against the most; above 0, `fixed` is the number."""
    limit = max(len(rows.scores) for rows in found)
    choices = sorted({min(k, limit) for k in ((fixed,) if fixed else CHOICES)})
    scores = {
        k: coco_accuracy(
            data.ground_truth, _detections(found, data, k, iou, max_det), max_det=max_det, names=names
        ).map50_95
        for k in choices
    }
    best = scores[choices[-1]]
    chosen = next(k for k in choices if best - scores[k] <= tolerance)
    changed = [_changed(rows, chosen, iou, iterations) for rows in found]
    return CandidateStudy(
        scores, fixed or chosen, len(found), sum(more for more, _ in changed), sum(greedy for _, greedy in changed)
    )


def _detections(
    found: Sequence[RankedRows], data: Validation, count: int, iou: float, max_det: int
) -> list[dict[str, Any]]:
    """COCO detections of every image with the first `count` rows entering NMS."""
    classes = range(len(data.ground_truth["categories"]))
    return [
        entry
        for (image_id, _), rows in zip(data.images, found, strict=True)
        for entry in coco_rows(image_id, _kept(rows, count, iou, max_det), classes)
    ]


def _kept(rows: RankedRows, count: int, iou: float, max_det: int) -> Iterable[tuple[list[float], float, int]]:
    boxes, scores, classes = (values[:count] for values in rows[:3])
    keep = nms(boxes, scores, classes, iou=iou, max_det=max_det)
    keep = keep[scores[keep] > MIN_SCORE]
    placed = unletterbox(boxes[keep], rows.placement.gain, rows.placement.pad_wh, rows.placement.frame_hw)
    return zip(placed.astype(float).tolist(), scores[keep].tolist(), classes[keep].tolist(), strict=True)


def _changed(rows: RankedRows, count: int, iou: float, iterations: int) -> tuple[bool, bool]:
    """Whether one more iteration, and whether greedy NMS, keeps other rows of this image above MIN_SCORE."""
    boxes, scores, classes = (values[:count] for values in rows[:3])
    kept, more = (set(np.flatnonzero(cluster_nms(boxes, classes, iou, t))) for t in (iterations, iterations + 1))
    greedy = set(nms(boxes, scores, classes, iou=iou, max_det=count).tolist())
    real = set(np.flatnonzero(scores > MIN_SCORE).tolist())
    return bool((kept ^ more) & real), bool((kept ^ greedy) & real)
