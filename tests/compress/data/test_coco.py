from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from compress.data import load_data
from compress.data.coco import read_annotations, to_coco
from compress.data.dataset import Sample
from compress.data.index import index_dataset
from runtime.errors import InputError


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
    samples = index_dataset(load_data(folder / "data.yaml"), ("val",)).splits["val"].samples
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


@pytest.fixture
def cameras(tmp_path: Path) -> list[Sample]:
    """Two images of one base name."""
    nothing = np.zeros((0, 5), np.float32)
    keys = ("images/val/cam1/0001.jpg", "images/val/cam2/0001.jpg")
    return [Sample(tmp_path / key, key, nothing, (10, 20), sha256="") for key in keys]


def write_coco(path: Path, files: Sequence[str]) -> Path:
    """Image 100 + i is `files[i]` and has one box of width i + 1."""
    boxes = [{"id": i, "image_id": 100 + i, "category_id": 5, "bbox": [0, 0, i + 1, 1]} for i in range(len(files))]
    path.write_text(json.dumps({
        "images": [{"id": 100 + i, "file_name": file} for i, file in enumerate(files)],
        "categories": [{"id": 90, "name": "green"}, {"id": 5, "name": "red"}, {"id": 6, "name": "blue"}],
        "annotations": boxes,
    }))  # fmt: skip
    return path


def widths(truth: Mapping[str, Any]) -> list[tuple[int, int]]:
    """(image id, width of the box) of each annotation."""
    return [(annotation["image_id"], annotation["bbox"][2]) for annotation in truth["annotations"]]


@pytest.mark.parametrize(
    "files",
    [
        ("other.jpg", "cam2/0001.jpg", "cam1/0001.jpg"),
        ("cam3/0001.jpg", "images/val/cam2/0001.jpg", "./val/cam1/0001.jpg"),
        ("cam3/0001.jpg", "cam2\\0001.jpg", "0001.jpg"),
    ],
)
def test_annotations_and_images_meet_by_path_not_by_base_name(
    cameras: list[Sample], tmp_path: Path, files: tuple[str, ...]
) -> None:
    truth = read_annotations(write_coco(tmp_path / "a.json", files), cameras, ("red", "green"))
    assert sorted(widths(truth)) == [(1, 3), (2, 2)]
    assert [image["id"] for image in truth["images"]] == [1, 2]
    assert {annotation["category_id"] for annotation in truth["annotations"]} == {0}


def test_annotations_of_other_classes_are_left_out(cameras: list[Sample], tmp_path: Path) -> None:
    path = write_coco(tmp_path / "a.json", ("cam1/0001.jpg", "cam2/0001.jpg"))
    assert not read_annotations(path, cameras, ("green",))["annotations"]


@pytest.mark.parametrize(
    ("files", "names", "what"),
    [
        (("0001.jpg",), ("red",), r"0001\.jpg fits several images"),
        (("cam1/0001.jpg",), ("red",), "no image images/val/cam2/0001.jpg"),
        (("cam1/0001.jpg", "cam2/0001.jpg"), ("red", "black"), "no category 'black'"),
    ],
)
def test_what_has_no_partner_is_named(
    cameras: list[Sample], tmp_path: Path, files: tuple[str, ...], names: tuple[str, ...], what: str
) -> None:
    with pytest.raises(InputError, match=what):
        read_annotations(write_coco(tmp_path / "a.json", files), cameras, names)


def test_annotations_for_another_size_are_refused(cameras: list[Sample], tmp_path: Path) -> None:
    path = write_coco(tmp_path / "a.json", ("cam1/0001.jpg", "cam2/0001.jpg"))
    content = json.loads(path.read_text())
    content["images"][1] |= {"width": 40, "height": 20}
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match="has 40x20 pixels there, and 20x10 in the data"):
        read_annotations(path, cameras, ("red", "green"))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"images": [3]}', '{"images": [], "categories": []}'])
def test_unusable_annotations_are_refused_in_one_line(cameras: list[Sample], tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(InputError) as caught:
        read_annotations(tmp_path / "a.json", cameras, ("red", "green"))
    assert "\n" not in str(caught.value)
