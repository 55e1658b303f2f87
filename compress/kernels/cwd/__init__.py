"""Channel-wise distillation: reference, launcher of kernel.cu, and the function that losses call."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from compress.kernels.device import (
    MAX_LEVELS,
    SUFFIX,
    WARP,
    Device,
    Launch,
    Launches,
    LevelMaps,
    Maps,
    addresses,
    ceil_div,
    cuts,
    fields,
    is_channels_last,
    level_maps,
    pointer,
    set_blocks,
    share_blocks,
    vector,
    with_constants,
)
from compress.kernels.fused import FusedLoss, check_maps
from compress.kernels.reference_helpers import sum_of_levels, widened
from runtime.errors import UsageError

MAX_WARPS, LEAST_WARPS = 16, 8
"""Warps of a block of rows. 64 registers per thread allow 32 warps per multiprocessor."""
VALUES = 16
"""Values of a row and map in a thread's registers."""
BLOCKS = 1056
"""Blocks of one launch of rows at most, over all levels: 4 times what 132 multiprocessors run at once."""
COLUMN_THREADS = 256
MAX_LANES = 32
"""Threads across a tile of columns: 512 bytes of a pixel."""
COLUMN_BLOCKS_PER_SM = 2
"""Blocks of columns that a multiprocessor runs at once, as 128 registers per thread allow; three would have 80, too few
for four loads of half types."""
COLUMN_BLOCKS = 128 * COLUMN_BLOCKS_PER_SM
"""Most blocks of one launch of columns, over all levels, unless images and channels need more: all that 128
multiprocessors run at once."""
LEAST_PIXELS = 16
"""Pixels of a column that a thread takes at least: a block writes two numbers for each of its columns."""
SOURCE = with_constants(
    "cwd",
    ROW_THREADS=MAX_WARPS * WARP,
    COLUMN_THREADS=COLUMN_THREADS,
    COLUMN_BLOCKS_PER_SM=COLUMN_BLOCKS_PER_SM,
    VALUES=VALUES,
)


def cwd(students: Maps, teachers: Maps, tau: float = 1.0, *, scale: Tensor | None = None) -> Tensor:
    """tau^2 / (N C) * sum over rows KL(softmax(t / tau) || softmax(s / tau)); the levels are added up.

    A row is the H*W values of one image's channel. Source: Shu et al., ICCV 2021.

    Args:
        students, teachers: (N, C, H, W) per level, in any float dtype. Only students get a gradient.
        tau: temperature, above 0.
        scale: () float32, the upstream gradient to expect; None is 1.

    Returns the loss () float32 (float64 for float64 maps). Raises UsageError for maps of unlike shapes, or a tau that
    is not above 0.
    """
    if not tau > 0:
        raise UsageError(f"tau is {tau}", "Give a temperature above 0")
    check_maps(students, teachers)
    arguments = ([*students], [*teachers], tau, scale)
    device = CWD.device(arguments)
    if device is None:
        return CWD.by_torch(arguments)
    return CWD.differentiable(device, CWD.run(device, arguments), arguments)


def reference(students: Maps, teachers: Maps, tau: float = 1.0) -> Tensor:
    """`cwd` in plain torch."""
    return sum_of_levels(_level(widened(s), widened(t), tau) for s, t in zip(students, teachers, strict=True))


def _level(s: Tensor, t: Tensor, tau: float) -> Tensor:
    log_p, log_q = (F.log_softmax(x.flatten(2) / tau, dim=2) for x in (t, s))
    return tau**2 * (log_p.exp() * (log_p - log_q)).sum(2).mean()


# ---- launcher ----------------------------------------------------------------------------------------------------


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


def launches(device: Device, students: Maps, teachers: Maps, tau: float = 1.0, scale: Tensor | None = None) -> Launches:
    """One launch over rows, or two over columns; the gradient has the student's layout.

    Maps are read in place if all students have one layout, NCHW or channels last. Otherwise NCHW copies are made and
    read.
    """
    columns = _are_columns(students)
    levels = level_maps(students, teachers, nchw=not columns)
    loss = levels[0].student.new_empty((), dtype=torch.float32)
    common = {"scale": pointer(scale), "loss": pointer(loss), "tau": tau, "kappa": math.log2(math.e) / tau}
    yield from (_columns if columns else _rows)(device, levels, common, loss)
    return loss, [_laid_like(maps.gradient, s) for maps, s in zip(levels, students, strict=True)]


