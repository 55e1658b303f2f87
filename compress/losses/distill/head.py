"""Distillation losses of the head: cells, anchors, objectness, classes and boxes, compared one by one.

They take *logits*: YOLOv5's head is one sigmoid a class, so nothing here is a softmax over classes. A softmax would not
see a shift common to all classes, which is exactly how a student loses its confidence.
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from compress.config import DistillConfig, Float, NonNegative, Positive
from compress.losses.boxes import decode_in_cell, paired_giou_exact
from compress.losses.detection import Gains, level_balance, scaled_gains
from compress.losses.distill.base import Context, DistillLoss, LossSettings, Outputs, Shape, check_same_images
from runtime.errors import UsageError

# Checkpoints keep anchors in float16, which moves them by up to 5e-4 of their size.
_ANCHOR_TOLERANCE = 2e-3


def check_same_head(student: Shape, teacher: Shape) -> None:
    """Raises UsageError unless a cell and anchor means the same in both heads."""
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


def scaled_bce(student: Tensor, teacher: Tensor, beta: float, detach_scale: bool) -> Tensor:
    """|p_T - p_S|^beta * BCE(z_S, p_T), element-wise, of float32 logits."""
    target = teacher.sigmoid()
    gap = (target - student.sigmoid()).abs()
    scale = gap if beta == 1 else gap**beta
    return (scale.detach() if detach_scale else scale) * F.binary_cross_entropy_with_logits(
        student, target, reduction="none"
    )


def binary_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(Bernoulli(sigmoid(z_T)) || Bernoulli(sigmoid(z_S))), element-wise, of float32 logits; exactly 0 if equal."""
    return teacher.sigmoid() * (teacher - student) + F.softplus(student) - F.softplus(teacher)


def gated_mean(sums: Tensor, gate_sum: Tensor, batch: int) -> Tensor:
    """Sum over gate sum. Below one confident cell an image the denominator stands still.

    Without that floor a batch of pure background would copy the teacher's noise at full strength.
    """
    return sums / gate_sum.clamp_min(batch)


class HeadLoss(DistillLoss):
    """A loss over cells and anchors, gated by the teacher's objectness g = sigmoid(o_T): a subclass has `objectness`
    and `cell`.

    Its parts carry the gains of the detection loss, so that a recipe's weight of 1 asks for about as much as the labels
    do. Without them the same weight gave 26 times the labels' gradient at the neck, nearly none of it to objectness.
    """

    compares_heads = True
    anchors: Tensor
    gains: Gains

    def __init__(self, student: Shape, teacher: Shape, config: DistillConfig | None = None, **settings: Any) -> None:
        super().__init__(student, teacher, config, **settings)
        check_same_head(student, teacher)
        self.register_buffer("anchors", teacher.anchors.detach().float().clone(), persistent=False)
        gains = scaled_gains(self.config.loss, teacher.nc, len(teacher.strides), self.config.imgsz)
        self.gains = gains._replace(cls=gains.cls / teacher.nc)  # here classes are summed, there they are averaged

    def compare(self, student: Outputs, teacher: Outputs, context: Context) -> Tensor:
        check_same_images(student.raw, teacher.raw, slice(1, None), "head")
        levels = zip(student.raw, teacher.raw, self.anchors, level_balance(len(student.raw)), strict=True)
        terms = [self._level(s.float(), t.float(), a, balance) for s, t, a, balance in levels]
        objectness, gated, gates = torch.stack(terms).sum(0).unbind()
        return objectness + gated_mean(gated, gates, len(student.raw[0]))

    def _level(self, student: Tensor, teacher: Tensor, anchors_wh: Tensor, balance: float) -> Tensor:
        """(3,) balanced mean over cells of the objectness term; gated sum of the other terms; sum of the gates."""
        gate = teacher[..., 4].sigmoid()
        objectness = self.objectness(student[..., 4], teacher[..., 4]).mean() * balance
        gated = (gate * self.cell(student, teacher, anchors_wh)).sum()
        return torch.stack((objectness, gated, gate.sum()))

    def objectness(self, student: Tensor, teacher: Tensor) -> Tensor:
        """(B, na, H, W): the objectness term of each cell and anchor, from their logits (B, na, H, W)."""
        raise NotImplementedError

    def cell(self, student: Tensor, teacher: Tensor, anchors_wh: Tensor) -> Tensor:
        """(B, na, H, W): the term of each cell and anchor that counts where the teacher sees an object.

        Both take logits (B, na, H, W, 5 + nc); `anchors_wh` (na, 2) are in cells.
        """
        raise NotImplementedError


