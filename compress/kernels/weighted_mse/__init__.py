"""Weighted mean squared error: reference, launcher of kernel.cu, and the function that losses call."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from itertools import repeat

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
    fields,
    level_maps,
    pointer,
    set_blocks,
    share_blocks,
    vector,
    with_constants,
)
from compress.kernels.fused import FusedLoss, check_maps
from compress.kernels.reference_helpers import sum_of_levels, widened

WEIGHT_EPS = 1e-9
"""Added to the sum of a level's weights, so that all-zero weights give 0."""
WEIGHT_BLOCKS = 64
"""Blocks, and so partial sums, per level's weights."""
WEIGHT_CONSTANTS = {"WEIGHT_EPS": WEIGHT_EPS, "WEIGHT_BLOCKS": WEIGHT_BLOCKS}
"""The constants that weights.cuh needs from a source that includes it."""
THREADS = 256
BLOCKS_PER_SM = 4
"""Blocks of a multiprocessor, as 64 registers per thread allow."""
BLOCKS = 128 * BLOCKS_PER_SM
"""Most blocks of one launch, over all levels: all that 128 multiprocessors run at once."""
SOURCE = with_constants("weighted_mse", THREADS=THREADS, BLOCKS_PER_SM=BLOCKS_PER_SM, **WEIGHT_CONSTANTS)


def weighted_mse(students: Maps, teachers: Maps, weights: Maps = (), *, scale: Tensor | None = None) -> Tensor:
    """Mean squared difference, or with weights sum w (s - t)^2 / (C * sum w + 1e-9); the levels are added up.

    Args:
        students, teachers: (N, C, H, W) per level, in any float dtype. Only students get a gradient.
        weights: (N, H, W) float32 per level, or none at all.
        scale: () float32, the upstream gradient to expect; None is 1.

    Returns the loss () float32 (float64 for float64 maps). Raises UsageError for maps of unlike shapes.
    """
    check_maps(students, teachers, weights)
    arguments = ([*students], [*teachers], [*weights], scale)
    device = WEIGHTED_MSE.device(arguments)
    if device is None:
        return WEIGHTED_MSE.by_torch(arguments)
    return WEIGHTED_MSE.differentiable(device, WEIGHTED_MSE.run(device, arguments), arguments)


def reference(students: Maps, teachers: Maps, weights: Maps = ()) -> Tensor:
    """`weighted_mse` in plain torch."""
    if not weights:
        return sum_of_levels(F.mse_loss(widened(s), widened(t)) for s, t in zip(students, teachers, strict=True))
    levels = zip(students, teachers, weights, strict=True)
    return sum_of_levels(_weighted_mean((widened(s) - widened(t)).square().sum(1), w, s.shape[1]) for s, t, w in levels)


def _weighted_mean(squared: Tensor, weights: Tensor, channels: int) -> Tensor:
    """The mean of (N, H, W) sums over channels."""
    return (weights * squared).sum() / (channels * weights.sum() + WEIGHT_EPS)


# ---- launcher ----------------------------------------------------------------------------------------------------


class _Level(ctypes.Structure):
    _fields_ = (
        *fields(ctypes.c_void_p, "student teacher gradient weights"),
        ("elements", ctypes.c_uint64),
        *fields(ctypes.c_uint32, "channels pixels first_block blocks channels_last vectorised"),
    )


class Args(ctypes.Structure):
    _fields_ = (
        ("levels", _Level * MAX_LEVELS),
        *fields(ctypes.c_void_p, "scale weight_partials partials ticket loss"),
        ("count", ctypes.c_int32),
    )


class _WeightSumLevel(ctypes.Structure):
    _fields_ = (("weights", ctypes.c_void_p), ("elements", ctypes.c_uint64))


class WeightSumArgs(ctypes.Structure):
    _fields_ = (("levels", _WeightSumLevel * MAX_LEVELS), ("partials", ctypes.c_void_p))


def launches(
    device: Device, students: Maps, teachers: Maps, weights: Maps = (), scale: Tensor | None = None
) -> Launches:
    """One launch, and before it one for the sums of the weights. The gradient has the student's layout."""
    levels = level_maps(students, teachers)
    pixel_weights = [w.float().contiguous() for w in weights]
    like = levels[0].student
    shares = share_blocks([maps.student.numel() for maps in levels], BLOCKS, THREADS * vector(like.dtype))
    grid = sum(shares)
    sums = None
    if pixel_weights:
        sums = empty_weight_sums(pixel_weights)
        yield weight_sums(pixel_weights, sums)
    partials, loss = like.new_empty(grid, dtype=torch.float32), like.new_empty((), dtype=torch.float32)
    ticket = device.tickets(1)
    args = Args(
        scale=pointer(scale),
        weight_partials=pointer(sums),
        partials=pointer(partials),
        ticket=pointer(ticket),
        loss=pointer(loss),
        count=len(levels),
    )
    set_blocks(args.levels, shares)
    for level, maps, w in zip(args.levels, levels, pixel_weights or repeat(None), strict=False):
        _describe(level, maps, w)
    yield Launch(SOURCE, f"weighted_mse{SUFFIX[like.dtype]}", args, grid, THREADS)
    return loss, [maps.gradient for maps in levels]


def _describe(level: _Level, maps: LevelMaps, weights: Tensor | None) -> None:
    _, channels, height, width = maps.student.shape
    row = maps.student.numel() if weights is None else channels if maps.channels_last else height * width
    maps.describe(level, row, *([] if weights is None else [weights]))
    level.weights = pointer(weights)
    level.elements, level.channels, level.pixels = maps.student.numel(), channels, height * width
    level.channels_last = maps.channels_last


def empty_weight_sums(weights: Sequence[Tensor]) -> Tensor:
    """(levels, WEIGHT_BLOCKS) float32 for `weight_sums`."""
    return weights[0].new_empty(len(weights), WEIGHT_BLOCKS)


def weight_sums(weights: Sequence[Tensor], partials: Tensor) -> Launch:
    """The launch that writes partial sums of each level's weights, float32 and dense, to `partials`."""
    args = WeightSumArgs(partials=pointer(partials))
    for level, w in zip(args.levels, weights, strict=False):
        level.weights, level.elements = pointer(w), w.numel()
    return Launch(SOURCE, "weight_sums", args, len(weights) * WEIGHT_BLOCKS, THREADS)


WEIGHTED_MSE = FusedLoss(
    "weighted_mse",
    "Tensor[] students, Tensor[] teachers, Tensor[] weights",
    function=weighted_mse,
    source=SOURCE,
    launches=launches,
    reference=reference,
)
