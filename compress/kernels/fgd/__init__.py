"""Focal distillation (FGD): reference, launcher of kernel.cu, and the function that losses call."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from compress.kernels.device import (
    MAX_LEVELS,
    SUFFIX,
    Device,
    Launch,
    Launches,
    LevelMaps,
    Maps,
    addresses,
    ceil_div,
    cuts,
    fields,
    fits_vectors,
    level_maps,
    pointer,
    power_of_2,
    vector,
    with_constants,
)
from compress.kernels.fused import FusedLoss, check_maps
from compress.kernels.reference_helpers import sum_of_levels, widened

THREADS = 512
"""Threads of a block; the last block of an image turns its sums into attentions with them."""
BLOCKS_PER_SM = 2
"""Blocks of a multiprocessor, as 64 registers per thread allow."""
BLOCKS = 128 * BLOCKS_PER_SM
"""Most blocks of one launch, over all levels, unless images and columns need more: all that 128 multiprocessors run at
once."""
LEAST_ROWS = 8
"""Rows of a thread at least: a tile costs a partial sum of each of its columns."""
SCALAR_COLUMNS = 4
"""Columns of a thread if 16-byte access does not fit."""
FEWEST_LANES, MOST_LANES = 8, 32
"""Threads that share a row; more would cross warps, fewer would give a tile more rows than are worth a partial sum."""
SOURCE = with_constants(
    "fgd",
    THREADS=THREADS,
    BLOCKS_PER_SM=BLOCKS_PER_SM,
    SCALAR_COLUMNS=SCALAR_COLUMNS,
)


def fgd(
    students: Maps,
    teachers: Maps,
    masks: Maps,
    gamma: float = 1.0,
    temperature: float = 0.5,
    *,
    scale: Tensor | None = None,
) -> Tensor:
    """Focal distillation without the global term. With u = mean_c |x|, v = mean_hw |x| of one image,

        S = HW softmax_hw(u / T),  Q = C softmax_c(v / T)
        level = 1/N sum_n ( sum mask S_t mean_c Q_t (s - t)^2 + gamma (mean_hw |S_s - S_t| + mean_c |Q_s - Q_t|) )

    and the levels are added up. The authors sum over channels and, in the last two terms, over pixels. Here these are
    means, so that no weight depends on the width or the image size. Source: Yang et al., CVPR 2022.

    Args:
        students, teachers: (N, C, H, W) per level, in any float dtype. Only students get a gradient; the teacher's
            attention has none.
        masks: (N, H, W) float32 per level, the weights of the pixels (`compress.losses.distill.features.FGD`).
        gamma: weight of the attention's distances, at least 0.
        temperature: T of the attention, above 0.
        scale: () float32, the upstream gradient to expect; None is 1.

    Returns the loss () float32 (float64 for float64 maps). Raises UsageError for maps of unlike shapes.
    """
    check_maps(students, teachers, masks)
    arguments = ([*students], [*teachers], [*masks], gamma, temperature, scale)
    device = FGD.device(arguments)
    if device is None:
        return FGD.by_torch(arguments)
    return FGD.differentiable(device, FGD.run(device, arguments), arguments)


def reference(students: Maps, teachers: Maps, masks: Maps, gamma: float = 1.0, temperature: float = 0.5) -> Tensor:
    """`fgd` in plain torch."""
    levels = zip(students, teachers, masks, strict=True)
    return sum_of_levels(_level(widened(s), widened(t), mask, gamma, temperature) for s, t, mask in levels)


def _level(s: Tensor, t: Tensor, mask: Tensor, gamma: float, temperature: float) -> Tensor:
    (spatial_s, channel_s), (spatial_t, channel_t) = (_attention(x, temperature) for x in (s, t))
    difference = (mask * (spatial_t * channel_t * (s - t).square()).mean(1)).sum() / len(s)
    attention = (spatial_s - spatial_t).abs().mean() + (channel_s - channel_t).abs().mean()
    return difference + gamma * attention


def _attention(x: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Spatial attention (N, 1, H, W) and channel attention (N, C, 1, 1) of (N, C, H, W), both of mean 1."""
    n, c, h, w = x.shape
    spatial, channel = x.abs().mean(1).flatten(1), x.abs().mean((2, 3))
    return (
        (h * w * F.softmax(spatial / temperature, 1)).view(n, 1, h, w),
        (c * F.softmax(channel / temperature, 1)).view(n, c, 1, 1),
    )


# ---- launcher ----------------------------------------------------------------------------------------------------


class _Axis(ctypes.Structure):
    _fields_ = (
        *fields(ctypes.c_void_p, "sums weights slopes mask"),
        *fields(ctypes.c_uint32, "length parts"),
    )


class _Level(ctypes.Structure):
    _fields_ = (
        *fields(ctypes.c_void_p, "student teacher gradient distances tickets"),
        ("columns", _Axis),
        ("rows", _Axis),
        *fields(ctypes.c_uint32, "images first_block lanes tile_rows vectorised unused"),
    )


class Args(ctypes.Structure):
    _fields_ = (
        ("levels", _Level * MAX_LEVELS),
        *fields(ctypes.c_void_p, "scale partials ticket loss"),
        *fields(ctypes.c_float, "gamma inv_temperature"),
        ("maps", ctypes.c_uint32),
        ("count", ctypes.c_int32),
    )


