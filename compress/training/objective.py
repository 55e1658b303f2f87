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
from compress.losses.distill import Context, DistillLoss, Outputs, detached
from compress.losses.gradients import squared_norms
from compress.models import YOLOv5
from compress.models.network import Section
from compress.training.compiled import compiled
from compress.training.curves import TEACHER_TERM
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

    Args:
        label_weight: weight of the detection loss.
        reference: the distillation loss whose gradient the weights follow; None takes the detection loss.
    """

    def __init__(
        self,
        model: YOLOv5,
        detection: DetectionLoss,
        losses: Mapping[str, DistillLoss] | None = None,
        *,
        label_weight: float = 1.0,
        reference: str | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.detection = detection
        self.losses = nn.ModuleDict(losses)  # makes their parameters this module's
        own = (losses or {}).values()
        self.weights = LossWeights(
            [loss.weight for loss in own], [loss.share for loss in own], [loss.components for loss in own]
        )
        self.label_weight, self.reference = label_weight, reference
        self.teacher: Objective | None = None
        """A teacher that trains too, on the labels alone: no gradient of the student's losses reaches it."""
        self._section: Section | None = None

    @property
    def terms(self) -> tuple[str, ...]:
        """Names of `Loss.terms`."""
        return (*DETECTION_TERMS, *self.losses, *([TEACHER_TERM] if self.teacher else []))

    @property
    def parts(self) -> list[Objective]:
        """Itself, and the objective of a teacher that trains too."""
        return [self, *([self.teacher] if self.teacher else [])]

    def own_parameters(self) -> list[nn.Parameter]:
        """All parameters but those of a teacher that trains too."""
        others = {id(parameter) for parameter in self.teacher.parameters()} if self.teacher else set()
        return [parameter for parameter in self.parameters() if id(parameter) not in others]

    def forward(
        self,
        images: Tensor,
        targets: Tensor,
        teacher_outputs: Outputs | None = None,
        factors: Sequence[float] = (),
        upstream: Tensor | None = None,
        measure: bool = False,
        labelled: int | None = None,
    ) -> Loss:
        """Loss of float images (B, 3, H, W) against targets (n, 6) and against the teacher's outputs for the images.

        Args:
            factors: of each distillation loss, multiplied by its weight; 0 leaves it out. Without factors all are 1.
            upstream: () float32, the gradient that `total` will get, where the caller knows it.
            measure: measure the gradients first, and let the weights follow.
            labelled: the number of images, the first ones, whose labels are known; None if those of all are.
        """
        if self.teacher is None:
            student = self.student_outputs(images)
            return self.loss(student, teacher_outputs, targets, factors, upstream, measure, labelled)
        teacher_outputs = self.teacher.student_outputs(images)
        own, terms = self.teacher.label_loss(teacher_outputs.raw, targets, labelled)
        student = self.student_outputs(images)
        total, others = self.loss(student, detached(teacher_outputs), targets, factors, upstream, measure, labelled)
        return Loss(total + own, torch.cat([others, terms.sum().view(1)]))

    def compile_networks(self) -> None:
        """Run backbone and neck of every model as compiled code from now on, section by section.

        The features lie between compiled sections, since gradients are measured there.
        """
        for part in self.parts:
            part._section = compiled(part.model.section)

    def student_outputs(self, images: Tensor) -> Outputs:
        """The model's raw maps and features."""
        return Outputs(*self.model.forward_features(images, self._section))

    def loss(
        self,
        student: Outputs,
        teacher: Outputs | None,
        targets: Tensor,
        factors: Sequence[float] = (),
        upstream: Tensor | None = None,
        measure: bool = False,
        labelled: int | None = None,
    ) -> Loss:
        """The sum of all losses of the model; see `forward`."""
        total, terms = self.label_loss(student.raw, targets, labelled)
        if not self.losses:
            return Loss(self.label_weight * total, self.label_weight * terms)
        if teacher is None:
            raise ValueError("a distillation needs the teacher's outputs")
        batch = student.raw[0].shape[0]
        factors = factors or [1.0] * len(self.losses)
        weights = self._weights(factors)
        upstream = None if upstream is None else upstream * batch
        seen = own_views(student)
        losses: list[Any] = [
            # multiplied just as autograd will do it, to the same bits
            loss(seen, teacher, Context(targets, None if upstream is None else upstream * weight, labelled))
            if factor else _left_out(loss, terms)
            for loss, weight, factor in zip(self.losses.values(), weights, factors, strict=True)
        ]  # fmt: skip
        if measure:
            of = dict(zip(self.losses, losses, strict=True))
            self._measure(
                of[self.reference].sum() if self.reference else total / batch, losses, student, seen, upstream
            )
            weights = self._weights(factors)
        distilled = torch.stack([(weight * loss).sum() for weight, loss in zip(weights, losses, strict=True)])
        return Loss(
            self.label_weight * total + distilled.sum() * batch,
            torch.cat([self.label_weight * terms, distilled.detach()]),
        )

    def label_loss(self, raw: Sequence[Tensor], targets: Tensor, labelled: int | None = None) -> tuple[Tensor, Tensor]:
        """The detection loss, unweighted, of the first `labelled` images (all, where None): the scalar times their
        number, and its parts (3,) averaged over all images, detached.
        """
        if labelled is None:
            return self.detection(raw, targets)
        if labelled == 0:
            return 0 * torch.stack([level.float().sum() for level in raw]).sum(), raw[0].new_zeros(3).float()
        total, parts = self.detection([level[:labelled] for level in raw], targets)
        return total, parts * (labelled / len(raw[0]))

    def _weights(self, factors: Sequence[float]) -> list[Tensor]:
        """The weights (components,) of each distillation loss as they are now, times its factor."""
        return [weights * factor for weights, factor in zip(self.weights.of_losses(), factors, strict=True)]

    def _measure(
        self, reference: Tensor, losses: Sequence[Tensor], student: Outputs, seen: Outputs, upstream: Tensor | None
    ) -> None:
        """Let the weights follow the gradients at the neck of this batch.

        They are measured times `upstream` and the weights, as large as they are trained: in float16 the gradients of
        some losses are 0 without it. A loss with a weight a level is measured at the views that it alone `seen`: from a
        coarse level its gradient goes on to the finer maps, where it would count for their levels.
        """
        scale = reference.new_ones(()) if upstream is None else upstream
        found = [squared_norms(scale * reference, student.features) / scale.square()]
        for weight, loss in zip(self.weights.of_losses(), losses, strict=True):
            factor = torch.ones_like(weight) if upstream is None else upstream * weight
            maps = (seen if len(weight) > 1 else student).features
            found.append(squared_norms((factor * loss).sum(), maps) / factor.square())
        norms, *own = summed_over_processes(torch.stack(found))
        self.weights.follow(norms, torch.stack(own))


def _left_out(loss: Any, terms: Tensor) -> Tensor:
    """Zeros (components,), with a gradient of 0 for the loss's parameters: several processes wait for each."""
    sums = [parameter.sum() for parameter in loss.parameters()]
    return (0 * torch.stack([terms.new_zeros(()), *sums]).sum()).expand(loss.components)


def own_views(outputs: Outputs) -> Outputs:
    """The same outputs with views of the features: a gradient at them is that of whoever reads them alone."""
    return outputs._replace(features=[feature.view_as(feature) for feature in outputs.features])
