"""Distillation losses: what a student is asked to copy from a frozen teacher.

In: the outputs of both networks for the same images. Out: one scalar per loss, named in the table `LOSSES`.
Every loss is a mean (neither batch nor image size changes its scale), accumulates in float32, is zero where student
equals teacher, and takes *logits*: YOLOv5's head is one sigmoid per class, so nothing here is a softmax over classes.
A softmax would not see a shift common to all classes, which is exactly how a student loses its confidence.

The caller multiplies by the batch size, as the detection loss does, and by the recipe's weight. It may say beforehand
what gradient it will send back (`upstream`): the fused kernels of the feature losses then write theirs multiplied by
it, which keeps float16 gradients from vanishing.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress.config import DistillConfig
from compress.kernels import functional as kernels
from compress.losses.boxes import decode_in_cell, paired_giou_exact
from compress.losses.detection import Gains, level_balance, scaled_gains
from runtime.errors import UsageError


class Outputs(NamedTuple):
    """One forward pass of a network."""

    raw: list[Tensor]
    """Per level (B, na, H, W, 5 + nc) logits tx, ty, tw, th, objectness, classes."""
    features: list[Tensor]
    """Per level (B, C, H, W): what the head's convolutions read."""


class Shape(NamedTuple):
    """What must be known of a network to compare its outputs with another's."""

    channels: tuple[int, ...]
    """Per level, of `Outputs.features`."""
    nc: int
    na: int
    anchors: Tensor
    """(nl, na, 2) in grid units."""
    strides: tuple[int, ...]
    """Pixels per cell."""


# Checkpoints keep anchors in float16, which moves them by up to 5e-4 of their size.
_ANCHOR_TOLERANCE = 2e-3

_SAME_STRIDES = "Distil between networks with the same levels, for example two scales of YOLOv5 P5"


def _refuse_other_strides(student: Shape, teacher: Shape) -> None:
    if tuple(map(int, student.strides)) != tuple(map(int, teacher.strides)):
        raise UsageError(f"the student's strides are {student.strides}, the teacher's {teacher.strides}", _SAME_STRIDES)


def _refuse_other_head(student: Shape, teacher: Shape) -> None:
    """Raise a UsageError unless a cell and anchor means the same in both heads."""
    if student.nc != teacher.nc:
        raise UsageError(
            f"the student has {student.nc} classes, the teacher {teacher.nc}",
            "Fine-tune the teacher on the student's classes, or use a feature loss",
        )
    a, b = student.anchors.float().cpu(), teacher.anchors.float().cpu()
    if student.na != teacher.na or a.shape != b.shape or not torch.allclose(a, b, rtol=_ANCHOR_TOLERANCE, atol=0):
        raise UsageError(
            "the student's anchors differ from the teacher's, so their boxes cannot be compared cell by cell",
            "Build the student with the teacher's anchors and set autoanchor: false",
        )


def _refuse_other_maps(student: list[Tensor], teacher: list[Tensor], spatial: slice, what: str) -> None:
    for s, t in zip(student, teacher, strict=True):
        if (s.shape[0], s.shape[spatial]) != (t.shape[0], t.shape[spatial]):
            raise UsageError(
                f"a {what} map of the student is {tuple(s.shape)}, of the teacher {tuple(t.shape)}",
                "Give both networks the same images at the same size",
            )


