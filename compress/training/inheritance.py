"""Start a student from a larger network: slices of its weights, then what a few training batches tell.

In: how a student starts, the network that it inherits from, training images. Out: the student, and what it took over.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from compress.compute.device import to_device
from compress.compute.resize import reduced
from compress.config import STUDENT_ACTIVATIONS, StudentConfig, TrainConfig
from compress.data.train_dataset import TrainItems
from compress.log import Log
from compress.losses.maps import for_anchors
from compress.models import Architecture, YOLOv5, load, load_model
from compress.models.architecture import Anchors
from compress.models.inherit import classes_by_name, fit_head, inherit, recalibrate, why_not
from compress.processes import is_first_process
from compress.training.class_map import ClassMap, class_map_of
from compress.training.objective import DETECTION_TERMS, Objective
from compress.training.prepare import first_batches, new_model
from compress.training.teacher import AnyTeacher, Teacher
from runtime.errors import UsageError
from runtime.files import write_json

INHERITANCE = "inheritance.json"
"""The file beside a training's others that says what its network took over."""


def source_of(config: StudentConfig, teacher: YOLOv5 | None, log: Log) -> YOLOv5 | None:
    """The larger network whose slices the student starts from: that of its own weights, else the teacher.

    None where it starts from scratch or from a copy of its weights. Raises UsageError when slices are asked for, or
    weights are given, and the student is no slice of them.
    """
    source = load_model(config.weights) if config.weights and config.scale else teacher
    if source is None and config.init == "inherit" and not config.weights:
        raise UsageError("there is no network to inherit from", "Give --weights of a larger one, or --init auto")
    return source if source is not None and inherits(config, source.arch, log) else None


def check_start(config: StudentConfig) -> None:
    """Raises UsageError when the student's own weights are no start for it, InputError when they cannot be read."""
    if config.weights:
        inherits(config, load(config.weights).architecture, print)


def inherits(config: StudentConfig, source: Architecture, log: Log) -> bool:
    """Whether the student starts from slices of `source`, the network of its own weights or else the teacher's.

    Raises UsageError as `source_of` does.
    """
    if config.init == "scratch" or not config.scale:
        return False
    student = source.resized(config.scale)
    is_copy = (student.depth, student.width) == (source.depth, source.width)
    if config.weights and is_copy and config.init == "auto":
        return False
    reason = why_not(student, source)
    if reason and config.init == "auto" and not config.weights:
        log(f"the student starts from scratch: {reason}")
        return False
    if reason:
        raise UsageError(reason, "Choose a student that is not wider, or let it start from scratch, without weights")
    return True


def new_student(
    config: StudentConfig,
    names: Sequence[str],
    *,
    source: YOLOv5 | None = None,
    anchors: Anchors | None = None,
    seed: int = 0,
    log: Log = print,
) -> YOLOv5:
    """A fresh student for the classes `names`, like `source` if it will inherit from it. Raises as `new_model`."""
    return new_model(
        names,
        scale=config.scale,
        weights=None if source else config.weights,
        anchors=anchors,
        like=source.arch if source else None,
        activation=config.activation and STUDENT_ACTIVATIONS[config.activation],
        seed=seed,
        log=log,
    )


class HeadTeacher(NamedTuple):
    """The teacher to whose outputs the head is fitted, if it is not the source alone."""

    teacher: AnyTeacher
    classes: Sequence[int | None]
    """For each class of the student the source's class that it is, or None."""


def inherit_from(
    source: YOLOv5,
    objective: Objective,
    train: TrainItems,
    config: TrainConfig,
    device: str,
    out: Path,
    log: Log,
    by: HeadTeacher | None = None,
) -> None:
    """Copy slices of `source` into the objective's model, measure its BatchNorm statistics and fit its head. In place.

    The head is fitted to the outputs of `by`; without it to those of the source, for the student's anchors and, by
    name, its classes.
    Writes `inheritance.json` into `out`: how many parameters were copied, which classes, which blocks start afresh, and
    the parts of the label loss (box, obj, cls) from scratch and before the first step, null where no label is known.
    Raises UsageError when the model is not a slice of the source.
    """
    student = objective.model
    larger = by.teacher if by else Teacher(source, device)
    classes = by.classes if by else classes_by_name(student.arch, source.arch)
    to_device(objective, larger.device)
    loaded, targets, _, labelled = zip(*first_batches(train, config, larger.device), strict=True)
    images = [reduced(one, config.imgsz) for one in loaded]
    scratch = _label_loss(objective, images, targets, labelled)
    found = inherit(student, source, classes)
    recalibrate(student, images)
    named = class_map_of(classes)
    wanted = (
        (larger(x).raw for x in loaded) if by else (_in_terms_of(student, source, larger(x).raw, named) for x in images)
    )
    fit_head(student, zip(images, wanted, strict=True), named.unknown)
    start = _label_loss(objective, images, targets, labelled)
    told = f"{sum(start.values()):.3f}, from scratch {sum(scratch.values()):.3f}" if train.labelled else "not known"
    log(
        f"inherited {found.parameters / found.total:.0%} of {found.total} parameters; "
        f"label loss before the first step {told}"
    )
    if is_first_process():
        losses = {"loss_from_scratch": scratch, "loss_before_first_step": start}
        known = losses if train.labelled else dict.fromkeys(losses)
        write_json(out / INHERITANCE, found._asdict() | known)


def _in_terms_of(student: YOLOv5, source: YOLOv5, raw: Sequence[torch.Tensor], named: ClassMap) -> list[torch.Tensor]:
    """The source's raw maps for the student's classes and anchors."""
    maps = [named(level) for level in raw]
    if student.arch.anchors == source.arch.anchors:
        return maps
    own, wanted = (network.detect.anchors.to(maps[0].device) for network in (source, student))
    return list(map(for_anchors, maps, own, wanted))


@torch.no_grad()
def _label_loss(
    objective: Objective,
    images: Sequence[torch.Tensor],
    targets: Sequence[torch.Tensor],
    labelled: Sequence[int | None],
) -> dict[str, float]:
    """Mean box, objectness and class loss in evaluation mode, which changes no statistics."""
    model = objective.model
    was_training = model.training
    model.eval()
    parts = [objective.label_loss(model(x), y, n)[1] for x, y, n in zip(images, targets, labelled, strict=True)]
    model.train(was_training)
    return dict(zip(DETECTION_TERMS, torch.stack(parts).mean(0).tolist(), strict=True))
