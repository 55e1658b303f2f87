"""Accuracy of boxes against labels, by two protocols.

COCO's (`coco_accuracy`) is what a report prints. YOLOv5's own (`match`, `average_precision`) needs NumPy only and is
fast enough for every epoch. The two differ: YOLOv5 matches a detection only to the label it overlaps most, integrates
an interpolated curve, and knows no crowd regions. On COCO128 the difference is 0.004.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeGuard

import numpy as np
from numpy.typing import NDArray

from benchmarks.packages import optional
from runtime.errors import InputError
from runtime.files import read_json
from runtime.image import read_image

if TYPE_CHECKING:
    from runtime.detections import Detections

Floats = NDArray[np.floating[Any]]

IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10, dtype=np.float32)
ACCURACY_CONF = 0.001
"""Lowest score that is evaluated. A higher threshold cuts the precision-recall curve, and the result is no mAP."""
COCO_MAX_DET = 100
_ALL, _SMALL, _MEDIUM, _LARGE = range(4)
"""COCO's area ranges, in the order of its tables."""


# ---------------------------------------------------------------------------------------------------- COCO's protocol


@dataclass(frozen=True)
class Accuracy:
    """COCO's figures, all 0..1. The figure of a size is None if no labelled object has that size (COCO prints -1)."""

    map50_95: float
    map50: float
    map75: float
    small: float | None
    medium: float | None
    large: float | None
    recall: float
    """Average recall at `max_det` detections per image."""
    per_class: Mapping[str, float] = field(default_factory=dict)
    """mAP50-95 of each class that the ground truth has."""
    images: int = 0
    instances: int = 0
    """Labelled objects, crowd regions not counted."""
    max_det: int = COCO_MAX_DET


def coco_accuracy(
    ground_truth: Mapping[str, Any],
    detections: Iterable[Mapping[str, Any]],
    *,
    max_det: int = COCO_MAX_DET,
    names: Sequence[str] | None = None,
) -> Accuracy:
    """COCO mAP of `detections` ({image_id, category_id, bbox [x, y, w, h] px, score}) against a COCO annotation dict.

    `names` are the printed names of the categories, in the order of `ground_truth["categories"]`; by default those
    written there. No detection at all is an accuracy of 0. Raises InputError when the ground truth has no object
    (no accuracy exists) or a detection is of an image that it does not have.
    """
    found = [dict(detection) for detection in detections]
    instances = sum(not entry.get("iscrowd", 0) for entry in ground_truth["annotations"])
    if not instances:
        raise InputError("The ground truth has no labelled object, so no accuracy exists", "Check the split's labels")
    _require_known_images(ground_truth, found)
    precision, recall = _evaluate(ground_truth, found, max_det)
    categories = sorted(ground_truth["categories"], key=lambda category: category["id"])
    printed = _printed_names(ground_truth["categories"], names)
    labels = [printed[category["id"]] for category in categories]
    per_class = {name: _mean(precision[:, :, k, _ALL]) for k, name in enumerate(labels)}
    return Accuracy(
        map50_95=_mean(precision[:, :, :, _ALL]) or 0.0,
        map50=_mean(precision[0, :, :, _ALL]) or 0.0,
        map75=_mean(precision[5, :, :, _ALL]) or 0.0,
        small=_mean(precision[:, :, :, _SMALL]),
        medium=_mean(precision[:, :, :, _MEDIUM]),
        large=_mean(precision[:, :, :, _LARGE]),
        recall=_mean(recall[:, :, _ALL]) or 0.0,
        per_class={name: ap for name, ap in per_class.items() if ap is not None},
        images=len(ground_truth["images"]),
        instances=instances,
        max_det=max_det,
    )


def _evaluate(ground_truth: Mapping[str, Any], found: list[dict[str, Any]], max_det: int) -> tuple[Floats, Floats]:
    """Precision (10 IoUs, 101 recalls, classes, 4 areas) and recall (10, classes, 4) at `max_det`; -1 is undefined."""
    package = optional("faster_coco_eval", "faster-coco-eval")
    truth = package.COCO(
        {
            "images": list(ground_truth["images"]),
            "categories": list(ground_truth["categories"]),
            "annotations": [_with_all_keys(*item) for item in enumerate(ground_truth["annotations"], 1)],
        }
    )
    evaluation = package.COCOeval_faster(truth, truth.loadRes(found), iouType="bbox", print_function=_quiet)
    evaluation.params.maxDets = [1, 10, max_det]
    evaluation.evaluate()
    evaluation.accumulate()
    return np.asarray(evaluation.eval["precision"])[..., -1], np.asarray(evaluation.eval["recall"])[..., -1]


