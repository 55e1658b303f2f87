"""The loss that a training minimises: detection, and with a teacher the weighted distillation losses on top.

An objective is one module that holds the model and the losses' own parameters, and whose forward yields the loss:
wrapped for several processes, every gradient passes through that one forward, so none can be missed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from compress.compute.reduce import summed_over_processes
from compress.config import TrainConfig
from compress.losses.detection import DetectionLoss
from compress.losses.distill import Context, DistillLoss, Outputs
from compress.losses.gradients import squared_norms
from compress.models import YOLOv5
from compress.training.ratio import LossWeights

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
        self.weights = LossWeights(
            [loss.weight for loss in own], [loss.share for loss in own], [loss.parts for loss in own]
        )

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
        seen = own_views(student)
        losses: list[Any] = [
            self._compare(name, seen, teacher, targets, None if upstream is None else upstream * weight)
            if factor else self._left_out(name, terms)
            for name, weight, factor in zip(self.losses, weights, factors, strict=True)
        ]  # fmt: skip
        if measure:
            self._measure(total / batch, losses, student, seen, upstream)
            weights = self._weights(factors)
        distilled = torch.stack([(weight * loss).sum() for weight, loss in zip(weights, losses, strict=True)])
        return Loss(total + distilled.sum() * batch, torch.cat([terms, distilled.detach()]))

    def _weights(self, factors: Sequence[float]) -> list[Tensor]:
        """The weights (parts,) of each distillation loss as they are now, times its factor."""
        return [weights * factor for weights, factor in zip(self.weights.of_losses(), factors, strict=True)]

    def _compare(
        self, name: str, student: Outputs, teacher: Outputs, targets: Tensor, upstream: Tensor | None
    ) -> Tensor:
        """One distillation loss, unweighted. `upstream` is multiplied just as autograd will do it, to the same bits."""
        loss: Tensor = self.losses[name](student, teacher, Context(targets, upstream))
        return loss

    def _left_out(self, name: str, terms: Tensor) -> Tensor:
        """Zeros (parts,), with a gradient of 0 for the loss's parameters: several processes wait for each of them."""
        loss: Any = self.losses[name]
        sums = [parameter.sum() for parameter in loss.parameters()]
        return (0 * torch.stack([terms.new_zeros(()), *sums]).sum()).expand(loss.parts)

    def _measure(
        self, label_loss: Tensor, losses: Sequence[Tensor], student: Outputs, seen: Outputs, upstream: Tensor | None
    ) -> None:
        """Let the weights follow the gradients at the neck of this batch.

        They are measured times `upstream` and the weights, as large as they are trained: in float16 the gradients of
        some losses are 0 without it. A loss with a weight a level is measured at the views that it alone `seen`: from a
        coarse level its gradient goes on to the finer maps, where it would count for their levels.
        """
        scale = label_loss.new_ones(()) if upstream is None else upstream
        found = [squared_norms(scale * label_loss, student.features) / scale.square()]
        for weight, loss in zip(self.weights.of_losses(), losses, strict=True):
            factor = torch.ones_like(weight) if upstream is None else upstream * weight
            maps = (seen if len(weight) > 1 else student).features
            found.append(squared_norms((factor * loss).sum(), maps) / factor.square())
        label, *own = summed_over_processes(torch.stack(found))
        self.weights.follow(label, torch.stack(own))


def own_views(outputs: Outputs) -> Outputs:
    """The same outputs with views of the features: a gradient at them is that of whoever reads them alone."""
    return outputs._replace(features=[feature.view_as(feature) for feature in outputs.features])
