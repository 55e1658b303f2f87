"""Host half of cuda/cwd.cu: see there for formula, traffic and tiling."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

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
    set_blocks,
    share_blocks,
    vector,
)
from runtime.errors import UsageError

SOURCE = "cwd.cu"
WARP = 32
MAX_WARPS, LEAST_WARPS = 16, 8
"""Of a block of rows. 64 registers a thread allow 32 warps a multiprocessor."""
VALUES = 16
"""Of a row and map in a thread's registers."""
BLOCKS = 1056
"""Of one launch of rows at most, over all levels: 4 times what 132 multiprocessors run at once."""
COLUMN_THREADS = 256
MAX_LANES = 32
"""Threads across a tile of columns: 512 bytes of a pixel."""
PIXELS = 16
"""Of a column that a thread takes: few enough that more blocks than run at once are left of three levels."""


class _RowsLevel(ctypes.Structure):
    _fields_ = (
        *fields(ctypes.c_void_p, "student teacher gradient"),
        *fields(ctypes.c_uint32, "rows pixels first_block blocks warps vectorised"),
    )


class _ColumnsLevel(ctypes.Structure):
    _fields_ = (
        *fields(ctypes.c_void_p, "student teacher gradient parts wholes tickets"),
        *fields(ctypes.c_uint32, "images channels pixels first_block stretches stretch tiles lanes vectorised unused"),
    )


_COMMON = (
    *fields(ctypes.c_void_p, "scale partials ticket loss"),
    *fields(ctypes.c_float, "tau kappa"),
    ("count", ctypes.c_int32),
)


class RowsArgs(ctypes.Structure):
    _fields_ = (("levels", _RowsLevel * MAX_LEVELS), *_COMMON)


class ColumnsArgs(ctypes.Structure):
    _fields_ = (("levels", _ColumnsLevel * MAX_LEVELS), *_COMMON)


def cwd(
    device: Device,
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    tau: float = 1.0,
    scale: Tensor | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """Loss () float32, and for each level `scale` times its gradient in the student's dtype and layout.

    Maps are read as they lie where all students lie in one layout, NCHW or channels last; else NCHW copies are.

    Args:
        device: where to run.
        students: (N, C, H, W) a level.
        teachers: the same.
        tau: temperature, above 0.
        scale: () float32, the upstream gradient to expect; None is 1.
    """
    if not tau > 0:
        raise UsageError(f"tau is {tau}", "give a temperature above 0")
    columns = _are_columns(students)
    pairs = dense_pairs(students, teachers, nchw=not columns)
    maps = [_Map(s, t, torch.empty_like(s)) for s, t in pairs]
    loss = pairs[0][0].new_empty((), dtype=torch.float32)
    common = {"scale": pointer(scale), "loss": pointer(loss), "tau": tau, "kappa": math.log2(math.e) / tau}
    (_columns if columns else _rows)(device, maps, common, loss)
    return loss, [_laid_like(m.gradient, s) for m, s in zip(maps, students, strict=True)]


class _Map(NamedTuple):
    """One level, dense and in one dtype."""

    student: Tensor
    teacher: Tensor
    gradient: Tensor


def _are_columns(maps: Sequence[Tensor]) -> bool:
    """Whether all maps can be read as channels last, and not all as NCHW."""
    return any(map(is_channels_last, maps)) and all(m.is_contiguous(memory_format=torch.channels_last) for m in maps)


def _laid_like(gradient: Tensor, student: Tensor) -> Tensor:
    return gradient.contiguous(memory_format=torch.channels_last) if is_channels_last(student) else gradient


def _point(level: _RowsLevel | _ColumnsLevel, maps: _Map, run: int) -> None:
    """Set the pointers; `run` is how many elements lie together."""
    level.student, level.teacher, level.gradient = map(pointer, maps)
    level.vectorised = fits_vectors(run, *maps)


def _rows(device: Device, maps: Sequence[_Map], common: dict[str, Any], loss: Tensor) -> None:
    warps = [_warps(m.student[0, 0].numel()) for m in maps]
    width = max(LEAST_WARPS, *warps)
    shares = share_blocks([m.student.numel() for m in maps], BLOCKS, width * WARP * VALUES)
    partials = loss.new_empty(sum(shares))
    args = RowsArgs(partials=pointer(partials), ticket=pointer(device.tickets(1)), count=len(maps), **common)
    set_blocks(args.levels, shares)
    for level, m, share in zip(args.levels, maps, warps, strict=False):
        n, channels, height, w = m.student.shape
        level.rows, level.pixels, level.warps = n * channels, height * w, share
        _point(level, m, level.pixels)
    suffix = SUFFIX[maps[0].student.dtype]
    device.launch(SOURCE, f"cwd_rows{suffix}", args, grid=sum(shares), block=width * WARP)


def _warps(pixels: int) -> int:
    """That share a row: as many as hold it in registers, if a block can."""
    return min(MAX_WARPS, ceil_div(pixels, WARP * VALUES))


def _columns(device: Device, maps: Sequence[_Map], common: dict[str, Any], loss: Tensor) -> None:
    args = ColumnsArgs(count=len(maps), **common)
    levels = args.levels[: len(maps)]
    for level, m in zip(levels, maps, strict=True):
        _tile(level, m)
    blocks = [level.images * level.tiles * level.stretches for level in levels]
    parts = [4 * level.images * level.stretches * level.channels for level in levels]
    wholes = [4 * level.images * level.channels for level in levels]
    floats = loss.new_empty(sum(parts + wholes + blocks)).split([*parts, *wholes, sum(blocks)])
    counts = [1, *(level.images * level.tiles for level in levels)]
    ticket, *tickets = device.tickets(sum(counts))[: sum(counts)].split(counts)
    args.partials, args.ticket = pointer(floats[-1]), pointer(ticket)
    places = zip(levels, floats, floats[len(maps) :], tickets, accumulate(blocks, initial=0), strict=False)
    for level, *areas, first in places:
        level.parts, level.wholes, level.tickets = map(pointer, areas)
        level.first_block = first
    suffix = SUFFIX[maps[0].student.dtype]
    device.launch(SOURCE, f"cwd_column_sums{suffix}", args, grid=sum(blocks), block=COLUMN_THREADS)
    device.launch(SOURCE, f"cwd_columns{suffix}", args, grid=sum(blocks), block=COLUMN_THREADS)


def _tile(level: _ColumnsLevel, maps: _Map) -> None:
    """Cut one level into tiles."""
    n, channels, height, width = maps.student.shape
    level.images, level.channels, level.pixels = n, channels, height * width
    _point(level, maps, channels)
    units = channels // vector(maps.student.dtype) if level.vectorised else channels
    level.tiles = ceil_div(units, MAX_LANES)
    level.lanes = ceil_div(units, level.tiles)
    level.stretches = ceil_div(level.pixels, COLUMN_THREADS // level.lanes * PIXELS)
    level.stretch = ceil_div(level.pixels, level.stretches)
