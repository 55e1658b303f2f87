"""The detection loss of YOLOv5 v7.0: assigns each labelled box to cells and anchors, and compares them.

In: raw head maps and labelled boxes. Out: one scalar and its three parts. No step of it waits for the device:
rows without a target are masked and never removed, so every shape is known from the number of targets alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress.compute.boxes import decode_in_cell, paired_ciou
from compress.config import LossConfig
from runtime.errors import UsageError

# (offset of the centre in cells) for: the own cell, then its left, upper, right and lower neighbour
_OFFSETS = ((0.0, 0.0), (0.5, 0.0), (0.0, 0.5), (-0.5, 0.0), (0.0, -0.5))

_BALANCE = {3: (4.0, 1.0, 0.4)}
_BALANCE_OTHERWISE = (4.0, 1.0, 0.25, 0.06, 0.02)
_FOCAL_ALPHA = 0.25


class Assignment(NamedTuple):
    """All pairs of cell and anchor with a target of one level, in YOLOv5's order: copies outermost, then anchors, then
    targets.

    N = 5 * na * nt. Rows with `keep` False are padding with harmless values: a fixed N costs no device sync.
    """

    image: Tensor
    """(N,) int64."""
    anchor: Tensor
    """(N,) int64, index into the anchors of this level."""
    row: Tensor
    """(N,) int64, grid y."""
    column: Tensor
    """(N,) int64, grid x."""
    class_id: Tensor
    """(N,) int64."""
    box: Tensor
    """(N, 4) float32: target x, y relative to the cell (-0.5..1.5), w, h; grid units."""
    keep: Tensor
    """(N,) bool: the pair is a positive."""


def level_balance(levels: int) -> tuple[float, ...]:
    """Weight of each level's objectness, finest level first. Source: YOLOv5 v7.0."""
    return _BALANCE.get(levels, _BALANCE_OTHERWISE[:levels])


class Gains(NamedTuple):
    """Weight of each part of the loss, after scaling."""

    box: float
    obj: float
    cls: float


def scaled_gains(config: LossConfig, nc: int, levels: int, imgsz: int) -> Gains:
    """The gains of the settings, scaled to levels, image size and classes as in YOLOv5 v7.0."""
    per_level = 3 / levels
    return Gains(
        box=config.box * per_level,
        obj=config.obj * (imgsz / 640) ** 2 * per_level,
        cls=config.cls * (nc / 80) * per_level,
    )


def _ratio_matches(anchors_wh: Tensor, targets_wh: Tensor, anchor_t: float) -> Tensor:
    """(na, nt) bool: no side differs by `anchor_t` times or more."""
    ratio = targets_wh[None] / anchors_wh[:, None]
    return torch.maximum(ratio, 1 / ratio).amax(2) < anchor_t


def _copies(centres: Tensor, size_wh: Tensor) -> Tensor:
    """(5, nt) bool: which of the five cells of `_OFFSETS` are assigned to each centre (nt, 2), in grid units."""
    from_far = size_wh - centres
    near = ((centres % 1 < 0.5) & (centres > 1)).T
    far = ((from_far % 1 < 0.5) & (from_far > 1)).T
    return torch.cat((torch.ones_like(near[:1]), near, far))


def assign_targets(targets: Tensor, anchors_wh: Tensor, size_hw: tuple[int, int], anchor_t: float) -> Assignment:
    """Assign the targets to cells and anchors of one level.

    A pair (anchor, target) matches when max(w/aw, aw/w, h/ah, ah/h) < anchor_t; it is then assigned to the cell
    of the centre and to the nearer neighbour on each axis. As in YOLOv5 v7.0.

    Args:
        targets: (nt, 6) float32 image, class, cx, cy, w, h; boxes normalised to the network's input.
        anchors_wh: (na, 2) float32 grid units.
        size_hw: grid rows and columns.
        anchor_t: greatest ratio of sides, exclusive.
    """
    na, nt, copies = len(anchors_wh), len(targets), len(_OFFSETS)
    height, width = size_hw
    size_wh = targets.new_tensor((width, height))
    image_class = targets[:, :2].long()
    centres, sizes = targets[:, 2:4] * size_wh, targets[:, 4:6] * size_wh
    keep = _copies(centres, size_wh)[:, None] & _ratio_matches(anchors_wh, sizes, anchor_t)  # (5, na, nt)
    cells = (centres - targets.new_tensor(_OFFSETS)[:, None]).long()  # (5, nt, 2)
    cells = torch.minimum(cells.clamp_min(0), size_wh.long() - 1)
    # padding takes the anchor's size: a target of size 0 or NaN must not reach the arithmetic
    sizes = torch.where(keep[..., None], sizes, anchors_wh[:, None])
    inside = (centres - cells)[:, None].expand(copies, na, nt, 2)

    def rows(column: Tensor) -> Tensor:
        return column.expand(copies, na, nt).flatten()

    return Assignment(
        image=rows(image_class[:, 0]),
        anchor=rows(torch.arange(na, device=targets.device)[:, None]),
        row=rows(cells[:, None, :, 1]),
        column=rows(cells[:, None, :, 0]),
        class_id=rows(image_class[:, 1]),
        box=torch.cat((inside, sizes), -1).flatten(0, 2),
        keep=keep.flatten(),
    )


