"""Overlap of paired boxes, differentiable: row i of one tensor against row i of the other; and the cells of a box."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

EPS = 1e-7
"""Added to denominators, as in YOLOv5."""


class _Corners(NamedTuple):
    left: Tensor
    top: Tensor
    right: Tensor
    bottom: Tensor


def touched_cells(centre: Tensor, side: Tensor, cells: int, margin: float = 0.0) -> Tensor:
    """(n, cells) bool: whether an interval of an axis, longer by `margin` cells at both ends, reaches into each cell.

    `centre` and `side` (n,) are fractions of the axis.
    """
    low, high = ((centre + sign * side / 2)[:, None] * cells + sign * margin for sign in (-1, 1))
    cell = torch.arange(cells, device=centre.device)
    return (cell < high) & (cell + 1 > low)


def _corners(boxes_xywh: Tensor) -> _Corners:
    x, y, w, h = boxes_xywh.unbind(-1)
    half_w, half_h = w / 2, h / 2
    return _Corners(x - half_w, y - half_h, x + half_w, y + half_h)


def _intersection(a: _Corners, b: _Corners) -> Tensor:
    width = torch.minimum(a.right, b.right) - torch.maximum(a.left, b.left)
    height = torch.minimum(a.bottom, b.bottom) - torch.maximum(a.top, b.top)
    return width.clamp_min(0) * height.clamp_min(0)


def _enclosing_wh(a: _Corners, b: _Corners) -> tuple[Tensor, Tensor]:
    width = torch.maximum(a.right, b.right) - torch.minimum(a.left, b.left)
    height = torch.maximum(a.bottom, b.bottom) - torch.minimum(a.top, b.top)
    return width, height


def _aspect_angle(boxes_xywh: Tensor) -> Tensor:
    """atan(w / h). Sizes are floored: a saturated logit gives w = h = 0, whose quotient has no finite gradient."""
    w, h = boxes_xywh[..., 2:].clamp_min(EPS).unbind(-1)
    return torch.atan(w / h)


def _aspect_penalty(a_xywh: Tensor, b_xywh: Tensor, iou: Tensor) -> Tensor:
    """The penalty alpha * v of CIoU; alpha carries no gradient."""
    v = (4 / math.pi**2) * (_aspect_angle(b_xywh) - _aspect_angle(a_xywh)).square()
    with torch.no_grad():
        alpha = v / (v - iou + (1 + EPS))
    return alpha * v


def paired_ciou(a_xywh: Tensor, b_xywh: Tensor) -> Tensor:
    """CIoU of boxes pair by pair: IoU - (centre distance / enclosing diagonal)^2 - alpha * v.

    Args:
        a_xywh: (..., 4) centre x, y, width, height in any one unit; predictions go here.
        b_xywh: (..., 4) in the same unit; targets go here.

    Returns:
        (...) at most 1. Finite for every finite input with non-negative sizes, and so is its gradient.
    """
    a, b = _corners(a_xywh), _corners(b_xywh)
    inter = _intersection(a, b)
    union = a_xywh[..., 2] * a_xywh[..., 3] + b_xywh[..., 2] * b_xywh[..., 3] - inter + EPS
    iou = inter / union
    enclosing_w, enclosing_h = _enclosing_wh(a, b)
    distance2 = (b_xywh[..., :2] - a_xywh[..., :2]).square().sum(-1)
    distance_iou = iou - distance2 / (enclosing_w.square() + enclosing_h.square() + EPS)
    return distance_iou - _aspect_penalty(a_xywh, b_xywh, iou)


def paired_giou_exact(a_xywh: Tensor, b_xywh: Tensor) -> Tensor:
    """GIoU that is exactly 1 for equal boxes, however small.

    A distillation loss must be 0 if student equals teacher, also in float32. Every area comes from the same corners,
    and eps is added to both sides of the fraction: (inter + eps) / (union + eps).

    Args and returns as `paired_ciou`.
    """
    a, b = _corners(a_xywh), _corners(b_xywh)
    inter = _intersection(a, b)
    union = (a.right - a.left) * (a.bottom - a.top) + (b.right - b.left) * (b.bottom - b.top) - inter
    enclosing_w, enclosing_h = _enclosing_wh(a, b)
    area = enclosing_w * enclosing_h
    return (inter + EPS) / (union + EPS) - (area - union) / (area + EPS)


def decode_in_cell(logits: Tensor, anchors_wh: Tensor) -> Tensor:
    """Box logits to boxes relative to their own cell: centre 2*sigmoid - 0.5, size (2*sigmoid)^2 * anchor.

    Args:
        logits: (..., 4) raw tx, ty, tw, th of any floating dtype.
        anchors_wh: broadcastable to (..., 2), grid units.

    Returns:
        (..., 4) float32 (float64 for float64 logits) x, y, w, h in grid units.
    """
    twice = logits.to(torch.promote_types(logits.dtype, torch.float32)).sigmoid() * 2
    return torch.cat((twice[..., :2] - 0.5, twice[..., 2:].square() * anchors_wh), -1)
