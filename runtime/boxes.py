"""Boxes as arrays: conversions, overlap, NMS, and conversion to frame pixels. NumPy only, no state.

`boxes_xyxy` are float32 (N, 4) corners [x1, y1, x2, y2] in pixels. Rules and constants are those of YOLOv5 v7.0.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Indices = NDArray[np.intp]

CLASS_OFFSET_PX = 7680.0
"""Boxes of different classes are moved this far apart, so that one suppression serves all classes."""
MAX_CANDIDATES = 30_000
"""Most boxes that enter suppression, best first."""
FIRST_CANDIDATES = 2048
"""This many best boxes are sorted first; the rest only if these do not give enough boxes."""
BLOCK = 256
"""Candidates that are compared at a time: the arrays of one block stay in the second-level cache."""


def xywh_to_xyxy(boxes_xywh: Floats) -> Floats:
    """(..., 4) [centre x, centre y, width, height] -> corners."""
    boxes_xywh = np.asarray(boxes_xywh)
    centre, half = boxes_xywh[..., :2], boxes_xywh[..., 2:4] / 2
    return np.concatenate([centre - half, centre + half], axis=-1)


def xyxy_to_xywh(boxes_xyxy: Floats) -> Floats:
    """(..., 4) corners -> [centre x, centre y, width, height]."""
    boxes_xyxy = np.asarray(boxes_xyxy)
    low, high = boxes_xyxy[..., :2], boxes_xyxy[..., 2:4]
    return np.concatenate([(low + high) / 2, high - low], axis=-1)


def nms(
    boxes_xyxy: Floats,
    scores: Floats,
    class_ids: NDArray[np.generic],
    *,
    iou: float,
    max_det: int,
    agnostic: bool = False,
) -> Indices:
    """Indices of the boxes that greedy suppression keeps, best first, at most `max_det`.

    A box is removed when its overlap with a kept, better box of its class is over `iou` (strictly); ties in score keep
    the given order. Overlap is computed in float32 on the class-shifted boxes, as in YOLOv5.
    Work stops when `max_det` boxes are found, which changes nothing: later boxes cannot remove earlier ones.
    """
    boxes_xyxy, scores = np.asarray(boxes_xyxy, np.float32), np.asarray(scores)
    offsets = np.asarray(class_ids).astype(np.float32) * np.float32(0 if agnostic else CLASS_OFFSET_PX)
    sides = np.ascontiguousarray((boxes_xyxy + offsets[:, None]).T)
    for count in (FIRST_CANDIDATES, MAX_CANDIDATES):
        order = best_first(scores, count)
        kept = _suppress(sides[:, order], float32_below(iou), max_det)
        if len(kept) == max_det or len(order) == len(scores):
            break
    return order[kept]


def _suppress(sides: Floats, iou: np.float32, max_det: int) -> Indices:
    """The first `max_det` survivors of boxes (4, N) that are sorted best first."""
    kept = np.empty(0, np.intp)
    for start in range(0, sides.shape[1], BLOCK):
        block = np.arange(start, min(start + BLOCK, sides.shape[1]))
        block = block[~_overlapping(sides[:, kept], sides[:, block], iou).any(axis=0)]
        kept = np.concatenate([kept, block[_greedy(sides[:, block], iou)]])
        if len(kept) >= max_det:
            break
    return kept[:max_det]


def float32_below(value: float) -> np.float32:
    """The largest float32 that is not above `value`.

    YOLOv5 compares float32 overlaps with a float64 threshold. A float32 is over that exactly when it is over this.
    """
    nearest = np.float32(value)
    return nearest if float(nearest) <= value else np.nextafter(nearest, np.float32(-np.inf))


def best_first(scores: Floats, count: int) -> Indices:
    """Indices of the `count` highest scores in descending order; equal scores keep their order."""
    if len(scores) <= count:
        return np.argsort(-scores, kind="stable")
    least = np.partition(scores, len(scores) - count)[len(scores) - count]
    candidates = np.flatnonzero(scores >= least)  # with all whose score equals the last one
    return candidates[np.argsort(-scores[candidates], kind="stable")][:count]


def _where(mask: NDArray[np.bool_]) -> tuple[Indices, Indices]:
    """Rows and columns of a matrix's true elements; `np.nonzero` takes three times as long on two axes."""
    flat = np.flatnonzero(mask)
    rows = flat // mask.shape[1]
    return rows, flat - rows * mask.shape[1]


