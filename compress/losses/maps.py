"""Raw maps in other terms: mirrored, on a coarser grid, averaged, of other anchors, from decoded rows, or of boxes.

A teacher's maps must mean what the student's mean, cell by cell and logit by logit. A logit that a teacher cannot give
is NaN; a loss takes the student's own value in its place, so that it pulls nowhere.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from compress.losses.detection import Grid, assign_targets

BACKGROUND = -12.0
"""Objectness logit of a cell without a box. A loss compares the 1000 best cells: at this value they count for 0.006
boxes in all where there is none."""
EDGE = 1e-6
"""Distance that probabilities keep from 0 and 1, so that their logits are finite."""
SIDE_LIMIT = 4.0
"""Largest logit of a side for other anchors. Where there is no object any side is as good, and in a regression a larger
logit would outweigh those of objects."""


def logit(probability: Tensor) -> Tensor:
    """The inverse of the sigmoid, finite."""
    return torch.logit(probability.float(), EDGE)


def mirrored(raw: Sequence[Tensor]) -> list[Tensor]:
    """Raw maps (B, na, H, W, 5 + nc) of an image as those of its mirror image: columns in reverse, tx negated.

    A centre lies 2*sigmoid(tx) - 0.5 from its cell's left edge; in the mirrored cell that is 1.5 - 2*sigmoid(tx), which
    is 2*sigmoid(-tx) - 0.5.
    """
    flipped = [level.flip(3) for level in raw]
    return [torch.cat((-level[..., :1], level[..., 1:]), -1) for level in flipped]


def mean_maps(several: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """The mean of each logit over networks, by level; over those that give it."""
    return [torch.stack([level.float() for level in levels]).nanmean(0) for levels in zip(*several, strict=True)]


def coarser(raw: Tensor, factor: int) -> Tensor:
    """A raw map on a grid whose cells are `factor` times as wide: (B, na, H, W, C) -> (B, na, H/factor, W/factor, C).

    For the same image and for anchors that are the same shares of it. Of the cells that become one, that with the
    largest objectness is taken, and its centre written in the wide cell, where it always fits: the sizes' logits, which
    refer to the anchor, stay.
    """
    if factor == 1:
        return raw
    batch, na, height, width, columns = raw.shape
    split = raw.float().view(batch, na, height // factor, factor, width // factor, factor, columns)
    cells = split.permute(0, 1, 2, 4, 3, 5, 6).flatten(4, 5)  # (B, na, H/f, W/f, f*f, C), x fastest
    best = cells[..., 4].nan_to_num(-torch.inf).argmax(-1, keepdim=True)
    taken = cells.gather(4, best[..., None].expand(*best.shape, columns)).squeeze(4)
    place = torch.cat((best % factor, best // factor), -1)
    centre = (taken[..., :2].sigmoid() * 2 - 0.5 + place) / factor
    return torch.cat((logit((centre + 0.5) / 2), taken[..., 2:]), -1)


def for_anchors(raw: Tensor, own_wh: Tensor, wanted_wh: Tensor) -> Tensor:
    """A raw map (B, na, H, W, 5 + nc) of the anchors `own_wh` (na, 2) as float32 for the anchors `wanted_wh`.

    The boxes stay, but for sides beyond SIDE_LIMIT.
    """
    share = raw[..., 2:4].float().sigmoid() * (own_wh / wanted_wh).sqrt().view(-1, 1, 1, 2)
    sides = logit(share).clamp(-SIDE_LIMIT, SIDE_LIMIT)
    return torch.cat((raw[..., :2].float(), sides, raw[..., 4:].float()), -1)


def maps_from_rows(rows: Tensor, anchors_wh: Tensor, strides: Sequence[int], size_hw: tuple[int, int]) -> list[Tensor]:
    """The raw maps that a decode made rows of: its inverse.

    Args:
        rows: (B, N, 5 + nc) centre and size in pixels, objectness, class probabilities; by level, anchor, y, x.
        anchors_wh: (nl, na, 2) in units of the level's stride.
        size_hw: pixels of the image.

    Returns:
        Per level (B, na, H, W, 5 + nc) logits.
    """
    na, columns = anchors_wh.shape[1], rows.shape[-1]
    grids = [(size_hw[0] // stride, size_hw[1] // stride) for stride in strides]
    levels = rows.float().split([na * height * width for height, width in grids], 1)
    made = []
    for level, (height, width), anchors, stride in zip(levels, grids, anchors_wh, strides, strict=True):
        shaped = level.view(len(rows), na, height, width, columns)
        x, y = (torch.arange(n, device=rows.device) for n in (width, height))
        cells = torch.stack((x.expand(height, width), y[:, None].expand(height, width)), -1)
        inside = shaped[..., :2] / stride - cells
        sides = shaped[..., 2:4] / stride / anchors.view(na, 1, 1, 2)
        made.append(torch.cat((_box_logits(inside, sides), logit(shaped[..., 4:])), -1))
    return made


def _box_logits(inside: Tensor, sides: Tensor) -> Tensor:
    """Box logits (..., 4) of centres relative to their cell, and of sizes as multiples of the anchor."""
    return torch.cat((logit((inside + 0.5) / 2), logit(sides.clamp_min(0).sqrt() / 2)), -1)


def maps_from_boxes(
    boxes: Tensor, anchors_wh: Tensor, grids_hw: Sequence[tuple[int, int]], anchor_t: float
) -> list[Tensor]:
    """Raw maps that say what boxes say: each is written to the cells and anchors that a label would be assigned to.

    Where several boxes meet, the one with the largest objectness is written. Cells without a box are background, and
    tell nothing of classes and sides. A GPU is waited for, as it is for an ONNX file's boxes.

    Args:
        boxes: (B, K, 5 + nc) centre and size as shares of the image, then logits of objectness and classes. A box of
            size 0 is none.
        anchors_wh: (nl, na, 2) in units of the level's stride.
        grids_hw: rows and columns of each level.
        anchor_t: greatest ratio of a box's and an anchor's sides, exclusive.

    Returns:
        Per level (B, na, H, W, 5 + nc) float32 logits.
    """
    batch, count, columns = boxes.shape
    flat = boxes.float().reshape(batch * count, columns)
    image = torch.arange(batch, device=boxes.device).repeat_interleave(count)[:, None]
    targets = torch.cat((image, torch.zeros_like(image), flat[:, :4]), 1)
    shapes = [(batch, anchors_wh.shape[1], *grid_hw) for grid_hw in grids_hw]
    pairs = assign_targets(targets, anchors_wh, Grid.of(shapes, boxes.device), anchor_t)
    return [
        _level_of_boxes(flat, anchors, shape, *level)
        for anchors, shape, *level in zip(
            anchors_wh, shapes, pairs.cell, pairs.centres.unbind(1), pairs.sides.unbind(1), pairs.keep, strict=True
        )
    ]


def _level_of_boxes(
    flat: Tensor,
    anchors_wh: Tensor,
    shape: tuple[int, ...],
    cell: Tensor,
    centres: Tensor,
    sides: Tensor,
    keep: Tensor,
) -> Tensor:
    """One level of `maps_from_boxes`, from that level of an `Assignment` of the boxes `flat` (nt, 5 + nc)."""
    raw = flat.new_full((*shape, flat.shape[1]), torch.nan)
    raw[..., 4] = BACKGROUND
    _, anchor, box = keep.nonzero().T
    order = flat[box, 4].argsort(stable=True)  # of boxes in one cell the last is the best
    cells = cell[keep][order]
    last = cells.new_full((math.prod(shape),), -1)
    last.scatter_reduce_(0, cells, torch.arange(len(cells), device=cells.device), "amax")
    filled = (last >= 0).nonzero().squeeze(1)
    wins = order[last[filled]]
    inside, wh = (part.expand(2, *keep.shape)[:, keep].T[wins] for part in (centres, sides))
    values = torch.cat((_box_logits(inside, wh / anchors_wh[anchor[wins]]), flat[box[wins], 4:]), 1)
    raw.view(-1, flat.shape[1])[filled] = values
    return raw


def pooled(features: Sequence[Tensor], factor: int) -> list[Tensor]:
    """Features (B, C, H, W) on the grid of `coarser`: means over squares of cells."""
    return [feature if factor == 1 else F.avg_pool2d(feature, factor) for feature in features]