def _with_all_keys(number: int, entry: Mapping[str, Any]) -> dict[str, Any]:
    """An annotation as the package wants it; its id is not 0, which would stand for no match."""
    known = {key: value for key, value in entry.items() if value is not None}
    return {"iscrowd": 0, "area": entry["bbox"][2] * entry["bbox"][3], **known, "id": number}


def _quiet(*_: object) -> None:
    """Drops the progress lines of the package."""


def _mean(values: Floats) -> float | None:
    defined = values[values > -1]
    return float(defined.mean()) if defined.size else None


def _printed_names(categories: Sequence[Mapping[str, Any]], names: Sequence[str] | None) -> dict[int, str]:
    names = [category["name"] for category in categories] if names is None else names
    if len(names) != len(categories):
        raise InputError(f"{len(names)} class names for {len(categories)} categories", "Give one name per category")
    return {category["id"]: name for category, name in zip(categories, names, strict=True)}


def _require_known_images(ground_truth: Mapping[str, Any], found: Iterable[Mapping[str, Any]]) -> None:
    known = {image["id"] for image in ground_truth["images"]}
    strange = next((entry["image_id"] for entry in found if entry["image_id"] not in known), None)
    if strange is not None:
        raise InputError(f"A detection is of image {strange!r}, which the ground truth does not have")


class Detecting(Protocol):
    """The part of a detector that an accuracy run needs."""

    @property
    def card(self) -> Any: ...

    def preprocess(self, frames: Sequence[NDArray[np.uint8]]) -> Any: ...

    def infer(self, prepared: Any) -> Any: ...

    def postprocess(self, raw: Any, prepared: Any, conf: float | None = None) -> Sequence[Detections]: ...


def detector_accuracy(
    detector: Detecting,
    samples: Iterable[tuple[int, Path]],
    ground_truth: Mapping[str, Any],
    *,
    conf: float = ACCURACY_CONF,
) -> Accuracy:
    """COCO accuracy of the detections of `detector` in the images (image id, path), by the same calls that are timed.

    Classes agree with the ground truth's categories by name. Only the images of `samples` count. Raises InputError
    when a class has no category, and as `coco_accuracy`.
    """
    pairs = list(samples)
    truth = restrict(ground_truth, {image_id for image_id, _ in pairs})
    return coco_accuracy(truth, detect_all(detector, pairs, truth, conf=conf))


def detect_all(
    detector: Detecting, samples: Iterable[tuple[int, Path]], ground_truth: Mapping[str, Any], *, conf: float
) -> Iterator[dict[str, Any]]:
    """COCO result entries of all boxes that the detector finds above `conf`, in calls of its least batch."""
    categories = category_ids(detector.card.names, ground_truth["categories"])
    left = iter(samples)
    while batch := list(islice(left, detector.card.batches.least)):
        prepared = detector.preprocess([read_image(path) for _, path in batch])
        found = detector.postprocess(detector.infer(prepared), prepared, conf)
        for (image_id, _), detections in zip(batch, found, strict=True):
            yield from coco_rows(image_id, detections, categories)


def coco_rows(
    image_id: int, found: Iterable[tuple[Sequence[float], float, int]], category_ids: Sequence[int]
) -> Iterator[dict[str, Any]]:
    """COCO result entries of one image's (x1 y1 x2 y2 px, score, class); `category_ids` is indexed by class."""
    for (left, top, right, bottom), score, class_id in found:
        box = [left, top, right - left, bottom - top]
        yield {"image_id": image_id, "category_id": category_ids[class_id], "bbox": box, "score": score}


def category_ids(names: Sequence[str], categories: Sequence[Mapping[str, Any]]) -> list[int]:
    """The category id of each class, by name."""
    ids = {category["name"]: category["id"] for category in categories}
    missing = [name for name in names if name not in ids]
    if missing:
        raise InputError(f"The annotations have no category {missing[0]!r}", f"They have {', '.join(ids)}")
    return [ids[name] for name in names]


def read_coco(path: Path) -> dict[str, Any]:
    """COCO ground truth from a JSON file. Raises InputError when it is something else."""
    data = read_json(path, COCO_HINT)
    for key in ("images", "annotations", "categories"):
        entries = data.get(key) if isinstance(data, dict) else None
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise InputError(f"{path}: `{key}` is not a list of objects", COCO_HINT)
    return data


