"""The detection loss of YOLOv5 v7.0: assigns each labelled box to cells and anchors, and compares them.

In: raw head maps and labelled boxes. Out: one scalar and its three parts. All levels are computed together, in at most
150 operations with the backward pass. None waits for the device: pairs without a target are masked and never removed,
so every shape is known from the number of targets alone, and `padded` keeps that to a few numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from compress.compute.boxes import CellCIoU
from compress.config import LossConfig
from runtime.errors import UsageError

# (offset of the centre in cells) for: the own cell, then its left, upper, right and lower neighbour
_OFFSETS = ((0.0, 0.0), (0.5, 0.0), (0.0, 0.5), (-0.5, 0.0), (0.0, -0.5))

_BALANCE = {3: (4.0, 1.0, 0.4)}
_BALANCE_OTHERWISE = (4.0, 1.0, 0.25, 0.06, 0.02)
_FOCAL_ALPHA = 0.25
LEAST_ROWS = 64
"""Targets of a batch after padding, at least."""


class Grid(NamedTuple):
    """Numbers that follow from the shapes of the head maps, as tensors. A GPU waits for each, so they are made once."""

    size: Tensor
    """(nl, 4, 1) float32: columns, rows, columns, rows."""
    edges: Tensor
    """(nl, 3, 2, 1) float32: where the distances begin that decide on copies; see `_copies`."""
    signs: Tensor
    """(3, 1, 1) float32: the direction of these distances."""
    offsets: Tensor
    """(5, 2, 1) float32: `_OFFSETS`."""
    first: Tensor
    """() int64: 0, the first column and row."""
    last: Tensor
    """(nl, 1, 2, 1) int64: the last column and row."""
    columns: Tensor
    """(nl, 1, 1) int64: cells of a row."""
    image_cells: Tensor
    """(nl, 1, 1, 1) int64: cells of an image, each counted once for every anchor, as in all that follows."""
    starts: Tensor
    """(2, nl, 1, na, 1) int64: the first cell of each anchor in the first image, counted in its level, then in all."""
    cells: Tensor
    """(3, nl) float32: 0, cells of the level, 0: what the sums of boxes, objectness and classes are divided by, but for
    the positives."""
    total: int
    """Cells of all levels."""

    @classmethod
    def of(cls, shapes: Sequence[Sequence[int]], device: torch.device) -> Grid:
        """The grid of maps (B, na, H, W)."""
        na = shapes[0][1]
        sizes_wh = [(width, height) for *_, height, width in shapes]
        areas = [width * height for width, height in sizes_wh]
        cells = [math.prod(shape) for shape in shapes]
        nothing = [0] * len(cells)
        starts = [
            [[start + anchor * area for anchor in range(na)] for start, area in zip(level_starts, areas, strict=True)]
            for level_starts in (nothing, [0, *accumulate(cells[:-1])])
        ]

        def tensor(values: Any, *shape: int) -> Tensor:
            return torch.tensor(values, device=device).view(shape)

        with torch.inference_mode(False):  # a training may take up what a validation has made
            return cls(
                size=tensor([2 * size for size in sizes_wh], -1, 4, 1).float(),
                edges=tensor([((2, 2), (0, 0), size) for size in sizes_wh], -1, 3, 2, 1).float(),
                signs=tensor((0.0, 1.0, -1.0), 3, 1, 1),
                offsets=tensor(_OFFSETS, 5, 2, 1),
                first=tensor(0),
                last=tensor(sizes_wh, -1, 1, 2, 1) - 1,
                columns=tensor([width for width, _ in sizes_wh], -1, 1, 1),
                image_cells=tensor([na * area for area in areas], -1, 1, 1, 1),
                starts=tensor(starts, 2, -1, 1, na, 1),
                cells=tensor((nothing, cells, nothing), 3, -1).float(),
                total=sum(cells),
            )


class Assignment(NamedTuple):
    """All pairs of cell and anchor with a target, in YOLOv5's order: levels outermost, then copies, anchors, targets.

    Pairs with `keep` False are padding with harmless values: a fixed number costs no device sync.
    """

    cell: Tensor
    """(nl, 5, na, nt) int64, index into the level's map (B, na, H, W, ...), flattened."""
    place: Tensor
    """(nl, 5, na, nt) int64, index into the maps of all levels, flattened and joined."""
    centres: Tensor
    """(2, nl, 5, 1, nt) float32: the target's x and y relative to the cell (-0.5..1.5), in cells."""
    sides: Tensor
    """(2, nl, 1, 1, nt) float32: the target's width and height in cells."""
    class_id: Tensor
    """(nt,) int64."""
    keep: Tensor
    """(nl, 5, na, nt) bool: the pair is a positive."""


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


def padded(targets: Tensor) -> Tensor:
    """Targets (nt, 6), followed by boxes of no size outside of the image, up to a power of two.

    So few shapes serve all batches. A box that is assigned to no cell and touches none changes no loss by more than
    rounding.
    """
    rows = max(LEAST_ROWS, 1 << max(len(targets) - 1, 0).bit_length())
    filled = F.pad(targets, (0, 0, 0, rows - len(targets)))
    filled[len(targets) :, 2:4].fill_(-1)
    return filled


