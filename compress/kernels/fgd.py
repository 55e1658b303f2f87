"""Host half of cuda/fgd.cu: see there for formula, traffic and tiling."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from compress.kernels.device import (
    MAX_LEVELS,
    SUFFIX,
    Device,
    ceil_div,
    dense_pairs,
    fields,
    fits_vectors,
    is_channels_last,
    pointer,
    power_of_2,
    vector,
)

SOURCE = "fgd.cu"
THREADS = 256
ATTENTION_THREADS = 1024
ROWS_PER_THREAD = 16
SCALAR_COLUMNS = 4
"""Columns of a thread where 16-byte access does not fit."""
FEWEST_LANES, MOST_LANES = 8, 32
"""That share a row; more would cross warps, fewer would give a tile more rows than are worth a partial sum."""


class _Axis(ctypes.Structure):
    _fields_ = (
        *fields(ctypes.c_void_p, "sums weights slopes mask"),
        *fields(ctypes.c_uint32, "length parts"),
    )


class _Level(ctypes.Structure):
    _fields_ = (
        *fields(ctypes.c_void_p, "student teacher gradient distances"),
        ("columns", _Axis),
        ("rows", _Axis),
        *fields(ctypes.c_uint32, "images first_block lanes vectorised"),
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
    """Of one level."""

    images: int
    rows: int
    columns: int
    lanes: int
    vectorised: bool
    row_tiles: int
    column_tiles: int

    @property
    def tiles(self) -> int:
        return self.images * self.row_tiles * self.column_tiles

    def floats(self, maps: int) -> list[int]:
        """Sizes of a level's maps: of columns, then of rows, sums, weights and slopes; distances."""
        columns, rows = self.images * self.columns, self.images * self.rows
        sums = (maps * self.row_tiles * columns, maps * self.column_tiles * rows)
        return [sums[0], columns, columns, sums[1], rows, rows, 2 * self.images]


def fgd(
    device: Device,
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    masks: Sequence[Tensor],
    gamma: float = 1.0,
    temperature: float = 0.5,
    scale: Tensor | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """Loss () float32, and for each level `scale` times its gradient in the student's dtype and layout.

    `masks` are (N, H, W) a level; `scale` () float32 is the upstream gradient to expect, None is 1.
    """
    pairs = dense_pairs(students, teachers, nchw=False)
    masks = [mask.float().contiguous() for mask in masks]
    gradients = [torch.empty_like(s) for s, _ in pairs]
    tilings = [_tile(s, t, g) for (s, t), g in zip(pairs, gradients, strict=True)]
    maps = 1 if gamma == 0 else 2
    like, grid = pairs[0][0], sum(tiling.tiles for tiling in tilings)
    sizes = [grid, *(size for tiling in tilings for size in tiling.floats(maps))]
    workspace, loss = like.new_empty(sum(sizes), dtype=torch.float32), like.new_empty((), dtype=torch.float32)
    parts = (pointer(workspace) + 4 * start for start in accumulate(sizes, initial=0))
    args = Args(
        scale=pointer(scale),
        partials=next(parts),
        ticket=pointer(device.tickets(1)),
        loss=pointer(loss),
        gamma=gamma,
        inv_temperature=1 / temperature,
        maps=maps,
        count=len(pairs),
    )
    first_blocks = accumulate((tiling.tiles for tiling in tilings), initial=0)
    inputs = zip(pairs, gradients, masks, tilings, strict=True)
    for level, ((s, t), g, mask, tiling), first in zip(args.levels, inputs, first_blocks, strict=False):
        level.student, level.teacher, level.gradient, level.first_block = pointer(s), pointer(t), pointer(g), first
        _fill(level, tiling, mask, is_channels_last(s), parts)
    dtype = SUFFIX[like.dtype]
    device.launch(SOURCE, f"fgd_sums{dtype}", args, grid=maps * grid, block=THREADS)
    axes = 2 * len(pairs) * max(tiling.images for tiling in tilings)
    device.launch(SOURCE, "fgd_attention", args, grid=axes, block=ATTENTION_THREADS)
    device.launch(SOURCE, f"fgd_gradient{dtype}", args, grid=grid, block=THREADS)
    return loss, gradients


def _tile(student: Tensor, teacher: Tensor, gradient: Tensor) -> _Tiling:
    images, channels, height, width = student.shape
    rows, columns = (height * width, channels) if is_channels_last(student) else (channels, height * width)
    vectorised = fits_vectors(columns, student, teacher, gradient)
    columns_per_thread = vector(student.dtype) if vectorised else SCALAR_COLUMNS
    lanes = min(max(power_of_2(ceil_div(columns, columns_per_thread)), FEWEST_LANES), MOST_LANES)
    row_tiles = ceil_div(rows, ROWS_PER_THREAD * THREADS // lanes)
    column_tiles = ceil_div(columns, lanes * columns_per_thread)
    return _Tiling(images, rows, columns, lanes, vectorised, row_tiles, column_tiles)


def _fill(level: _Level, tiling: _Tiling, mask: Tensor, channels_last: bool, parts: Iterator[int]) -> None:
    """All but the features; `parts` are the addresses of what `_Tiling.floats` lists."""
    level.images, level.lanes, level.vectorised = tiling.images, tiling.lanes, tiling.vectorised
    column_mask, row_mask = (0, pointer(mask)) if channels_last else (pointer(mask), 0)
    level.columns = _Axis(next(parts), next(parts), next(parts), column_mask, tiling.columns, tiling.row_tiles)
    level.rows = _Axis(next(parts), next(parts), next(parts), row_mask, tiling.rows, tiling.column_tiles)
    level.distances = next(parts)