def read_ground_truth(path: Path) -> dict[str, Any]:
    """COCO ground truth of which every entry can be measured against.

    Raises InputError that names the first one that cannot, or two categories of one name.
    """
    data = read_coco(path)
    for key, wanted in ENTRIES.items():
        for number, entry in enumerate(data[key], 1):
            for name, (what, is_right) in wanted.items():
                if not is_right(entry.get(name)):
                    value = reprlib.repr(entry.get(name))
                    raise InputError(f"{path}: {name} of {key}[{number}] is {value}, expected {what}", COCO_HINT)
    names = [category["name"] for category in data["categories"]]
    if len(set(names)) < len(names):
        raise InputError(f"{path}: two categories have one name", "Give every class its own name")
    return data


def is_whole(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and abs(value) <= MAX_COCO_NUMBER


def is_box(value: Any) -> TypeGuard[list[Any]]:
    return isinstance(value, list) and len(value) == 4 and all(map(_is_number, value))


COCO_HINT = "Give COCO's instances JSON"
MAX_COCO_NUMBER = 1e9
"""Largest coordinate and area; NaN is refused, too."""
WHOLE, TEXT = ("a whole number", is_whole), ("text", lambda value: isinstance(value, str))
ENTRIES: Mapping[str, Mapping[str, tuple[str, Callable[[Any], bool]]]] = {
    "images": {"id": WHOLE, "file_name": TEXT},
    "categories": {"id": WHOLE, "name": TEXT},
    "annotations": {
        "image_id": WHOLE,
        "category_id": WHOLE,
        "bbox": ("four numbers", is_box),
        "area": ("a number, or none", lambda value: value is None or _is_number(value)),
        "iscrowd": ("0 or 1, or none", lambda value: value in (None, 0, 1)),
    },
}
"""List of a ground truth -> keys of its entries that are read, what each holds in words, and the check of a value."""


def restrict(ground_truth: Mapping[str, Any], image_ids: set[int]) -> dict[str, Any]:
    """The part of a COCO annotation dict that is about these images."""
    return {
        "images": [image for image in ground_truth["images"] if image["id"] in image_ids],
        "annotations": [entry for entry in ground_truth["annotations"] if entry["image_id"] in image_ids],
        "categories": list(ground_truth["categories"]),
    }


JACKKNIFE_GROUPS = 10


def jackknife_maps(
    ground_truth: Mapping[str, Any], detections: Sequence[Mapping[str, Any]], groups: int = JACKKNIFE_GROUPS
) -> Floats:
    """mAP50-95 on all images, then with each of `groups` groups of images left out, (1 + groups,).

    Images with objects are dealt out to the groups in turn, so none of the rest is without objects; there are fewer
    groups of few such images, and none of one alone. `benchmarks.statistics.jackknife_error` turns the figures into
    an error of sampling.
    """
    labelled = {entry["image_id"] for entry in ground_truth["annotations"] if not entry.get("iscrowd", 0)}
    ids = sorted((image["id"] for image in ground_truth["images"]), key=lambda image_id: image_id not in labelled)
    groups = min(groups, len(labelled)) if len(labelled) > 1 else 0
    kept = [set(ids), *(set(ids) - set(ids[group::groups]) for group in range(groups))]
    maps = [
        coco_accuracy(restrict(ground_truth, images), (row for row in detections if row["image_id"] in images)).map50_95
        for images in kept
    ]
    return np.array(maps)


# -------------------------------------------------------------------------------------------------- YOLOv5's protocol

RECALL_POINTS = np.linspace(0, 1, 101)
CONFIDENCE_POINTS = np.linspace(0, 1, 1000)
SMOOTHING_TAPS = 101
"""A tenth of the confidence points, made odd."""


@dataclass(frozen=True)
class YoloMetrics:
    """YOLOv5's validation figures, all 0..1; arrays are per class of `class_ids`, the classes that have labels."""

    precision: float
    """Mean over classes at the confidence where the smoothed mean F1 is highest; so is `recall`."""
    recall: float
    map50: float
    map50_95: float
    class_ids: NDArray[np.int64]
    ap: Floats
    """(classes, 10): AP at IoU 0.50, 0.55 ... 0.95."""
    class_precision: Floats
    class_recall: Floats
    best_confidence: float


def match(detections: Floats, labels: Floats, iou_thresholds: Floats = IOU_THRESHOLDS) -> NDArray[np.bool_]:
    """Which detections are right, (n, thresholds), for one image.

    `detections` (n, 6) x1 y1 x2 y2 score class; `labels` (m, 5) class x1 y1 x2 y2. A detection counts for the label of
    its class that it overlaps most; of the detections that count for one label, the most confident is right.
    """
    correct = np.zeros((len(detections), len(iou_thresholds)), bool)
    if not len(detections) or not len(labels):
        return correct
    same_class = detections[:, None, 5] == labels[None, :, 0]
    iou = np.where(same_class, _iou(detections[:, :4], labels[:, 1:5]), np.float32(-1))
    label = iou.shape[1] - 1 - iou[:, ::-1].argmax(axis=1)  # of equal overlaps the last label, as YOLOv5 v7.0 has it
    best_iou = iou.max(axis=1)
    best_first = np.argsort(-detections[:, 4], kind="stable")
    for column, threshold in enumerate(np.asarray(iou_thresholds, np.float32)):
        over = best_first[best_iou[best_first] >= threshold]
        _, first = np.unique(label[over], return_index=True)
        correct[over[first], column] = True
    return correct


def _iou(a_xyxy: Floats, b_xyxy: Floats) -> Floats:
    """(n, m) in float32, with the 1e-7 in the denominator that YOLOv5's matching has (and its NMS has not)."""
    a, b = np.asarray(a_xyxy, np.float32)[:, None], np.asarray(b_xyxy, np.float32)[None]
    sides = np.clip(np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2]), 0, None)
    shared = sides[..., 0] * sides[..., 1]
    area_a, area_b = ((x[..., 2] - x[..., 0]) * (x[..., 3] - x[..., 1]) for x in (a, b))
    return shared / (area_a + area_b - shared + np.float32(1e-7))


