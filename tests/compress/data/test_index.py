from __future__ import annotations

import hashlib
import os
import shutil
import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin

from compress.data import DataConfig, Sample, load_data
from compress.data.index import JUDGES, decoded_size_hw, index_dataset, index_image, quick_digest
from compress.data.labels import label_path
from runtime.errors import InputError
from runtime.image import decode_image, read_image
from tests.compress.data.conftest import folder_hash, write_image


def png_header(width: int, height: int) -> bytes:
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))


def truncated(suffix: str) -> bytes:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    return cv2.imencode(suffix, noise)[1].tobytes()[:-2000]


BAD_IMAGES = {
    "zero bytes.jpg": b"",
    "truncated.jpg": truncated(".jpg"),
    "truncated.png": truncated(".png"),
    "huge.png": png_header(40_000, 40_000) + b"\0" * 64,
    "text.jpg": b"this is not an image at all, just some text",
    "html.png": b"<!DOCTYPE html><html></html>",
    "pickle.jpg": b"cos\nsystem\n(S'touch CANARY'\ntR.",
    "fits.tif": b"SIMPLE  =                    T" + b" " * 2850,
    "header only.jpg": b"\xff\xd8\xff\xe0\x00\x10JFIF",
    "gif.png": b"GIF89a\x01\x00\x01\x00\x80\x00\x00",
}


def test_samples_hold_labels_and_sizes(dataset: Path) -> None:
    index = index_dataset(load_data(dataset), ("train",)).splits["train"]
    assert [sample.size_hw for sample in index.samples] == [(48, 64)] * 4
    np.testing.assert_allclose(index.samples[1].labels, [[1, 0.5, 0.5, 0.4, 0.3]])
    assert not index.problems


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_a_bad_image_is_reported_and_only_it_is_left_out(dataset: Path, name: str) -> None:
    bad = dataset.parent / "images/train" / name
    bad.write_bytes(BAD_IMAGES[name])
    before = folder_hash(dataset.parent)
    index = index_dataset(load_data(dataset), ("train",)).splits["train"]
    assert folder_hash(dataset.parent) == before
    kept = {sample.image.name for sample in index.samples}
    assert {f"{i}.png" for i in range(4)} <= kept
    assert name not in kept
    assert [problem.path for problem in index.problems] == [bad]
    assert "\n" not in str(index.problems[0])


def test_a_listed_image_that_is_missing_is_reported(dataset: Path) -> None:
    (dataset.parent / "list.txt").write_text("images/train/0.png\nimages/train/gone.png\n")
    dataset.write_text("train: list.txt\nval: images/val\nnames: [cat, dog]\n")
    index = index_dataset(load_data(dataset), ("train",)).splits["train"]
    assert len(index.samples) == 1
    assert "gone.png" in str(index.problems[0])


def test_a_bad_row_is_reported_as_file_and_line(dataset: Path) -> None:
    labels = dataset.parent / "labels/train/0.txt"
    labels.write_text("0 0.5 0.5 0.1 0.1\n7 0.5 0.5 0.1 0.1\n")
    index = index_dataset(load_data(dataset), ("train",)).splits["train"]
    assert str(index.problems[0]).startswith(f"{labels}:2: class 7")
    assert len(index.samples[0].labels) == 1


def test_an_image_without_label_file_is_background(dataset: Path) -> None:
    label_path(dataset.parent / "images/train/2.png").unlink()
    index = index_dataset(load_data(dataset), ("train",)).splits["train"]
    assert [len(sample.labels) for sample in index.samples] == [1, 1, 0, 1]
    assert not index.problems


def test_a_split_without_a_usable_image_is_an_error(dataset: Path) -> None:
    for image in (dataset.parent / "images/val").iterdir():
        image.write_bytes(b"")
    with pytest.raises(InputError, match="none of 2 images can be used"):
        index_dataset(load_data(dataset), ("val",)).splits["val"]
    with pytest.raises(InputError, match="no test split"):
        index_dataset(load_data(dataset), ("test",)).splits["test"]


