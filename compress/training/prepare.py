"""Prepare a training: samples and a model, from settings and files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from compress.config import DistillConfig, Recipe, TrainConfig
from compress.data.class_names import class_conflict
from compress.data.dataset import Dataset, Sample, SplitIndex
from compress.data.image_store import fits_in_memory
from compress.data.index import require_labels
from compress.data.loader import Batch, epoch_tasks, train_batches
from compress.data.train_dataset import MixedDataset, TrainDataset, TrainItems
from compress.evaluate import as_network_input
from compress.log import Log
from compress.losses.autoanchor import choose_anchors, scaled_sizes
from compress.models import Architecture, YOLOv5
from compress.models.architecture import Anchors
from compress.models.checkpoint import load, transfer
from runtime.errors import UsageError

FITTED_BATCHES = 4
"""Training batches to which statistics, head and adapters are fitted before the first step."""


class Splits(NamedTuple):
    train: TrainItems
    val: Sequence[Sample]


def open_splits(data: Dataset, config: TrainConfig, log: Log) -> Splits:
    """The samples of both splits; rows and images that were left out are logged.

    Raises InputError when no training image has a label.
    """
    require_labels("train", data.splits["train"], data.path, data.root)
    train, val = (_samples(split, data.splits[split], log) for split in ("train", "val"))
    _tell_shared(data.splits["val"], data.splits["train"], "training", log)
    return Splits(TrainDataset(train, config.image_side, config.augment, config.seed), val)


def open_distillation(data: Dataset, unlabelled: SplitIndex | None, config: DistillConfig, log: Log) -> Splits:
    """The images of a distillation: those of the train split, the unlabelled ones, or as many of both in every batch.

    Raises InputError when labels are trained on and there are none.
    """
    if config.label_weight or config.rules.trains_teacher:
        require_labels("train", data.splits["train"], data.path, data.root)
    val = _samples("val", data.splits["val"], log)
    train = _samples("train", data.splits["train"], log) if config.uses_train_split else ()
    if train:
        _tell_shared(data.splits["val"], data.splits["train"], "training", log)
    if unlabelled:
        _tell_shared(data.splits["val"], unlabelled, "unlabelled training", log)
    more = unlabelled.samples if unlabelled else ()
    fits = fits_in_memory([*train, *more], config.image_side)
    own, other = (
        TrainDataset(samples, config.image_side, config.augment, config.seed, cache=fits, has_labels=has_labels)
        for samples, has_labels in ((train, data.splits["train"].boxes > 0), (more, False))
    )
    return Splits(MixedDataset(own, other) if train and more else own if train else other, val)


def _tell_shared(val: SplitIndex, trained: SplitIndex, kind: str, log: Log) -> None:
    """A line where images of val are trained on."""
    if shared := val.count_in(trained):
        log(
            f"val: {shared} of {len(val.samples)} images are {kind} images too, so its mAP says little about new images"
        )


def _samples(split: str, index: SplitIndex, log: Log) -> Sequence[Sample]:
    log(f"{split}: {len(index.samples)} images, {index.boxes} boxes, {index.background} images without labels")
    for line in index.problem_lines(split):
        log(line)
    return index.samples


def first_batches(train: TrainItems, config: TrainConfig, device: torch.device) -> list[Batch]:
    """The first batches of a training, at most FITTED_BATCHES, on the device; their images are float 0..1."""
    tasks = epoch_tasks(train, 0, batch=config.batch)[:FITTED_BATCHES]
    return [
        one._replace(images=as_network_input(one.images, device), targets=one.targets.to(device))
        for one in train_batches(train, tasks)
    ]


def new_model(
    names: Sequence[str],
    *,
    scale: str | None,
    weights: Path | None,
    anchors: Anchors | None = None,
    like: Architecture | None = None,
    activation: str | None = None,
    seed: int = 0,
    log: Log = print,
) -> YOLOv5:
    """A model for the classes `names`, started from `weights` wherever name and shape agree.

    Its size is `scale`, else that of the checkpoint; its anchors, layout and activation are those given, else those of
    the checkpoint or of `like`, else the default: the newest layout for its anchors, and SiLU. The rest starts as in a
    fresh seeded network, with the head's biases set for rare objects. Raises UsageError when neither is given.
    """
    _require_start(scale, weights)
    checkpoint = load(weights) if weights else None
    architecture = _architecture(
        tuple(names), scale, checkpoint.architecture if checkpoint else like, anchors, activation
    )
    torch.manual_seed(seed)
    model = YOLOv5(architecture)
    model.init_detect_bias()
    if checkpoint:
        copied, skipped = transfer(checkpoint.state_dict, model)
        log(f"{weights}: {len(copied)} tensors copied, {len(skipped)} start afresh{_why(skipped)}")
    return model


def model_from_state(state: Mapping[str, Any], names: Sequence[str]) -> YOLOv5:
    """The model that a resumed training continues with; its weights come with the rest of the state.

    Raises UsageError when the state was trained on other classes.
    """
    architecture = Architecture.from_json(state["architecture"])
    if architecture.names != tuple(names):
        raise UsageError(
            class_conflict("the state", architecture.names, "the data", names),
            "Resume with the same data, or start anew in another folder",
        )
    return YOLOv5(architecture)


def _architecture(
    names: tuple[str, ...],
    scale: str | None,
    like: Architecture | None,
    anchors: Anchors | None = None,
    activation: str | None = None,
) -> Architecture:
    """The network of `scale`, in what is not given as `like`; without a scale as large as that.

    Raises UsageError when `like` has another number of levels than there are groups of anchors.
    """
    if like is None:
        assert scale is not None
        return Architecture.of_scale(scale, names, anchors, activation=activation or "SiLU")
    if anchors and len(anchors) != len(like.anchors):
        raise UsageError(
            f"the student's weights are of a network with {len(like.anchors)} levels, the teacher has {len(anchors)}",
            "Give weights with as many levels, or none",
        )
    made = replace(like, names=names, anchors=anchors or like.anchors, activation=activation or like.activation)
    return made.resized(scale) if scale else made


def check_image_sizes(recipe: Recipe) -> None:
    """Raises UsageError when teacher and student do not take images of the recipe's sizes."""
    teacher = planned_teacher(recipe)
    student = _planned(recipe.student.scale, recipe.student.weights, teacher.anchors)
    for network, training in ((teacher, recipe.teacher), (student, recipe.distill)):
        network.require_image_size(recipe.imgsz)
        network.require_image_size(training.imgsz)
        network.require_image_size(*(recipe.export.imgsz or ()))


