"""Losses as their formulas read, for autograd."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from compress.compute.boxes import EPS


def ciou(a: Tensor, b: Tensor) -> Tensor:
    """The formula, of boxes (..., 4) of centre and sides."""
    (ax, ay, aw, ah), (bx, by, bw, bh) = a.unbind(-1), b.unbind(-1)

    def lengths(x: Tensor, w: Tensor, tx: Tensor, tw: Tensor) -> tuple[Tensor, Tensor]:
        left, right, target_left, target_right = x - w / 2, x + w / 2, tx - tw / 2, tx + tw / 2
        overlap = torch.minimum(right, target_right) - torch.maximum(left, target_left)
        return overlap.clamp_min(0), torch.maximum(right, target_right) - torch.minimum(left, target_left)

    (overlap_w, hull_w), (overlap_h, hull_h) = lengths(ax, aw, bx, bw), lengths(ay, ah, by, bh)
    overlap = overlap_w * overlap_h
    iou = overlap / (aw * ah + bw * bh - overlap + EPS)
    distance = ((bx - ax).square() + (by - ay).square()) / (hull_w.square() + hull_h.square() + EPS)
    angle, target_angle = (torch.atan(w.clamp_min(EPS) / h.clamp_min(EPS)) for w, h in ((aw, ah), (bw, bh)))
    v = 4 / math.pi**2 * (target_angle - angle).square()
    alpha = (v / (v - iou + 1 + EPS)).detach()
    return iou - distance - alpha * v
