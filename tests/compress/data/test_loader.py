from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from compress.config import AugmentConfig
from compress.data import load_data
from compress.data.dataset import Sample
from compress.data.image_store import ImageStore, cached_bytes, free_bytes, resized_hw
from compress.data.index import index_dataset
from compress.data.loader import Batch, epoch_tasks, map_ahead, train_batches, val_batches
from compress.data.train_dataset import TrainDataset, TrainItems
from runtime.boxes import unletterbox
from runtime.errors import InputError
from tests.compress.data.conftest import PLAIN, assert_equal, folder_hash, mixed


def epoch(dataset: TrainItems, number: int = 3, *, batch: int = 4, workers: int = 0, **options: Any) -> list[Batch]:
    return list(train_batches(dataset, epoch_tasks(dataset, number, batch=batch, **options), workers))


def test_a_batch_is_uint8_rgb_with_targets_that_name_their_image(samples: tuple[Sample, ...]) -> None:
    batches = epoch(TrainDataset(samples, 64, AugmentConfig(mixup=0.5)))
    assert [len(batch.images) for batch in batches] == [4, 4, 3]
    assert sorted(index for batch in batches for index in batch.indices) == list(range(11))
    for batch in batches:
        assert batch.images.dtype == torch.uint8
        assert batch.images.shape[1:] == (3, 64, 64)
        assert batch.targets.dtype == torch.float32
        assert batch.targets.shape[1] == 6
        assert ((batch.targets[:, 2:] >= 0) & (batch.targets[:, 2:] <= 1)).all()
        assert (batch.targets[:, 0] < len(batch.images)).all()
        assert (batch.targets[:, 0].diff() >= 0).all()


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_batches_are_equal_for_any_number_of_workers(samples: tuple[Sample, ...], workers: int) -> None:
    config = AugmentConfig(mixup=0.5, degrees=10)
    assert_equal(epoch(TrainDataset(samples, 64, config)), epoch(TrainDataset(samples, 64, config), workers=workers))


def test_batches_are_equal_with_and_without_memory_and_on_every_repetition(samples: tuple[Sample, ...]) -> None:
    cached = TrainDataset(samples, 64, AugmentConfig(), cache=True)
    first = epoch(cached)
    assert_equal(first, epoch(cached))
    assert_equal(first, epoch(TrainDataset(samples, 64, AugmentConfig(), cache=False)))


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_together_hold_what_one_rank_alone_holds(samples: tuple[Sample, ...], world: int) -> None:
    dataset = TrainDataset(samples, 64, AugmentConfig())
    whole = epoch(dataset)
    ranks = [epoch(dataset, rank=rank, world=world) for rank in range(world)]
    for batch, *parts in zip(whole, *ranks, strict=True):
        assert sum((part.indices for part in parts), ()) == batch.indices
        assert torch.equal(torch.cat([part.images for part in parts]), batch.images)
        assert torch.equal(torch.cat([part.targets[:, 1:] for part in parts]), batch.targets[:, 1:])


def test_no_rank_is_left_without_an_image(samples: tuple[Sample, ...]) -> None:
    dataset = TrainDataset(samples[:9], 64, PLAIN)
    last = [epoch(dataset, rank=rank, world=3)[-1] for rank in range(3)]
    assert [len(batch.images) for batch in last] == [1, 1, 1]


def test_epochs_and_seeds_differ(samples: tuple[Sample, ...]) -> None:
    dataset = TrainDataset(samples, 64, AugmentConfig())
    assert epoch(dataset)[0].indices != epoch(dataset, 4)[0].indices
    assert not torch.equal(
        epoch(dataset)[0].images, epoch(TrainDataset(samples, 64, AugmentConfig(), seed=1))[0].images
    )


def test_mosaic_can_be_switched_off_for_the_last_epochs(samples: tuple[Sample, ...]) -> None:
    plain = TrainDataset(samples, 64, AugmentConfig(mosaic=0))
    assert_equal(epoch(TrainDataset(samples, 64, AugmentConfig(mixup=1)), mosaic=False), epoch(plain))


def test_without_augmentation_labels_stay_on_their_objects(tmp_path: Path) -> None:
    image = np.zeros((60, 120, 3), np.uint8)
    image[15:45, 30:60] = (0, 0, 255)
    import cv2

    cv2.imwrite(str(tmp_path / "a.png"), image)
    labels = np.array([[0, 45 / 120, 0.5, 30 / 120, 0.5]], np.float32)
    made, moved = TrainDataset([Sample(tmp_path / "a.png", "a.png", labels, (60, 120), "")], 240, PLAIN).item(0, 0)
    red = np.argwhere(made[..., 2].astype(int) - made[..., 0] > 128)
    (y0, x0), (y1, x1) = red.min(0), red.max(0) + 1
    cx, cy, w, h = moved[0, 1:] * 240
    np.testing.assert_allclose([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2], [x0, y0, x1, y1], atol=1.01)