class ObjKD(HeadLoss):
    """Objectness-gated soft labels.

    With logits z = (b, o, c) of cell and anchor i, p = sigmoid, gate g_i = p(o_T):

        L_obj = sum over levels of balance_l * mean_i |p(o_T) - p(o_S)|^beta * BCE(o_S, p(o_T))
        L_cls = sum_i g_i sum_k |p(c_T) - p(c_S)|^beta * BCE(c_S, p(c_T)) / max(sum_i g_i, B)
        L_box = sum_i g_i (1 - GIoU(box_S, box_T)) / max(sum_i g_i, B)
        L = 1 * obj * L_obj + 1 * cls / nc * L_cls + 4 * box * L_box

    where obj, cls and box are the detection loss's scaled gains.

    Sources: gating, Mehta & Ozturk 2018; the |.|^beta factor and the weights, BCKD (ICCV 2023); level balance as in
    the detection loss. The weights 1, 1, 4 belong to these means and gains: another reduction needs others.
    """

    name = "obj_kd"

    class Settings(LossSettings):
        beta: Annotated[Float, Field(ge=1)] = 1.0
        """Below 1 the gradient at p_S = p_T would be infinite."""
        weights: tuple[NonNegative, NonNegative, NonNegative] = (1.0, 1.0, 4.0)
        """Weights of objectness, classes and boxes."""
        detach_scale: bool = False
        """Keep the gradient out of the |.|^beta factor (BCKD lets it in)."""

    settings: Settings

    def objectness(self, student: Tensor, teacher: Tensor) -> Tensor:
        return self.settings.weights[0] * self.gains.obj * self._soft(student, teacher)

    def cell(self, student: Tensor, teacher: Tensor, anchors_wh: Tensor) -> Tensor:
        anchors_wh = anchors_wh[:, None, None]
        boxes, targets = (decode_in_cell(z[..., :4], anchors_wh) for z in (student, teacher))
        classes = self._soft(student[..., 5:], teacher[..., 5:]).sum(-1)
        overlap = paired_giou_exact(boxes, targets)
        return self.settings.weights[1] * self.gains.cls * classes + self.settings.weights[2] * self.gains.box * (
            1 - overlap
        )

    def _soft(self, student: Tensor, teacher: Tensor) -> Tensor:
        return scaled_bce(student, teacher, self.settings.beta, self.settings.detach_scale)


class KD(HeadLoss):
    """Hinton's soft labels for a head of sigmoids: a *binary* KL, teacher first, at temperature T.

        KL(z_T, z_S) = p log(p / q) + (1 - p) log((1 - p) / (1 - q)),  p = sigmoid(z_T / T), q = sigmoid(z_S / T)
        L_obj = sum over levels of balance_l * mean_i KL(o_T, o_S)
        L_cls = sum_i g_i sum_k KL(c_T, c_S) / max(sum_i g_i, B)
        L = T^2 * (obj * L_obj + cls / nc * L_cls)

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
        return self.gains.cls * self._soft(student[..., 5:], teacher[..., 5:]).sum(-1)

    def _soft(self, student: Tensor, teacher: Tensor) -> Tensor:
        temperature = self.settings.temperature
        return temperature**2 * binary_kl(student / temperature, teacher / temperature)