def _overlapping(a: Floats, b: Floats, iou: np.float32) -> NDArray[np.bool_]:
    """(N, M): which boxes of (4, N) and (4, M) overlap more than `iou`.

    All pairs are compared, one coordinate at a time: per pair eight times as fast as gathering pairs of equal classes.
    """
    width = np.minimum(a[2][:, None], b[2]) - np.maximum(a[0][:, None], b[0])
    height = np.minimum(a[3][:, None], b[3]) - np.maximum(a[1][:, None], b[1])
    shared = np.maximum(width, 0, out=width) * np.maximum(height, 0, out=height)
    area_a, area_b = (a[2] - a[0]) * (a[3] - a[1]), (b[2] - b[0]) * (b[3] - b[1])
    union = np.subtract(area_a[:, None] + area_b, shared, out=width)
    with np.errstate(divide="ignore", invalid="ignore"):  # two empty boxes: NaN, which is over nothing
        return np.divide(shared, union, out=height) > iou


def _greedy(sides: Floats, iou: np.float32) -> NDArray[np.bool_]:
    """Mask of the boxes (4, N), sorted best first, that greedy suppression keeps: a fixed point over overlapping pairs.

    Round n is right for every box at the end of a chain of at most n suppressions, so the result that no longer
    changes is the sequential one.
    """
    better, worse = _where(np.triu(_overlapping(sides, sides, iou), 1))
    alive = np.ones(sides.shape[1], bool)
    while True:
        survives = np.ones_like(alive)
        survives[worse[alive[better]]] = False
        if np.array_equal(survives, alive):
            return alive
        alive = survives


def detections_from_rows(
    rows: Floats,
    *,
    conf: float,
    iou: float,
    max_det: int = 300,
    multi_label: bool = False,
    agnostic: bool = False,
    classes: Sequence[int] | None = None,
) -> Floats:
    """Decoded rows (N, 5 + C) [cx, cy, w, h, objectness, class probabilities] of one image -> finished boxes.

    Returns (n, 6) float32 [x1, y1, x2, y2, score, class], best first, in the pixels of the rows. Both thresholds are
    strict. `multi_label` gives one box for every class over `conf`, else the best class counts. `classes` keeps
    only these.
    """
    rows = np.asarray(rows, np.float32)
    threshold = np.float32(conf)
    rows = rows[rows[:, 4] > threshold]
    probabilities = rows[:, 5:] * rows[:, 4:5]
    if multi_label and probabilities.shape[1] > 1:
        box_ids, class_ids = _where(probabilities > threshold)
        scores = probabilities[box_ids, class_ids]
    else:
        box_ids, class_ids, scores = _best_class(probabilities, threshold)
    if classes is not None:
        wanted = np.isin(class_ids, np.asarray(classes))
        box_ids, class_ids, scores = box_ids[wanted], class_ids[wanted], scores[wanted]
    boxes = xywh_to_xyxy(rows[:, :4])[box_ids]
    kept = nms(boxes, scores, class_ids, iou=iou, max_det=max_det, agnostic=agnostic)
    return np.column_stack([boxes[kept], scores[kept], class_ids[kept]]).astype(np.float32, copy=False)


def _best_class(probabilities: Floats, threshold: np.float32) -> tuple[Indices, Indices, Floats]:
    """Box index, class (the lowest of equal ones) and score of the boxes whose best class is over the threshold."""
    if not probabilities.size:
        return np.empty(0, np.intp), np.empty(0, np.intp), np.empty(0, np.float32)
    best = probabilities.argmax(axis=1)
    scores = probabilities[np.arange(len(best)), best]
    passed = np.flatnonzero(scores > threshold)
    return passed, best[passed], scores[passed]


def unletterbox(boxes_xyxy: Floats, gain: float, pad_wh: tuple[float, float], frame_hw: tuple[int, int]) -> Floats:
    """Canvas boxes (N, 4) -> frame pixels, clipped to the frame (its width and height included). Not rounded."""
    pad = np.array([*pad_wh, *pad_wh], np.float32)
    boxes = (np.asarray(boxes_xyxy, np.float32) - pad) / np.float32(gain)
    height, width = frame_hw
    return np.clip(boxes, 0, np.array([width, height, width, height], np.float32))