def test_an_image_that_breaks_during_training_is_reported_once_and_loses_its_labels(
    samples: tuple[Sample, ...], caplog: pytest.LogCaptureFixture
) -> None:
    samples[2].image.write_bytes(b"broken")
    dataset = TrainDataset(samples, 64, PLAIN, cache=True)
    with caplog.at_level(logging.WARNING):
        batches = epoch(dataset, workers=2) + epoch(dataset, workers=2)
    assert len([record for record in caplog.records if "02.png" in record.getMessage()]) == 1
    assert list(dataset.store.problems) == [2]
    for batch in batches:
        for position, index in enumerate(batch.indices):
            assert (batch.targets[:, 0] == position).sum() == (0 if index == 2 else 2)


def test_an_image_that_breaks_before_validation_is_an_error(samples: tuple[Sample, ...]) -> None:
    samples[2].image.write_bytes(b"broken")
    with pytest.raises(InputError, match=r"02\.png"):
        list(val_batches(samples, imgsz=64, batch=4, stride=32, workers=2))


def test_decoded_images_are_kept_only_when_they_fit(
    samples: tuple[Sample, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    need = cached_bytes(samples, 64)
    store = ImageStore(samples, 64)
    assert sum(store.load(i)[0].nbytes for i in range(len(samples))) == need
    assert free_bytes() > 0
    monkeypatch.setattr("compress.data.image_store.free_bytes", lambda: need)
    assert not ImageStore(samples, 64).cached
    monkeypatch.setattr("compress.data.image_store.free_bytes", lambda: 3 * need)
    assert ImageStore(samples, 64).cached
    monkeypatch.setattr("compress.data.image_store.sharing_count", lambda: 2)
    assert not ImageStore(samples, 64).cached


def test_a_cached_image_cannot_be_written(samples: tuple[Sample, ...]) -> None:
    image, _ = ImageStore(samples, 64).load(0)
    with pytest.raises(ValueError, match="read-only"):
        image[0, 0] = 0


def test_the_predicted_size_is_that_of_the_resized_image(samples: tuple[Sample, ...]) -> None:
    store = ImageStore(samples, 37)
    assert all(store.load(i)[0].shape[:2] == resized_hw(sample.size_hw, 37) for i, sample in enumerate(samples))


def test_reading_a_dataset_changes_nothing_in_its_folder(dataset: Path) -> None:
    before = folder_hash(dataset.parent)
    found = index_dataset(load_data(dataset), ("train",)).splits["train"].samples
    epoch(TrainDataset(found, 64, AugmentConfig()), workers=2)
    list(val_batches(found, imgsz=64, batch=2, stride=32))
    assert folder_hash(dataset.parent) == before


@pytest.mark.parametrize("batch", [8, 32])
def test_rectangular_batches_are_those_of_yolov5(shared: Path, reference: Path, batch: int) -> None:
    numbers = json.loads((reference / "data_reference.json").read_text())
    expected = numbers[f"rect_batch_shapes_bs{batch}"]
    samples = index_dataset(load_data(shared / "data/coco128/data.yaml"), ("val",)).splits["val"].samples
    batches = list(val_batches(samples, imgsz=640, batch=batch, stride=32, workers=2))
    assert [list(one.images.shape[2:]) for one in batches] == expected["batch_shapes"]
    ratio = {str(int(s.image.stem)): s.size_hw[0] / s.size_hw[1] for s in samples}
    ours = [str(int(sample.image.stem)) for one in batches for sample in one.samples]
    assert [ratio[name] for name in ours] == [ratio[name] for name in expected["files_in_order"]]  # except for ties

    first, one = numbers[f"rect_item0_bs{batch}"], batches[0]
    assert one.samples[0].image.name == first["file"]
    assert [list(one.samples[0].size_hw), [list(one.gains_wh[0])[::-1], list(one.pads_wh[0])]] == first["shapes"]
    np.testing.assert_allclose(one.targets[one.targets[:, 0] == 0].numpy(), first["labels"], atol=1e-6)


def test_square_batches_keep_the_given_order(samples: tuple[Sample, ...]) -> None:
    batches = list(val_batches(samples, imgsz=96, batch=4, stride=32, rect=False))
    assert [tuple(one.images.shape[2:]) for one in batches] == [(96, 96)] * 3
    assert [sample for one in batches for sample in one.samples] == list(samples)


def test_validation_labels_can_be_mapped_to_the_original_boxes(samples: tuple[Sample, ...]) -> None:
    for one in val_batches(samples, imgsz=96, batch=4, stride=32):
        height, width = one.images.shape[2:]
        for position, sample in enumerate(one.samples):
            cx, cy, w, h = (one.targets[one.targets[:, 0] == position, 2:].numpy() * [width, height, width, height]).T
            boxes = np.stack([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2], 1).astype(np.float32)
            back = unletterbox(boxes, one.gains_wh[position][1], one.pads_wh[position], sample.size_hw)
            own_h, own_w = sample.size_hw
            expected = sample.labels[:, 3:5] * [own_w, own_h]
            np.testing.assert_allclose(back[:, 2:] - back[:, :2], expected, atol=0.02 * max(own_h, own_w))


def test_work_ahead_keeps_order_and_passes_errors_on() -> None:
    assert list(map_ahead(lambda x: x * x, range(20), workers=3)) == [x * x for x in range(20)]
    with pytest.raises(ZeroDivisionError):
        list(map_ahead(lambda x: 1 // x, [1, 0, 1], workers=2))


def test_an_abandoned_epoch_stops_its_workers(samples: tuple[Sample, ...]) -> None:
    dataset = TrainDataset(samples, 64, PLAIN)
    batches = train_batches(dataset, epoch_tasks(dataset, 0, batch=1), workers=2)
    next(batches)
    batches.close()  # type: ignore[attr-defined]
    assert next(batches, None) is None


# -- labelled and unlabelled images ---------------------------------------------------------------


def test_a_batch_holds_as_many_unlabelled_images_as_labelled_ones_and_those_first(samples: tuple[Sample, ...]) -> None:
    batches = epoch(mixed(samples, 5))
    assert [(batch.labelled, len(batch.images)) for batch in batches] == [(2, 4), (2, 4), (1, 2)]
    assert sorted(i for batch in batches for i in batch.indices if i < 5) == list(range(5))
    for batch in batches:
        assert set(batch.targets[:, 0].tolist()) == set(range(batch.labelled or 0))


@pytest.mark.parametrize("labelled", [2, 4, 8])
def test_every_unlabelled_image_comes_once_in_a_pass_whatever_the_epochs(
    samples: tuple[Sample, ...], labelled: int
) -> None:
    dataset, seen = mixed(samples, labelled), []
    unlabelled = dataset._unlabelled
    unlabelled.item = lambda number, index, *, mosaic: seen.append((number, index))  # type: ignore[method-assign]
    for number in range(9):
        for index in dataset.order(number)[1::2]:
            dataset.item(number, int(index))
    count = len(samples) - labelled
    assert len(seen) == 9 * labelled
    assert [number for number, _ in seen] == [place // count for place in range(len(seen))]
    assert all(len({*seen[i : i + count]}) == len(seen[i : i + count]) for i in range(0, len(seen), count))


def test_mosaics_join_images_of_one_kind(samples: tuple[Sample, ...]) -> None:
    dataset = mixed(samples, 5, AugmentConfig(mosaic=1, mixup=1))
    batches = epoch(dataset)
    assert all(batch.labelled == len(batch.images) / 2 for batch in batches)
    assert all((batch.targets[:, 0] < batch.labelled).all() for batch in batches)
    assert dataset._own.store._images.keys() <= set(range(5))


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_share_both_kinds(samples: tuple[Sample, ...], world: int) -> None:
    whole = epoch(mixed(samples, 6), batch=6)
    ranks = [epoch(mixed(samples, 6), batch=6, rank=rank, world=world) for rank in range(world)]
    for batch, *parts in zip(whole, *ranks, strict=True):
        assert sorted(index for part in parts for index in part.indices) == sorted(batch.indices)
        assert sum(part.labelled or 0 for part in parts) == batch.labelled


def test_an_epoch_is_the_same_whatever_came_before_it(samples: tuple[Sample, ...]) -> None:
    config = AugmentConfig(mixup=0.5)
    dataset = mixed(samples, 4, config)
    for number in range(3):
        epoch(dataset, number, workers=2)
    assert_equal(epoch(dataset), epoch(mixed(samples, 4, config)))


def test_images_that_are_all_labelled_are_not_counted(samples: tuple[Sample, ...]) -> None:
    assert {batch.labelled for batch in epoch(TrainDataset(samples, 64, PLAIN))} == {None}
    assert {batch.labelled for batch in epoch(TrainDataset(samples, 64, PLAIN, has_labels=False))} == {0}