def targets_on(device: torch.device, targets: Tensor) -> Tensor:
    """The targets (nt, 6) of a training step on its device: `padded` on a GPU, where steps of equal shapes can be one
    graph, and as they are on a CPU, where each row costs time.
    """
    return targets if device.type == "cpu" else padded(targets).to(device, non_blocking=True)


def _ratio_matches(anchors_wh: Tensor, sides: Tensor, anchor_t: float) -> Tensor:
    """(nl, na, nt) bool: no side differs by `anchor_t` times or more."""
    ratio = sides[:, None] / anchors_wh[..., None]
    return torch.maximum(ratio, ratio.reciprocal()).amax(2) < anchor_t


def _copies(centres: Tensor, grid: Grid) -> Tensor:
    """(nl, 5, nt) bool: which of the five cells of `_OFFSETS` are assigned to each centre (nl, 2, nt).

    A neighbour is, if the distance from its edge of the map is more than 1 and its fraction less than 0.5. The own cell
    always is: its distance is 2.
    """
    distance = torch.addcmul(grid.edges, centres[:, None], grid.signs).flatten(1, 2)[:, 1:]
    return F.threshold(distance, 1, 0.5) % 1 < 0.5


def assign_targets(targets: Tensor, anchors_wh: Tensor, grid: Grid, anchor_t: float) -> Assignment:
    """Assign the targets to cells and anchors of all levels.

    A pair (anchor, target) matches when max(w/aw, aw/w, h/ah, ah/h) < anchor_t; it is then assigned to the cell
    of the centre and to the nearer neighbour on each axis. As in YOLOv5 v7.0.

    Args:
        targets: (nt, 6) float32 image, class, cx, cy, w, h; boxes normalised to the network's input.
        anchors_wh: (nl, na, 2) float32 cells.
        grid: that of the maps.
        anchor_t: greatest ratio of sides, exclusive.
    """
    columns = targets.T.contiguous()
    image_class = columns[:2].long()
    centres, sides = (columns[2:] * grid.size).split(2, 1)
    keep = _copies(centres, grid)[:, :, None] & _ratio_matches(anchors_wh, sides, anchor_t)[:, None]
    # clamped before the cell is taken off, as YOLOv5 does: it matters for a centre on the far edge
    cells = (centres[:, None] - grid.offsets).long().clamp(grid.first, grid.last)  # (nl, 5, 2, nt)
    within_anchor = torch.addcmul(cells[:, :, 0], cells[:, :, 1], grid.columns)
    cell, place = torch.addcmul(grid.starts, image_class[0], grid.image_cells) + within_anchor[:, :, None]
    return Assignment(
        cell=cell,
        place=place,
        centres=(centres[:, None] - cells).movedim(2, 0)[:, :, :, None],
        sides=sides.movedim(1, 0)[:, :, None, None],
        class_id=image_class[1],
        keep=keep,
    )


class _Rows(torch.autograd.Function):
    """The logits that the loss reads: the objectness everywhere, the others where a pair is.

    The gradient of all levels is one tensor, which is filled with zeros once and gets all rows in one addition.

    Args:
        cell, place: those of an `Assignment`, (nl, ...).
        raw: per level (B, na, H, W, 5 + nc).

    Returns:
        Boxes (nl, ..., 4) and classes (nl, ..., nc), then the objectness (cells,) of each level, all float32.
    """

    @staticmethod
    def forward(ctx: Any, cell: Tensor, place: Tensor, *raw: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(place)
        ctx.shapes, ctx.dtype = [level.shape for level in raw], raw[0].dtype
        # index_select: its backward adds rows in order; advanced indexing sorts or serialises
        rows = [x.reshape(-1, x.shape[-1]).index_select(0, i.flatten()) for x, i in zip(raw, cell, strict=True)]
        logits = torch.cat(rows).float().view(*cell.shape, raw[0].shape[-1])
        objectness = [x[..., 4].to(torch.float32, memory_format=torch.contiguous_format).flatten() for x in raw]
        return logits[..., :4], logits[..., 5:], *objectness

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, boxes: Tensor, classes: Tensor, *objectness: Tensor) -> tuple[Tensor | None, ...]:
        (place,) = ctx.saved_tensors
        rows = torch.cat((boxes, boxes.new_zeros(*place.shape, 1), classes), -1)
        cells = [math.prod(shape[:-1]) for shape in ctx.shapes]
        gradient = rows.new_zeros(sum(cells), rows.shape[-1], dtype=ctx.dtype)
        gradient[:, 4] = torch.cat(objectness)
        gradient.index_add_(0, place.flatten(), rows.to(ctx.dtype).flatten(0, -2))
        levels = gradient.split(cells)
        return None, None, *(level.view(shape) for level, shape in zip(levels, ctx.shapes, strict=True))


