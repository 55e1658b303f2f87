"""What is minimised: the detection loss, and with a teacher the weighted distillation losses on top.

An objective is one module that holds the model and the losses' own parameters, and whose forward yields the loss:
wrapped for several processes, every gradient passes through that one forward, so none can be missed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from compress.compute.timing import Span, unwatched
from compress.config import TrainConfig
from compress.losses.detection import DetectionLoss
from compress.losses.distill import Context, DistillLoss, Outputs
from compress.models import YOLOv5

DETECTION_TERMS = ("box", "obj", "cls")


class Loss(NamedTuple):
    """One batch's loss."""

    total: Tensor
    """Scalar with a gradient, times the batch size (YOLOv5's convention: it scales with the images)."""
    terms: Tensor
    """(len(objective.terms),) detached, not times the batch size; they add up to total / batch size."""


def detection_loss(model: YOLOv5, config: TrainConfig) -> DetectionLoss:
    """YOLOv5's loss for the anchors that the model has now, its gains scaled to classes and image size."""
    return DetectionLoss(model.detect.anchors, model.arch.strides, model.arch.nc, config.loss, config.imgsz)


class Objective(nn.Module):
    """Plain training: the detection loss of a model."""

    def __init__(self, model: YOLOv5, detection: DetectionLoss) -> None:
        super().__init__()
        self.model = model
        self.detection = detection
        self.span: Span = unwatched

    @property
    def terms(self) -> tuple[str, ...]:
        return DETECTION_TERMS

    def forward(
        self,
        images: Tensor,
        targets: Tensor,
        guide: Outputs | None = None,
        factor: float = 1.0,
        upstream: Tensor | None = None,
    ) -> Loss:
        """Loss of float images (B, 3, H, W) against targets (n, 6); a plain training ignores the rest."""
        with self.span("forward"):
            raw = self.model(images)
        with self.span("loss"):
            return Loss(*self.detection(raw, targets))


class DistillObjective(Objective):
    """The detection loss plus `factor * weight * loss` for each distillation loss."""

    def __init__(
        self, model: YOLOv5, detection: DetectionLoss, losses: Mapping[str, DistillLoss], weights: Mapping[str, float]
    ) -> None:
        super().__init__(model, detection)
        self.losses = nn.ModuleDict(losses)  # makes their parameters this module's
        self.by_name = dict(losses)
        self.weights = dict(weights)

    @property
    def terms(self) -> tuple[str, ...]:
        return (*DETECTION_TERMS, *self.losses)

    def forward(
        self,
        images: Tensor,
        targets: Tensor,
        guide: Outputs | None = None,
        factor: float = 1.0,
        upstream: Tensor | None = None,
    ) -> Loss:
        """Loss against labels and against the teacher's outputs `guide`; `factor` scales all of the latter.

        `upstream` () float32 is the gradient that `total` will get, where the caller knows it.
        """
        if guide is None:
            raise ValueError("a distillation needs the teacher's outputs")
        with self.span("forward"):
            student = Outputs(*self.model.forward_features(images))
        with self.span("loss"):
            hard, parts = self.detection(student.raw, targets)
            expected = None if upstream is None else upstream * images.shape[0]
            soft = torch.stack([self._soft(name, student, guide, targets, factor, expected) for name in self.by_name])
            return Loss(hard + soft.sum() * images.shape[0], torch.cat([parts, soft.detach()]))

    def _soft(
        self,
        name: str,
        student: Outputs,
        guide: Outputs,
        targets: Tensor,
        factor: float,
        upstream: Tensor | None,
    ) -> Tensor:
        """One weighted distillation loss. `upstream` is multiplied just as autograd will do it, to the same bits."""
        weight = factor * self.weights[name]
        context = Context(targets, None if upstream is None else upstream * weight)
        return weight * self.by_name[name](student, guide, context)
