"""The loss that a training minimises: detection, and with a teacher the weighted distillation losses on top.

An objective is one module that holds the model and the losses' own parameters, and whose forward yields the loss:
wrapped for several processes, every gradient passes through that one forward, so none can be missed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from compress.config import TrainConfig
from compress.losses.detection import DetectionLoss
from compress.losses.distill import Context, DistillLoss, Outputs
from compress.models import YOLOv5
from compress.training.ratio import LossWeights, gradient_norms

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

    A weight is fixed, or follows the gradients (see `compress.training.ratio`).

    Without `losses` it is a plain training, which takes no notice of a teacher.
    """

    def __init__(
        self,
        model: YOLOv5,
        detection: DetectionLoss,
        losses: Mapping[str, DistillLoss] | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.detection = detection
        self.losses = nn.ModuleDict(losses)  # makes their parameters this module's
        own = (losses or {}).values()
        self.weights = LossWeights([loss.weight for loss in own], [loss.share for loss in own])

    @property
    def terms(self) -> tuple[str, ...]:
        """Names of `Loss.terms`."""
        return (*DETECTION_TERMS, *self.losses)

    def forward(
        self,
        images: Tensor,
        targets: Tensor,
        teacher_outputs: Outputs | None = None,
        factors: Sequence[float] = (),
        upstream: Tensor | None = None,
        measure: bool = False,
    ) -> Loss:
        """Loss of float images (B, 3, H, W) against targets (n, 6) and against the teacher's outputs for the images.

        Args:
            factors: of each distillation loss, multiplied by its weight; 0 leaves it out. Without factors all are 1.
            upstream: () float32, the gradient that `total` will get, where the caller knows it.
            measure: measure the gradients first, and let the weights follow.
        """
        return self.loss(self.student_outputs(images), teacher_outputs, targets, factors, upstream, measure)

    def student_outputs(self, images: Tensor) -> Outputs:
        """The model's raw maps and features."""
        return Outputs(*self.model.forward_features(images))

    def loss(
        self,
        student: Outputs,
        teacher: Outputs | None,
        targets: Tensor,
        factors: Sequence[float],
        upstream: Tensor | None,
        measure: bool,
    ) -> Loss:
        """The sum of all losses; see `forward`."""
        total, terms = self.detection(student.raw, targets)
        if not self.losses:
            return Loss(total, terms)
        if teacher is None:
            raise ValueError("a distillation needs the teacher's outputs")
        batch = student.raw[0].shape[0]
        factors = factors or [1.0] * len(self.losses)
        weights = self._weights(factors)
        upstream = None if upstream is None else upstream * batch
        losses: list[Any] = [
            self._compare(name, student, teacher, targets, None if upstream is None else upstream * weight)
            if factor else self._left_out(name, terms)
            for name, weight, factor in zip(self.losses, weights, factors, strict=True)
        ]  # fmt: skip
        if measure:
            self._measure(total / batch, losses, student, upstream)
            weights = self._weights(factors)
        distilled = torch.stack([weight * loss for weight, loss in zip(weights, losses, strict=True)])
        return Loss(total + distilled.sum() * batch, torch.cat([terms, distilled.detach()]))

    def _weights(self, factors: Sequence[float]) -> list[Tensor]:
        """The weight () of each distillation loss as it is now, times its factor."""
        return [weight * factor for weight, factor in zip(self.weights.weights, factors, strict=True)]

    def _compare(
        self, name: str, student: Outputs, teacher: Outputs, targets: Tensor, upstream: Tensor | None
    ) -> Tensor:
        """One distillation loss, unweighted. `upstream` is multiplied just as autograd will do it, to the same bits."""
        return self.losses[name](student, teacher, Context(targets, upstream))

    def _left_out(self, name: str, terms: Tensor) -> Tensor:
        """0, with a gradient of 0 for the loss's own parameters: several processes wait for each of them."""
        sums = [parameter.sum() for parameter in self.losses[name].parameters()]
        return 0 * torch.stack([terms.new_zeros(()), *sums]).sum()

    def _measure(self, label_loss: Tensor, losses: Sequence[Tensor], student: Outputs, upstream: Tensor | None) -> None:
        """Let the weights follow the gradients at the neck of this batch.

        They are measured times `upstream` and the weights, as large as they are trained: in float16 the gradients of
        some losses are 0 without it.
        """
        own = self.weights.weights
        scales = torch.cat([own.new_ones(1), own]) * upstream if upstream is not None else own.new_ones(len(own) + 1)
        scaled = [scale * loss for scale, loss in zip(scales, [label_loss, *losses], strict=True)]
        label, *others = gradient_norms(scaled, student.features) / scales
        self.weights.update(label, torch.stack(others))
