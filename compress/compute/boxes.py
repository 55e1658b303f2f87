"""Overlap of paired boxes, differentiable: each box of one tensor with its own in the other; and the cells of a box."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

EPS = 1e-7
"""Added to denominators, as in YOLOv5."""
_TINY = torch.finfo(torch.float32).tiny
"""The smallest normal number: what is above -_TINY is not negative."""


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


def paired_giou_exact(a_xywh: Tensor, b_xywh: Tensor) -> Tensor:
    """GIoU that is exactly 1 for equal boxes, however small.

    A distillation loss must be 0 if student equals teacher, also in float32. Every area comes from the same corners,
    and eps is added to both sides of the fraction: (inter + eps) / (union + eps).

    Args:
        a_xywh: (..., 4) centre x, y, width, height in any one unit; predictions go here.
        b_xywh: (..., 4) in the same unit; targets go here.

    Returns:
        (...) at most 1. Finite for every finite input with non-negative sizes, and so is its gradient.
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


class CellCIoU(nn.Module):
    """CIoU of decoded boxes with their targets: IoU - (centre distance / enclosing diagonal)^2 - alpha * v.

    v = 4 / pi^2 * (atan(w_T / h_T) - atan(w / h))^2, alpha = v / (v - IoU + 1 + EPS) without a gradient.

    Args:
        anchors_wh: (nl, na, 2) float32, cells.
    """

    largest: Tensor
    slopes: Tensor
    signs: Tensor
    tie: Tensor
    eps: Tensor

    def __init__(self, anchors_wh: Tensor) -> None:
        super().__init__()
        # numbers become tensors here: in `forward`, a GPU would wait for each
        for name, value in {
            "largest": 4 * anchors_wh,
            "slopes": -2 * F.pad(4 * anchors_wh, (2, 0), value=1.0),
            "signs": torch.tensor([[2.0], [-2.0]]),
            "tie": torch.tensor(0.5),
            "eps": torch.tensor([[EPS], [EPS / 2]]),
        }.items():
            self.register_buffer(name, value, persistent=False)

    def forward(self, logits: Tensor, centres: Tensor, sides: Tensor) -> tuple[Tensor, Tensor]:
        """1 - CIoU with a gradient at the logits, and CIoU without; both (nl, copies, na, nt) float32.

        Finite for every finite input with non-negative sides, and so is the gradient.

        Args:
            logits: (nl, copies, na, nt, 4) float32 tx, ty, tw, th; see `decode_in_cell`.
            centres: broadcastable to (2, nl, copies, na, nt): x and y of the targets relative to the logits' own cells.
            sides: broadcastable to the same: width and height of the targets in cells.
        """
        largest, slopes = (table[:, None, :, None] for table in (self.largest, self.slopes))
        constants = largest, slopes, self.signs, self.tie, self.eps
        shortfall, ciou = _CellCIoU.apply(logits, centres, sides, constants)  # type: ignore[no-untyped-call]
        return shortfall, ciou


class _CellCIoU(torch.autograd.Function):
    """Decode and compare, with the backward pass written out: 34 operations, where autograd takes 128 on each level.

    Inside, boxes are (2 of prediction and target, 2 axes, R). Corners are (2, 2 of right and -left, 2 axes, R) and
    doubled, so that the smaller one is always the inner one, and no side is halved. The squares of the diagonal and of
    the distance are halved, so that their slopes need no factor. Powers of two change no rounding: on a CPU, values and
    gradients are those of the formula's autograd to the bit.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, centres: Tensor, sides: Tensor, constants: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor]:
        largest, *ctx.constants, eps = constants
        _, signs, _ = ctx.constants
        shape = logits.shape[:-1]
        share = logits.sigmoid()
        own_centres = torch.rsub(share[..., :2], -0.5, alpha=-2)  # 2 * share - 0.5
        own_sides = share[..., 2:].square() * largest
        own = own_centres.movedim(-1, 0), own_sides.movedim(-1, 0)
        boxes = torch.cat((*own, centres.expand(2, *shape), sides.expand(2, *shape))).reshape(2, 2, 2, -1)
        centres, sides = boxes[:, 0], boxes[:, 1]

        corners = torch.addcmul(sides[:, None], centres[:, None], signs[:, None])
        inner, outer = torch.aminmax(corners, dim=0)
        overlap, hull = inner.mean(0), outer.mean(0)
        extents = torch.cat((sides, overlap.clamp_min(0)[None]))
        areas = extents[:, 0] * extents[:, 1]
        gap = centres[1] - centres[0]
        squares = torch.stack((gap, hull)).square().mean(1)
        below = torch.stack((areas[:2].sum(0) - areas[2], squares[1])) + eps
        ratios = torch.stack((areas[2], squares[0])) / below  # IoU; the distance by the diagonal, squared

        # a saturated logit gives w = h = 0, whose quotient has no finite gradient
        floored = sides.clamp_min(EPS)
        aspects = floored[:, 0] / floored[:, 1]
        angles = aspects.atan()
        turn = angles[1] - angles[0]
        v = turn.square() * (4 / math.pi**2)
        alpha = v / (v - ratios[0] + (1 + EPS))
        ciou = (ratios[0] - ratios[1] - alpha * v).view(shape)

        ctx.save_for_backward(
            share, corners, overlap, hull, extents, gap, below, ratios, floored[0, 1], aspects[0], turn, alpha
        )
        ctx.mark_non_differentiable(ciou)
        ctx.set_materialize_grads(False)
        return 1 - ciou, ciou

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: None) -> tuple[Tensor | None, ...]:
        share, corners, overlap, hull, extents, gap, below, ratios, height, aspect, turn, alpha = ctx.saved_tensors
        slopes, signs, tie = ctx.constants
        # of CIoU: the sign of 1 - CIoU is that of the slopes at the end
        g = gradient.reshape(-1)
        by_above, by_below = g / below, ratios / below * g  # the latter negated
        across = extents[::2].flip(1)  # the other side of the predicted box and of the overlap

        # a corner bounds the overlap or the hull; where it meets the target's corner, it bounds each by half
        by_overlap = _passed((by_above[0] + by_below[0]) * across[1], overlap, -_TINY)
        bounds_overlap = torch.heaviside(corners[1] - corners[0], tie)
        by_corner = torch.lerp(by_below[1] * hull, by_overlap, bounds_overlap)
        by_centre = by_corner[0] - by_corner[1] + by_above[1] * gap

        by_aspect = g * alpha * (8 / math.pi**2) * turn / (aspect.square() + 1)
        by_floored = torch.stack((by_aspect / height, by_aspect * (aspect / height)))  # the height's negated
        by_area = torch.addcmul(by_below[0] * across[0], _passed(by_floored, extents[0], EPS), signs, value=-0.5)
        by_side = by_corner.mean(0) - by_area

        by_share = torch.cat((by_centre.T, by_side.T), 1).view(share.shape).mul_(slopes)
        by_share[..., 2:].mul_(share[..., 2:])
        return torch.ops.aten.sigmoid_backward(by_share, share), None, None, None


def _passed(gradient: Tensor, value: Tensor, floor: float) -> Tensor:
    """The gradient where the value is above the floor that it was clamped to, else 0."""
    passed: Tensor = torch.ops.aten.threshold_backward(gradient, value, floor)
    return passed
