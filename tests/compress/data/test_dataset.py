from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from compress.data import Dataset, Sample, SplitIndex, index_dataset, load_data
from compress.data.dataset import Problem, key_of, path_of
from runtime.errors import InputError
from tests.compress.data.conftest import write_image, write_labels


@pytest.fixture
def indexed(dataset: Path) -> Dataset:
    """The small set with one bad row and one bad image."""
    (dataset.parent / "labels/train/1.txt").write_text("1 0.333333 0.1234567 0.4 0.3\n7 0.5 0.5 0.1 0.1\n")
    (dataset.parent / "images/val/broken.png").write_bytes(b"")
    return index_dataset(load_data(dataset))


def assert_equal(one: Dataset, other: Dataset) -> None:
    assert (one.path, one.root, one.names, one.notices) == (other.path, other.root, other.names, other.notices)
    assert one.splits.keys() == other.splits.keys()
    for ours, theirs in zip(one.splits.values(), other.splits.values(), strict=True):
        assert ours.problems == theirs.problems
        for a, b in zip(ours.samples, theirs.samples, strict=True):
            assert (a.image, a.key, a.size_hw, a.sha256) == (b.image, b.key, b.size_hw, b.sha256)
            assert a.labels.tobytes() == b.labels.tobytes()
            assert a.labels.shape == b.labels.shape
            assert b.labels.dtype == np.float32
            assert not b.labels.flags.writeable


def test_what_is_saved_is_loaded(indexed: Dataset, tmp_path: Path) -> None:
    indexed.save(tmp_path / "index.json")
    loaded = Dataset.load(tmp_path / "index.json", indexed.root)
    assert_equal(indexed, loaded)
    assert indexed.sha256 == loaded.sha256
    assert [len(index.problems) for index in loaded.splits.values()] == [1, 1]


def test_every_bit_of_a_float32_survives(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    uniform = rng.random(500_000, np.float32)
    tiny = uniform * np.float32(1e-30)
    near_one = np.nextafter(np.float32(1), np.array([0, 2], np.float32))
    values = np.concatenate([uniform, tiny, near_one, np.array([0, -0.0, -1e-7], np.float32)])
    labels = values.reshape(-1, 5)
    sample = Sample(tmp_path / "a.png", "a.png", labels, (10, 20), "00")
    whole = Dataset(tmp_path / "data.yaml", tmp_path, ("a",), (), {"train": SplitIndex((sample,), ())})
    whole.save(tmp_path / "index.json")
    (loaded,) = Dataset.load(tmp_path / "index.json", tmp_path).splits["train"].samples
    assert loaded.labels.tobytes() == labels.tobytes()


def test_the_file_is_json_without_absolute_paths_and_moves_with_the_data(indexed: Dataset, tmp_path: Path) -> None:
    (indexed.root / "index.json").write_text("an older file")
    indexed.save(indexed.root / "index.json")
    text = (indexed.root / "index.json").read_text()
    assert json.loads(text)["splits"].keys() == {"train", "val"}
    assert str(indexed.root) not in text
    moved = tmp_path / "moved"
    shutil.move(indexed.root, moved)
    loaded = Dataset.load(moved / "index.json", moved)
    assert loaded.path == moved / "data.yaml"
    assert all(sample.image.is_relative_to(moved) and sample.image.is_file() for sample in loaded.splits["val"].samples)
    assert loaded.sha256 == indexed.sha256


def test_the_digest_follows_images_labels_names_and_splits(dataset: Path) -> None:
    def digest() -> str:
        return index_dataset(load_data(dataset)).sha256

    digests = [digest()]
    os.utime(dataset.parent / "images/train/0.png", (0, 0))
    assert digest() == digests[0]
    write_image(dataset.parent / "images/train/0.png", seed=99)
    digests.append(digest())
    (dataset.parent / "labels/train/0.txt").write_text("0 0.5 0.5 0.4 0.300001\n")
    digests.append(digest())
    dataset.write_text(dataset.read_text().replace("cat", "bird"))
    digests.append(digest())
    (dataset.parent / "images/train/0.png").rename(dataset.parent / "images/train/moved.png")
    digests.append(digest())
    assert len(set(digests)) == len(digests)


def test_an_image_outside_the_root_has_a_key_too(dataset: Path, tmp_path: Path) -> None:
    outside = write_image(tmp_path / "elsewhere/images/0.png")
    write_labels(tmp_path / "elsewhere/labels/0.txt", "0 0.5 0.5 0.1 0.1\n")
    dataset.write_text(f"train: {outside.parent}\nval: images/val\nnames: [cat, dog]\n")
    indexed = index_dataset(load_data(dataset))
    (sample,) = indexed.splits["train"].samples
    assert sample.key == "../elsewhere/images/0.png"
    indexed.save(tmp_path / "index.json")
    assert str(tmp_path) not in (tmp_path / "index.json").read_text()
    assert Dataset.load(tmp_path / "index.json", indexed.root).splits["train"].samples[0].image == outside


def test_keys_have_slashes_and_give_the_path_again(tmp_path: Path) -> None:
    for path in (tmp_path / "set/a b/c.png", tmp_path / "other/c.png", tmp_path / "set"):
        key = key_of(path, tmp_path / "set")
        assert "\\" not in key
        assert path_of(key, tmp_path / "set") == path


@pytest.mark.skipif(os.name == "nt" or os.uname().sysname == "Darwin", reason="file names are Unicode there")
def test_a_file_name_that_is_not_utf8_survives(dataset: Path, tmp_path: Path) -> None:
    image = dataset.parent / "images/train/0.png"
    image.rename(os.fsdecode(os.fsencode(image.parent) + b"/gr\xfcn.png"))
    indexed = index_dataset(load_data(dataset))
    indexed.save(tmp_path / "index.json")
    loaded = Dataset.load(tmp_path / "index.json", indexed.root)
    assert_equal(indexed, loaded)
    assert all(sample.image.is_file() for sample in loaded.splits["train"].samples)
    assert loaded.sha256 == indexed.sha256


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"schema_version": 2}', '{"schema_version": 1, "splits": {"train": 3}}']
)
def test_a_file_that_is_no_index_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "index.json").write_text(text)
    with pytest.raises(InputError, match=r"index\.json"):
        Dataset.load(tmp_path / "index.json", tmp_path)
    with pytest.raises(InputError, match="cannot be read"):
        Dataset.load(tmp_path / "gone.json", tmp_path)


def test_the_first_problems_are_told_and_the_others_counted() -> None:
    problems = tuple(Problem(Path("a.txt"), line, "odd") for line in range(1, 8))
    lines = list(SplitIndex((), problems).problem_lines("train"))
    assert lines[0] == "train: skipped a.txt:1: odd"
    assert lines[4:] == ["train: skipped a.txt:5: odd", "train: 2 more problems"]
    assert list(SplitIndex((), problems[:5]).problem_lines("val")) == [
        f"val: skipped a.txt:{n}: odd" for n in range(1, 6)
    ]