class _Tiling(NamedTuple):
    """How one level is cut into tiles, a block each."""

    images: int
    rows: int
    columns: int
    lanes: int
    tile_rows: int
    row_tiles: int
    column_tiles: int

    @property
    def tiles(self) -> int:
        return self.images * self.row_tiles * self.column_tiles

    def floats(self, maps: int) -> list[int]:
        """Sizes of the level's small maps: sums, weights and slopes of columns, the same of rows, distances."""
        columns, rows = self.images * self.columns, self.images * self.rows
        sums = (maps * self.row_tiles * columns, maps * self.column_tiles * rows)
        return [sums[0], columns, columns, sums[1], rows, rows, self.images]


def launches(
    device: Device,
    students: Maps,
    teachers: Maps,
    masks: Maps,
    gamma: float = 1.0,
    temperature: float = 0.5,
    scale: Tensor | None = None,
) -> Launches:
    """Sums with attentions, gradient: two launches over all levels. The gradient has the student's layout."""
    levels = level_maps(students, teachers)
    masks = [mask.float().contiguous() for mask in masks]
    tilings = tile(levels)
    sources = 1 if gamma == 0 else 2  # maps to be summed
    like, grid = levels[0].student, sum(tiling.tiles for tiling in tilings)
    sizes = [grid, *(size for tiling in tilings for size in tiling.floats(sources))]
    workspace, loss = like.new_empty(sum(sizes), dtype=torch.float32), like.new_empty((), dtype=torch.float32)
    counts = [*(tiling.images for tiling in tilings), 1]
    counters = device.tickets(sum(counts))
    *tickets, ticket = addresses(counters, counts)
    areas = iter(addresses(workspace, sizes))
    args = Args(
        scale=pointer(scale),
        partials=next(areas),
        ticket=ticket,
        loss=pointer(loss),
        gamma=gamma,
        inv_temperature=1 / temperature,
        maps=sources,
        count=len(levels),
    )
    first_blocks = accumulate((tiling.tiles for tiling in tilings), initial=0)
    described = zip(args.levels, levels, masks, tilings, first_blocks, tickets, strict=False)
    for level, maps, mask, tiling, first, counters_of_level in described:
        maps.describe(level, tiling.columns)
        level.first_block, level.tickets = first, counters_of_level
        _describe(level, tiling, pointer(mask), maps.channels_last, areas)
    dtype = SUFFIX[like.dtype]
    yield Launch(SOURCE, f"fgd_sums{dtype}", args, grid, THREADS)
    yield Launch(SOURCE, f"fgd_gradient{dtype}", args, grid, THREADS)
    return loss, [maps.gradient for maps in levels]


def tile(levels: Sequence[LevelMaps]) -> list[_Tiling]:
    """The levels' tiles, which depend on the shapes alone: at most `BLOCKS` in all, if images and columns allow it."""
    tilings = [_whole_columns(maps) for maps in levels]
    strips = tuple(tiling.tiles for tiling in tilings)
    work = tuple(tiling.rows * ceil_div(tiling.columns, tiling.column_tiles) for tiling in tilings)
    pieces = cuts(strips, work, BLOCKS, THREADS * LEAST_ROWS * vector(levels[0].student.dtype))
    heights = [ceil_div(tiling.rows, count) for tiling, count in zip(tilings, pieces, strict=True)]
    return [
        tiling._replace(tile_rows=height, row_tiles=ceil_div(tiling.rows, height))
        for tiling, height in zip(tilings, heights, strict=True)
    ]


def _whole_columns(maps: LevelMaps) -> _Tiling:
    """Tiles that have all rows."""
    images, channels, height, width = maps.student.shape
    rows, columns = (height * width, channels) if maps.channels_last else (channels, height * width)
    columns_per_thread = vector(maps.student.dtype) if fits_vectors(columns, *maps) else SCALAR_COLUMNS
    lanes = min(max(power_of_2(ceil_div(columns, columns_per_thread)), FEWEST_LANES), MOST_LANES)
    return _Tiling(images, rows, columns, lanes, rows, 1, ceil_div(columns, lanes * columns_per_thread))


def _describe(level: _Level, tiling: _Tiling, mask: int, channels_last: bool, areas: Iterator[int]) -> None:
    """Write all but the maps; `areas` are the addresses of what `_Tiling.floats` lists."""
    level.images, level.lanes, level.tile_rows = tiling.images, tiling.lanes, tiling.tile_rows
    column_mask, row_mask = (0, mask) if channels_last else (mask, 0)
    level.columns = _Axis(next(areas), next(areas), next(areas), column_mask, tiling.columns, tiling.row_tiles)
    level.rows = _Axis(next(areas), next(areas), next(areas), row_mask, tiling.rows, tiling.column_tiles)
    level.distances = next(areas)


FGD = FusedLoss(
    "fgd",
    "Tensor[] students, Tensor[] teachers, Tensor[] masks, float gamma, float temperature",
    function=fgd,
    source=SOURCE,
    launches=launches,
    reference=reference,
)