def _write_last(places: Tensor, values: Tensor, keep: Tensor, count: int) -> Tensor:
    """(count,) zeros with values >= 0 written at the kept places; of duplicates the last wins, on every device.

    The index of a value and its bits make one number, the largest of which each place keeps.
    """
    index = torch.arange(0, places.numel() << 32, 1 << 32, device=places.device).view_as(places)
    numbers = (index + values.view(torch.int32)) * keep
    written = index.new_zeros(count).scatter_reduce_(0, places.flatten(), numbers.flatten(), "amax")
    return written.view(torch.float32)[::2]


def _focal_factor(logits: Tensor, target: Tensor, gamma: float) -> Tensor:
    p = logits.sigmoid()
    p_true = target * p + (1 - target) * (1 - p)
    return (target * _FOCAL_ALPHA + (1 - target) * (1 - _FOCAL_ALPHA)) * (1 - p_true) ** gamma


def _positive_weight(weight: float) -> Tensor | None:
    return None if weight == 1 else torch.tensor(weight)


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
    gains: Tensor
    balance: Tensor
    counted: Tensor
    class_targets: Tensor
    obj_pw: Tensor | None
    cls_pw: Tensor | None

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
        self.nc, off = nc, self.config.label_smoothing / 2
        anchors_grid = anchors_grid.detach().float().clone()
        self.ciou = CellCIoU(anchors_grid)
        even = [1.0] * levels
        # a number becomes a tensor here: in `forward`, a GPU would wait for the copy
        for name, value in {
            "anchors_grid": anchors_grid,
            "gains": torch.tensor(scaled_gains(self.config, nc, levels, imgsz)),
            "balance": torch.tensor([even, level_balance(levels), even]),
            "counted": torch.tensor([[1.0], [0.0], [float(nc)]]),
            "class_targets": torch.eye(nc) * (1 - 2 * off) + off,
            "obj_pw": _positive_weight(self.config.obj_pw),
            "cls_pw": _positive_weight(self.config.cls_pw),
        }.items():
            self.register_buffer(name, value, persistent=False)
        self._grids: dict[Any, Grid] = {}

    def forward(self, raw: Sequence[Tensor], targets: Tensor) -> tuple[Tensor, Tensor]:
        """
        Args:
            raw: per level (B, na, H, W, 5 + nc) logits tx, ty, tw, th, objectness, classes.
            targets: (nt, 6) image, class, cx, cy, w, h normalised to the network's input; nt may be 0.

        Returns:
            The scalar to differentiate, times the batch size; and the parts box, obj, cls (3,) with their gains but
            without the batch size, detached.
        """
        targets, grid = targets.float(), self._grid(raw)
        pairs = assign_targets(targets, self.anchors_grid, grid, self.config.anchor_t)
        boxes, classes, *objectness = _Rows.apply(pairs.cell, pairs.place, *raw)  # type: ignore[no-untyped-call]
        shortfall, ciou = self.ciou(boxes, pairs.centres, pairs.sides)
        quality = _write_last(pairs.place, ciou.clamp_min(0), pairs.keep, grid.total)

        keep = pairs.keep.flatten(1)
        box = (shortfall.flatten(1) * keep).sum(1)
        cls = (self._classes(classes, pairs.class_id) * pairs.keep[..., None]).flatten(1).sum(1)
        sums = torch.cat((box, *self._objectness(objectness, quality), cls)).view(3, -1)
        counts = torch.addcmul(grid.cells, keep.sum(1, dtype=torch.float32).clamp_min(1), self.counted)
        parts = (sums / counts * self.balance).sum(1) * self.gains
        return parts.sum() * len(raw[0]), parts.detach()

    def _grid(self, raw: Sequence[Tensor]) -> Grid:
        shapes, device = tuple(level.shape[:4] for level in raw), raw[0].device
        if (shapes, device) not in self._grids:
            self._grids[shapes, device] = Grid.of(shapes, device)
        return self._grids[shapes, device]

    def _objectness(self, logits: Sequence[Tensor], quality: Tensor) -> list[Tensor]:
        """Per level (1,): the sum of BCE over all cells. Each level apart: joined, other cells would be those that a
        CPU computes one by one, whose sigmoid differs in the last bit.
        """
        targets = quality.split([len(level) for level in logits])
        return [self._bce(x, y, self.obj_pw).sum().view(1) for x, y in zip(logits, targets, strict=True)]

    def _classes(self, logits: Tensor, class_id: Tensor) -> Tensor:
        """(..., nt, nc) BCE of the logits of all pairs with the classes (nt,); zeros if there is only one class."""
        if self.nc == 1:
            return torch.zeros_like(logits)
        return self._bce(logits, self.class_targets.index_select(0, class_id).expand_as(logits), self.cls_pw)

    def _bce(self, logits: Tensor, target: Tensor, positive_weight: Tensor | None) -> Tensor:
        """Element-wise binary cross-entropy; focal if fl_gamma > 0."""
        loss = F.binary_cross_entropy_with_logits(logits, target, pos_weight=positive_weight, reduction="none")
        gamma = self.config.fl_gamma
        return loss * _focal_factor(logits, target, gamma) if gamma > 0 else loss
