"""Start a student from a larger network: slices of its weights, then what a few training batches tell.

In: a student, the network that it inherits from, training images. Out: the same student, and what it took over.
"""

from __future__ import annotations

from itertools import islice
from typing import Any

import torch

from compress.compute.device import to_device
from compress.data.loader import train_batches
from compress.data.train_dataset import TrainDataset
from compress.log import Log
from compress.losses.detection import DetectionLoss
from compress.models import YOLOv5
from compress.models.inherit import fit_head, inherit, recalibrate
from compress.training.teacher import Teacher
from compress.validate import as_network_input

BATCHES = 4
"""Training batches that BatchNorm statistics and the head are fitted to."""

Document = dict[str, Any]


def inherit_from(
    source: YOLOv5, student: YOLOv5, loss: DetectionLoss, train: TrainDataset, *, batch: int, device: str, log: Log
) -> Document:
    """Copy slices of `source` into `student`, measure its BatchNorm statistics afresh and fit its head. In place.

    Returns a JSON object: parameters that were copied, classes, blocks that start afresh, and the label loss of each
    image part (box, obj, cls) before and after. Raises UsageError when the student is not a slice of the source.
    """
    teacher = Teacher(source, device)
    where = student.detect.anchors.device
    to_device(student, teacher.device)
    loss = to_device(loss, teacher.device)
    batches = list(islice(train_batches(train, batch=batch, epoch=0), BATCHES))
    images = [as_network_input(one.images, teacher.device) for one in batches]
    targets = [one.targets.to(teacher.device) for one in batches]
    before = _label_loss(student, loss, images, targets)
    found = inherit(student, source)
    recalibrate(student, images)
    fit_head(student, source.arch, lambda x: teacher(x).raw, images)
    after = _label_loss(student, loss, images, targets)
    student.to(where)
    share = found.parameters / found.total
    log(
        f"inherited {share:.0%} of {found.total} parameters; label loss before the first step "
        f"{sum(before.values()):.3f} -> {sum(after.values()):.3f}"
    )
    return found._asdict() | {"loss_from_scratch": before, "loss_before_first_step": after}


@torch.no_grad()
def _label_loss(
    model: YOLOv5, loss: DetectionLoss, images: list[torch.Tensor], targets: list[torch.Tensor]
) -> dict[str, float]:
    """Mean box, objectness and class loss in evaluation mode, which changes no statistics."""
    was_training = model.training
    model.eval()
    parts = [loss(model(x), y)[1] for x, y in zip(images, targets, strict=True)]
    model.train(was_training)
    return dict(zip(("box", "obj", "cls"), torch.stack(parts).mean(0).tolist(), strict=True))