class DistillLoss(nn.Module):
    """Base of every distillation loss.

    Args:
        student, teacher: what the two networks produce.
        config: the recipe's distillation settings.

    Raises:
        UsageError: the two networks cannot be compared by this loss.
    """

    compares_heads = False
    """Whether cells, anchors and classes must mean the same in both networks."""

    def __init__(self, student: Shape, teacher: Shape, config: DistillConfig | None = None) -> None:
        super().__init__()
        _refuse_other_strides(student, teacher)
        self.config = config or DistillConfig()

    def forward(
        self, student: Outputs, teacher: Outputs, targets: Tensor | None = None, upstream: Tensor | None = None
    ) -> Tensor:
        """Scalar float32 for one batch. No gradient reaches the teacher.

        Args:
            targets: (n, 6) image, class, x, y, w, h as fractions, for a loss that looks at labels.
            upstream: () float32, the gradient of the final loss by this one, where it is known; it changes no result.

        Raises:
            UsageError: the maps belong to different images or image sizes.
        """
        constant = Outputs([t.detach() for t in teacher.raw], [t.detach() for t in teacher.features])
        return self.distance(student, constant, targets, upstream)

    def distance(self, student: Outputs, teacher: Outputs, targets: Tensor | None, upstream: Tensor | None) -> Tensor:
        """What `forward` gives for a teacher without gradient."""
        return self.compare(student, teacher)

    def compare(self, student: Outputs, teacher: Outputs) -> Tensor:
        """Distance of outputs in equal channels; exactly 0 for equal ones."""
        raise NotImplementedError


def _scaled_bce(student: Tensor, teacher: Tensor, beta: float, detach_scale: bool) -> Tensor:
    """|p_T - p_S|^beta * BCE(z_S, p_T), element-wise, of float32 logits."""
    goal = teacher.sigmoid()
    gap = (goal - student.sigmoid()).abs()
    scale = gap if beta == 1 else gap**beta
    return (scale.detach() if detach_scale else scale) * F.binary_cross_entropy_with_logits(
        student, goal, reduction="none"
    )


def _binary_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(Bernoulli(sigmoid(z_T)) || Bernoulli(sigmoid(z_S))), element-wise, of float32 logits; exactly 0 if equal."""
    return teacher.sigmoid() * (teacher - student) + F.softplus(student) - F.softplus(teacher)


def _gated_mean(sums: Tensor, gate_sum: Tensor, batch: int) -> Tensor:
    """Sum over gate sum. Below one confident cell an image the denominator stands still.

    Without that floor a batch of pure background would copy the teacher's noise at full strength.
    """
    return sums / gate_sum.clamp_min(batch)


class _HeadLoss(DistillLoss):
    """A loss over cells and anchors, gated by the teacher's objectness g = sigmoid(o_T).

    Its parts carry the gains of the detection loss, so that a recipe's weight of 1 asks for about as much as the labels
    do. Without them the same weight gave 26 times the labels' gradient at the neck, nearly none of it to objectness.
    """

    compares_heads = True
    anchors: Tensor
    gains: Gains

    def __init__(self, student: Shape, teacher: Shape, config: DistillConfig | None = None) -> None:
        super().__init__(student, teacher, config)
        _refuse_other_head(student, teacher)
        self.register_buffer("anchors", teacher.anchors.detach().float().clone(), persistent=False)
        gains = scaled_gains(self.config.loss, teacher.nc, len(teacher.strides), self.config.imgsz)
        self.gains = gains._replace(cls=gains.cls / teacher.nc)  # here classes are summed, there they are averaged

    def compare(self, student: Outputs, teacher: Outputs) -> Tensor:
        _refuse_other_maps(student.raw, teacher.raw, slice(1, None), "head")
        levels = zip(student.raw, teacher.raw, self.anchors, level_balance(len(student.raw)), strict=True)
        terms = [self._level(s.float(), t.float(), a, balance) for s, t, a, balance in levels]
        objectness, gated, gates = torch.stack(terms).sum(0).unbind()
        return objectness + _gated_mean(gated, gates, len(student.raw[0]))

    def _level(self, student: Tensor, teacher: Tensor, anchors_wh: Tensor, balance: float) -> Tensor:
        """(3,) balanced mean over cells of the objectness term; gated sum of the other terms; sum of the gates."""
        gate = teacher[..., 4].sigmoid()
        objectness = self.objectness(student[..., 4], teacher[..., 4]).mean() * balance
        gated = (gate * self.cell(student, teacher, anchors_wh)).sum()
        return torch.stack((objectness, gated, gate.sum()))

    def objectness(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Element-wise, of logits (B, na, H, W)."""
        raise NotImplementedError

    def cell(self, student: Tensor, teacher: Tensor, anchors_wh: Tensor) -> Tensor:
        """(B, na, H, W): what a cell and anchor adds where the teacher sees an object."""
        raise NotImplementedError