def _are_columns(maps: Maps) -> bool:
    """Whether all maps can be read as channels last, and not all as NCHW."""
    return any(map(is_channels_last, maps)) and all(m.is_contiguous(memory_format=torch.channels_last) for m in maps)


def _laid_like(gradient: Tensor, student: Tensor) -> Tensor:
    return gradient.contiguous(memory_format=torch.channels_last) if is_channels_last(student) else gradient


def _rows(device: Device, levels: Sequence[LevelMaps], common: dict[str, Any], loss: Tensor) -> Iterator[Launch]:
    warps = [_warps(maps.student[0, 0].numel()) for maps in levels]
    width = max(LEAST_WARPS, *warps)
    shares = share_blocks([maps.student.numel() for maps in levels], BLOCKS, width * WARP * VALUES)
    partials, ticket = loss.new_empty(sum(shares)), device.tickets(1)
    args = RowsArgs(partials=pointer(partials), ticket=pointer(ticket), count=len(levels), **common)
    set_blocks(args.levels, shares)
    for level, maps, share in zip(args.levels, levels, warps, strict=False):
        n, channels, height, w = maps.student.shape
        level.rows, level.pixels, level.warps = n * channels, height * w, share
        maps.describe(level, level.pixels)
    suffix = SUFFIX[levels[0].student.dtype]
    yield Launch(SOURCE, f"cwd_rows{suffix}", args, sum(shares), width * WARP)


def _warps(pixels: int) -> int:
    """Warps that share a row: as many as hold it in registers, if a block can."""
    return min(MAX_WARPS, ceil_div(pixels, WARP * VALUES))


def _columns(device: Device, levels: Sequence[LevelMaps], common: dict[str, Any], loss: Tensor) -> Iterator[Launch]:
    args = ColumnsArgs(count=len(levels), **common)
    structs = args.levels[: len(levels)]
    for level, maps in zip(structs, levels, strict=True):
        _describe(level, maps)
    strips = tuple(level.images * level.tiles for level in structs)
    work = tuple(level.pixels * ceil_div(level.channels, level.tiles) for level in structs)
    least = COLUMN_THREADS * LEAST_PIXELS * vector(levels[0].student.dtype)
    for level, stretches in zip(structs, cuts(strips, work, COLUMN_BLOCKS, least), strict=True):
        level.stretch = ceil_div(level.pixels, stretches)
        level.stretches = ceil_div(level.pixels, level.stretch)
    blocks = [level.images * level.tiles * level.stretches for level in structs]
    parts = [4 * level.images * level.stretches * level.channels for level in structs]
    wholes = [4 * level.images * level.channels for level in structs]
    sizes = [*parts, *wholes, sum(blocks)]
    counts = [*(level.images * level.tiles for level in structs), 1]
    workspace, counters = loss.new_empty(sum(sizes)), device.tickets(sum(counts))
    areas, tickets = addresses(workspace, sizes), addresses(counters, counts)
    args.partials, args.ticket = areas[-1], tickets[-1]
    places = zip(structs, areas, areas[len(levels) :], tickets, accumulate(blocks, initial=0), strict=False)
    for level, part, whole, ticket, first in places:
        level.parts, level.wholes, level.tickets, level.first_block = part, whole, ticket, first
    suffix = SUFFIX[levels[0].student.dtype]
    for kernel in ("cwd_column_sums", "cwd_columns"):
        yield Launch(SOURCE, f"{kernel}{suffix}", args, sum(blocks), COLUMN_THREADS)


def _describe(level: _ColumnsLevel, maps: LevelMaps) -> None:
    """Write all but the stretches of pixels."""
    n, channels, height, width = maps.student.shape
    level.images, level.channels, level.pixels = n, channels, height * width
    maps.describe(level, channels)
    units = channels // vector(maps.student.dtype) if level.vectorised else channels
    level.tiles = ceil_div(units, MAX_LANES)
    level.lanes = ceil_div(units, level.tiles)


CWD = FusedLoss(
    "cwd",
    "Tensor[] students, Tensor[] teachers, float tau",
    function=cwd,
    source=SOURCE,
    launches=launches,
    reference=reference,
)
