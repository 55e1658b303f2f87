"""Start a student from a larger network: slices of its weights, then what a few training batches tell.

In: a student, the network that it inherits from, training images. Out: the same student, and what it took over.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from compress.compute.device import to_device
from compress.config import TrainConfig
from compress.data.train_dataset import TrainDataset
from compress.log import Log
from compress.models import YOLOv5
from compress.models.inherit import fit_head, inherit, recalibrate
from compress.training.objective import DETECTION_TERMS, Objective
from compress.training.prepare import first_batches
from compress.training.teacher import Teacher

BATCHES = 4
"""Training batches that BatchNorm statistics and the head are fitted to."""

Document = dict[str, Any]


def inherit_from(
    source: YOLOv5, objective: Objective, train: TrainDataset, config: TrainConfig, device: str, log: Log
) -> Document:
    """Copy slices of `source` into the objective's model, measure its BatchNorm statistics and fit its head. In place.

    Returns a JSON object: how many parameters were copied, which classes, which blocks start afresh, and the parts of
    the label loss (box, obj, cls) from scratch and before the first step. Raises UsageError when the model is not a
    slice of the source.
    """
    teacher, student = Teacher(source, device), objective.model
    to_device(objective, teacher.device)
    images, targets, _ = zip(*first_batches(train, config, teacher.device, BATCHES), strict=True)
    scratch = _label_loss(objective, images, targets)
    found = inherit(student, source)
    recalibrate(student, images)
    fit_head(student, source.arch, lambda x: teacher(x).raw, images)
    start = _label_loss(objective, images, targets)
    log(
        f"inherited {found.parameters / found.total:.0%} of {found.total} parameters; label loss before the first step "
        f"{sum(start.values()):.3f}, from scratch {sum(scratch.values()):.3f}"
    )
    return found._asdict() | {"loss_from_scratch": scratch, "loss_before_first_step": start}


@torch.no_grad()
def _label_loss(
    objective: Objective, images: Sequence[torch.Tensor], targets: Sequence[torch.Tensor]
) -> dict[str, float]:
    """Mean box, objectness and class loss in evaluation mode, which changes no statistics."""
    model = objective.model
    was_training = model.training
    model.eval()
    parts = [objective.detection(model(x), y)[1] for x, y in zip(images, targets, strict=True)]
    model.train(was_training)
    return dict(zip(DETECTION_TERMS, torch.stack(parts).mean(0).tolist(), strict=True))