class ObjKD(_HeadLoss):
    """Objectness-gated soft labels.

    With logits z = (b, o, c) of cell and anchor i, p = sigmoid, gate g_i = p(o_T):

        L_obj = sum over levels of balance_l * mean_i |p(o_T) - p(o_S)|^beta * BCE(o_S, p(o_T))
        L_cls = sum_i g_i sum_k |p(c_T) - p(c_S)|^beta * BCE(c_S, p(c_T)) / max(sum_i g_i, B)
        L_box = sum_i g_i (1 - GIoU(box_S, box_T)) / max(sum_i g_i, B)
        L = 1 * obj * L_obj + 1 * cls / nc * L_cls + 4 * box * L_box

    where obj, cls and box are the detection loss's scaled gains.

    Sources: gating, Mehta & Ozturk 2018; the |.|^beta factor and the weights, BCKD (ICCV 2023); level balance as in
    the detection loss. The weights 1, 1, 4 belong to these means and gains: another reduction needs others.

    Args:
        beta: at least 1, or the gradient at p_S = p_T is infinite.
        weights: of objectness, classes and boxes.
        detach_scale: keep the gradient out of the |.|^beta factor (BCKD lets it in).
    """

    def __init__(
        self,
        student: Shape,
        teacher: Shape,
        config: DistillConfig | None = None,
        *,
        beta: float = 1.0,
        weights: tuple[float, float, float] = (1.0, 1.0, 4.0),
        detach_scale: bool = False,
    ) -> None:
        super().__init__(student, teacher, config)
        self.beta, self.weights, self.detach_scale = beta, weights, detach_scale

    def objectness(self, student: Tensor, teacher: Tensor) -> Tensor:
        return self.weights[0] * self.gains.obj * self._soft(student, teacher)

    def cell(self, student: Tensor, teacher: Tensor, anchors_wh: Tensor) -> Tensor:
        anchors_wh = anchors_wh[:, None, None]
        boxes, goals = (decode_in_cell(z[..., :4], anchors_wh) for z in (student, teacher))
        classes = self._soft(student[..., 5:], teacher[..., 5:]).sum(-1)
        overlap = paired_giou_exact(boxes, goals)
        return self.weights[1] * self.gains.cls * classes + self.weights[2] * self.gains.box * (1 - overlap)

    def _soft(self, student: Tensor, teacher: Tensor) -> Tensor:
        return _scaled_bce(student, teacher, self.beta, self.detach_scale)


class KD(_HeadLoss):
    """Hinton's soft labels for a head of sigmoids: a *binary* KL, teacher first, at temperature T.

        KL(z_T, z_S) = p log(p / q) + (1 - p) log((1 - p) / (1 - q)),  p = sigmoid(z_T / T), q = sigmoid(z_S / T)
        L_obj = sum over levels of balance_l * mean_i KL(o_T, o_S)
        L_cls = sum_i g_i sum_k KL(c_T, c_S) / max(sum_i g_i, B)
        L = T^2 * (obj * L_obj + cls / nc * L_cls)

    obj and cls are the detection loss's scaled gains. The gate g_i = sigmoid(o_T) is taken at temperature 1; T^2 keeps
    the gradient's size when T changes; boxes take no part. T is `DistillConfig.temperature`.
    """

    def objectness(self, student: Tensor, teacher: Tensor) -> Tensor:
        return self.gains.obj * self._soft(student, teacher)

    def cell(self, student: Tensor, teacher: Tensor, anchors_wh: Tensor) -> Tensor:
        return self.gains.cls * self._soft(student[..., 5:], teacher[..., 5:]).sum(-1)

    def _soft(self, student: Tensor, teacher: Tensor) -> Tensor:
        temperature = self.config.temperature
        return temperature**2 * _binary_kl(student / temperature, teacher / temperature)