def planned_teacher(recipe: Recipe) -> Architecture:
    """The network that the teacher of a recipe will have, of one class."""
    return _planned(None if recipe.teacher.weights else recipe.teacher.scale, recipe.teacher.weights)


def _planned(scale: str | None, weights: Path | None, anchors: Anchors | None = None) -> Architecture:
    """The network that `new_model` would make, of one class."""
    _require_start(scale, weights)
    return _architecture(("any",), scale, load(weights).architecture if weights else None, anchors)


def _require_start(scale: str | None, weights: Path | None) -> None:
    if scale is None and weights is None:
        raise UsageError("neither a scale nor weights are given", "Use --weights FILE or --scale n")


def _why(skipped: Sequence[str]) -> str:
    return f" (first: {skipped[0]})" if skipped else ""


def adapt_anchors(model: YOLOv5, samples: Sequence[Sample], config: TrainConfig, log: Log) -> YOLOv5:
    """The model with anchors that suit the labels: the same object if its own already suit them."""
    sizes = scaled_sizes(
        [sample.labels[:, 3:5] for sample in samples],
        [sample.size_hw for sample in samples],
        config.imgsz,
        np.random.default_rng(config.seed),
    )
    rng = np.random.default_rng([config.seed, 1])
    choice = choose_anchors(sizes, np.array(model.arch.anchors), rng=rng, anchor_t=config.loss.anchor_t)
    log(
        f"anchors: {'replaced' if choice.replaced else 'kept'}, best possible recall {choice.after.recall:.4f}, "
        f"{choice.after.matches:.2f} matches per label"
    )
    return with_anchors(model, choice.anchors_px) if choice.replaced else model


def with_anchors(model: YOLOv5, anchors_px: Any) -> YOLOv5:
    """A model of the same weights for anchors (nl, na, 2) in pixels."""
    changed = YOLOv5(replace(model.arch, anchors=anchors_px))
    state = {key: value for key, value in model.state_dict().items() if not key.endswith("anchors")}
    changed.load_state_dict(state, strict=False)
    return changed
