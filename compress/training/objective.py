"""The loss that a training minimises: detection, and with a teacher the weighted distillation losses on top.

An objective is one module that holds the model and the losses' own parameters, and whose forward yields the loss:
wrapped for several processes, every gradient passes through that one forward, so none can be missed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from compress.config import TrainConfig
from compress.losses.detection import DetectionLoss
from compress.losses.distill import Context, DistillLoss, Outputs
from compress.models import YOLOv5

DETECTION_TERMS = ("box", "obj", "cls")


class Loss(NamedTuple):
    """The loss of one batch."""

    total: Tensor
    """Scalar with a gradient, times the batch size (YOLOv5's convention: it scales with the images)."""
    terms: Tensor
    """(len(objective.terms),) detached, not times the batch size; they add up to total / batch size."""


def detection_loss(model: YOLOv5, config: TrainConfig) -> DetectionLoss:
    """YOLOv5's loss for the anchors that the model has now, its gains scaled to classes and image size.

    Raises UsageError when the model does not take images of this size.
    """
    model.arch.require_image_size(config.imgsz)
    return DetectionLoss(model.detect.anchors, model.arch.strides, model.arch.nc, config.loss, config.imgsz)


class Objective(nn.Module):
    """A model with its detection loss, and `factor * weight * loss` for each distillation loss of `losses`.

    Without `losses` it is a plain training, which takes no notice of a teacher.
    """

    def __init__(
        self,
        model: YOLOv5,
        detection: DetectionLoss,
        losses: Mapping[str, DistillLoss] | None = None,
        weights: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.detection = detection
        self.losses = nn.ModuleDict(losses)  # makes their parameters this module's
        self.weights = dict(weights or {})

    @property
    def terms(self) -> tuple[str, ...]:
        """Names of `Loss.terms`."""
        return (*DETECTION_TERMS, *self.losses)

    def forward(
        self,
        images: Tensor,
        targets: Tensor,
        teacher_outputs: Outputs | None = None,
        factor: float = 1.0,
        upstream: Tensor | None = None,
    ) -> Loss:
        """Loss of float images (B, 3, H, W) against targets (n, 6) and against the teacher's outputs for the images.

        `factor` scales all distillation losses. `upstream` () float32 is the gradient that `total` will get, where the
        caller knows it.
        """
        return self.loss(self.student_outputs(images), teacher_outputs, targets, factor, upstream)

    def student_outputs(self, images: Tensor) -> Outputs:
        """The model's raw maps and features."""
        return Outputs(*self.model.forward_features(images))

    def loss(
        self, student: Outputs, teacher: Outputs | None, targets: Tensor, factor: float, upstream: Tensor | None
    ) -> Loss:
        """The sum of all losses; see `forward`."""
        total, terms = self.detection(student.raw, targets)
        if not self.losses:
            return Loss(total, terms)
        if teacher is None:
            raise ValueError("a distillation needs the teacher's outputs")
        batch = student.raw[0].shape[0]
        upstream = None if upstream is None else upstream * batch
        distilled = torch.stack([
            self._distilled(name, student, teacher, targets, factor * self.weights[name], upstream)
            for name in self.losses
        ])  # fmt: skip
        return Loss(total + distilled.sum() * batch, torch.cat([terms, distilled.detach()]))

    def _distilled(
        self, name: str, student: Outputs, teacher: Outputs, targets: Tensor, weight: float, upstream: Tensor | None
    ) -> Tensor:
        """One weighted distillation loss. `upstream` is multiplied just as autograd will do it, to the same bits."""
        context = Context(targets, None if upstream is None else upstream * weight)
        return weight * self.losses[name](student, teacher, context)
