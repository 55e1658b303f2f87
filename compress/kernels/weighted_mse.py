"""Host half of cuda/weighted_mse.cu: see there for formula, traffic and tiling."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from itertools import repeat

import torch
from torch import Tensor

from compress.kernels.device import (
    MAX_LEVELS,
    SUFFIX,
    Device,
    dense_pairs,
    fields,
    fits_vectors,
    is_channels_last,
    pointer,
    set_blocks,
    share_blocks,
    vector,
)

SOURCE = "weighted_mse.cu"
THREADS = 256
BLOCKS = 512
"""Of one launch at most, over all levels: 4 a multiprocessor on 128 of them, which 64 registers a thread allow."""
WEIGHT_BLOCKS = 64


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


def weighted_mse(
    device: Device,
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    weights: Sequence[Tensor] = (),
    scale: Tensor | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """Loss () float32, and for each level `scale` times its gradient in the student's dtype and layout.

    Args:
        weights: (N, H, W) a level, or none at all.
        scale: () float32, the upstream gradient to expect; None is 1.
    """
    pairs = dense_pairs(students, teachers, nchw=False)
    maps = [w.float().contiguous() for w in weights]
    gradients = [torch.empty_like(s) for s, _ in pairs]
    like = pairs[0][0]
    shares = share_blocks([s.numel() for s, _ in pairs], BLOCKS, THREADS * vector(like.dtype))
    grid = sum(shares)
    sums = weight_sums(device, maps) if maps else None
    partials, loss = like.new_empty(grid, dtype=torch.float32), like.new_empty((), dtype=torch.float32)
    args = Args(
        scale=pointer(scale),
        weight_partials=pointer(sums),
        partials=pointer(partials),
        ticket=pointer(device.tickets(1)),
        loss=pointer(loss),
        count=len(pairs),
    )
    set_blocks(args.levels, shares)
    levels = zip(args.levels, pairs, gradients, maps or repeat(None), strict=False)  # fewer than MAX_LEVELS
    for level, (s, t), g, w in levels:
        _fill(level, s, t, g, w)
    device.launch(SOURCE, f"weighted_mse{SUFFIX[like.dtype]}", args, grid=grid, block=THREADS)
    return loss, gradients


def _fill(level: _Level, student: Tensor, teacher: Tensor, gradient: Tensor, weights: Tensor | None) -> None:
    _, channels, height, width = student.shape
    last = is_channels_last(student)
    row = student.numel() if weights is None else channels if last else height * width
    level.student, level.teacher, level.gradient = pointer(student), pointer(teacher), pointer(gradient)
    level.weights = pointer(weights)
    level.elements, level.channels, level.pixels = student.numel(), channels, height * width
    level.channels_last = last
    level.vectorised = fits_vectors(row, student, teacher, gradient, *([] if weights is None else [weights]))


def weight_sums(device: Device, weights: Sequence[Tensor]) -> Tensor:
    """(levels, WEIGHT_BLOCKS) partial sums, for `weighted_norm` of common.cuh."""
    partials = weights[0].new_empty(len(weights), WEIGHT_BLOCKS)
    args = WeightSumArgs(partials=pointer(partials))
    for level, w in zip(args.levels, weights, strict=False):
        level.weights, level.elements = pointer(w), w.numel()
    device.launch(SOURCE, "weight_sums", args, grid=len(weights) * WEIGHT_BLOCKS, block=THREADS)
    return partials
