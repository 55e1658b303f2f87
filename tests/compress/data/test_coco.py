from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from compress.data import load_data
from compress.data.coco import to_coco
from compress.data.dataset import Sample
from compress.data.index import index_split


def sample(key: str, labels: NDArray[np.float32], size_hw: tuple[int, int]) -> Sample:
    return Sample(Path("/set", key), key, labels, size_hw, sha256="")


def test_boxes_are_pixels_and_ids_count_from_one() -> None:
    labels = np.array([[1, 0.5, 0.5, 0.5, 0.25]], np.float32)
    samples = [sample("a.jpg", np.zeros((0, 5), np.float32), (10, 20)), sample("cam2/b.jpg", labels, (100, 200))]
    truth = to_coco(samples, ["cat", "dog"])
    assert [image["id"] for image in truth["images"]] == [1, 2]
    assert truth["images"][1] == {"id": 2, "file_name": "cam2/b.jpg", "height": 100, "width": 200}
    assert truth["annotations"] == [
        {"id": 1, "image_id": 2, "category_id": 1, "bbox": [50.0, 37.5, 100.0, 25.0], "area": 2500.0, "iscrowd": 0}
    ]
    assert truth["categories"] == [{"id": 0, "name": "cat"}, {"id": 1, "name": "dog"}]


def test_boxes_of_coco128_agree_with_its_original_annotations(shared: Path) -> None:
    folder = shared / "data/coco128"
    samples = index_split(load_data(folder / "data.yaml"), "val").samples
    truth = to_coco(samples, load_data(folder / "data.yaml").names)
    original = json.loads((folder / "annotations/instances.json").read_text())
    files = {image["id"]: image["file_name"].split("/")[-1] for image in original["images"]}
    expected = sorted((files[a["image_id"]], *a["bbox"]) for a in original["annotations"] if not a["iscrowd"])
    names = {image["id"]: image["file_name"].split("/")[-1] for image in truth["images"]}
    found = sorted((names[a["image_id"]], *a["bbox"]) for a in truth["annotations"])
    assert len(found) == len(expected) == 929
    used = [0.0] * len(found)
    for i, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        assert ours[0] == theirs[0]
        used[i] = float(np.abs(np.subtract(ours[1:], theirs[1:])).max())
    assert np.median(used) < 1e-3
