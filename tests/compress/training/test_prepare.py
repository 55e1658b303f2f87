from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from compress.config import AugmentConfig, DistillConfig, TrainConfig
from compress.data import Dataset, SplitIndex
from compress.data.unlabelled import NO_LABELS
from compress.models import Architecture, YOLOv5, save_model
from compress.models.checkpoint import load
from compress.training.prepare import (
    adapt_anchors,
    model_from_state,
    new_model,
    open_distillation,
    open_splits,
    with_anchors,
)
from runtime.errors import UsageError

from .toys import NAMES, network, quiet

OTHER_ANCHORS = (((4, 4),), ((8, 8),), ((16, 16),))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    torch.manual_seed(3)
    model = YOLOv5(Architecture.of_scale("p", ("cat",), anchors=OTHER_ANCHORS))
    save_model(model, tmp_path / "cat.safetensors")
    return tmp_path / "cat.safetensors"


def test_a_new_model_is_the_same_for_the_same_seed() -> None:
    one, same, other = (new_model(NAMES, scale="p", weights=None, seed=seed, log=quiet) for seed in (1, 1, 2))
    assert torch.equal(one.model[0].conv.weight, same.model[0].conv.weight)
    assert not torch.equal(one.model[0].conv.weight, other.model[0].conv.weight)


def test_a_model_takes_size_anchors_and_weights_from_its_checkpoint(checkpoint: Path) -> None:
    lines: list[str] = []
    model = new_model(NAMES, scale=None, weights=checkpoint, log=lines.append)
    assert (model.arch.scale, model.arch.names, model.arch.anchors) == ("p", NAMES, OTHER_ANCHORS)
    assert torch.equal(model.model[3].conv.weight, load(checkpoint).state_dict["model.3.conv.weight"])
    assert "6 start afresh (first: model.24.m.0.weight)" in lines[0]


def test_given_anchors_win_over_the_checkpoints(checkpoint: Path) -> None:
    anchors = (((1, 2),), ((3, 4),), ((5, 6),))
    assert new_model(NAMES, scale="n", weights=checkpoint, anchors=anchors, log=quiet).arch.anchors == anchors
    assert new_model(NAMES, scale="n", weights=checkpoint, log=quiet).arch.anchors == OTHER_ANCHORS


def test_other_anchors_leave_every_weight_as_it_was() -> None:
    model = network()
    changed = with_anchors(model, [[(9, 9)] * 3] * 3)
    for key, value in model.state_dict().items():
        assert key.endswith("anchors") or torch.equal(value, changed.state_dict()[key])
    assert changed.arch.anchors == (((9.0, 9.0),) * 3,) * 3


def test_anchors_that_suit_the_labels_stay_the_same_object(tiny_data: Dataset) -> None:
    settings = TrainConfig(imgsz=64, augment=AugmentConfig())
    samples = open_splits(tiny_data, settings, quiet).train.samples
    lines: list[str] = []
    model = network()
    assert adapt_anchors(model, samples, settings, lines.append) is model
    assert lines[0].startswith("anchors: kept, best possible recall ")


def test_training_images_in_the_val_split_are_told(tiny_data: Dataset) -> None:
    lines: list[str] = []
    open_splits(tiny_data, TrainConfig(imgsz=64), lines.append)
    assert not any("training images too" in line for line in lines)
    same = replace(tiny_data, splits={"train": tiny_data.splits["train"], "val": tiny_data.splits["train"]})
    open_splits(same, TrainConfig(imgsz=64), lines.append)
    assert lines[-1] == "val: 10 of 10 images are training images too, so its mAP says little about new images"


def test_training_images_in_the_val_split_of_a_distillation_are_told_labelled_or_not(tiny_data: Dataset) -> None:
    train, val = tiny_data.splits["train"], tiny_data.splits["val"]
    settings, lines = DistillConfig(imgsz=64, unlabelled=tiny_data.root), []
    open_distillation(tiny_data, train, settings, lines.append)
    assert not any("images too" in line for line in lines)
    open_distillation(tiny_data, val, settings, lines.append)
    assert lines[-1].startswith("val: 4 of 4 images are unlabelled training images too")
    same = replace(tiny_data, splits={"train": val, "val": val})
    open_distillation(same, None, DistillConfig(imgsz=64), lines.append)
    assert lines[-1].startswith("val: 4 of 4 images are training images too")


def test_a_state_of_other_classes_does_not_continue() -> None:
    state = {"architecture": network().arch.to_json()}
    assert model_from_state(state, NAMES).arch == network().arch
    with pytest.raises(UsageError, match="Resume with the same data"):
        model_from_state(state, ("bolt", "washer"))


@pytest.mark.parametrize(
    ("changes", "images", "labelled"),
    [
        ({}, 20, 10),
        ({"strategy": "soft_labels"}, 20, 10),
        ({"strategy": "label_free"}, 4, 0),
        ({"strategy": "label_free", "label_weight": 0.5}, 20, 10),
    ],
)
def test_the_train_split_takes_part_but_in_a_training_without_labels(
    changes: dict[str, object], images: int, labelled: int, tiny_data: Dataset
) -> None:
    settings = DistillConfig.model_validate({"imgsz": 64, "unlabelled": "images"} | changes)
    train = open_distillation(tiny_data, tiny_data.splits["val"], settings, quiet).train
    assert (len(train), train.labelled) == (images, labelled)


def test_beside_unlabelled_images_a_train_split_without_labels_counts_as_unlabelled(tiny_data: Dataset) -> None:
    train = tiny_data.splits["train"]
    bare = SplitIndex(tuple(replace(sample, labels=NO_LABELS) for sample in train.samples), ())
    data = replace(tiny_data, splits={**tiny_data.splits, "train": bare})
    settings = DistillConfig.model_validate({"imgsz": 64, "unlabelled": "images", "strategy": "soft_labels"})
    found = open_distillation(data, tiny_data.splits["val"], settings, quiet).train
    assert (len(found), found.labelled) == (20, 0)
