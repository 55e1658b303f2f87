"""1x1 adapter and weighted mean squared error: reference, launcher of kernel.cu, and the function that losses call.

The kernel does not support more than 128 channels, float32, or GPUs before sm_80. For these there is a general way:
torch's matrix products around the kernel of weighted_mse.
"""

from __future__ import annotations

import ctypes
from collections.abc import Generator, Sequence
from functools import cache
from itertools import repeat
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from compress.kernels import weighted_mse as general
from compress.kernels.device import (
    MAX_LEVELS,
    RESERVED_SHARED_BYTES,
    SUFFIX,
    WARP,
    Device,
    Launch,
    Launches,
    LevelMaps,
    Maps,
    ceil_div,
    dense_pairs,
    fields,
    is_channels_last,
    pointer,
    set_blocks,
    share_blocks,
    with_constants,
)
from compress.kernels.fused import FusedLoss, check_maps
from compress.kernels.toolchain import Source
from runtime.errors import UsageError

MAX_CHANNELS = 128
"""Most channels, of student and of teacher, that a block can hold."""
PIXELS = 64
"""Pixels of a tile."""
MULTIPROCESSORS = 132
"""The blocks of one launch, over all levels, are all that so many run at once."""
MULTIPROCESSOR_SHARED_BYTES = 228 << 10
NARROW, WARPS_NARROW, WARPS_WIDE = 64, 16, 8
"""Warps that a multiprocessor runs at once: 16 channels last and up to 64 channels of the student, whose share of dW is
in registers, at 128 registers per thread; others would spill, and have 192."""
TILES = 4
"""Least tiles per block, if a level has that many: a block costs a copy of dW in memory, as much as 1 to 3 tiles."""
SUM_THREADS, SUM_ENTRIES = 256, 4 * WARP
"""Threads of a block of `adapter_sums`, and numbers that it adds up."""
SOURCE = with_constants(
    "adapter_mse",
    MAX_CHANNELS=MAX_CHANNELS,
    PIXELS=PIXELS,
    BLOCKS_PER_SM=1,
    SUM_THREADS=SUM_THREADS,
    SUM_ENTRIES=SUM_ENTRIES,
    STUDENT_CHANNELS=MAX_CHANNELS,
    TEACHER_CHANNELS=MAX_CHANNELS,
    CHANNELS_LAST=0,
    **general.WEIGHT_CONSTANTS,
)
"""The build for most channels, NCHW; see `source_of` for others."""


def adapter_mse(
    students: Maps,
    teachers: Maps,
    matrices: Maps,
    biases: Maps,
    weights: Maps = (),
    *,
    scale: Tensor | None = None,
) -> Tensor:
    """`weighted_mse` of W s + b against the teacher: W is the matrix of a 1x1 convolution, b its bias.

    W and b are used in the dtype of the maps, as under autocast. The adapted map is compared unrounded if the kernel
    computes it, and rounded to that dtype in plain torch.

    Args:
        students: (N, C_student, H, W) per level, in any float dtype.
        teachers: (N, C_teacher, H, W) per level; no gradient.
        matrices: (C_teacher, C_student) per level, in any float dtype.
        biases: (C_teacher) per level.
        weights: (N, H, W) float32 per level, or none at all; no gradient.
        scale: () float32, the upstream gradient to expect; None is 1.

    Returns the loss () float32 (float64 for float64 maps). Raises UsageError for shapes that do not fit each other.
    """
    check_maps(students, teachers, weights, same_channels=False)
    check_adapters(students, teachers, matrices, biases)
    arguments = ([*students], [*teachers], [*matrices], [*biases], [*weights], scale)
    device = ADAPTER_MSE.device(arguments)
    if device is None:
        return ADAPTER_MSE.by_torch(arguments)
    return ADAPTER_MSE.differentiable(device, ADAPTER_MSE.run(device, arguments), arguments)


def check_adapters(students: Maps, teachers: Maps, matrices: Maps, biases: Maps) -> None:
    """Raises UsageError unless each level has a matrix and a bias between its numbers of channels."""
    if not len(students) == len(matrices) == len(biases):
        told = f"{len(students)} student maps, {len(matrices)} matrices, {len(biases)} biases"
        raise UsageError(told, "Give one of each per level")
    for s, t, matrix, bias in zip(students, teachers, matrices, biases, strict=True):
        channels = (t.shape[1], s.shape[1])
        if matrix.shape != channels or bias.shape != channels[:1]:
            shapes = ", ".join(str(tuple(x.shape)) for x in (s, t, matrix, bias))
            raise UsageError(
                f"student, teacher, matrix and bias have shapes {shapes}",
                "Give (N, S, H, W), (N, T, H, W), (T, S) and (T)",
            )


def reference(students: Maps, teachers: Maps, matrices: Maps, biases: Maps, weights: Maps = ()) -> Tensor:
    """`adapter_mse` in plain torch."""
    levels = zip(students, matrices, biases, strict=True)
    adapted = [F.conv2d(s, w.to(s.dtype)[:, :, None, None], b.to(s.dtype)) for s, w, b in levels]
    return general.reference(adapted, teachers, weights)