class Pointwise(nn.Conv2d):
    """1x1 convolution that computes in its input's dtype, whatever the dtype of its weights."""

    def __init__(self, channels_in: int, channels_out: int, *, bias: bool = True) -> None:
        super().__init__(channels_in, channels_out, 1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.conv2d(x, self.weight.to(x.dtype), bias)


def adapter(channels_in: int, channels_out: int, *, bias: bool) -> Pointwise:
    """Brings features into the teacher's channels; starts as the identity where there are equally many."""
    conv = Pointwise(channels_in, channels_out, bias=bias)
    if channels_in == channels_out:
        nn.init.dirac_(conv.weight)
        if conv.bias is not None:
            nn.init.zeros_(conv.bias)
    return conv


def teacher_score(raw: Tensor) -> Tensor:
    """(B, H, W) float32: the best sigmoid(objectness) * sigmoid(class) over anchors and classes of each cell.

    Args:
        raw: (B, na, H, W, 5 + nc) logits.
    """
    best_class = raw[..., 5:].amax(-1).float().sigmoid()  # the sigmoid rises, so the greatest logit comes first
    return (raw[..., 4].float().sigmoid() * best_class).amax(1)


class _FeatureLoss(DistillLoss):
    """A loss of the features, which an adapter a level brings into the teacher's channels."""

    sees_offsets = True
    """Whether the loss changes when a constant is added to a channel; where not, an adapter has no bias to learn."""

    def __init__(self, student: Shape, teacher: Shape, config: DistillConfig | None = None) -> None:
        super().__init__(student, teacher, config)
        pairs = zip(student.channels, teacher.channels, strict=True)
        self.adapters = nn.ModuleList(adapter(*pair, bias=self.sees_offsets) for pair in pairs)

    def distance(self, student: Outputs, teacher: Outputs, targets: Tensor | None, upstream: Tensor | None) -> Tensor:
        pairs = zip(self.adapters, student.features, strict=True)
        adapted = [adapter(feature) for adapter, feature in pairs]
        return self.kernel(self._alike(adapted, teacher), teacher, targets, upstream)

    def compare(self, student: Outputs, teacher: Outputs) -> Tensor:
        return self.kernel(self._alike(student.features, teacher), teacher, None, None)

    def kernel(
        self, features: list[Tensor], teacher: Outputs, targets: Tensor | None, upstream: Tensor | None
    ) -> Tensor:
        """Distance of features in the teacher's channels."""
        raise NotImplementedError

    @staticmethod
    def _alike(features: list[Tensor], teacher: Outputs) -> list[Tensor]:
        _refuse_other_maps(features, teacher.features, slice(2, None), "feature")
        return features


class FeatMSE(_FeatureLoss):
    """Mean squared difference of features: sum over levels of mean (A(s) - t)^2, A the 1x1 convolution.

    Adapter and comparison are one kernel: what A gives is not written to memory where channels allow it.
    """

    def distance(self, student: Outputs, teacher: Outputs, targets: Tensor | None, upstream: Tensor | None) -> Tensor:
        adapters = cast("list[nn.Conv2d]", list(self.adapters))
        return kernels.adapter_mse(
            self._alike(self.hidden(student.features), teacher),
            teacher.features,
            [adapter.weight.flatten(1) for adapter in adapters],
            [cast(Tensor, adapter.bias) for adapter in adapters],
            self.weights(teacher),
            scale=upstream,
        )

    def kernel(
        self, features: list[Tensor], teacher: Outputs, targets: Tensor | None, upstream: Tensor | None
    ) -> Tensor:
        return kernels.weighted_mse(features, teacher.features, self.weights(teacher), scale=upstream)

    def hidden(self, features: list[Tensor]) -> list[Tensor]:
        """What the adapters read."""
        return features

    def weights(self, teacher: Outputs) -> list[Tensor]:
        """(B, H, W) float32 a level, or none."""
        return []


class FeatSL2(FeatMSE):
    """Squared difference of features where the teacher sees something.

        sum over levels of sum w (P(s) - t)^2 / (C * sum w + 1e-9)

    where the inner sums run over the whole batch, w is `teacher_score` and P is 1x1 convolution - ReLU - 1x1
    convolution. The usual weight is 6. Source: Ultralytics 2026, as its documentation states the formula.
    """

    def __init__(self, student: Shape, teacher: Shape, config: DistillConfig | None = None) -> None:
        super().__init__(student._replace(channels=teacher.channels), teacher, config)
        self.first = nn.ModuleList(map(Pointwise, student.channels, teacher.channels))

    def hidden(self, features: list[Tensor]) -> list[Tensor]:
        return [first(feature).relu_() for first, feature in zip(self.first, features, strict=True)]

    def weights(self, teacher: Outputs) -> list[Tensor]:
        return [teacher_score(raw) for raw in teacher.raw]


class CWD(_FeatureLoss):
    """Channel-wise distillation: where in the image each channel fires, as a distribution over its pixels.

        sum over levels of tau^2 / (B C) * sum over images and channels KL(softmax(t / tau) || softmax(A(s) / tau))

    The usual weight is 10. Source: Shu et al., ICCV 2021.
    """

    sees_offsets = False

    def __init__(
        self, student: Shape, teacher: Shape, config: DistillConfig | None = None, *, tau: float = 1.0
    ) -> None:
        super().__init__(student, teacher, config)
        self.tau = tau

    def kernel(
        self, features: list[Tensor], teacher: Outputs, targets: Tensor | None, upstream: Tensor | None
    ) -> Tensor:
        return kernels.cwd(features, teacher.features, self.tau, scale=upstream)


class PKD(_FeatureLoss):
    """Pearson distance of each channel over the batch: 1 - r, averaged over channels, summed over levels.

    Blind to each channel's scale and offset, so that it needs least tuning. The usual weight is 6. Source: Cao et al.,
    NeurIPS 2022.
    """

    sees_offsets = False

    def kernel(
        self, features: list[Tensor], teacher: Outputs, targets: Tensor | None, upstream: Tensor | None
    ) -> Tensor:
        return kernels.pkd(features, teacher.features, scale=upstream)


class FGD(_FeatureLoss):
    """Focal distillation: differences weighted by the teacher's attention, inside and outside the labelled boxes apart.

    `compress.kernels.reference.fgd` has the formula. A pixel inside boxes weighs alpha / area of the smallest of them,
    any other beta / number of such pixels in its image; without targets every pixel is background. The authors' global
    term is left out. Source: Yang et al., CVPR 2022.
    """

    def __init__(
        self,
        student: Shape,
        teacher: Shape,
        config: DistillConfig | None = None,
        *,
        alpha: float = 1.0,
        beta: float = 0.5,
        gamma: float = 1.0,
        temperature: float = 0.5,
    ) -> None:
        super().__init__(student, teacher, config)
        self.alpha, self.beta, self.gamma, self.temperature = alpha, beta, gamma, temperature

    def kernel(
        self, features: list[Tensor], teacher: Outputs, targets: Tensor | None, upstream: Tensor | None
    ) -> Tensor:
        masks = [self.mask(feature, targets) for feature in teacher.features]
        return kernels.fgd(features, teacher.features, masks, self.gamma, self.temperature, scale=upstream)

    def mask(self, feature: Tensor, targets: Tensor | None) -> Tensor:
        """(B, H, W) float32: the weight of each pixel of a (B, C, H, W) map."""
        inside = box_density(feature, targets)
        outside = inside == 0
        pixels = outside.sum((1, 2), keepdim=True).clamp_min(1)
        return self.alpha * inside + self.beta * outside / pixels


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
    """(n, cells) float32, 1 where the interval reaches into the cell. `centre` and `size` (n,) are fractions."""
    low, high = ((centre + side * size / 2)[:, None] * cells for side in (-1, 1))
    cell = torch.arange(cells, device=centre.device)
    return ((cell < high) & (cell + 1 > low)).float()


LOSSES: dict[str, type[DistillLoss]] = {
    "obj_kd": ObjKD,
    "feat_mse": FeatMSE,
    "feat_sl2": FeatSL2,
    "cwd": CWD,
    "pkd": PKD,
    "fgd": FGD,
    "kd": KD,
}
"""The distillation losses by the names that recipes use."""
