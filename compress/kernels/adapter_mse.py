"""Host half of cuda/adapter_mse.cu: see there for formula, traffic and tiling.

What the kernel does not take (more than 128 channels, float32, GPUs before sm_80) goes the general way: torch's matrix
products around the kernel of weighted_mse.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import partial
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
    set_blocks,
    share_blocks,
)
from compress.kernels.weighted_mse import weight_sums, weighted_mse
from runtime.errors import UsageError

SOURCE = "adapter_mse.cu"
MAX_CHANNELS = 128
PIXELS = 64
"""Of a tile."""
WARPS = 132 * 8
"""Of one launch, over all levels: 8 a multiprocessor on 132 of them, which 192 registers a thread allow."""
TILES = 4
"""Of a block at least, where there are so many: each block costs a copy of dW in memory, as much as 1 to 3 tiles."""
SUM_THREADS = 256


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
    """What one build of the source serves."""

    student: int
    teacher: int
    channels_last: bool

    @property
    def defines(self) -> tuple[str, ...]:
        return (
            f"STUDENT_CHANNELS={self.student}",
            f"TEACHER_CHANNELS={self.teacher}",
            f"CHANNELS_LAST={int(self.channels_last)}",
        )

    @property
    def warps(self) -> int:
        """Of a block."""
        return _padded(self.teacher) // 16

    @property
    def shared_bytes(self) -> int:
        """The adapter; two tiles of either map; two tiles of weights and the bias in float32. See `Shared` there."""
        into, out = _padded(self.student), _padded(self.teacher)
        tiles = PIXELS * (_pitch(into) + _pitch(out)) if self.channels_last else (into + out) * _pitch(PIXELS)
        return 2 * (out * _pitch(into) + 2 * tiles) + 4 * (2 * PIXELS + out)


def adapter_mse(
    device: Device,
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    matrices: Sequence[Tensor],
    biases: Sequence[Tensor],
    weights: Sequence[Tensor] = (),
    scale: Tensor | None = None,
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    """Loss () float32, and `scale` times its gradients: for each level of the student, in its dtype and layout; of the
    matrix and of the bias, in float32.

    Students are (N, C_student, H, W), teachers (N, C_teacher, H, W), matrices (C_teacher, C_student) and biases
    (C_teacher) of any float dtype; weights (N, H, W) a level, or none at all. `scale` () float32 is the upstream
    gradient to expect; None is 1.
    """
    pairs = dense_pairs(students, teachers, nchw=False)
    maps: list[Tensor | None] = [w.float().contiguous() for w in weights]
    maps = maps or [None] * len(pairs)
    problems = [_problem(*pair, m, b, w) for pair, m, b, w in zip(pairs, matrices, biases, maps, strict=True)]
    kinds = [_kind(device, problem) for problem in problems]
    losses: list[Tensor] = []
    results: dict[int, _Gradients] = {}
    for kind in dict.fromkeys(kinds):
        places = [i for i, other in enumerate(kinds) if other == kind]
        alike = [problems[i] for i in places]
        loss, gradients = _tiled(device, kind, alike, scale) if kind else _general(device, alike, scale)
        losses.append(loss)
        results.update(zip(places, gradients, strict=True))
    loss = losses[0] if len(losses) == 1 else torch.stack(losses).sum()
    ordered = [results[i] for i in range(len(problems))]
    return loss, [g.student for g in ordered], [g.matrix for g in ordered], [g.bias for g in ordered]


def _problem(student: Tensor, teacher: Tensor, matrix: Tensor, bias: Tensor, weights: Tensor | None) -> _Problem:
    channels = (teacher.shape[1], student.shape[1])
    if matrix.shape != channels or bias.shape != channels[:1]:
        shapes = ", ".join(str(tuple(x.shape)) for x in (student, teacher, matrix, bias))
        raise UsageError(
            f"student, teacher, matrix and bias have shapes {shapes}",
            "give (N, S, H, W), (N, T, H, W), (T, S) and (T)",
        )
    return _Problem(student, teacher, matrix, bias, weights)


def _kind(device: Device, problem: _Problem) -> _Kind | None:
    """None for what goes the general way."""
    student = problem.student
    kind = _Kind(student.shape[1], problem.teacher.shape[1], is_channels_last(student))
    fits = student.dtype in (torch.float16, torch.bfloat16) and device.facts.capability >= (8, 0)
    fits = fits and all(c % 8 == 0 and c <= MAX_CHANNELS for c in (kind.student, kind.teacher))
    return kind if fits and kind.shared_bytes <= device.facts.shared_bytes else None


def _padded(channels: int) -> int:
    return 16 * ceil_div(channels, 16)


def _pitch(columns: int) -> int:
    """`kPitch` of the source."""
    return columns if columns % 64 == 0 else columns + 8


# ---- on tensor cores ----------------------------------------------------------------------------------------------


def _tiled(
    device: Device, kind: _Kind, problems: Sequence[_Problem], scale: Tensor | None
) -> tuple[Tensor, list[_Gradients]]:
    problems = [p._replace(matrix=p.matrix.float().contiguous(), bias=p.bias.float().contiguous()) for p in problems]
    gradients = [_Gradients(*map(torch.empty_like, (p.student, p.matrix, p.bias))) for p in problems]
    shapes = [_images(p.student, kind) for p in problems]
    shares = _share([images * ceil_div(pixels, PIXELS) for images, pixels in shapes], WARPS // kind.warps)
    grid, count = sum(shares), kind.teacher * kind.student + kind.teacher
    like = problems[0].matrix
    sums, partials, loss = like.new_empty(grid, count), like.new_empty(grid), like.new_empty(())
    maps = [p.weights for p in problems if p.weights is not None]
    weighed = weight_sums(device, maps) if maps else [None] * len(problems)
    args = Args(
        scale=pointer(scale),
        partials=pointer(partials),
        ticket=pointer(device.tickets(1)),
        loss=pointer(loss),
        count=len(problems),
    )
    set_blocks(args.levels, shares)
    levels = zip(args.levels, problems, gradients, weighed, strict=False)  # fewer than MAX_LEVELS
    for level, p, g, w in levels:
        _fill(level, p, g, kind)
        level.weight_partials, level.sums = pointer(w), pointer(sums[level.first_block])
    launch = partial(device.launch, SOURCE, defines=kind.defines)
    name = f"adapter_mse{SUFFIX[problems[0].student.dtype]}"
    launch(name, args, grid=grid, block=32 * kind.warps, shared=kind.shared_bytes)
    launch("adapter_sums", args, grid=len(problems) * ceil_div(count, SUM_THREADS), block=SUM_THREADS)
    return loss, gradients


def _images(student: Tensor, kind: _Kind) -> tuple[int, int]:
    """Images and pixels of each, as far as pixels of all channels follow one another in memory."""
    images, _, height, width = student.shape
    return (1, images * height * width) if kind.channels_last else (images, height * width)


def _share(tiles: Sequence[int], blocks: int) -> list[int]:
    """Blocks of each level: no more than keep the longest walk as short as it is."""
    shares = share_blocks(tiles, blocks, TILES)
    return [ceil_div(count, ceil_div(count, share)) for count, share in zip(tiles, shares, strict=True)]


def _fill(level: _Level, problem: _Problem, gradients: _Gradients, kind: _Kind) -> None:
    level.student, level.teacher, level.gradient = map(pointer, (*problem[:2], gradients.student))
    level.matrix, level.bias, level.weights = map(pointer, problem[2:])
    level.matrix_gradient, level.bias_gradient = map(pointer, gradients[1:])
    level.images, level.pixels = _images(problem.student, kind)
    run = problem.student.shape[1] if kind.channels_last else level.pixels
    level.vectorised = fits_vectors(run, *problem[:2], gradients.student)


# ---- the general way ----------------------------------------------------------------------------------------------


def _general(device: Device, problems: Sequence[_Problem], scale: Tensor | None) -> tuple[Tensor, list[_Gradients]]:
    adapted = [_times(p.matrix, p.student, p.bias) for p in problems]
    weights = [p.weights for p in problems if p.weights is not None]
    loss, gradients = weighted_mse(device, adapted, [p.teacher for p in problems], weights, scale)
    return loss, [_backwards(p, g) for p, g in zip(problems, gradients, strict=True)]


def _backwards(problem: _Problem, gradient: Tensor) -> _Gradients:
    """From the gradient of the adapted map."""
    by_image = torch.bmm(gradient.flatten(2), problem.student.flatten(2).mT)
    return _Gradients(
        _times(problem.matrix.mT, gradient),
        by_image.sum(0, dtype=torch.float32),
        gradient.sum((0, 2, 3), dtype=torch.float32),
    )


def _times(matrix: Tensor, maps: Tensor, bias: Tensor | None = None) -> Tensor:
    """Matrix times each pixel's channels, plus bias, in the dtype and layout of the maps (N, C, H, W)."""
    last, x = is_channels_last(maps), maps.flatten(2)
    grown = matrix.to(x.dtype).expand(len(x), *matrix.shape)
    pair = (x.mT, grown.mT) if last else (grown, x)
    if bias is None:
        y = torch.bmm(*pair)
    else:
        added = bias.to(x.dtype)
        y = torch.baddbmm(added if last else added[:, None], *pair)
    return (y.mT if last else y).unflatten(2, maps.shape[2:])
