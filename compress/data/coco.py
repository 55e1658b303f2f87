"""Samples and COCO ground truth: write labels as COCO JSON, and read from a COCO JSON what belongs to samples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from benchmarks.accuracy import category_ids, read_ground_truth
from compress.data.dataset import Sample
from runtime.errors import InputError


def to_coco(samples: Sequence[Sample], names: Sequence[str]) -> dict[str, Any]:
    """COCO JSON: image ids count from 1 in sample order, `file_name` is the key, category ids are class indices.

    `bbox` is top-left x, y, width, height in float pixels of the image as displayed (after EXIF rotation).
    """
    annotations: list[dict[str, Any]] = []
    for image_id, sample in enumerate(samples, 1):
        for class_id, x, y, w, h in _boxes_px(sample):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": int(class_id),
                    "bbox": [x, y, w, h],
                    "area": w * h,
                    "iscrowd": 0,
                }
            )
    return {
        "images": [_image(image_id, sample) for image_id, sample in enumerate(samples, 1)],
        "annotations": annotations,
        "categories": [{"id": class_id, "name": name} for class_id, name in enumerate(names)],
    }


def _image(image_id: int, sample: Sample) -> dict[str, Any]:
    height, width = sample.size_hw
    return {"id": image_id, "file_name": sample.key, "height": height, "width": width}


def _boxes_px(sample: Sample) -> list[list[float]]:
    """Rows [class, left, top, width, height] in pixels."""
    height, width = sample.size_hw
    rows = sample.labels.astype(np.float64)
    rows[:, 1:3] -= rows[:, 3:5] / 2
    return (rows * [1, width, height, width, height]).tolist()


def read_annotations(path: Path, samples: Sequence[Sample], names: Sequence[str]) -> dict[str, Any]:
    """The part of a COCO JSON that is about `samples`, with image ids 1.. in sample order and class-index categories.

    Categories are matched by class name, images by the end of the path: `file_name` may be `0001.jpg` or
    `cam1/0001.jpg` for the sample `val/cam1/0001.jpg`; the longer one wins. Raises InputError when the file is not COCO
    JSON, when a class or an image is not in it or has another size there, or when one of its images fits several
    samples.
    """
    raw = read_ground_truth(path)
    by_file = {PurePosixPath(image["file_name"].replace("\\", "/")).parts: image for image in raw["images"]}
    images = [_image_of(sample, by_file, path) for sample in samples]
    class_ids = {key: index for index, key in enumerate(category_ids(names, raw["categories"]))}
    image_ids = {image["id"]: number for number, image in enumerate(images, 1)}
    counts = Counter(image["id"] for image in images)
    repeated = next((image["file_name"] for image in images if counts[image["id"]] > 1), None)
    if repeated is not None:
        raise InputError(f"{path}: {repeated} fits several images of the data", "Write more of the path into file_name")
    return {
        "images": [image | {"id": number} for number, image in enumerate(images, 1)],
        "annotations": [
            entry | {"image_id": image_ids[entry["image_id"]], "category_id": class_ids[entry["category_id"]]}
            for entry in raw["annotations"]
            if entry["image_id"] in image_ids and entry["category_id"] in class_ids
        ],
        "categories": [{"id": index, "name": name} for index, name in enumerate(names)],
    }


def _image_of(sample: Sample, by_file: Mapping[tuple[str, ...], dict[str, Any]], path: Path) -> dict[str, Any]:
    parts = sample.image.parts
    found = next((by_file[parts[start:]] for start in range(len(parts)) if parts[start:] in by_file), None)
    if found is None:
        raise InputError(f"{path}: no image {sample.key}", "Give file_name as it ends the path of the image")
    height, width = sample.size_hw
    stated_hw = found.get("height", height), found.get("width", width)
    if stated_hw != (height, width):
        raise InputError(
            f"{path}: {sample.key} has {stated_hw[1]}x{stated_hw[0]} pixels there, and {width}x{height} in the data",
            "Give the annotations of these very images",
        )
    return found
