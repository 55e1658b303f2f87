"""The frozen teacher of a distillation, and the checks of teacher and student before the first epoch."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from compress.compute.device import pick_device, to_device
from compress.compute.timing import Stopwatch
from compress.config import DistillConfig
from compress.data.class_names import class_conflict
from compress.data.loader import Batch, train_batches
from compress.data.train_dataset import TrainItems
from compress.evaluate import as_network_input
from compress.log import Log
from compress.losses.distill import DistillLoss, Outputs, Shape, make_losses
from compress.losses.preflight import DROWNS, SCALED, Check, preflight
from compress.models import YOLOv5
from compress.models.checkpoint import load_model
from compress.training.objective import Objective, detection_loss
from runtime.errors import EdgestillError, InputError

PROBE_IMAGES = 4


class Teacher:
    """A network that only infers: evaluation mode, convolutions fused with their normalisation, no gradient.

    It is no part of any module, so no optimiser, no `train()` and no saved file ever reaches it.
    """

    def __init__(self, model: YOLOv5, device: str = "auto", *, half: bool = False) -> None:
        self.device = pick_device(device)
        self._half = half and self.device.type == "cuda"
        self.model = to_device(model.fuse().eval().requires_grad_(False), self.device)

    @torch.no_grad()  # not inference_mode: its tensors may not take part in the student's backward
    def __call__(self, images: torch.Tensor) -> Outputs:
        """Outputs for float images (B, 3, H, W); on a GPU with `half` in float16."""
        with torch.autocast(images.device.type, torch.float16, enabled=self._half):
            return Outputs(*self.model.forward_features(images))


def load_teacher(path: Path, names: Sequence[str]) -> YOLOv5:
    """The teacher's model. Raises InputError when its classes are not exactly the data's, in their order."""
    model = load_model(path)
    if model.arch.names != tuple(names):
        raise InputError(
            class_conflict(f"the teacher {path}", model.arch.names, "the data", names),
            "Fine-tune the teacher on this data first: edgestill train",
        )
    return model


def shape_of(model: YOLOv5) -> Shape:
    """The facts of a network that the distillation losses need."""
    return Shape(model.feature_channels, model.arch.nc, model.arch.na, model.detect.anchors, model.arch.strides)


def build_losses(student: YOLOv5, teacher: YOLOv5, config: DistillConfig) -> dict[str, DistillLoss]:
    """The recipe's losses by name. Raises UsageError as `make_losses` does."""
    return make_losses(shape_of(student), shape_of(teacher), config)


def distillation(student: YOLOv5, teacher: YOLOv5, config: DistillConfig, *, has_labels: bool = True) -> Objective:
    """The objective of a distillation. Where the images have no labels, the weights of its losses follow the first one
    that compares heads. Raises UsageError as `make_losses` does.
    """
    losses = build_losses(student, teacher, config)
    reference = None if has_labels else next(name for name, loss in losses.items() if loss.compares_heads)
    return Objective(
        student, detection_loss(student, config), losses, label_weight=config.label_weight, reference=reference
    )


def check_distillation(
    objective: Objective, teacher: Teacher, train: TrainItems, config: DistillConfig, log: Log
) -> list[Check]:
    """Refuse a distillation that would silently do nothing, and log what the teacher costs.

    One small training batch passes through copies: no weight, statistic or gradient changes. Raises EdgestillError
    when a check fails, with the first that did.
    """
    batch = next(train_batches(train, batch=min(config.batch, PROBE_IMAGES), epoch=0))
    probe = to_device(copy.deepcopy(objective), teacher.device)
    on_device = batch._replace(images=batch.images.to(teacher.device), targets=batch.targets.to(teacher.device))
    losses: Any = probe.losses
    label_loss = partial(probe.label_loss, labelled=batch.labelled) if train.labelled else None
    checks = preflight(probe.model, teacher.model, losses, on_device, task=label_loss, label_weight=config.label_weight)
    for check in checks:
        if not check.ok:
            raise EdgestillError(f"the distillation would not work: {check.name}: {check.detail}")
    for check in checks:
        if check.name.endswith((DROWNS, SCALED)):
            log(f"{check.name}: {check.detail}")
    log(f"distillation: {len(checks)} checks passed; {checks[-1].name}: {checks[-1].detail}")
    log(cost_line(probe, teacher, on_device))
    return checks


def cost_line(objective: Objective, teacher: Teacher, batch: Batch) -> str:
    """One line: the time of the teacher beside the student's forward and backward, measured on one batch."""
    images = as_network_input(batch.images, teacher.device)
    watch = Stopwatch(teacher.device)
    for _ in range(2):  # the first round warms up
        watch.seconds.clear()
        with watch.phase("teacher"):
            teacher_outputs = teacher(images)
        with watch.phase("student"):
            objective(images, batch.targets, teacher_outputs).total.backward()
    teacher_ms, student_ms = (1e3 * watch.seconds[name] / len(images) for name in ("teacher", "student"))
    share = teacher_ms / (teacher_ms + student_ms)
    return f"teacher: {teacher_ms:.1f} ms an image, {share:.0%} of a step (student {student_ms:.1f} ms)"
