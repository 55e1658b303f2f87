"""Distillation losses of the head: cells, anchors, objectness, classes and boxes, compared one by one.

They take *logits*: YOLOv5's head is one sigmoid a class, so nothing here is a softmax over classes. A softmax would not
see a shift common to all classes, which is exactly how a student loses its confidence.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from compress.compute.boxes import touched_cells
from compress.config import DistillConfig, NonNegative, Positive
from compress.kernels.soft_head import (
    Pair,
    as_they_are,
    binary_kl,
    completed,
    gated_level,
    soft_head,
)
from compress.losses.detection import Gains, level_balance, scaled_gains
from compress.losses.distill.base import (
    Context,
    DistillLoss,
    LossSettings,
    Outputs,
    Shape,
    check_same_images,
)
from runtime.errors import UsageError

ANCHOR_TOLERANCE = 2e-3
"""Checkpoints keep anchors in float16, which moves them by up to 5e-4 of their size."""


def same_anchors(one: Tensor, other: Tensor) -> bool:
    """Whether two tables of anchors (nl, na, 2) are the same as far as files keep them."""
    return one.shape == other.shape and torch.allclose(one, other, rtol=ANCHOR_TOLERANCE, atol=0)


def check_same_head(student: Shape, teacher: Shape) -> None:
    """Raises UsageError unless a cell and anchor means the same in both heads."""
    if student.nc != teacher.nc:
        raise UsageError(
            f"the student has {student.nc} classes, the teacher {teacher.nc}",
            "Fine-tune the teacher on the student's classes, or use a feature loss",
        )
    a, b = student.anchors.float().cpu(), teacher.anchors.float().cpu()
    if student.na != teacher.na or not same_anchors(a, b):
        raise UsageError(
            "the student's anchors differ from the teacher's, so their boxes cannot be compared cell by cell",
            "Build the student with the teacher's anchors and set autoanchor: false",
        )


class HeadLoss(DistillLoss):
    """A loss over cells and anchors: a subclass has `objectness` and `cell`, or a `level` or `compare_maps` of its own.

    Objectness is compared everywhere, but in an unlabelled image only if the teacher is sure of an object in it: else
    that would teach background where nobody knows. The rest is compared where the teacher sees an object: each cell
    counts with its gate g = sigmoid(o_T), and the mean is taken level by level, as in the detection loss. The parts
    carry that loss's gains, so a weight of 1 gives about as much gradient as the labels do.

    What the teacher does not tell pulls nowhere: logits that are NaN, and every logit near a labelled object of a class
    that the teacher does not know, since to it there is only background.
    """

    compares_heads = True
    anchors: Tensor
    unknown: Tensor
    gains: Gains

    def __init__(self, student: Shape, teacher: Shape, config: DistillConfig | None = None, **settings: Any) -> None:
        super().__init__(student, teacher, config, **settings)
        check_same_head(student, teacher)
        self.register_buffer("anchors", teacher.anchors.detach().float().clone(), persistent=False)
        self.tells_all = teacher.tells_all
        self.register_buffer("unknown", torch.tensor(teacher.unknown, dtype=torch.int64), persistent=False)
        self.gains = scaled_gains(self.config.loss, teacher.nc, len(teacher.strides), self.config.imgsz)

    def compare(self, student: Outputs, teacher: Outputs, context: Context) -> Tensor:
        check_same_images(student.raw, teacher.raw, slice(1, None), "head")
        seen = [silent_at(raw, context.targets, self.unknown) for raw in teacher.raw]
        told = seen if context.labelled is None else self._without_guessed_background(seen, context.labelled)
        tells_all = self.tells_all and context.labelled is None
        upstream = None if context.upstream is None else context.upstream.view(())
        return self.compare_maps(student.raw, told, seen, tells_all, upstream)

    def compare_maps(
        self,
        student: Sequence[Tensor],
        told: Sequence[Tensor],
        seen: Sequence[Tensor],
        tells_all: bool,
        upstream: Tensor | None,
    ) -> Tensor:
        """The loss () float32 of maps (B, na, H, W, 5 + nc) of logits, one a level.

        Args:
            told: the teacher's; NaN is a logit that it does not tell.
            seen: the teacher's, with the objectness of all objects that it sees, compared or not: that of the gates.
            tells_all: whether none of `told` is NaN.
            upstream: see `Context`; ().
        """
        pair = as_they_are if tells_all else completed
        gates = [raw[..., 4] for raw in seen]
        levels = zip(student, told, gates, self.anchors, level_balance(len(told)), strict=True)
        return torch.stack([self.level(*level, pair) for level in levels]).sum()

    def _without_guessed_background(self, teacher: Sequence[Tensor], labelled: int) -> list[Tensor]:
        """The maps without objectness in each image after the first `labelled` in which the teacher is sure of no
        object. A teacher that does not know every class is asked cell by cell: an object of another class may lie
        anywhere.
        """
        sure = [raw[..., 4].float().sigmoid().nan_to_num(0) >= self.config.unsure for raw in teacher]
        if not len(self.unknown):
            found = torch.stack([level.flatten(1).any(1) for level in sure]).any(0)
            sure = [found.view(-1, 1, 1, 1)] * len(teacher)
        is_objectness = torch.arange(teacher[0].shape[-1], device=teacher[0].device) == 4
        unlabelled = (torch.arange(len(teacher[0]), device=teacher[0].device) >= labelled).view(-1, 1, 1, 1)
        return [
            raw.masked_fill((unlabelled & ~level)[..., None] & is_objectness, torch.nan)
            for raw, level in zip(teacher, sure, strict=True)
        ]

    def level(
        self, student: Tensor, teacher: Tensor, seen: Tensor, anchors_wh: Tensor, balance: float, pair: Pair
    ) -> Tensor:
        """The loss () float32 of one level, as `gated_level` makes it of `objectness` and `cell`.

        Args:
            student, teacher: (B, na, H, W, 5 + nc) logits; NaN is one that the teacher does not tell.
            seen: (B, na, H, W) logits of the objects that the teacher sees, compared or not: those of the gates.
            anchors_wh: (na, 2) in cells.
            balance: the level's factor of the objectness in the detection loss.
            pair: makes of logits of both those that are compared.
        """
        return gated_level(student, teacher, seen, anchors_wh, balance, self.objectness, self.cell, pair)

    def objectness(self, student: Tensor, teacher: Tensor) -> Tensor:
        """(B, na, H, W): the objectness term of each cell and anchor, from their logits (B, na, H, W)."""
        raise NotImplementedError

    def cell(self, student: Tensor, teacher: Tensor, anchors_wh: Tensor) -> Tensor:
        """(B, k): the terms of each cell and anchor that count where the teacher sees an object.

        Both are logits (B, k, 5 + nc) float32; `anchors_wh` (B, k, 2) are in cells.
        """
        raise NotImplementedError


def silent_at(raw: Tensor, targets: Tensor | None, classes: Tensor) -> Tensor:
    """A teacher's map (B, na, H, W, 5 + nc) that tells nothing at labelled objects of `classes` (k,) int64, nor one
    cell around: the labels are assigned to neighbouring cells too.

    `targets` (n, 6) are image, class, x, y, w, h as fractions.
    """
    if targets is None or not len(classes):
        return raw
    batch, _, height, width, _ = raw.shape
    centre, side = targets[:, 2:4].float(), targets[:, 4:6].float()
    of_class = torch.isin(targets[:, 1].long(), classes)
    rows, columns = (touched_cells(centre[:, i], side[:, i], n, margin=1) for i, n in ((1, height), (0, width)))
    touched = (of_class[:, None, None] & rows[:, :, None] & columns[:, None]).to(raw.dtype)
    silent = raw.new_zeros((batch, height, width)).index_add_(0, targets[:, 0].long(), touched) > 0
    return raw.masked_fill(silent[:, None, :, :, None], torch.nan)


class Soft(HeadLoss):
    """Soft labels: the divergence of the teacher's probabilities from the student's, and the overlap of their boxes.

    With logits z = (b, o, c) of cell and anchor i, gate g_i = sigmoid(o_T), binary KL of logits, on each level:

        L_obj = balance * mean_i KL(o_T || o_S)
        L_cls = sum_i g_i mean_k KL(c_T || c_S) / max(sum_i g_i, B)
        L_box = sum_i g_i (1 - GIoU(box_S, box_T)) / max(sum_i g_i, B)
        L = obj * L_obj + 4 * cls * L_cls + box * L_box, summed over levels

    obj, cls and box are the detection loss's scaled gains. The gradient by a logit is p_S - p_T: smooth, and zero at
    agreement. Classes weigh four times as much as among the labels, whose gain leaves them little of the gradient: in a
    short training a student then mixes up classes that its teacher tells apart.

    On an NVIDIA GPU it runs as a fused kernel (`compress/kernels/soft_head`).
    """

    name = "soft"

    class Settings(LossSettings):
        weights: tuple[NonNegative, NonNegative, NonNegative] = (1.0, 4.0, 1.0)
        """Weights of objectness, classes and boxes."""

    settings: Settings

    def compare_maps(
        self,
        student: Sequence[Tensor],
        told: Sequence[Tensor],
        seen: Sequence[Tensor],
        tells_all: bool,
        upstream: Tensor | None,
    ) -> Tensor:
        balance, weights, gains = level_balance(len(told)), self.settings.weights, self.gains
        obj, cls, box = (w * gain for w, gain in zip(weights, (gains.obj, gains.cls, gains.box), strict=True))
        return soft_head(student, told, seen, [*self.anchors], balance, obj, cls, box, tells_all, scale=upstream)


class KD(HeadLoss):
    """Hinton's soft labels for a head of sigmoids: a *binary* KL, teacher first, at temperature T.

        KL(z_T, z_S) = p log(p / q) + (1 - p) log((1 - p) / (1 - q)),  p = sigmoid(z_T / T), q = sigmoid(z_S / T)
        L_obj = balance * mean_i KL(o_T, o_S)
        L_cls = sum_i g_i mean_k KL(c_T, c_S) / max(sum_i g_i, B)
        L = T^2 * (obj * L_obj + cls * L_cls), summed over levels

    obj and cls are the detection loss's scaled gains. The gate g_i = sigmoid(o_T) is taken at temperature 1; T^2 keeps
    the gradient's size when T changes; boxes take no part.
    """

    name = "kd"

    class Settings(LossSettings):
        temperature: Positive = 4.0

    settings: Settings

    def objectness(self, student: Tensor, teacher: Tensor) -> Tensor:
        return self.gains.obj * self._soft(student, teacher)

    def cell(self, student: Tensor, teacher: Tensor, anchors_wh: Tensor) -> Tensor:
        return self.gains.cls * self._soft(student[..., 5:], teacher[..., 5:]).mean(-1)

    def _soft(self, student: Tensor, teacher: Tensor) -> Tensor:
        temperature = self.settings.temperature
        return temperature**2 * binary_kl(student / temperature, teacher / temperature)


class MSE(HeadLoss):
    """The textbook's squared difference of outputs: sum over levels of mean (z_S - z_T)^2.

    The mean is over images, cells, anchors and all their logits z, those of boxes included, each as much as any other;
    `soft` weighs them by what they mean. Source: Ba & Caruana, NIPS 2014.
    """

    name = "mse"

    def level(
        self, student: Tensor, teacher: Tensor, seen: Tensor, anchors_wh: Tensor, balance: float, pair: Pair
    ) -> Tensor:
        s, t = pair(student, teacher)
        return F.mse_loss(s.float(), t.float())


class CrossEntropy(HeadLoss):
    """The textbook's cross-entropy with the teacher's probabilities.

        sum over levels of mean CE(z_S, p_T) - CE(z_T, p_T),  CE(z, p) = -p log sigmoid(z) - (1 - p) log sigmoid(-z)

    p = sigmoid(z). The mean is over images, cells, anchors, and objectness and classes; boxes take no part. The
    teacher's own entropy is taken off: that changes no gradient, and makes the loss 0 where both agree.
    """

    name = "cross_entropy"

    def level(
        self, student: Tensor, teacher: Tensor, seen: Tensor, anchors_wh: Tensor, balance: float, pair: Pair
    ) -> Tensor:
        s, t = pair(student, teacher)
        return binary_kl(s[..., 4:].float(), t[..., 4:].float()).mean()