XMP_TURNED = b'<r xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/>'


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def index_of(image: Path) -> Sample:
    """The sample of an image without labels."""
    sample, problems = index_image(image, DataConfig(image.parent / "data.yaml", image.parent, {}, names=("part",)))
    assert sample is not None
    assert not problems
    return sample


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif", ".webp"])
def test_the_size_is_that_of_the_decoded_image_for_every_orientation(
    tmp_path: Path, suffix: str, orientation: int
) -> None:
    path = tmp_path / f"turned{suffix}"
    Image.new("RGB", (60, 40)).save(path, exif=exif(orientation))
    assert index_of(path).size_hw == read_image(path).shape[:2]


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif", ".webp"])
def test_exif_turns_an_image_and_xmp_does_not(tmp_path: Path, suffix: str) -> None:
    Image.new("RGB", (60, 40)).save(tmp_path / f"exif{suffix}", exif=exif(6))
    image = Image.new("RGB", (60, 40))
    if suffix == ".png":
        info = PngImagePlugin.PngInfo()
        info.add_itxt("XML:com.adobe.xmp", XMP_TURNED.decode())
        image.save(tmp_path / "xmp.png", pnginfo=info)
    elif suffix == ".tif":
        image.save(tmp_path / "xmp.tif", tiffinfo={700: XMP_TURNED})
    else:
        image.save(tmp_path / f"xmp{suffix}", xmp=XMP_TURNED)
    assert index_of(tmp_path / f"exif{suffix}").size_hw == (60, 40)
    assert index_of(tmp_path / f"xmp{suffix}").size_hw == (40, 60)


def test_sixteen_bit_grey_cmyk_and_animated_images_are_read(tmp_path: Path) -> None:
    Image.fromarray(np.full((20, 30), 40_000, np.uint16)).save(tmp_path / "grey.png")
    Image.new("CMYK", (30, 20)).save(tmp_path / "print.jpg")
    frames = [Image.new("RGB", (30, 20), (value, 0, 0)) for value in (0, 200)]
    frames[0].save(tmp_path / "moving.webp", save_all=True, append_images=frames[1:])
    for name in ("grey.png", "print.jpg", "moving.webp"):
        assert index_of(tmp_path / name).size_hw == (20, 30)


def test_very_thin_and_very_large_images_are_named(tmp_path: Path) -> None:
    thin = write_image(tmp_path / "thin.png", width=200, height=1)
    with pytest.raises(InputError, match="200x1 pixels, expected at least 10"):
        decoded_size_hw(thin.read_bytes(), thin)
    with pytest.raises(InputError, match="pixels"):
        decoded_size_hw(png_header(60_000, 60_000) + b"\0\0\0\0IDAT" + b"\0" * 64, tmp_path / "wide.png")


def test_a_sample_has_the_key_and_the_digest_of_its_file(dataset: Path) -> None:
    sample = index_dataset(load_data(dataset), ("train",)).splits["train"].samples[0]
    assert sample.key == "images/train/0.png"
    assert sample.sha256 == hashlib.sha256(sample.image.read_bytes()).hexdigest()