# ---- launcher ----------------------------------------------------------------------------------------------------


class _Level(ctypes.Structure):
    _fields_ = (
        *fields(ctypes.c_void_p, "student teacher gradient matrix bias weights weight_partials"),
        *fields(ctypes.c_void_p, "sums matrix_gradient bias_gradient"),
        *fields(ctypes.c_uint32, "images pixels first_block blocks vectorised unused"),
    )


class Args(ctypes.Structure):
    _fields_ = (
        ("levels", _Level * MAX_LEVELS),
        *fields(ctypes.c_void_p, "scale partials ticket loss"),
        ("count", ctypes.c_int32),
    )


class _Problem(NamedTuple):
    """One level."""

    student: Tensor
    teacher: Tensor
    matrix: Tensor
    bias: Tensor
    weights: Tensor | None


class _Gradients(NamedTuple):
    student: Tensor
    matrix: Tensor
    bias: Tensor


class _Kind(NamedTuple):
    """The levels that one build of the source serves."""

    student: int
    """Channels."""
    teacher: int
    """Channels."""
    channels_last: bool

    @property
    def warps(self) -> int:
        """Warps of a block."""
        return _padded(self.teacher) // 16

    @property
    def shared_bytes(self) -> int:
        """The adapter; two tiles of either map; two tiles of weights and the bias in float32. See `Shared` there."""
        into, out = _padded(self.student), _padded(self.teacher)
        tiles = PIXELS * (_pitch(into) + _pitch(out)) if self.channels_last else (into + out) * _pitch(PIXELS)
        return 2 * (out * _pitch(into) + 2 * tiles) + 4 * (2 * PIXELS + out)

    @property
    def blocks_per_sm(self) -> int:
        """Blocks that a multiprocessor runs at once, as registers and shared memory allow."""
        warps = WARPS_NARROW if self.channels_last and self.student <= NARROW else WARPS_WIDE
        return min(warps // self.warps, MULTIPROCESSOR_SHARED_BYTES // (self.shared_bytes + RESERVED_SHARED_BYTES))


def launches(
    device: Device,
    students: Maps,
    teachers: Maps,
    matrices: Maps,
    biases: Maps,
    weights: Maps = (),
    scale: Tensor | None = None,
) -> Launches:
    """The levels of each kind go together. A student's gradient has its dtype and layout; that of a matrix and of a
    bias is float32.
    """
    pairs = dense_pairs(students, teachers)
    pixel_weights: list[Tensor | None] = [w.float().contiguous() for w in weights]
    pixel_weights = pixel_weights or [None] * len(pairs)
    levels = zip(pairs, matrices, biases, pixel_weights, strict=True)
    problems = [_Problem(*pair, matrix, bias, w) for pair, matrix, bias, w in levels]
    kinds = [_kind(device, problem) for problem in problems]
    losses: list[Tensor] = []
    results: dict[int, _Gradients] = {}
    for kind in dict.fromkeys(kinds):
        places = [i for i, other in enumerate(kinds) if other == kind]
        alike = [problems[i] for i in places]
        loss, gradients = yield from _tiled(device, kind, alike, scale) if kind else _general(device, alike, scale)
        losses.append(loss)
        results.update(zip(places, gradients, strict=True))
    loss = losses[0] if len(losses) == 1 else torch.stack(losses).sum()
    by_kind = zip(*(results[i] for i in range(len(problems))), strict=True)
    return loss, [gradient for gradients in by_kind for gradient in gradients]


def _kind(device: Device, problem: _Problem) -> _Kind | None:
    """The kind of a level; None for levels that are computed in the general way."""
    student = problem.student
    kind = _Kind(student.shape[1], problem.teacher.shape[1], is_channels_last(student))
    fits = student.dtype in (torch.float16, torch.bfloat16) and device.facts.capability >= (8, 0)
    fits = fits and all(c % 8 == 0 and c <= MAX_CHANNELS for c in (kind.student, kind.teacher))
    return kind if fits and kind.shared_bytes <= device.facts.shared_bytes else None


@cache
def source_of(kind: _Kind) -> Source:
    """The build for levels of one kind."""
    return SOURCE.replaced(
        STUDENT_CHANNELS=kind.student,
        TEACHER_CHANNELS=kind.teacher,
        CHANNELS_LAST=int(kind.channels_last),
        BLOCKS_PER_SM=kind.blocks_per_sm,
    )


def _padded(channels: int) -> int:
    return 16 * ceil_div(channels, 16)


def _pitch(columns: int) -> int:
    """`kPitch` of the source."""
    return columns if columns % 64 == 0 else columns + 8


_LevelLaunches = Generator[Launch, None, tuple[Tensor, list[_Gradients]]]
"""Launches for some levels; the return value is their loss and gradients."""


# ---- on tensor cores ----------------------------------------------------------------------------------------------


def _tiled(device: Device, kind: _Kind, problems: Sequence[_Problem], scale: Tensor | None) -> _LevelLaunches:
    problems = [p._replace(matrix=p.matrix.float().contiguous(), bias=p.bias.float().contiguous()) for p in problems]
    gradients = [_Gradients(*map(torch.empty_like, (p.student, p.matrix, p.bias))) for p in problems]
    shapes = [_images(p.student, kind) for p in problems]
    shares = _share(
        [images * ceil_div(pixels, PIXELS) for images, pixels in shapes], MULTIPROCESSORS * kind.blocks_per_sm
    )
    grid, count = sum(shares), kind.teacher * kind.student + kind.teacher
    like = problems[0].matrix
    sums, partials, loss = like.new_empty(grid, count), like.new_empty(grid), like.new_empty(())
    weights = [p.weights for p in problems if p.weights is not None]
    weighed = None
    if weights:
        weighed = general.empty_weight_sums(weights)
        yield general.weight_sums(weights, weighed)
    ticket = device.tickets(1)
    args = Args(
        scale=pointer(scale),
        partials=pointer(partials),
        ticket=pointer(ticket),
        loss=pointer(loss),
        count=len(problems),
    )
    set_blocks(args.levels, shares)
    levels = zip(args.levels, problems, gradients, repeat(None) if weighed is None else weighed, strict=False)
    for level, p, g, w in levels:
        _describe(level, p, g, kind)
        level.weight_partials, level.sums = pointer(w), pointer(sums[level.first_block])
    name = f"adapter_mse{SUFFIX[problems[0].student.dtype]}"
    source = source_of(kind)
    yield Launch(source, name, args, grid, WARP * kind.warps, kind.shared_bytes)
    yield Launch(source, "adapter_sums", args, len(problems) * ceil_div(count, SUM_ENTRIES), SUM_THREADS)
    return loss, gradients


def _images(student: Tensor, kind: _Kind) -> tuple[int, int]:
    """Images, and pixels of each, as the kernel counts them: channels last is one image with all pixels."""
    images, _, height, width = student.shape
    return (1, images * height * width) if kind.channels_last else (images, height * width)


def _share(tiles: Sequence[int], blocks: int) -> list[int]:
    """Blocks of each level: the fewest that do not increase the most tiles that any block processes."""
    shares = share_blocks(tiles, blocks, TILES)
    return [ceil_div(count, ceil_div(count, share)) for count, share in zip(tiles, shares, strict=True)]


def _describe(level: _Level, problem: _Problem, gradients: _Gradients, kind: _Kind) -> None:
    student, teacher, *others = problem
    level.images, level.pixels = _images(student, kind)
    run = student.shape[1] if kind.channels_last else level.pixels
    LevelMaps(student, teacher, gradients.student).describe(level, run)
    level.matrix, level.bias, level.weights = map(pointer, others)
    level.matrix_gradient, level.bias_gradient = map(pointer, gradients[1:])


# ---- the general way ----------------------------------------------------------------------------------------------


def _general(device: Device, problems: Sequence[_Problem], scale: Tensor | None) -> _LevelLaunches:
    adapted = [_apply_adapter(p.matrix, p.student, p.bias) for p in problems]
    teachers = [p.teacher for p in problems]
    weights = [p.weights for p in problems if p.weights is not None]
    loss, gradients = yield from general.launches(device, adapted, teachers, weights, scale)
    return loss, [_backwards(p, g) for p, g in zip(problems, gradients, strict=True)]


def _backwards(problem: _Problem, gradient: Tensor) -> _Gradients:
    """The gradients, from the gradient of the adapted map."""
    by_image = torch.bmm(gradient.flatten(2), problem.student.flatten(2).mT)
    return _Gradients(
        _apply_adapter(problem.matrix.mT, gradient),
        by_image.sum(0, dtype=torch.float32),
        gradient.sum((0, 2, 3), dtype=torch.float32),
    )


def _apply_adapter(matrix: Tensor, maps: Tensor, bias: Tensor | None = None) -> Tensor:
    """Matrix times each pixel's channels, plus bias, in the dtype and layout of the maps (N, C, H, W)."""
    x, matrix, bias = maps.flatten(2), matrix.to(maps.dtype), None if bias is None else bias.to(maps.dtype)
    if is_channels_last(maps):
        y = F.linear(x.mT, matrix, bias).mT  # one product of all pixels, which adds the bias as it stores
    elif bias is None:
        y = torch.bmm(matrix.expand(len(x), *matrix.shape), x)
    else:
        y = torch.baddbmm(bias[:, None], matrix.expand(len(x), *matrix.shape), x)  # the bias is copied to a map first
    return y.unflatten(2, maps.shape[2:])


ADAPTER_MSE = FusedLoss(
    "adapter_mse",
    "Tensor[] students, Tensor[] teachers, Tensor[] matrices, Tensor[] biases, Tensor[] weights",
    function=adapter_mse,
    source=SOURCE,
    launches=launches,
    reference=reference,
    learns=(0, 2, 3),
)
