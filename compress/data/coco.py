"""In: samples. Out: their labels as COCO ground truth, in pixels of the original images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from compress.data.dataset import Sample


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