def average_precision(tp: NDArray[np.bool_], conf: Floats, pred_cls: Floats, target_cls: Floats) -> YoloMetrics:
    """Figures over a whole split: `tp` (n, 10) of `match`, `conf` and `pred_cls` (n,), `target_cls` (labels,).

    A class with labels and no detection has AP 0. Without any label all figures are 0.
    """
    order = np.argsort(-conf, kind="stable")
    tp, conf, pred_cls = tp[order], np.asarray(conf, np.float64)[order], pred_cls[order]
    class_ids, counts = np.unique(target_cls, return_counts=True)
    curves = [
        _class_curves(tp[pred_cls == class_id], conf[pred_cls == class_id], int(count))
        for class_id, count in zip(class_ids, counts, strict=True)
    ]
    if not curves:
        return _no_labels()
    ap, precision, recall = (np.stack(part) for part in zip(*curves, strict=True))
    f1 = 2 * precision * recall / (precision + recall + 1e-16)
    best = int(_smooth(f1.mean(axis=0)).argmax())
    return YoloMetrics(
        precision=float(precision[:, best].mean()),
        recall=float(recall[:, best].mean()),
        map50=float(ap[:, 0].mean()),
        map50_95=float(ap.mean()),
        class_ids=class_ids.astype(np.int64),
        ap=ap,
        class_precision=precision[:, best],
        class_recall=recall[:, best],
        best_confidence=float(CONFIDENCE_POINTS[best]),
    )


def _no_labels() -> YoloMetrics:
    none = np.zeros(0)
    return YoloMetrics(0.0, 0.0, 0.0, 0.0, none.astype(np.int64), np.zeros((0, len(IOU_THRESHOLDS))), none, none, 0.0)


def _class_curves(tp: NDArray[np.bool_], conf: Floats, labels: int) -> tuple[Floats, Floats, Floats]:
    """AP at each IoU (10,), and precision and recall at IoU 0.5 over the confidence points (1000,); best first."""
    if not len(tp):
        return np.zeros(tp.shape[1]), np.zeros(len(CONFIDENCE_POINTS)), np.zeros(len(CONFIDENCE_POINTS))
    right = tp.cumsum(axis=0)
    recall = right / (labels + 1e-16)
    precision = right / np.arange(1, len(tp) + 1)[:, None]
    ap = np.array([_area_under(recall[:, column], precision[:, column]) for column in range(tp.shape[1])])
    return (
        ap,
        np.interp(-CONFIDENCE_POINTS, -conf, precision[:, 0], left=1),
        np.interp(-CONFIDENCE_POINTS, -conf, recall[:, 0], left=0),
    )


def _area_under(recall: Floats, precision: Floats) -> float:
    """Trapezoid integral of the precision envelope, sampled at 101 recalls."""
    recall = np.concatenate([[0.0], recall, [1.0]])
    precision = np.concatenate([[1.0], precision, [0.0]])
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    heights = np.interp(RECALL_POINTS, recall, envelope)
    return float(((heights[1:] + heights[:-1]) / 2 * np.diff(RECALL_POINTS)).sum())


def _smooth(values: Floats) -> Floats:
    """Box filter; the ends are repeated."""
    padded = np.pad(values, SMOOTHING_TAPS // 2, mode="edge")
    return np.convolve(padded, np.full(SMOOTHING_TAPS, 1 / SMOOTHING_TAPS), mode="valid")
