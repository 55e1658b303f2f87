from __future__ import annotations

import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from compress.data import load_data
from compress.data.index import image_size_hw, index_split
from compress.data.labels import label_path
from runtime.errors import InputError
from runtime.image import read_image
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
    index = index_split(load_data(dataset), "train")
    assert [sample.size_hw for sample in index.samples] == [(48, 64)] * 4
    np.testing.assert_allclose(index.samples[1].labels, [[1, 0.5, 0.5, 0.4, 0.3]])
    assert not index.problems


@pytest.mark.parametrize("decode", [None, True, False])
@pytest.mark.parametrize("name", BAD_IMAGES)
def test_a_bad_image_is_reported_and_only_it_is_left_out(dataset: Path, name: str, decode: bool | None) -> None:
    bad = dataset.parent / "images/train" / name
    bad.write_bytes(BAD_IMAGES[name])
    before = folder_hash(dataset.parent)
    index = index_split(load_data(dataset), "train", decode=decode)
    assert folder_hash(dataset.parent) == before
    kept = {sample.image.name for sample in index.samples}
    assert {f"{i}.png" for i in range(4)} <= kept
    if decode is not False or not name.startswith("truncated"):  # headers cannot tell that the end is missing
        assert name not in kept
        assert [problem.path for problem in index.problems] == [bad]
        assert "\n" not in str(index.problems[0])


def test_a_listed_image_that_is_missing_is_reported(dataset: Path) -> None:
    (dataset.parent / "list.txt").write_text("images/train/0.png\nimages/train/gone.png\n")
    dataset.write_text("train: list.txt\nval: images/val\nnames: [cat, dog]\n")
    index = index_split(load_data(dataset), "train")
    assert len(index.samples) == 1
    assert "gone.png" in str(index.problems[0])


def test_a_bad_row_is_reported_as_file_and_line(dataset: Path) -> None:
    labels = dataset.parent / "labels/train/0.txt"
    labels.write_text("0 0.5 0.5 0.1 0.1\n7 0.5 0.5 0.1 0.1\n")
    index = index_split(load_data(dataset), "train")
    assert str(index.problems[0]).startswith(f"{labels}:2: class 7")
    assert len(index.samples[0].labels) == 1


def test_an_image_without_label_file_is_background(dataset: Path) -> None:
    label_path(dataset.parent / "images/train/2.png").unlink()
    index = index_split(load_data(dataset), "train")
    assert [len(sample.labels) for sample in index.samples] == [1, 1, 0, 1]
    assert not index.problems


def test_a_split_without_a_usable_image_is_an_error(dataset: Path) -> None:
    for image in (dataset.parent / "images/val").iterdir():
        image.write_bytes(b"")
    with pytest.raises(InputError, match="none of 2 images can be used"):
        index_split(load_data(dataset), "val")
    with pytest.raises(InputError, match="no test split"):
        index_split(load_data(dataset), "test")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_size_is_that_of_the_decoded_image_for_every_exif_orientation(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "turned.jpg"
    Image.new("RGB", (60, 40)).save(path, exif=exif)
    assert image_size_hw(path) == read_image(path).shape[:2]


def test_sixteen_bit_grey_cmyk_and_animated_images_are_read(tmp_path: Path) -> None:
    Image.fromarray(np.full((20, 30), 40_000, np.uint16)).save(tmp_path / "grey.png")
    Image.new("CMYK", (30, 20)).save(tmp_path / "print.jpg")
    frames = [Image.new("RGB", (30, 20), (value, 0, 0)) for value in (0, 200)]
    frames[0].save(tmp_path / "moving.webp", save_all=True, append_images=frames[1:])
    for name in ("grey.png", "print.jpg", "moving.webp"):
        assert image_size_hw(tmp_path / name) == (20, 30) == read_image(tmp_path / name).shape[:2]


def test_very_thin_and_very_long_images_are_named(tmp_path: Path) -> None:
    write_image(tmp_path / "thin.png", width=200, height=1)
    with pytest.raises(InputError, match="200x1 pixels, expected at least 10"):
        image_size_hw(tmp_path / "thin.png")
    (tmp_path / "wide.png").write_bytes(png_header(60_000, 60_000) + b"\0\0\0\0IDAT" + b"\0" * 64)
    with pytest.raises(InputError, match="pixels"):
        image_size_hw(tmp_path / "wide.png")


def test_a_pickled_label_cache_is_never_opened(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for place in ("labels/train.cache", "labels.cache", "train.cache"):
        (dataset.parent / place).write_bytes(b"cos\nsystem\n(S'touch CANARY'\ntR.")
    assert len(index_split(load_data(dataset), "train").samples) == 4
    assert not (tmp_path / "CANARY").exists()


def test_the_order_does_not_depend_on_the_number_of_workers(shared: Path) -> None:
    data = load_data(shared / "data/bccd/data.yaml")
    one, four = (index_split(data, "val", workers=workers).samples for workers in (1, 4))
    assert [sample.image for sample in one] == [sample.image for sample in four] == list(data.splits["val"])
