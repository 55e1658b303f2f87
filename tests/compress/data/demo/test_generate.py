from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from compress.data import load_data
from compress.data.demo.belt_parts import PARTS
from compress.data.demo.belt_scene import MIN_VISIBLE
from compress.data.demo.generate import generate, scene
from compress.data.index import index_dataset
from compress.data.writing import split_of
from runtime.errors import UsageError
from tests.compress.data.conftest import folder_hash


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return generate(tmp_path_factory.mktemp("belt") / "set", images=20, size=(160, 192), seed=3)


def test_the_generated_set_is_a_valid_dataset(made: Path) -> None:
    data = load_data(made)
    assert data.names == tuple(PARTS)
    assert {split: len(images) for split, images in data.splits.items()} == {"train": 16, "val": 4, "test": 4}
    index = index_dataset(data, ("train",)).splits["train"]
    assert not index.problems
    assert {sample.size_hw for sample in index.samples} == {(160, 192)}
    assert all(1 <= len(sample.labels) <= 9 for sample in index.samples)


def test_one_seed_gives_one_set_of_bytes_for_any_number_of_workers(made: Path, tmp_path: Path) -> None:
    again = generate(tmp_path / "again", images=20, size=(160, 192), seed=3, workers=1)
    assert contents(again.parent) == contents(made.parent)
    other = generate(tmp_path / "other", images=2, size=(160, 192), seed=4)
    first = "images/train/belt_00000.jpg"
    assert contents(other.parent)[first] != contents(made.parent)[first]


def test_boxes_are_tight_around_the_visible_pixels() -> None:
    for index in range(10):
        drawn = scene(0, index, (160, 160))
        for part, (_, x1, y1, x2, y2) in zip(drawn.ids, drawn.boxes.astype(int).tolist(), strict=True):
            mask = drawn.part_ids == part
            assert mask[y1:y2, x1:x2].sum() == mask.sum() > 0
            assert mask[y1].any()
            assert mask[y2 - 1].any()
            assert mask[:, x1].any()
            assert mask[:, x2 - 1].any()


def test_every_class_is_drawn_and_stands_out_from_the_belt() -> None:
    seen: set[int] = set()
    for index in range(12):
        drawn = scene(1, index, (160, 160))
        seen |= set(drawn.boxes[:, 0].astype(int).tolist())
        brightness = drawn.image.mean(2)
        assert brightness[drawn.part_ids > 0].mean() > brightness[drawn.part_ids == 0].mean() + 10
    assert seen == set(range(len(PARTS)))


def test_parts_overlap_and_are_cut_but_stay_visible() -> None:
    overlaps = 0
    for index in range(20):
        boxes = scene(2, index, (160, 160)).boxes[:, 1:]
        assert (np.minimum(boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]) >= 6).all()
        wide = np.minimum(boxes[:, None, 2], boxes[None, :, 2]) - np.maximum(boxes[:, None, 0], boxes[None, :, 0])
        high = np.minimum(boxes[:, None, 3], boxes[None, :, 3]) - np.maximum(boxes[:, None, 1], boxes[None, :, 1])
        overlaps += int(((wide > 2) & (high > 2)).sum() - len(boxes)) // 2
    assert overlaps > 10
    assert 0 < MIN_VISIBLE < 1


def test_a_fifth_is_for_validation_and_never_nothing() -> None:
    assert [split_of(i, 10) for i in range(10)].count("val") == 2
    for images in range(2, 12):
        splits = {split_of(i, images) for i in range(images)}
        assert splits == {"train", "val"}


def test_a_folder_that_holds_something_is_not_touched(made: Path) -> None:
    before = folder_hash(made.parent)
    with pytest.raises(UsageError, match="not empty"):
        generate(made.parent, images=2)
    assert folder_hash(made.parent) == before


def test_a_failed_run_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("compress.data.demo.generate.write_data_yaml", fail)
    with pytest.raises(KeyboardInterrupt):
        generate(tmp_path / "set", images=2, size=(64, 64))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("images", "size"), [(1, (64, 64)), (2, (10, 64)), (2, (64, 100_000))])
def test_impossible_requests_are_refused(tmp_path: Path, images: int, size: tuple[int, int]) -> None:
    with pytest.raises(UsageError, match="expected"):
        generate(tmp_path / "set", images=images, size=size)
