"""Start a student from a larger network: slices of its weights, then what a few training batches tell.

In: a student, the network that it inherits from, training images. Out: the same student, and what it took over.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any

import torch

from compress.compute.device import to_device
from compress.compute.resize import reduced
from compress.config import TrainConfig
from compress.data.loader import train_batches
from compress.data.train_dataset import TrainDataset
from compress.evaluate import as_network_input
from compress.log import Log
from compress.models import YOLOv5
from compress.models.inherit import fit_head, inherit, recalibrate
from compress.training.objective import DETECTION_TERMS, Objective
from compress.training.teacher import AnyTeacher

BATCHES = 4
"""Training batches that BatchNorm statistics and the head are fitted to."""

Document = dict[str, Any]


def inherit_from(
    source: YOLOv5,
    objective: Objective,
    train: TrainDataset,
    config: TrainConfig,
    teacher: AnyTeacher,
    log: Log,
    classes: Sequence[int | None] | None = None,
) -> Document:
    """Copy slices of `source` into the objective's model, measure its BatchNorm statistics and fit its head. In place.

    The head is fitted to the outputs of `teacher`, on whose device all is computed; `classes` are as for `inherit`.
    Returns a JSON object: how many parameters were copied, which classes, which blocks start afresh, and the parts of
    the label loss (box, obj, cls) from scratch and before the first step. Raises UsageError when the model is not a
    slice of the source.
    """
    student = objective.model
    to_device(objective, teacher.device)
    batches = list(islice(train_batches(train, batch=config.batch, epoch=0), BATCHES))
    seen = [as_network_input(one.images, teacher.device) for one in batches]
    images = [reduced(one, config.imgsz) for one in seen]
    targets = [one.targets.to(teacher.device) for one in batches]
    scratch = _label_loss(objective, images, targets)
    found = inherit(student, source, classes)
    recalibrate(student, images)
    told = ((own, teacher(whole).raw) for own, whole in zip(images, seen, strict=True))
    fit_head(
        student, told, unknown=[index for index, name in enumerate(student.arch.names) if name not in found.classes]
    )
    start = _label_loss(objective, images, targets)
    log(
        f"inherited {found.parameters / found.total:.0%} of {found.total} parameters; label loss before the first step "
        f"{sum(start.values()):.3f}, from scratch {sum(scratch.values()):.3f}"
    )
    return found._asdict() | {"loss_from_scratch": scratch, "loss_before_first_step": start}


@torch.no_grad()
def _label_loss(objective: Objective, images: list[torch.Tensor], targets: list[torch.Tensor]) -> dict[str, float]:
    """Mean box, objectness and class loss in evaluation mode, which changes no statistics."""
    model = objective.model
    was_training = model.training
    model.eval()
    parts = [objective.detection(model(x), y)[1] for x, y in zip(images, targets, strict=True)]
    model.train(was_training)
    return dict(zip(DETECTION_TERMS, torch.stack(parts).mean(0).tolist(), strict=True))
