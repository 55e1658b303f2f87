"""Distillation losses of the features: the maps that the head's convolutions read.

On an NVIDIA GPU the comparison runs as a fused kernel (`compress/kernels`). The caller may say beforehand what gradient
it will send back (`Context.upstream`): a kernel then writes its gradient multiplied by it, which keeps float16
gradients from vanishing.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress.config import DistillConfig, NonNegative, Positive
from compress.kernels.adapter_mse import adapter_mse
from compress.kernels.cwd import cwd
from compress.kernels.fgd import fgd
from compress.kernels.pkd import pkd
from compress.kernels.weighted_mse import weighted_mse
from compress.losses.distill.base import (
    NO_CONTEXT,
    Context,
    DistillLoss,
    LossSettings,
    Outputs,
    Shape,
    check_same_images,
    detached,
)


class Pointwise(nn.Conv2d):
    """1x1 convolution that computes in its input's dtype, whatever the dtype of its weights."""

    def __init__(self, channels_in: int, channels_out: int, *, bias: bool = True) -> None:
        super().__init__(channels_in, channels_out, 1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.conv2d(x, self.weight.to(x.dtype), bias)


def adapter(channels_in: int, channels_out: int, *, bias: bool) -> Pointwise:
    """A 1x1 convolution to the teacher's channels; it starts as the identity if both numbers of channels are equal."""
    conv = Pointwise(channels_in, channels_out, bias=bias)
    if channels_in == channels_out:
        nn.init.dirac_(conv.weight)
        if conv.bias is not None:
            nn.init.zeros_(conv.bias)
    return conv


class FeatureLoss(DistillLoss):
    """A loss of the features. An adapter per level gives them the teacher's channels. A subclass has `compare`."""

    share = 0.3
    until = 0.7
    depends_on_offset = True
    """Whether the loss changes when a constant is added to a channel; where not, an adapter has no bias to learn."""

    def __init__(self, student: Shape, teacher: Shape, config: DistillConfig | None = None, **settings: Any) -> None:
        super().__init__(student, teacher, config, **settings)
        pairs = zip(student.channels, teacher.channels, strict=True)
        self.adapters = nn.ModuleList(adapter(*pair, bias=self.depends_on_offset) for pair in pairs)

    def forward(self, student: Outputs, teacher: Outputs, context: Context = NO_CONTEXT) -> Tensor:
        adapted = [adapter(feature) for adapter, feature in zip(self.adapters, student.features, strict=True)]
        check_same_images(adapted, teacher.features, slice(2, None), "feature")
        return self.compare(student._replace(features=adapted), detached(teacher), context)

    def adapter_parameters(self) -> tuple[list[Tensor], list[Tensor]]:
        """Per level the matrix (C_teacher, C_student) and the bias (C_teacher) of the adapter."""
        adapters = cast("list[Pointwise]", list(self.adapters))
        return [a.weight.flatten(1) for a in adapters], [cast(Tensor, a.bias) for a in adapters]


class FeatMSE(FeatureLoss):
    """Mean squared difference of features: sum over levels of mean (A(s) - t)^2, A the 1x1 convolution.

    Adapter and comparison are one kernel: the adapted map is not written to memory if channels allow it.
    """

    name = "feat_mse"

    def forward(self, student: Outputs, teacher: Outputs, context: Context = NO_CONTEXT) -> Tensor:
        check_same_images(student.features, teacher.features, slice(2, None), "feature")
        return adapter_mse(student.features, teacher.features, *self.adapter_parameters(), scale=context.upstream)

    def compare(self, student: Outputs, teacher: Outputs, context: Context) -> Tensor:
        return weighted_mse(student.features, teacher.features, scale=context.upstream)


class FeatSL2(FeatureLoss):
    """Squared difference of features, weighted by how sure the teacher is of an object at each pixel.

        sum over levels of sum w (P(s) - t)^2 / (C * sum w + 1e-9)

    where the inner sums run over the whole batch, w is `teacher_score` and P is 1x1 convolution - ReLU - 1x1
    convolution. The weight given there is 6. Source: Ultralytics 2026, as its documentation states the formula.
    """

    name = "feat_sl2"

    def __init__(self, student: Shape, teacher: Shape, config: DistillConfig | None = None, **settings: Any) -> None:
        super().__init__(student._replace(channels=teacher.channels), teacher, config, **settings)
        self.first = nn.ModuleList(map(Pointwise, student.channels, teacher.channels))

    def forward(self, student: Outputs, teacher: Outputs, context: Context = NO_CONTEXT) -> Tensor:
        check_same_images(student.features, teacher.features, slice(2, None), "feature")
        hidden = [first(feature).relu_() for first, feature in zip(self.first, student.features, strict=True)]
        weights = teacher_scores(teacher)
        return adapter_mse(hidden, teacher.features, *self.adapter_parameters(), weights, scale=context.upstream)

    def compare(self, student: Outputs, teacher: Outputs, context: Context) -> Tensor:
        return weighted_mse(student.features, teacher.features, teacher_scores(teacher), scale=context.upstream)


class CWD(FeatureLoss):
    """Channel-wise distillation: compares where each channel is active, as a distribution over the pixels of an image.

        sum over levels of tau^2 / (B C) * sum over images and channels KL(softmax(t / tau) || softmax(A(s) / tau))

    The weight in the paper is 10. Source: Shu et al., ICCV 2021.
    """

    name = "cwd"
    depends_on_offset = False

    class Settings(LossSettings):
        tau: Positive = 1.0
        """Temperature: above 1 it weighs the weaker pixels more."""

    settings: Settings

    def compare(self, student: Outputs, teacher: Outputs, context: Context) -> Tensor:
        return cwd(student.features, teacher.features, self.settings.tau, scale=context.upstream)


class PKD(FeatureLoss):
    """Pearson distance of each channel over the batch: 1 - r, averaged over channels, summed over levels.

    It ignores each channel's scale and offset, so it needs the least tuning. The weight in the paper is 6. Source: Cao
    et al., NeurIPS 2022.
    """

    name = "pkd"
    depends_on_offset = False

    def compare(self, student: Outputs, teacher: Outputs, context: Context) -> Tensor:
        return pkd(student.features, teacher.features, scale=context.upstream)


class FGD(FeatureLoss):
    """Focal distillation: differences weighted by the teacher's attention, inside and outside the labelled boxes apart.

    `compress.kernels.fgd.fgd` has the formula. A pixel inside boxes weighs alpha / area of the smallest of them,
    any other beta / number of such pixels in its image; without targets every pixel is background. The authors' global
    term is left out. Source: Yang et al., CVPR 2022.
    """

    name = "fgd"
    reads_labels = True

    class Settings(LossSettings):
        alpha: NonNegative = 1.0
        """Weight of the pixels inside boxes."""
        beta: NonNegative = 0.5
        """Weight of the other pixels."""
        gamma: NonNegative = 1.0
        """Weight of the distances of the attentions."""
        temperature: Positive = 0.5
        """Temperature of the attentions."""

    settings: Settings

    def compare(self, student: Outputs, teacher: Outputs, context: Context) -> Tensor:
        masks = [self.mask(feature, context.targets) for feature in teacher.features]
        gamma, temperature = self.settings.gamma, self.settings.temperature
        return fgd(student.features, teacher.features, masks, gamma, temperature, scale=context.upstream)

    def mask(self, feature: Tensor, targets: Tensor | None) -> Tensor:
        """(B, H, W) float32: the weight of each pixel of a (B, C, H, W) map."""
        inside = box_density(feature, targets)
        outside = inside == 0
        pixels = outside.sum((1, 2), keepdim=True).clamp_min(1)
        return self.settings.alpha * inside + self.settings.beta * outside / pixels


UNTOLD = -1e4
"""A logit whose probability is 0; float16 holds it."""


def teacher_score(raw: Tensor) -> Tensor:
    """(B, H, W) float32: the best sigmoid(objectness) * sigmoid(class) over anchors and classes of each cell.

    Args:
        raw: (B, na, H, W, 5 + nc) logits.
    """
    best_class = raw[..., 5:].amax(-1).float().sigmoid()  # the sigmoid rises, so the greatest logit comes first
    return (raw[..., 4].float().sigmoid() * best_class).amax(1)


def teacher_scores(teacher: Outputs) -> list[Tensor]:
    """`teacher_score` of every level, without a gradient; what the teacher does not tell counts as 0."""
    return [teacher_score(raw.detach().nan_to_num(UNTOLD)) for raw in teacher.raw]


def box_density(feature: Tensor, targets: Tensor | None) -> Tensor:
    """(B, H, W) float32: 1 / pixels of the smallest box over each pixel of a (B, C, H, W) map, 0 where there is none.

    A box covers the pixels that it touches. `targets` (n, 6) are image, class, x, y, w, h as fractions.
    """
    batch, _, height, width = feature.shape
    density = feature.new_zeros((batch, height, width), dtype=torch.float32)
    if targets is None:
        return density
    image, centre, size = targets[:, 0].long(), targets[:, 2:4].float(), targets[:, 4:6].float()
    rows = _touched(centre[:, 1], size[:, 1], height)
    columns = _touched(centre[:, 0], size[:, 0], width)
    area = (rows.sum(1) * columns.sum(1)).clamp_min(1)
    boxes = rows[:, :, None] * columns[:, None] / area[:, None, None]
    return density.scatter_reduce(0, image[:, None, None].expand_as(boxes), boxes, "amax")


def _touched(centre: Tensor, size: Tensor, cells: int) -> Tensor:
    """(n, cells) float32, 1 if the interval reaches into the cell. `centre` and `size` (n,) are fractions."""
    low, high = ((centre + side * size / 2)[:, None] * cells for side in (-1, 1))
    cell = torch.arange(cells, device=centre.device)
    return ((cell < high) & (cell + 1 > low)).float()