def _masked_mean(values: Tensor, keep: Tensor) -> Tensor:
    """Mean of values (N,) or (N, C) over the kept rows; 0, with a gradient path, if none is kept."""
    weight = keep.to(values.dtype).reshape(-1, *[1] * (values.dim() - 1))
    return (values * weight).sum() / (weight.sum() * values[:1].numel()).clamp_min(1)


def _write_last(cells: Tensor, values: Tensor, keep: Tensor, count: int) -> Tensor:
    """(count,) zeros with values written at the kept cells; of duplicates the last row wins, on every device."""
    rank = torch.where(keep, torch.arange(len(cells), device=cells.device), -1)
    last = rank.new_full((count,), -1).scatter_reduce_(0, cells, rank, "amax")
    wins = keep & (last[cells] == rank)
    return values.new_zeros(count).scatter_add_(0, cells, torch.where(wins, values, 0))


def _focal_factor(logits: Tensor, target: Tensor, gamma: float) -> Tensor:
    p = logits.sigmoid()
    p_true = target * p + (1 - target) * (1 - p)
    return (target * _FOCAL_ALPHA + (1 - target) * (1 - _FOCAL_ALPHA)) * (1 - p_true) ** gamma


def _bce(logits: Tensor, target: Tensor, positive_weight: float, gamma: float) -> Tensor:
    """Element-wise binary cross-entropy; focal if gamma > 0."""
    weight = None if positive_weight == 1 else logits.new_tensor(positive_weight)
    loss = F.binary_cross_entropy_with_logits(logits, target, pos_weight=weight, reduction="none")
    return loss * _focal_factor(logits, target, gamma) if gamma > 0 else loss


class DetectionLoss(nn.Module):
    """L = B * (box * sum_l mean(1 - CIoU) + obj * sum_l balance_l * mean BCE + cls * sum_l mean BCE).

    Gains are those of `scaled_gains`. The objectness target of a positive is its CIoU, detached and floored at 0.
    Everything accumulates in float32 for inputs of any dtype. The rules are YOLOv5 v7.0's.

    Args:
        anchors_grid: (nl, na, 2) anchors in units of their level's stride (the buffer `model.24.anchors`).
        strides: (nl,) pixels per cell.
        nc: number of classes.
        config: gains before scaling.
        imgsz: the size that the objectness gain is scaled for.

    Raises UsageError when anchors and strides have different numbers of levels.
    """

    anchors_grid: Tensor

    def __init__(
        self, anchors_grid: Tensor, strides: Sequence[int], nc: int, config: LossConfig | None = None, imgsz: int = 640
    ) -> None:
        super().__init__()
        levels = len(anchors_grid)
        if len(strides) != levels:
            raise UsageError(
                f"{levels} levels of anchors but {len(strides)} strides", "Give one set of anchors per stride"
            )
        self.config = config or LossConfig()
        self.nc = nc
        self.balance = level_balance(levels)
        self.gains = scaled_gains(self.config, nc, levels, imgsz)
        self.register_buffer("anchors_grid", anchors_grid.detach().float().clone(), persistent=False)

    def forward(self, raw: Sequence[Tensor], targets: Tensor) -> tuple[Tensor, Tensor]:
        """
        Args:
            raw: per level (B, na, H, W, 5 + nc) logits tx, ty, tw, th, objectness, classes.
            targets: (nt, 6) image, class, cx, cy, w, h normalised to the network's input; nt may be 0.

        Returns:
            The scalar to differentiate, times the batch size; and the parts box, obj, cls (3,) with their gains but
            without the batch size, detached.
        """
        targets = targets.float()
        terms = [
            self._level(level_raw, targets, anchors, balance)
            for level_raw, anchors, balance in zip(raw, self.anchors_grid, self.balance, strict=True)
        ]
        parts = torch.stack(terms).sum(0) * terms[0].new_tensor(self.gains)
        return parts.sum() * raw[0].shape[0], parts.detach()

    def _level(self, raw: Tensor, targets: Tensor, anchors_wh: Tensor, balance: float) -> Tensor:
        """(3,) box, objectness and class term of one level, before their gains."""
        batch, na, height, width, channels = raw.shape
        assigned = assign_targets(targets, anchors_wh, (height, width), self.config.anchor_t)
        cells = ((assigned.image * na + assigned.anchor) * height + assigned.row) * width + assigned.column
        # index_select: its backward adds rows in order; advanced indexing sorts or serialises
        logits = raw.reshape(-1, channels).index_select(0, cells).float()

        ciou = paired_ciou(decode_in_cell(logits[:, :4], anchors_wh[assigned.anchor]), assigned.box)
        box = _masked_mean(1 - ciou, assigned.keep)

        quality = _write_last(cells, ciou.detach().clamp_min(0), assigned.keep, batch * na * height * width)
        objectness = self._bce_of(raw[..., 4].reshape(-1).float(), quality, self.config.obj_pw).mean() * balance
        return torch.stack((box, objectness, self._classes(logits[:, 5:], assigned)))

    def _classes(self, logits: Tensor, assigned: Assignment) -> Tensor:
        """Mean BCE over positives and classes; 0 if there is only one class."""
        if self.nc == 1:
            return logits.new_zeros(())
        off = self.config.label_smoothing / 2
        hot = assigned.class_id[:, None] == torch.arange(self.nc, device=logits.device)
        return _masked_mean(self._bce_of(logits, hot * (1 - 2 * off) + off, self.config.cls_pw), assigned.keep)

    def _bce_of(self, logits: Tensor, target: Tensor, positive_weight: float) -> Tensor:
        return _bce(logits, target, positive_weight, self.config.fl_gamma)
