from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from compress.data import load_data
from compress.data.check import check
from compress.data.demo.generate import generate
from tests.compress.data.conftest import folder_hash, write_image, write_labels


def test_a_sound_dataset_is_ok_and_unchanged(dataset: Path) -> None:
    before = folder_hash(dataset.parent)
    report = check(load_data(dataset))
    assert folder_hash(dataset.parent) == before
    assert report.ok
    train = report.splits["train"]
    assert (train.images, train.usable, train.background, train.boxes) == (4, 4, 0, 4)
    assert train.boxes_per_class == {"cat": 2, "dog": 2}
    assert train.image_sizes == {"64x48": 4}
    assert train.boxes_per_image["max"] == 1
    assert "nothing is wrong" in report.to_text()


def test_the_report_is_json_and_a_short_text(dataset: Path) -> None:
    labels = dataset.parent / "labels/train/0.txt"
    labels.write_text("9 0.5 0.5 0.1 0.1\n" * 50)
    report = check(load_data(dataset))
    assert json.loads(json.dumps(report.to_json()))["splits"]["train"]["usable"] == 4
    assert len(report.splits["train"].problems) == 50
    text = report.to_text()
    assert f"{labels}:1: class 9" in text
    assert "30 more" in text
    assert text.endswith("the images and rows that are named as problems are left out of a training")
    assert not report.ok


def test_bad_images_are_named_even_when_nothing_is_left(dataset: Path) -> None:
    for image in (dataset.parent / "images/val").iterdir():
        image.write_bytes(b"")
    report = check(load_data(dataset))
    assert report.splits["val"].usable == 0
    assert len(report.splits["val"].problems) == 2
    assert report.to_text()


def test_an_image_in_train_and_val_is_a_leak(dataset: Path) -> None:
    images = dataset.parent / "images"
    shutil.copyfile(images / "train/0.png", images / "val/same.png")
    shutil.copyfile(images / "train/1.png", images / "train/twin.png")
    report = check(load_data(dataset))
    assert [set(group) for group in report.leaks] == [{"images/train/0.png", "images/val/same.png"}]
    assert [set(group) for group in report.duplicates] == [{"images/train/1.png", "images/train/twin.png"}]
    assert not report.ok
    assert report.to_text().splitlines()[-1].startswith("nothing is left out of a training, but ")


def test_images_that_cannot_be_used_are_problems_and_no_twins(dataset: Path) -> None:
    for name in ("a.png", "b.png"):
        (dataset.parent / "images/train" / name).write_bytes(b"")
    report = check(load_data(dataset))
    assert len(report.splits["train"].problems) == 2
    assert report.duplicates == ()


def test_one_folder_for_both_splits_is_a_leak(dataset: Path) -> None:
    dataset.write_text("train: images/train\nval: images/train\nnames: [cat, dog]\n")
    assert len(check(load_data(dataset)).leaks) == 4


def test_unusual_things_are_reported(dataset: Path) -> None:
    root = dataset.parent
    dataset.write_text("train: images/train\nval: images/val\ntest: images/nowhere\nnames: [cat, dog, bird, fish]\n")
    (root / "labels/val/0.txt").write_text("2 0.5 0.5 0.01 0.5\n0 0.0 0.5 0.5 0.5\n0 0.5 0.5 1 1\n")
    (root / "labels/train/orphan.txt").write_text("0 0.5 0.5 0.1 0.1\n")
    for i in range(10):
        write_image(root / f"images/train/empty{i}.png", seed=100 + i)
    told = "\n".join(check(load_data(dataset)).unusual)
    for what in (
        "test split left out",
        "bird has 1 boxes in val and none in train",
        "fish has no boxes in train",
        "cat has only 2 boxes",
        "1 boxes with a side under 3 px",
        "1 boxes that reach beyond the image",
        "1 boxes that fill the whole image",
        "10 of 14 images have no labels",
        "1 label files without an image",
    ):
        assert what in told


def test_images_that_share_a_label_file_are_reported(dataset: Path) -> None:
    write_image(dataset.parent / "images/train/0.jpg", seed=50)
    report = check(load_data(dataset))
    assert (
        "train: 1 label files belong to several images, first images/train/0.jpg and images/train/0.png"
        in report.unusual
    )


def test_images_of_one_base_name_in_two_folders_are_two_images(dataset: Path) -> None:
    for camera in ("cam1", "cam2"):
        write_image(dataset.parent / f"images/train/{camera}/0.png", seed=ord(camera[-1]))
        write_labels(dataset.parent / f"labels/train/{camera}/0.txt", "0 0.5 0.5 0.2 0.2\n")
    report = check(load_data(dataset))
    assert (report.splits["train"].usable, report.splits["train"].boxes) == (6, 6)
    assert report.ok


@pytest.mark.parametrize("splits", [("train",), ("val",), ("train", "val")])
def test_splits_without_a_label_are_not_ok(dataset: Path, splits: tuple[str, ...]) -> None:
    for split in splits:
        shutil.rmtree(dataset.parent / "labels" / split)
    report = check(load_data(dataset))
    assert not report.ok
    assert len(report.unlabelled) == len(splits)
    assert f"{len(splits)} splits without labels" in report.verdict
    for split in splits:
        assert f"{split}: no image has a label (Labels of images/{split}/0.png are looked for in" in report.to_text()


def test_labels_beside_the_images_are_found_and_named(dataset: Path) -> None:
    root = dataset.parent
    (root / "labels/train/0.txt").rename(root / "images/train/0.txt")
    (root / "labels/train/1.txt").unlink()
    told = "train: 1 label files that are beside their image in images/ and are not read"
    assert told in check(load_data(dataset)).unusual


def test_a_generated_set_is_ok(tmp_path: Path) -> None:
    assert check(load_data(generate(tmp_path / "set", images=6, size=(96, 96)))).ok


def test_the_real_sets_have_no_problems(shared: Path) -> None:
    report = check(load_data(shared / "data/bccd/data.yaml"))
    assert report.ok, report.to_text()
    assert report.splits["train"].images == 205