def test_an_image_in_two_splits_is_decoded_once(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset.write_text("train: images\nval: images/val\nnames: [cat, dog]\n")
    decoded: list[Path] = []

    def counted(data: bytes, origin: Path) -> NDArray[np.uint8]:
        decoded.append(origin)
        return decode_image(data, origin)

    monkeypatch.setattr("compress.data.index.decode_image", counted)
    splits = index_dataset(load_data(dataset)).splits
    assert (len(splits["train"].samples), len(splits["val"].samples)) == (6, 2)
    assert sorted(decoded) == sorted(dataset.parent.rglob("*.png"))


def test_a_pickled_label_cache_is_never_opened(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for place in ("labels/train.cache", "labels.cache", "train.cache"):
        (dataset.parent / place).write_bytes(b"cos\nsystem\n(S'touch CANARY'\ntR.")
    assert len(index_dataset(load_data(dataset), ("train",)).splits["train"].samples) == 4
    assert not (tmp_path / "CANARY").exists()


def test_samples_are_in_the_order_of_their_paths(shared: Path) -> None:
    data = load_data(shared / "data/bccd/data.yaml")
    assert [sample.image for sample in index_dataset(data, ("val",)).splits["val"].samples] == list(data.splits["val"])


def test_the_quick_digest_follows_every_file_of_the_data(dataset: Path) -> None:
    root = dataset.parent
    digests = [quick_digest(load_data(dataset))]
    assert quick_digest(load_data(dataset)) == digests[0]
    os.utime(root / "images/train/0.png", (1, 1))
    digests.append(quick_digest(load_data(dataset)))
    (root / "labels/val/0.txt").unlink()
    digests.append(quick_digest(load_data(dataset)))
    (root / "images/val/1.png").unlink()
    digests.append(quick_digest(load_data(dataset)))
    dataset.write_text(dataset.read_text().replace("dog", "bird"))
    digests.append(quick_digest(load_data(dataset)))
    assert len(set(digests)) == len(digests)


def test_key_points_behind_the_box_are_not_read_as_a_polygon(dataset: Path) -> None:
    dataset.write_text(dataset.read_text() + "kpt_shape: [3, 2]\nflip_idx: [0, 1, 2]\n")
    row = "0 0.70 0.30 0.10 0.20 0.67 0.25 0.70 0.30 0.73 0.35\n"
    (dataset.parent / "labels/train/0.txt").write_text(f"{row}0 0.1 0.2 0.5 0.2 0.5 0.6 0.1 0.4\n")
    data = load_data(dataset)
    index = index_dataset(data, ("train",)).splits["train"]
    np.testing.assert_allclose(index.samples[0].labels, [[0, 0.7, 0.3, 0.1, 0.2]], atol=1e-6)
    assert "9 columns, expected 5 (class cx cy w h) or 11" in str(index.problems[0])
    assert "key points are not used" in data.notices[0]


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_split_without_a_label_is_an_error_that_names_where_they_belong(dataset: Path, split: str) -> None:
    shutil.rmtree(dataset.parent / f"labels/{split}")
    with pytest.raises(InputError, match=f"{split}: no image has a label") as caught:
        index_dataset(load_data(dataset))
    assert f"looked for in labels/{split}" in caught.value.hint


def test_labels_beside_the_images_are_named_where_none_was_read(dataset: Path) -> None:
    for labels in (dataset.parent / "labels/train").iterdir():
        labels.rename(dataset.parent / "images/train" / labels.name)
    with pytest.raises(InputError, match="no image has a label") as caught:
        index_dataset(load_data(dataset))
    assert caught.value.hint == "Move images/train/0.txt and its like to labels/train"


def test_wrong_rows_are_named_where_none_was_read(dataset: Path) -> None:
    for labels in (dataset.parent / "labels/val").iterdir():
        labels.write_text("7 0.5 0.5 0.1 0.1\n")
    with pytest.raises(InputError, match="val: no image has a label") as caught:
        index_dataset(load_data(dataset))
    assert "First of 2 problems" in caught.value.hint
    assert "class 7" in caught.value.hint


def test_images_without_labels_are_counted(dataset: Path) -> None:
    (dataset.parent / "labels/train/0.txt").unlink()
    index = index_dataset(load_data(dataset), ("train",)).splits["train"]
    assert (index.boxes, index.background) == (3, 1)


def test_a_split_may_do_without_labels_where_none_are_trained_on(dataset: Path) -> None:
    shutil.rmtree(dataset.parent / "labels/train")
    splits = index_dataset(load_data(dataset), labelled=JUDGES).splits
    assert (splits["train"].boxes, splits["val"].boxes) == (0, 2)
    shutil.rmtree(dataset.parent / "labels/val")
    with pytest.raises(InputError, match="val: no image has a label"):
        index_dataset(load_data(dataset), labelled=JUDGES)
